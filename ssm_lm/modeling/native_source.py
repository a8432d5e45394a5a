"""The C source of the decoding step on a CPU; native_library.py compiles it, native_step.py calls it.

Every function is one operation on few tokens, in float32, and stands for the PyTorch code named beside it, which is its
twin in the tests. Weights may be bfloat16 (`half` = 1): a float's upper half.

`run` is a whole step: all threads go through the same list of calls together, and share the loops that are marked
`omp for`, at whose end they wait for one another.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t I;

static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline float at(const void *p, I i, I half) {
    return half ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* y = W x + bias: x (B, in), W (out, in), y (B, out). Of few rows bound by the reading of W; four of them share it. */
#define LINEAR(NAME, TYPE, LOAD)                                                                    \
    static void NAME(I B, I out, I in, const float *x, const TYPE *W, const void *bias, I half,     \
                     float *y) {                                                                    \
        _Pragma("omp for schedule(static)")                                                         \
        for (I o = 0; o < out; o++) {                                                               \
            const TYPE *w = W + o * in;                                                             \
            const float plus = bias ? at(bias, o, half) : 0;                                        \
            I b = 0;                                                                                \
            for (; b + 4 <= B; b += 4) {                                                            \
                const float *x0 = x + b * in, *x1 = x0 + in, *x2 = x1 + in, *x3 = x2 + in;          \
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                               \
                _Pragma("omp simd reduction(+ : s0, s1, s2, s3)")                                   \
                for (I i = 0; i < in; i++) {                                                        \
                    float v = LOAD(w[i]);                                                           \
                    s0 += v * x0[i]; s1 += v * x1[i]; s2 += v * x2[i]; s3 += v * x3[i];             \
                }                                                                                   \
                y[b * out + o] = s0 + plus; y[(b + 1) * out + o] = s1 + plus;                       \
                y[(b + 2) * out + o] = s2 + plus; y[(b + 3) * out + o] = s3 + plus;                 \
            }                                                                                       \
            for (; b < B; b++) {                                                                    \
                const float *x0 = x + b * in;                                                       \
                float s0 = 0;                                                                       \
                _Pragma("omp simd reduction(+ : s0)")                                               \
                for (I i = 0; i < in; i++) s0 += LOAD(w[i]) * x0[i];                                \
                y[b * out + o] = s0 + plus;                                                         \
            }                                                                                       \
        }                                                                                           \
    }
#define SAME(x) (x)
LINEAR(linear_float, float, SAME)
LINEAR(linear_half, uint16_t, widen)

#define BLOCK 64 /* rows of x that stay near while a row of W meets them */
static void linear(I B, I out, I in, const float *x, const void *W, const void *bias, I half, float *y) {
    for (I b = 0; b < B; b += BLOCK) {
        const I rows = B - b < BLOCK ? B - b : BLOCK;
        if (half) linear_half(rows, out, in, x + b * in, W, bias, half, y + b * out);
        else linear_float(rows, out, in, x + b * in, W, bias, half, y + b * out);
    }
}
/* Whether PyTorch's products of bfloat16 may be faster: the processor multiplies it; or this was built for no processor
   in particular, or for one thread */
I multiplies_half(void) {
#if defined(__AVX512BF16__) || defined(__AMX_BF16__) || defined(__ARM_FEATURE_BF16)
    return 1;
#elif !defined(_OPENMP) || (defined(__x86_64__) && !defined(__AVX2__))
    return 1;
#else
    return 0;
#endif
}

static void norm_row(I H, const float *x, const void *weight, const void *bias, I half, float eps, I layer, float *y) {
    float mean = 0, square = 0;
    if (layer) {
        #pragma omp simd reduction(+ : mean)
        for (I i = 0; i < H; i++) mean += x[i];
        mean /= H;
    }
    #pragma omp simd reduction(+ : square)
    for (I i = 0; i < H; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1 / sqrtf(square / H + eps);
    for (I i = 0; i < H; i++) {
        y[i] = (x[i] - mean) * scale * (weight ? at(weight, i, half) : 1) + (bias ? at(bias, i, half) : 0);
    }
}

/* nn.Embedding: h (B, H), the rows of table (V, H) that tokens (B), each below V, name */
static void embed(I B, I H, const I *tokens, const void *table, I half, float *h) {
    #pragma omp for schedule(static)
    for (I b = 0; b < B; b++) {
        for (I i = 0; i < H; i++) h[b * H + i] = at(table, tokens[b] * H + i, half);
    }
}

/* x.to(bfloat16).to(float32), n numbers: to the nearest, of two to the even one */
static void round_half(I n, float *x) {
    #pragma omp for schedule(static)
    for (I i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits = x[i] == x[i] ? (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000 : 0x7fc00000;
        memcpy(x + i, &bits, 4);
    }
}

/* nn.LayerNorm where layer is 1, else nn.RMSNorm: x, y (B, H) */
static void norm(I B, I H, const float *x, const void *weight, const void *bias, I half, float eps, I layer, float *y) {
    #pragma omp for schedule(static)
    for (I b = 0; b < B; b++) norm_row(H, x + b * H, weight, bias, half, eps, layer, y + b * H);
}

/* In all steps T tokens of B rows follow one another: u and y are (B, T, channels), the state (B, ...) of a row goes
   from the one before to the one after them. */

/* DiscreteDiagonal.step: state = Lambda_bar state + u, y = row . state + D u. u, y (B, T, H); state (B, H, N) */
static void step_diagonal(I B, I T, I H, I N, const float *u, float *state, const float *Lambda, const float *row,
                          const float *D, float *y) {
    const I half = N / 2;
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) {
        for (I h = 0; h < H; h++) {
            float *re = state + (b * H + h) * N, *im = re + half;
            const float *l_re = Lambda + h * N, *l_im = l_re + half, *c_re = row + h * N, *c_im = c_re + half;
            for (I t = 0; t < T; t++) {
                const float v = u[(b * T + t) * H + h];
                float sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (I n = 0; n < half; n++) {
                    const float r = l_re[n] * re[n] - l_im[n] * im[n] + v, i = l_re[n] * im[n] + l_im[n] * re[n];
                    re[n] = r;
                    im[n] = i;
                    sum += c_re[n] * r + c_im[n] * i;
                }
                y[(b * T + t) * H + h] = sum + D[h] * v;
            }
        }
    }
}

/* DiscreteDPLR.step: state = R(E) state - F G^T state + B_bar u, y = C_row . state + D u. F, G (H, rank, N),
   rank <= 4 */
static void step_dplr(I B, I T, I H, I N, I rank, const float *u, float *state, const float *E, const float *F,
                      const float *G, const float *B_bar, const float *C_row, const float *D, float *y) {
    const I half = N / 2;
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) {
        for (I h = 0; h < H; h++) {
            float *re = state + (b * H + h) * N, *im = re + half;
            const float *e_re = E + h * N, *e_im = e_re + half, *in = B_bar + h * N, *c = C_row + h * N;
            for (I t = 0; t < T; t++) {
                const float v = u[(b * T + t) * H + h];
                float low[4] = {0, 0, 0, 0}, sum = 0;
                for (I r = 0; r < rank; r++) {
                    const float *g = G + (h * rank + r) * N;
                    float s = 0;
                    #pragma omp simd reduction(+ : s)
                    for (I n = 0; n < N; n++) s += g[n] * re[n];
                    low[r] = s;
                }
                #pragma omp simd
                for (I n = 0; n < half; n++) {
                    const float r = e_re[n] * re[n] - e_im[n] * im[n], i = e_re[n] * im[n] + e_im[n] * re[n];
                    re[n] = r + in[n] * v;
                    im[n] = i + in[half + n] * v;
                }
                for (I r = 0; r < rank; r++) {
                    const float *f = F + (h * rank + r) * N, s = low[r];
                    #pragma omp simd
                    for (I n = 0; n < N; n++) re[n] -= f[n] * s;
                }
                #pragma omp simd reduction(+ : sum)
                for (I n = 0; n < N; n++) sum += c[n] * re[n];
                y[(b * T + t) * H + h] = sum + D[h] * v;
            }
        }
    }
}

/* step_dplr of one row and rank 1 or 2, made of what S systems of channels share: P (rank, S, N), B_of (S, N). With
       z = B dt / 2 u - P (mix P^T (state + R(E) state) + of_u u)      state = R(E) (state + z) + z
   a channel's F, G and B_bar, three of the five vectors that it reads, come down to numbers (H, 1 + rank + rank^2):
   dt / 2, of_u, mix; see dplr_numbers */
static inline void shared_steps(const int rank, I T, I H, I N, const float *u, float *re, const float *e,
                                const float *p, const float *q, const float *in, const float *numbers, const float *c,
                                float d, float *y) {
    const I half = N / 2;
    const float *of_u = numbers + 1, *mix = of_u + rank;
    float *im = re + half;
    for (I t = 0; t < T; t++) {
        const float v = u[t * H], drive = numbers[0] * v;
        float first = 0, second = 0, sum = 0;
        #pragma omp simd reduction(+ : first, second)
        for (I n = 0; n < half; n++) {
            const float s_re = re[n] + e[n] * re[n] - e[half + n] * im[n];
            const float s_im = im[n] + e[n] * im[n] + e[half + n] * re[n];
            first += p[n] * s_re + p[half + n] * s_im;
            if (rank == 2) second += q[n] * s_re + q[half + n] * s_im;
        }
        const float low = mix[0] * first + (rank == 2 ? mix[1] * second : 0) + of_u[0] * v;
        const float other = rank == 2 ? mix[2] * first + mix[3] * second + of_u[1] * v : 0;
        #pragma omp simd reduction(+ : sum)
        for (I n = 0; n < half; n++) {
            float z_re = drive * in[n] - low * p[n], z_im = drive * in[half + n] - low * p[half + n];
            if (rank == 2) z_re -= other * q[n], z_im -= other * q[half + n];
            const float s_re = re[n] + z_re, s_im = im[n] + z_im;
            re[n] = z_re + e[n] * s_re - e[half + n] * s_im;
            im[n] = z_im + e[n] * s_im + e[half + n] * s_re;
            sum += c[n] * re[n] + c[half + n] * im[n];
        }
        y[t * H] = sum + d * v;
    }
}
static void step_dplr_shared(I S, I T, I H, I N, I rank, const float *u, float *state, const float *E, const float *P,
                             const float *B_of, const float *numbers, const float *C_row, const float *D, float *y) {
    #pragma omp for schedule(static)
    for (I h = 0; h < H; h++) {
        const float *e = E + h * N, *p = P + h % S * N, *q = p + S * N, *in = B_of + h % S * N, *c = C_row + h * N;
        const float *of = numbers + h * (1 + rank + rank * rank);
        if (rank == 1) shared_steps(1, T, H, N, u + h, state + h * N, e, p, p, in, of, c, D[h], y + h);
        else shared_steps(2, T, H, N, u + h, state + h * N, e, p, q, in, of, c, D[h], y + h);
    }
}

/* DiscreteMIMO.step between its two products: states (B, T, P), the state after every token, takes the place of what
   drives it: state = Lambda_bar state + states */
static void step_states(I B, I T, I P, float *states, float *state, const float *Lambda) {
    const I half = P / 2;
    #pragma omp for schedule(static)
    for (I b = 0; b < B; b++) {
        float *now = state + b * P;
        for (I t = 0; t < T; t++) {
            float *y = states + (b * T + t) * P;
            #pragma omp simd
            for (I n = 0; n < half; n++) {
                const float re = now[n], im = now[half + n];
                now[n] = y[n] += Lambda[n] * re - Lambda[half + n] * im;
                now[half + n] = y[half + n] += Lambda[n] * im + Lambda[half + n] * re;
            }
        }
    }
}

/* DiscreteSSD.step, D v included: x (B, T, H + 2 N (+ E)), y (B, T, H), H = E P. scale, bias (2, N) of b and c; bc
   room for (B, T, 2 N). Lambda_bar (E, N), dt (E); or, where inverse, softplus^-1(dt) (E), is no NULL, every token has
   a step of its own, the rates are decay (E) and omega (E, N / 2), and room is for (B, E, N) */
static void step_ssd(I B, I T, I E, I P, I N, const float *x, float *state, const float *Lambda_bar, const double *dt,
                     const double *decay, const double *omega, const double *inverse, const float *scale,
                     const float *bias, float eps, const float *D, float *bc, float *room, float *y) {
    const I H = E * P, half = N / 2, width = H + 2 * N + (inverse ? E : 0);
    #pragma omp for schedule(static) collapse(2)
    for (I r = 0; r < B * T; r++) {
        for (I part = 0; part < 2; part++) {
            const float *from = x + r * width + H + part * N;
            norm_row(N, from, scale + part * N, bias + part * N, 0, eps, 0, bc + (2 * r + part) * N);
        }
    }
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) {
        for (I e = 0; e < E; e++) {
            for (I t = 0; t < T; t++) {
                const float *token = x + (b * T + t) * width, *in = bc + 2 * (b * T + t) * N, *out = in + N;
                const float *Lambda = Lambda_bar + e * N;
                double step = dt[e];
                if (inverse) {
                    float *own = room + (b * E + e) * N;
                    const double raw = token[H + 2 * N + e] + inverse[e];
                    step = raw > 20 ? raw : log1p(exp(raw));
                    for (I n = 0; n < half; n++) {
                        const double size = exp(-step * decay[e]), angle = step * omega[e * half + n];
                        own[n] = size * cos(angle);
                        own[half + n] = size * sin(angle);
                    }
                    Lambda = own;
                }
                for (I h = e * P; h < (e + 1) * P; h++) {
                    float *re = state + (b * H + h) * N, *im = re + half, sum = 0;
                    const float v = token[h], drive = v * (float)step;
                    #pragma omp simd reduction(+ : sum)
                    for (I n = 0; n < half; n++) {
                        const float r = Lambda[n] * re[n] - Lambda[half + n] * im[n] + drive * in[n];
                        const float i = Lambda[n] * im[n] + Lambda[half + n] * re[n] + drive * in[half + n];
                        re[n] = r;
                        im[n] = i;
                        sum += out[n] * r + out[half + n] * i;
                    }
                    y[(b * T + t) * H + h] = sum + D[h] * v;
                }
            }
        }
    }
}

/* ShortConvolution, then f, 0 identity, 2 silu: u, y (B, T, C) in rows that lie u_apart, y_apart; tail (B, K - 1, C) */
static void convolve(I f, I B, I T, I C, I K, const float *u, I u_apart, float *tail, const void *weight,
                     const void *bias, I half, float *y, I y_apart) {
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) {
        for (I c = 0; c < C; c++) {
            float *past = tail + b * (K - 1) * C + c;
            for (I t = 0; t < T; t++) {
                const float v = u[(b * T + t) * u_apart + c];
                float sum = at(bias, c, half) + at(weight, c * K + K - 1, half) * v;
                for (I j = 0; j + 1 < K; j++) {
                    sum += at(weight, c * K + j, half) * past[j * C];
                    past[j * C] = j + 2 < K ? past[(j + 1) * C] : v;
                }
                y[(b * T + t) * y_apart + c] = f == 2 ? sum / (1 + expf(-sum)) : sum;
            }
        }
    }
}

/* y = f(a) b for `rows` rows of `width` numbers, which lie a_apart, b_apart and y_apart; f: 0 identity, 2 silu */
static void multiply(I f, I rows, I width, const float *a, I a_apart, const float *b, I b_apart, float *y, I y_apart) {
    #pragma omp for schedule(static) collapse(2)
    for (I r = 0; r < rows; r++) {
        for (I i = 0; i < width; i++) {
            const float v = a[r * a_apart + i];
            y[r * y_apart + i] = (f == 2 ? v / (1 + expf(-v)) : v) * b[r * b_apart + i];
        }
    }
}

/* y += D x: x, y (B, H) */
static void add_skip(I B, I H, const float *x, const float *D, float *y) {
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) for (I h = 0; h < H; h++) y[b * H + h] += D[h] * x[b * H + h];
}

/* the activations of activations.py (0 identity, 1 gelu, 2 silu): n numbers, y may be x */
static void activate(I kind, I n, const float *x, float *y) {
    #pragma omp for schedule(static)
    for (I i = 0; i < n; i++) {
        const float v = x[i];
        switch (kind) {
            case 1: y[i] = 0.5f * v * (1 + erff(v * 0.70710678118654752f)); break;
            case 2: y[i] = v / (1 + expf(-v)); break;
            default: y[i] = v;
        }
    }
}

/* the residual h (B, H) after a sublayer. mode 0: h += p; 1, "glu": h += p[:H] sigmoid(p[H:]), p (B, 2H);
   2, "half": h += y sigmoid(p) */
static void add_gated(I mode, I B, I H, const float *p, const float *y, float *h) {
    const I width = mode == 1 ? 2 * H : H;
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) {
        for (I i = 0; i < H; i++) {
            const float v = p[b * width + i];
            if (mode == 0) h[b * H + i] += v;
            else if (mode == 1) h[b * H + i] += v / (1 + expf(-p[b * width + H + i]));
            else h[b * H + i] += y[b * H + i] / (1 + expf(-v));
        }
    }
}

/* mixers.masked: x (B, H) *= by (B) */
static void mask(I B, I H, float *x, const float *by) {
    #pragma omp for schedule(static)
    for (I b = 0; b < B; b++) for (I i = 0; i < H; i++) x[b * H + i] *= by[b];
}

/* What Python can put into the list of a step: each of these takes its arguments from a row of A. */

typedef union { I i; float f; void *p; } A;
typedef struct { void (*function)(const A *); const A *arguments; } Call;

void call_linear(const A *a) { linear(a[0].i, a[1].i, a[2].i, a[3].p, a[4].p, a[5].p, a[6].i, a[7].p); }
void call_embed(const A *a) { embed(a[0].i, a[1].i, a[2].p, a[3].p, a[4].i, a[5].p); }
void call_round_half(const A *a) { round_half(a[0].i, a[1].p); }
void call_norm(const A *a) { norm(a[0].i, a[1].i, a[2].p, a[3].p, a[4].p, a[5].i, a[6].f, a[7].i, a[8].p); }
void call_step_diagonal(const A *a) {
    step_diagonal(a[0].i, a[1].i, a[2].i, a[3].i, a[4].p, a[5].p, a[6].p, a[7].p, a[8].p, a[9].p);
}
void call_step_dplr(const A *a) {
    step_dplr(a[0].i, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p, a[9].p, a[10].p, a[11].p,
              a[12].p, a[13].p);
}
void call_step_dplr_shared(const A *a) {
    step_dplr_shared(a[0].i, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p, a[9].p, a[10].p, a[11].p,
                     a[12].p, a[13].p);
}
void call_step_states(const A *a) { step_states(a[0].i, a[1].i, a[2].i, a[3].p, a[4].p, a[5].p); }
void call_step_ssd(const A *a) {
    step_ssd(a[0].i, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p, a[9].p, a[10].p, a[11].p, a[12].p,
             a[13].p, a[14].f, a[15].p, a[16].p, a[17].p, a[18].p);
}
void call_convolve(const A *a) {
    convolve(a[0].i, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].i, a[7].p, a[8].p, a[9].p, a[10].i, a[11].p, a[12].i);
}
void call_multiply(const A *a) {
    multiply(a[0].i, a[1].i, a[2].i, a[3].p, a[4].i, a[5].p, a[6].i, a[7].p, a[8].i);
}
void call_add_skip(const A *a) { add_skip(a[0].i, a[1].i, a[2].p, a[3].p, a[4].p); }
void call_mask(const A *a) { mask(a[0].i, a[1].i, a[2].p, a[3].p); }
void call_activate(const A *a) { activate(a[0].i, a[1].i, a[2].p, a[3].p); }
void call_add_gated(const A *a) { add_gated(a[0].i, a[1].i, a[2].i, a[3].p, a[4].p, a[5].p); }

void run(I n, const Call *calls, I threads) {
    #pragma omp parallel num_threads(threads)
    for (I k = 0; k < n; k++) calls[k].function(calls[k].arguments);
}

/* torch.argmax of V numbers: the first of the largest, or the first that is no number */
static I largest(I V, const float *x) {
    float most = -INFINITY;
    int strange = 0;
    #pragma omp simd reduction(max : most) reduction(| : strange)
    for (I i = 0; i < V; i++) {
        most = x[i] > most ? x[i] : most;
        strange |= x[i] != x[i];
    }
    for (I i = 0; i < V; i++) if (strange ? x[i] != x[i] : x[i] == most) return i;
    return 0;
}

/* Greedy search until there are `limit` tokens, of which there are at[0], or until all rows have ended, which
   at[1] = 0 says: the calls, from ids (B) to logits (B, V), and of each row the likeliest token, into ids and
   chosen (2, room, B), once for who listens. A token in ends ends a row, which then gets `fill`; none is among the
   first `least` tokens. unfinished (B): 1, or 0 for a row that has ended. */
void search(I n, const Call *calls, I threads, I limit, I *at, I B, I V, float *logits, I *ids, I room, I *chosen,
            I n_ends, const I *ends, I least, I fill, I *unfinished) {
    #pragma omp parallel num_threads(threads)
    while (at[0] < limit && at[1]) {
        for (I k = 0; k < n; k++) calls[k].function(calls[k].arguments);
        #pragma omp for schedule(static)
        for (I b = 0; b < B; b++) {
            float *row = logits + b * V;
            for (I e = 0; e < n_ends && at[0] < least; e++) {
                if (0 <= ends[e] && ends[e] < V) row[ends[e]] = -INFINITY;
            }
            const I token = unfinished[b] ? largest(V, row) : fill;
            for (I e = 0; e < n_ends; e++) unfinished[b] &= token != ends[e];
            ids[b] = chosen[at[0] * B + b] = chosen[(room + at[0]) * B + b] = token;
        }
        #pragma omp single
        {
            I left = 0;
            for (I b = 0; b < B; b++) left |= unfinished[b];
            at[0]++;
            at[1] = left;
        }
    }
}

/* linear with nothing before or after it */
void product(I B, I out, I in, const float *x, const void *W, const void *bias, I half, float *y, I threads) {
    #pragma omp parallel num_threads(threads)
    linear(B, out, in, x, W, bias, half, y);
}
"""
