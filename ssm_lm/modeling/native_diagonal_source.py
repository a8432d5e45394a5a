"""The C source of the operators of a chunk of S4D on a CPU; native_library.py compiles it, native_diagonal.py calls it.

The powers of a pole are made one from the other, in float64, where PyTorch takes an exponential, a sine and a cosine
for each: z_0 = 1, z_(t+1) = lambda z_t. All of a channel stays in a core's cache, its N/2 = half poles side by side.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t I;


/* Of a thread: eight rows of `half` numbers, then T + 1 rows of 2 half floats; in doubles */
I diagonal_room(I half, I T) { return 8 * half + (T + 1) * half; }

static void first_power(I half, const double *log_re, const double *log_im, double *re, double *im) {
    for (I m = 0; m < half; m++) {
        const double modulus = exp(log_re[m]);
        re[m] = modulus * cos(log_im[m]);
        im[m] = modulus * sin(log_im[m]);
    }
}
static void next_power(I half, const double *l_re, const double *l_im, double *re, double *im) {
    #pragma omp simd
    for (I m = 0; m < half; m++) {
        const double r = l_re[m] * re[m] - l_im[m] * im[m];
        im[m] = l_re[m] * im[m] + l_im[m] * re[m];
        re[m] = r;
    }
}

/* taps 2 Re(c z_t), emit 2 Re(c z_(t+1) x), inject z_(T-1-t), carry z_T */
static void operators_of(I half, I T, const double *log_re, const double *log_im, const float *c_re, const float *c_im,
                         float *taps, float *emit, float *inject, float *carry, double *room) {
    double *l_re = room, *l_im = l_re + half, *re = l_im + half, *im = re + half;
    float *powers = (float *)(room + 8 * half);
    const I N = 2 * half;
    first_power(half, log_re, log_im, l_re, l_im);
    for (I m = 0; m < half; m++) re[m] = 1, im[m] = 0;
    for (I t = 0; t <= T; t++) {
        float *z = powers + t * N, *row = emit + (t - 1) * N, sum = 0;
        #pragma omp simd
        for (I m = 0; m < half; m++) z[m] = re[m], z[half + m] = im[m];
        if (t < T) {
            #pragma omp simd reduction(+ : sum)
            for (I m = 0; m < half; m++) sum += 2 * (c_re[m] * z[m] - c_im[m] * z[half + m]);
            taps[t] = sum;
        }
        if (t > 0) {
            #pragma omp simd
            for (I m = 0; m < half; m++) {
                row[m] = 2 * (c_re[m] * z[m] - c_im[m] * z[half + m]);
                row[half + m] = -2 * (c_re[m] * z[half + m] + c_im[m] * z[m]);
            }
        }
        next_power(half, l_re, l_im, re, im);
    }
    for (I n = 0; n < N; n++) for (I t = 0; t < T; t++) inject[n * T + T - 1 - t] = powers[t * N + n];
    memcpy(carry, powers + T * N, N * sizeof(float));
}

/* With (p, q) the gradient of z_t: that of log lambda is the sum of t conj(z_t) (p + i q) */
static void gradients_of(I half, I T, const double *log_re, const double *log_im, const float *c_re, const float *c_im,
                         const float *of_taps, const float *of_emit, I emit_row, const float *of_inject, I inject_row,
                         const float *of_carry, double *of_log_re, double *of_log_im, float *of_c_re, float *of_c_im,
                         double *room) {
    double *l_re = room, *l_im = l_re + half, *re = l_im + half, *im = re + half;
    double *d_re = im + half, *d_im = d_re + half; /* the gradient of c */
    float *of_powers = (float *)(room + 8 * half), *nothing = (float *)(d_im + half); /* N zeros: `half` doubles */
    const I N = 2 * half;
    for (I n = 0; n < N; n++) for (I t = 0; t < T; t++) of_powers[t * N + n] = of_inject[n * inject_row + T - 1 - t];
    memcpy(of_powers + T * N, of_carry, N * sizeof(float));
    memset(nothing, 0, N * sizeof(float));
    memset(of_log_re, 0, half * sizeof(double));
    memset(of_log_im, 0, half * sizeof(double));
    memset(d_re, 0, N * sizeof(double));
    first_power(half, log_re, log_im, l_re, l_im);
    for (I m = 0; m < half; m++) re[m] = 1, im[m] = 0;
    for (I t = 0; t <= T; t++) {
        const float *row = t > 0 ? of_emit + (t - 1) * emit_row : nothing, *own = of_powers + t * N;
        const double tap = t < T ? of_taps[t] : 0;
        #pragma omp simd
        for (I m = 0; m < half; m++) {
            const double a = 2 * (tap + row[m]), b = 2 * row[half + m];
            const double p = own[m] + c_re[m] * a - c_im[m] * b, q = own[half + m] - c_im[m] * a - c_re[m] * b;
            d_re[m] += a * re[m] - b * im[m];
            d_im[m] -= a * im[m] + b * re[m];
            of_log_re[m] += t * (re[m] * p + im[m] * q);
            of_log_im[m] += t * (re[m] * q - im[m] * p);
        }
        next_power(half, l_re, l_im, re, im);
    }
    for (I m = 0; m < half; m++) of_c_re[m] = d_re[m], of_c_im[m] = d_im[m];
}

void diagonal_operators(I H, I half, I T, const double *log_re, const double *log_im, const float *c_re,
                        const float *c_im, float *taps, float *emit, float *inject, float *carry, double *room,
                        I threads) {
    const I N = 2 * half, size = diagonal_room(half, T);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I part = 0; part < threads; part++) {
        for (I h = H * part / threads; h < H * (part + 1) / threads; h++) {
            operators_of(half, T, log_re + h * half, log_im + h * half, c_re + h * half, c_im + h * half, taps + h * T,
                         emit + h * T * N, inject + h * N * T, carry + h * N, room + part * size);
        }
    }
}

void diagonal_operators_backward(I H, I half, I T, const double *log_re, const double *log_im, const float *c_re,
                                 const float *c_im, const float *of_taps, const float *of_emit, I emit_head, I emit_row,
                                 const float *of_inject, I inject_head, I inject_row, const float *of_carry,
                                 double *of_log_re, double *of_log_im, float *of_c_re, float *of_c_im, double *room,
                                 I threads) {
    const I N = 2 * half, size = diagonal_room(half, T);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I part = 0; part < threads; part++) {
        for (I h = H * part / threads; h < H * (part + 1) / threads; h++) {
            gradients_of(half, T, log_re + h * half, log_im + h * half, c_re + h * half, c_im + h * half,
                         of_taps + h * T, of_emit + h * emit_head, emit_row, of_inject + h * inject_head, inject_row,
                         of_carry + h * N, of_log_re + h * half, of_log_im + h * half, of_c_re + h * half,
                         of_c_im + h * half, room + part * size);
        }
    }
}
"""
