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

/* bilinear_dplr, rank 1 or 2. w is made twice: for the sums over the states, and for what they are needed for */
void dplr_system(I H, I S, I half, I rank, const float *log_dt, const float *log_re, const float *im, const float *P,
                 const float *B, const float *C, float *E, float *F, float *G, float *B_bar, float *C_row, I threads) {
    const I N = 2 * half;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I h = 0; h < H; h++) {
        const I s = h % S;
        const float *rates = log_re + s * half, *turns = im + s * half, *in = B + s * N, *p[2];
        const double dt = exp(log_dt[h]);
        double capacitance[2][2] = {{1, 0}, {0, 1}}, of_B[2] = {0, 0}, M[2][2];
        for (I r = 0; r < rank; r++) p[r] = P + (r * S + s) * N;
        for (I m = 0; m < half; m++) {
            const Complex w = inverse_of(dt, rates, turns, m), wB = product(w, number(in, half, m));
            for (I r = 0; r < rank; r++) {
                const Complex low = number(p[r], half, m);
                of_B[r] += low.re * wB.re + low.im * wB.im;
                for (I k = 0; k < rank; k++) {
                    const Complex wP = product(w, number(p[k], half, m));
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
        for (I m = 0; m < half; m++) {
            const Complex w = inverse_of(dt, rates, turns, m), wB = product(w, number(in, half, m));
            const I re = h * N + m, imaginary = re + half;
            double b_re = wB.re, b_im = wB.im;
            for (I k = 0; k < rank; k++) {
                double f_re = 0, f_im = 0;
                for (I r = 0; r < rank; r++) {
                    const Complex wP = product(w, number(p[r], half, m));
                    f_re += dt * wP.re * M[r][k], f_im += dt * wP.im * M[r][k];
                }
                b_re -= f_re * of_B[k], b_im -= f_im * of_B[k];
                const Complex g = product(conjugate(w), number(p[k], half, m));
                F[re * rank + k] = 2 * f_re, F[imaginary * rank + k] = 2 * f_im;
                G[re * rank + k] = g.re, G[imaginary * rank + k] = g.im;
            }
            E[re] = 2 * w.re - 1, E[imaginary] = 2 * w.im;
            B_bar[re] = dt * b_re, B_bar[imaginary] = dt * b_im;
            C_row[re] = 2 * C[re], C_row[imaginary] = -2 * C[imaginary];
        }
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
