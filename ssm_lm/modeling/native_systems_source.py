"""The C source of S4's and S4D's discretisation on a CPU; native_library.py compiles it, native_systems.py calls it.

In float64, and rounded once at the end. A channel h takes system h mod S.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>

typedef int64_t I;

typedef struct { double re, im; } Complex;

static inline Complex product(Complex a, Complex b) {
    return (Complex){a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
static inline Complex conjugate(Complex a) { return (Complex){a.re, -a.im}; }
static inline Complex number(const float *real_form, I half, I m) {
    return (Complex){real_form[m], real_form[half + m]};
}
/* 1 / (1 - dt Lambda / 2) */
static inline Complex inverse_of(double dt, const float *log_re, const float *im, I m) {
    const double a = 1 + dt * exp(log_re[m]) / 2, b = dt * im[m] / 2, scale = 1 / (a * a + b * b);
    return (Complex){a * scale, b * scale};
}

/* of bilinear_dplr, system s with a channel's dt, rank 1 or 2: M, and what P makes of w B */
static inline void low_rank(I S, I half, I rank, I s, double dt, const float *log_re, const float *im, const float *P,
                            const float *B, double M[2][2], double of_B[2]) {
    const I N = 2 * half;
    double capacitance[2][2] = {{1, 0}, {0, 1}};
    of_B[0] = of_B[1] = 0;
    for (I m = 0; m < half; m++) {
        const Complex w = inverse_of(dt, log_re + s * half, im + s * half, m);
        const Complex wB = product(w, number(B + s * N, half, m));
        for (I r = 0; r < rank; r++) {
            const Complex low = number(P + (r * S + s) * N, half, m);
            of_B[r] += low.re * wB.re + low.im * wB.im;
            for (I k = 0; k < rank; k++) {
                const Complex wP = product(w, number(P + (k * S + s) * N, half, m));
                capacitance[r][k] += dt * (low.re * wP.re + low.im * wP.im);
            }
        }
    }
    if (rank == 1) M[0][0] = 1 / capacitance[0][0];
    else {
        const double scale = 1 / (capacitance[0][0] * capacitance[1][1] - capacitance[0][1] * capacitance[1][0]);
        M[0][0] = scale * capacitance[1][1], M[0][1] = -scale * capacitance[0][1];
        M[1][0] = -scale * capacitance[1][0], M[1][1] = scale * capacitance[0][0];
    }
}

/* bilinear_dplr, rank 1 or 2. w is made twice: for the sums over the states, and for what they are needed for */
void dplr_system(I H, I S, I half, I rank, const float *log_dt, const float *log_re, const float *im, const float *P,
                 const float *B, const float *C, float *E, float *F, float *G, float *B_bar, float *C_row, I threads) {
    const I N = 2 * half;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I h = 0; h < H; h++) {
        const I s = h % S;
        const double dt = exp(log_dt[h]);
        double of_B[2], M[2][2];
        low_rank(S, half, rank, s, dt, log_re, im, P, B, M, of_B);
        for (I m = 0; m < half; m++) {
            const Complex w = inverse_of(dt, log_re + s * half, im + s * half, m);
            const Complex wB = product(w, number(B + s * N, half, m));
            const I re = h * N + m, imaginary = re + half;
            double b_re = wB.re, b_im = wB.im;
            for (I k = 0; k < rank; k++) {
                double f_re = 0, f_im = 0;
                for (I r = 0; r < rank; r++) {
                    const Complex wP = product(w, number(P + (r * S + s) * N, half, m));
                    f_re += dt * wP.re * M[r][k], f_im += dt * wP.im * M[r][k];
                }
                b_re -= f_re * of_B[k], b_im -= f_im * of_B[k];
                const Complex g = product(conjugate(w), number(P + (k * S + s) * N, half, m));
                F[re * rank + k] = 2 * f_re, F[imaginary * rank + k] = 2 * f_im;
                G[re * rank + k] = g.re, G[imaginary * rank + k] = g.im;
            }
            E[re] = 2 * w.re - 1, E[imaginary] = 2 * w.im;
            B_bar[re] = dt * b_re, B_bar[imaginary] = dt * b_im;
            C_row[re] = 2 * C[re], C_row[imaginary] = -2 * C[imaginary];
        }
    }
}

/* The gradient of one number of f in the equations below, vector k, state m, by those of a channel's F and B_bar */
static inline Complex through_f(const float *of_F, const float *of_B_bar, I half, I rank, I m, I k, double dt,
                                const double *of_B) {
    const I at = m * rank + k;
    return (Complex){2 * of_F[at] - dt * of_B[k] * of_B_bar[m],
                     2 * of_F[at + half * rank] - dt * of_B[k] * of_B_bar[half + m]};
}

/* The gradients of bilinear_dplr. That of a complex z has those of its parts, of_z = d/d re + i d/d im: with c = a b,
   of_a = conj(b) of_c; with a sum of re(conj(a) b), whose gradient is g, of_a = g b and of_b = g a. What it goes
   through is f = F / 2 = dt wP M and B_bar = dt (wB - f of_B), with of_B = P^T wB and M the inverse of 1 + dt P^T wP.
   Those of what channels share come apart: of_log_re, of_im (H, half), of_P (rank, H, N), of_in (H, N) */
void dplr_system_backward(I H, I S, I half, I rank, const float *log_dt, const float *log_re, const float *im,
                          const float *P, const float *B, const float *of_E, const float *of_F, const float *of_G,
                          const float *of_B_bar, const float *of_C_row, float *of_log_dt, float *of_log_re,
                          float *of_im, float *of_P, float *of_in, float *of_C, I threads) {
    const I N = 2 * half;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I h = 0; h < H; h++) {
        const I s = h % S;
        const double dt = exp(log_dt[h]);
        double of_B[2], M[2][2], g_of_B[2] = {0, 0}, g_M[2][2] = {{0, 0}, {0, 0}}, g_cap[2][2], g_dt = 0;
        low_rank(S, half, rank, s, dt, log_re, im, P, B, M, of_B);
        for (I m = 0; m < half; m++) {
            const Complex w = inverse_of(dt, log_re + s * half, im + s * half, m);
            const Complex g_b = number(of_B_bar + h * N, half, m);
            for (I k = 0; k < rank; k++) {
                const Complex g_f = through_f(of_F + h * N * rank, of_B_bar + h * N, half, rank, m, k, dt, of_B);
                for (I r = 0; r < rank; r++) {
                    const Complex wP = product(w, number(P + (r * S + s) * N, half, m));
                    g_M[r][k] += dt * (wP.re * g_f.re + wP.im * g_f.im);
                    g_of_B[k] -= dt * dt * M[r][k] * (wP.re * g_b.re + wP.im * g_b.im);
                }
            }
        }
        /* of the inverse of M: -M^T of_M M^T */
        for (I r = 0; r < rank; r++) {
            for (I k = 0; k < rank; k++) {
                g_cap[r][k] = 0;
                for (I i = 0; i < rank; i++) for (I j = 0; j < rank; j++) g_cap[r][k] -= M[i][r] * g_M[i][j] * M[k][j];
            }
        }
        for (I m = 0; m < half; m++) {
            const Complex w = inverse_of(dt, log_re + s * half, im + s * half, m), b = number(B + s * N, half, m);
            const Complex wB = product(w, b), g_b = number(of_B_bar + h * N, half, m);
            Complex g_wB = {dt * g_b.re, dt * g_b.im}, g_w = {2 * of_E[h * N + m], 2 * of_E[h * N + half + m]};
            g_dt += wB.re * g_b.re + wB.im * g_b.im;
            for (I r = 0; r < rank; r++) {
                const Complex low = number(P + (r * S + s) * N, half, m), wP = product(w, low);
                const I at = (h * N + m) * rank + r;
                const Complex g_G = {of_G[at], of_G[at + half * rank]};
                g_wB.re += g_of_B[r] * low.re, g_wB.im += g_of_B[r] * low.im;
                Complex g_P = product(w, g_G), g_wP = {0, 0};
                g_P.re += g_of_B[r] * wB.re, g_P.im += g_of_B[r] * wB.im;
                for (I k = 0; k < rank; k++) {
                    const Complex other = number(P + (k * S + s) * N, half, m), w_other = product(w, other);
                    const Complex g_f = through_f(of_F + h * N * rank, of_B_bar + h * N, half, rank, m, k, dt, of_B);
                    g_wP.re += dt * (M[r][k] * g_f.re + g_cap[k][r] * other.re);
                    g_wP.im += dt * (M[r][k] * g_f.im + g_cap[k][r] * other.im);
                    g_P.re += dt * g_cap[r][k] * w_other.re, g_P.im += dt * g_cap[r][k] * w_other.im;
                    /* dt stands before f, before B_bar, in which f is, and before P^T wP */
                    g_dt += M[r][k] * (wP.re * g_f.re + wP.im * g_f.im);
                    g_dt -= dt * M[r][k] * of_B[k] * (wP.re * g_b.re + wP.im * g_b.im);
                    g_dt += g_cap[r][k] * (low.re * w_other.re + low.im * w_other.im);
                }
                const Complex back = product(conjugate(w), g_wP), first = product(conjugate(low), g_wP);
                const Complex second = product(low, conjugate(g_G));
                float *to = of_P + (r * H + h) * N + m;
                to[0] = g_P.re + back.re, to[half] = g_P.im + back.im;
                g_w.re += first.re + second.re, g_w.im += first.im + second.im;
            }
            const Complex g_in = product(conjugate(w), g_wB), last = product(conjugate(b), g_wB);
            of_in[h * N + m] = g_in.re, of_in[h * N + half + m] = g_in.im;
            g_w.re += last.re, g_w.im += last.im;
            /* w = 1 / (1 - dt Lambda / 2): of Lambda dt / 2 conj(w^2) of_w, of dt re(conj(Lambda / 2 w^2) of_w) */
            const Complex Lambda = {-exp(log_re[s * half + m]), im[s * half + m]};
            const Complex turned = product(conjugate(product(w, w)), g_w);
            g_dt += (Lambda.re * turned.re + Lambda.im * turned.im) / 2;
            of_log_re[h * half + m] = dt / 2 * turned.re * Lambda.re;
            of_im[h * half + m] = dt / 2 * turned.im;
            of_C[h * N + m] = 2 * of_C_row[h * N + m], of_C[h * N + half + m] = -2 * of_C_row[h * N + half + m];
        }
        of_log_dt[h] = dt * g_dt;
    }
}

/* The same system but for E and C_row as step_dplr_shared of native_steps_source.py reads it: with w = (E + 1) / 2
       F = w P mix 4,  B_bar = w (dt B - P of_u 2)
   numbers (H, 1 + rank + rank^2): dt / 2, then of_u = dt mix P^T w B, then mix = dt / 2 M */
void dplr_numbers(I H, I S, I half, I rank, const float *log_dt, const float *log_re, const float *im, const float *P,
                  const float *B, float *numbers, I threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I h = 0; h < H; h++) {
        float *to = numbers + h * (1 + rank + rank * rank);
        const double dt = exp(log_dt[h]);
        double of_B[2], M[2][2];
        low_rank(S, half, rank, h % S, dt, log_re, im, P, B, M, of_B);
        *to++ = dt / 2;
        for (I r = 0; r < rank; r++, to++) {
            double sum = 0;
            for (I k = 0; k < rank; k++) sum += M[r][k] * of_B[k];
            *to = dt * dt / 2 * sum;
        }
        for (I r = 0; r < rank; r++) for (I k = 0; k < rank; k++) *to++ = dt / 2 * M[r][k];
    }
}

/* diagonal_system by zero-order hold, and what a step reads of it: log_re, log_im, CB_re, CB_im (H, half), Lambda_bar
   and row (H, N). With s = sin(b / 2) and c = cos(b / 2): sin b = 2 s c, cos b - 1 = -2 s^2 */
void diagonal_system(I H, I S, I half, const float *log_dt, const float *rates, const float *turns, const float *B,
                     const float *C, double *log_re, double *log_im, float *CB_re, float *CB_im, float *Lambda_bar,
                     float *row, I threads) {
    const I N = 2 * half;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I h = 0; h < H; h++) {
        const I s = h % S;
        const double dt = exp(log_dt[h]);
        for (I m = 0; m < half; m++) {
            const Complex Lambda = {-exp(rates[s * half + m]), turns[s * half + m]};
            const double a = dt * Lambda.re, b = dt * Lambda.im, less_one = expm1(a), sine = sin(b / 2);
            const double modulus = less_one + 1, cos_less_one = -2 * sine * sine, sin_b = 2 * sine * cos(b / 2);
            const Complex power = {modulus * (1 + cos_less_one), modulus * sin_b};
            const double scale = 1 / (Lambda.re * Lambda.re + Lambda.im * Lambda.im);
            const Complex drive = {less_one * (1 + cos_less_one) + cos_less_one, power.im};
            const Complex divided = product(drive, (Complex){Lambda.re * scale, -Lambda.im * scale});
            const Complex CB = product(number(C + h * N, half, m), product(divided, number(B + s * N, half, m)));
            const I k = h * half + m, re = h * N + m;
            log_re[k] = a, log_im[k] = b;
            CB_re[k] = CB.re, CB_im[k] = CB.im;
            Lambda_bar[re] = power.re, Lambda_bar[re + half] = power.im;
            row[re] = 2 * CB_re[k], row[re + half] = -2 * CB_im[k];
        }
    }
}
"""
