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
