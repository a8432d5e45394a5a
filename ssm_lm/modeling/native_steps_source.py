"""The C source of single tokens of the state spaces and of the short convolution on a CPU: what discrete.py says of a
step, in float32; see native_layers_source.py.
"""

SOURCE = r"""
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
#define CHANNELS 4 /* whose sums do not wait for one another */
static inline void shared_steps(const int rank, I S, I T, I H, I N, I h, I count, const float *u, float *state,
                                const float *E, const float *P, const float *B_of, const float *numbers,
                                const float *C_row, const float *D, float *y) {
    const I half = N / 2;
    for (I t = 0; t < T; t++) {
        float low[CHANNELS], other[CHANNELS];
        for (I k = 0; k < count; k++) {
            const float *re = state + (h + k) * N, *im = re + half, *e = E + (h + k) * N;
            const float *p = P + (h + k) % S * N, *q = p + S * N;
            const float *of_u = numbers + (h + k) * (1 + rank + rank * rank) + 1, *mix = of_u + rank;
            const float v = u[t * H + h + k];
            float first = 0, second = 0;
            #pragma omp simd reduction(+ : first, second)
            for (I n = 0; n < half; n++) {
                const float s_re = re[n] + e[n] * re[n] - e[half + n] * im[n];
                const float s_im = im[n] + e[n] * im[n] + e[half + n] * re[n];
                first += p[n] * s_re + p[half + n] * s_im;
                if (rank == 2) second += q[n] * s_re + q[half + n] * s_im;
            }
            low[k] = mix[0] * first + (rank == 2 ? mix[1] * second : 0) + of_u[0] * v;
            other[k] = rank == 2 ? mix[2] * first + mix[3] * second + of_u[1] * v : 0;
        }
        for (I k = 0; k < count; k++) {
            float *re = state + (h + k) * N, *im = re + half, sum = 0;
            const float *p = P + (h + k) % S * N, *q = p + S * N, *in = B_of + (h + k) % S * N;
            const float *e = E + (h + k) * N, *c = C_row + (h + k) * N, v = u[t * H + h + k];
            const float drive = numbers[(h + k) * (1 + rank + rank * rank)] * v, by_p = low[k], by_q = other[k];
            #pragma omp simd reduction(+ : sum)
            for (I n = 0; n < half; n++) {
                float z_re = drive * in[n] - by_p * p[n], z_im = drive * in[half + n] - by_p * p[half + n];
                if (rank == 2) z_re -= by_q * q[n], z_im -= by_q * q[half + n];
                const float s_re = re[n] + z_re, s_im = im[n] + z_im;
                re[n] = z_re + e[n] * s_re - e[half + n] * s_im;
                im[n] = z_im + e[n] * s_im + e[half + n] * s_re;
                sum += c[n] * re[n] + c[half + n] * im[n];
            }
            y[t * H + h + k] = sum + D[h + k] * v;
        }
    }
}
static void step_dplr_shared(I S, I T, I H, I N, I rank, const float *u, float *state, const float *E, const float *P,
                             const float *B_of, const float *numbers, const float *C_row, const float *D, float *y) {
    #pragma omp for schedule(static)
    for (I h = 0; h < H; h += CHANNELS) {
        const I count = H - h < CHANNELS ? H - h : CHANNELS;
        if (rank == 1) shared_steps(1, S, T, H, N, h, count, u, state, E, P, B_of, numbers, C_row, D, y);
        else shared_steps(2, S, T, H, N, h, count, u, state, E, P, B_of, numbers, C_row, D, y);
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
                y[(b * T + t) * y_apart + c] = activated(f, sum);
            }
        }
    }
}
"""
