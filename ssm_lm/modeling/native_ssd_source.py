"""The C source of SSD's chunk scan on a CPU; native_library.py compiles it, native_ssd.py calls it, and ssd.py has the
equations.

A thread takes a head of a row, with its state, through all chunks: all that is made of one stays in its cache. In it
x_j = dt_j v_j, and the state lies as (N, P), N as [real | imaginary], so that every matrix is a factor of `product`:

    W_ij = exp(d_j - d_i)  for j <= i of one document      d: decays since the chunk's start
    y = (c~ b~^T o W) x + a c~ S + D v                     a_i = exp(-d_i), where the start reaches token i
    S <- R (keep S + b~^T z x)                             z_j = exp(d_j - d_end), where token j reaches the end

The backward goes through the chunks from the last one, with the gradient of the state in the place of the state.
"""

SOURCE = r"""
#include <math.h>

/* Tokens v (B, L, E P), whose rows lie v_row apart, b and c (B, L, N); cos and sin (E, T, N / 2), decay and step (E, T)
   of all chunks and rows where `shared`, else (B, chunks, ...); number (B, chunks T) of documents in their chunk, or
   NULL; starts (B, E, chunks + 1, N, P), the last of which is the state behind them, or NULL */
typedef struct {
    I B, L, E, P, N, T, chunks, shared, v_row;
    const float *v, *b, *c, *cos, *sin, *decay, *step, *skip;
    const int32_t *number;
    float *starts;
} Scan;

/* One chunk of a head: n tokens from `first` on, counted over all rows, and its matrices in rows of whole registers */
typedef struct {
    I n, first, keeps;
    const float *cos, *sin, *decay, *step;
    float *v, *x, *b, *b_turned, *c, *weights, *scores, *from_start, *to_end;
} Chunk;

INLINE I chunk_room(I P, I N, I T) {
    return T * (2 * columns(P) + 2 * columns(N) + 2 * columns(T)) + N * columns(T) + 2 * T;
}
INLINE float *chunk_in(Chunk *k, I P, I N, I T, float *room) {
    k->v = room;
    k->x = k->v + T * columns(P);
    k->b = k->x + T * columns(P);
    k->b_turned = k->b + T * columns(N);
    k->c = k->b_turned + N * columns(T);
    k->weights = k->c + T * columns(N);
    k->scores = k->weights + T * columns(T);
    k->from_start = k->scores + T * columns(T);
    k->to_end = k->from_start + T;
    return k->to_end + T;
}

/* R(-angle) of the rows of b or c: to their chunk's start */
INLINE void turn_back(const Scan *s, const Chunk *k, const float *from, float *to) {
    const I N = s->N, M = N / 2;
    for (I t = 0; t < k->n; t++, from += N, to += columns(N)) {
        const float *cos = k->cos + t * M, *sin = k->sin + t * M;
        #pragma omp simd
        for (I m = 0; m < M; m++) {
            to[m] = cos[m] * from[m] + sin[m] * from[M + m];
            to[M + m] = cos[m] * from[M + m] - sin[m] * from[m];
        }
        memset(to + N, 0, (columns(N) - N) * sizeof(float));
    }
}

/* Chunk `at` of row b and head e, as far as the state needs it; with what y needs beside it, where has_output. is_new:
   the weights of this head are not in their place yet */
APART void read_chunk(const Scan *s, Chunk *k, I b, I e, I at, I has_output, I is_new) {
    const I T = s->T, N = s->N, P = s->P, of_P = columns(P), of_T = columns(T);
    const I left = s->L - at * T, n = left < T ? left : T, first = b * s->L + at * T;
    const I operators = (s->shared ? e : (b * s->chunks + at) * s->E + e) * T;
    k->n = n;
    k->first = first;
    k->cos = s->cos + operators * (N / 2);
    k->sin = s->sin + operators * (N / 2);
    k->decay = s->decay + operators;
    k->step = s->step + operators;
    for (I t = 0; t < n; t++) {
        const float *from = s->v + (first + t) * s->v_row + e * P, step = k->step[t];
        float *v = k->v + t * of_P, *x = k->x + t * of_P;
        memset(v + P, 0, (of_P - P) * sizeof(float));
        memset(x + P, 0, (of_P - P) * sizeof(float));
        for (I p = 0; p < P; p++) v[p] = from[p], x[p] = step * from[p];
    }
    turn_back(s, k, s->b + first * N, k->b);
    turn(k->b_turned, of_T, k->b, columns(N), n, N);
    const float *d = k->decay, end = d[n - 1];
    const int32_t *number = s->number ? s->number + (b * s->chunks + at) * T : 0;
    const I apart = number && number[n - 1] > 0; /* documents begin in this chunk */
    k->keeps = !apart;
    for (I t = 0; t < n; t++) {
        k->from_start[t] = apart && number[t] > 0 ? 0 : exp_of(-d[t]);
        k->to_end[t] = apart && number[t] < number[n - 1] ? 0 : exp_of(d[t] - end);
    }
    if (!has_output) return;
    turn_back(s, k, s->c + first * N, k->c);
    if (!s->shared || s->number || is_new) {
        memset(k->weights, 0, T * of_T * sizeof(float));
        for (I i = 0; i < (s->shared && !s->number ? T : n); i++) {
            float *row = k->weights + i * of_T;
            #pragma omp simd
            for (I j = 0; j <= i; j++) row[j] = exp_of(d[j] - d[i]);
            if (apart) for (I j = 0; j <= i; j++) row[j] *= number[i] == number[j];
        }
    }
    for (I c = 0; c < n; c += 32) { /* later tokens are not asked for */
        product(n - c, N, 32, k->c + c * columns(N), columns(N), 1, k->b_turned + c, of_T, k->scores + c * of_T + c,
                of_T, 0);
    }
}

/* How many columns of row i of such a lower triangle there are */
INLINE I reached(I i) { return (i / 32 + 1) * 32; }

/* C += A B for the lower triangle A (n, n), and with A^T in its place; columns of B and C: `wide` */
#define AT_ONCE 16
INLINE I at_once(I n, I i) { return n - i < AT_ONCE ? n - i : AT_ONCE; }
APART void lower(I n, const float *A, I of_T, const float *B, float *C, I wide) {
    for (I i = 0; i < n; i += AT_ONCE) {
        const I rows = at_once(n, i);
        product(rows, i + rows, wide, A + i * of_T, of_T, 1, B, wide, C + i * wide, wide, 1);
    }
}
APART void lower_turned(I n, const float *A, I of_T, const float *B, float *C, I wide) {
    for (I j = 0; j < n; j += AT_ONCE) {
        product(at_once(n, j), n - j, wide, A + j * of_T + j, 1, of_T, B + j * wide, wide, C + j * wide, wide, 1);
    }
}
/* to = a_t from of n rows */
APART void scale_rows(I n, I wide, const float *a, const float *from, float *to) {
    for (I t = 0; t < n; t++) {
        #pragma omp simd
        for (I i = 0; i < wide; i++) to[t * wide + i] = a[t] * from[t * wide + i];
    }
}

/* S (N, columns(P)) from a state (P, N) of the head, and back; NULL: zeros, nothing */
INLINE void read_state(float *S, const float *state, I N, I P) {
    memset(S, 0, N * columns(P) * sizeof(float));
    for (I p = 0; state && p < P; p++) for (I n = 0; n < N; n++) S[n * columns(P) + p] = state[p * N + n];
}
INLINE void write_state(const float *S, float *state, I N, I P) {
    for (I p = 0; state && p < P; p++) for (I n = 0; n < N; n++) state[p * N + n] = S[n * columns(P) + p];
}
/* S = R(sign angle) S, by the angles of a chunk's last token */
INLINE void turn_state(const Scan *s, const Chunk *k, float sign, float *S) {
    const I M = s->N / 2, wide = columns(s->P), last = (k->n - 1) * M;
    for (I m = 0; m < M; m++) {
        const float cos = k->cos[last + m], sin = sign * k->sin[last + m];
        float *re = S + m * wide, *im = S + (M + m) * wide;
        #pragma omp simd
        for (I p = 0; p < wide; p++) {
            const float x = re[p], y = im[p];
            re[p] = cos * x - sin * y;
            im[p] = cos * y + sin * x;
        }
    }
}
INLINE void keep_start(const Scan *s, I head, I chunk, const float *S) {
    const I N = s->N, P = s->P;
    if (!s->starts) return;
    float *to = s->starts + (head * (s->chunks + 1) + chunk) * N * P;
    for (I n = 0; n < N; n++) memcpy(to + n * P, S + n * columns(P), P * sizeof(float));
}

I ssd_scan_room(I P, I N, I T) {
    return chunk_room(P, N, T) + N * columns(P) + T * (columns(P) + columns(N));
}
I ssd_scan_backward_room(I P, I N, I T) {
    const I of_T = columns(T), of_N = columns(N), of_P = columns(P);
    return chunk_room(P, N, T) + 2 * N * of_P + 2 * P * of_N + P * of_T + T * (4 * of_P + 2 * of_N + of_T)
         + T * (N / 2 + 1);
}

/* A head of a row: y (B, L, E P) may be NULL; state, or NULL, and final (B, E, P, N) */
APART void scan_head(const Scan *s, I b, I e, const float *state, float *y, float *final, float *room) {
    const I T = s->T, N = s->N, P = s->P, of_T = columns(T), of_N = columns(N), of_P = columns(P), head = b * s->E + e;
    Chunk chunk, *k = &chunk;
    float *S = chunk_in(k, P, N, T, room), *rows = S + N * of_P, *vectors = rows + T * of_P;
    I is_zero = !state;
    read_state(S, state ? state + head * P * N : 0, N, P);
    for (I at = 0; at < s->chunks; at++) {
        read_chunk(s, k, b, e, at, y != 0, at == 0);
        const I n = k->n;
        keep_start(s, head, at, S);
        if (y) {
            memset(rows, 0, n * of_P * sizeof(float));
            if (!is_zero) {
                scale_rows(n, of_N, k->from_start, k->c, vectors);
                product(n, N, of_P, vectors, of_N, 1, S, of_P, rows, of_P, 0);
            }
            for (I i = 0; i < n; i++) {
                float *row = k->scores + i * of_T, *weights = k->weights + i * of_T;
                #pragma omp simd
                for (I j = 0; j < reached(i); j++) row[j] *= weights[j];
            }
            lower(n, k->scores, of_T, k->x, rows, of_P);
            for (I t = 0; t < n; t++) {
                float *to = y + (k->first + t) * s->E * P + e * P;
                for (I p = 0; p < P; p++) to[p] = rows[t * of_P + p] + s->skip[e * P + p] * k->v[t * of_P + p];
            }
        }
        const float keep = k->keeps ? exp_of(-k->decay[n - 1]) : 0;
        for (I i = 0; i < N * of_P; i++) S[i] *= keep;
        scale_rows(n, of_P, k->to_end, k->x, rows);
        product(N, n, of_P, k->b_turned, of_T, 1, rows, of_P, S, of_P, 1);
        turn_state(s, k, 1, S);
        is_zero = 0;
    }
    keep_start(s, head, s->chunks, S);
    write_state(S, final + head * P * N, N, P);
}

/* The backward's gradients: y, v (B, L, E P); final, or NULL, and state (B, E, P, N); vectors, b's and c's, (2, B, L,
   E, N); angle (B, chunks, E, T, N / 2), decay and step (B, chunks, E, T), of one chunk if shared; skip (B, E, P).
   Decays in doubles: what a pair of tokens adds to one it takes from another, and little is left of their sum */
typedef struct {
    const float *y, *final;
    float *v, *state, *vectors, *angle, *step, *skip;
    double *decay;
} Gradients;

/* R(angle) of the rows of a gradient of b~ or c~, to memory; and what it says of the angles */
INLINE void turn_forth(const Scan *s, const Chunk *k, I e, const float *turned, const float *of_turned, float *to,
                       float *of_angle) {
    const I N = s->N, M = N / 2, of_N = columns(N);
    for (I t = 0; t < k->n; t++) {
        const float *cos = k->cos + t * M, *sin = k->sin + t * M, *x = turned + t * of_N, *g = of_turned + t * of_N;
        float *row = to + ((k->first + t) * s->E + e) * N, *angle = of_angle + t * M;
        #pragma omp simd
        for (I m = 0; m < M; m++) {
            angle[m] += g[m] * x[M + m] - g[M + m] * x[m];
            row[m] = cos[m] * g[m] - sin[m] * g[M + m];
            row[M + m] = cos[m] * g[M + m] + sin[m] * g[m];
        }
    }
}

APART void scan_head_back(const Scan *s, const Gradients *g, I b, I e, float *room) {
    const I T = s->T, N = s->N, M = N / 2, P = s->P, of_T = columns(T), of_N = columns(N), of_P = columns(P);
    const I head = b * s->E + e;
    Chunk chunk, *k = &chunk;
    float *of_S = chunk_in(k, P, N, T, room), *S = of_S + N * of_P, *of_S_turned = S + N * of_P;
    float *S_turned = of_S_turned + P * of_N, *x_turned = S_turned + P * of_N, *of_y = x_turned + P * of_T;
    float *of_x = of_y + T * of_P, *rows = of_x + T * of_P, *more_rows = rows + T * of_P;
    float *of_b = more_rows + T * of_P, *of_c = of_b + T * of_N, *of_scores = of_c + T * of_N;
    float *of_angle = of_scores + T * of_T, *of_step = of_angle + T * M;
    float *of_skip = g->skip + head * P;
    memset(of_skip, 0, P * sizeof(float));
    read_state(of_S, g->final ? g->final + head * P * N : 0, N, P);
    for (I at = s->chunks - 1; at >= 0; at--) {
        read_chunk(s, k, b, e, at, 1, at == s->chunks - 1);
        const I n = k->n, last = (n - 1) * M, operators = (s->shared ? head : (b * s->chunks + at) * s->E + e) * T;
        double *of_decay = g->decay + operators;
        const float *start = s->starts + (head * (s->chunks + 1) + at) * N * P, *after = start + N * P;
        if (!s->shared || at == s->chunks - 1) {
            memset(of_angle, 0, T * (M + 1) * sizeof(float));
            memset(of_decay, 0, T * sizeof(double));
        }
        pad_rows(S, start, N, P);
        for (I t = 0; t < n; t++) {
            const float *from = g->y + (k->first + t) * s->E * P + e * P;
            memset(of_y + t * of_P + P, 0, (of_P - P) * sizeof(float));
            memcpy(of_y + t * of_P, from, P * sizeof(float));
            for (I p = 0; p < P; p++) of_skip[p] += from[p] * k->v[t * of_P + p];
        }

        /* the turn over the chunk */
        for (I m = 0; m < M; m++) {
            const float *re = of_S + m * of_P, *im = of_S + (M + m) * of_P;
            of_angle[last + m] += dot(P, im, after + m * P) - dot(P, re, after + (M + m) * P);
        }
        turn_state(s, k, -1, of_S);

        /* what the tokens add to the state: z x b~ */
        product(n, N, of_P, k->b, of_N, 1, of_S, of_P, rows, of_P, 0);
        scale_rows(n, of_P, k->to_end, rows, of_x);
        for (I t = 0; t < n; t++) {
            const float by_decay = dot(P, of_x + t * of_P, k->x + t * of_P);
            of_decay[t] += by_decay;
            of_decay[n - 1] -= by_decay;
        }
        scale_rows(n, of_P, k->to_end, k->x, rows);
        turn(of_S_turned, of_N, of_S, of_P, N, P);
        product(n, P, of_N, rows, of_P, 1, of_S_turned, of_N, of_b, of_N, 0);

        /* the start, on its way to the end, and as the tokens read it: a c~ */
        const float keep = k->keeps ? exp_of(-k->decay[n - 1]) : 0;
        if (keep > 0) of_decay[n - 1] -= keep * dot(N * of_P, of_S, S);
        for (I i = 0; i < N * of_P; i++) of_S[i] *= keep;
        scale_rows(n, of_P, k->from_start, of_y, more_rows);
        product(N, n, of_P, k->c, 1, of_N, more_rows, of_P, of_S, of_P, 1);
        turn(S_turned, of_N, S, of_P, N, P);
        product(n, P, of_N, more_rows, of_P, 1, S_turned, of_N, of_c, of_N, 0);
        for (I t = 0; t < n; t++) of_decay[t] -= dot(N, of_c + t * of_N, k->c + t * of_N);

        /* tokens of the chunk: scores o W, and the gradient of either in the other's place */
        turn(x_turned, of_T, k->x, of_P, n, P);
        for (I c = 0; c < n; c += 32) {
            product(n - c, P, 32, of_y + c * of_P, of_P, 1, x_turned + c, of_T, of_scores + c * of_T + c, of_T, 0);
        }
        for (I i = 0; i < n; i++) {
            float *scores = k->scores + i * of_T, *of_row = of_scores + i * of_T;
            double sum = 0;
            const float *weights = k->weights + i * of_T;
            #pragma omp simd reduction(+ : sum)
            for (I j = 0; j <= i; j++) {
                const float weighted = scores[j] * weights[j], pair = of_row[j] * weighted;
                scores[j] = weighted;
                of_row[j] *= weights[j];
                of_decay[j] += pair;
                sum += pair;
            }
            for (I j = i + 1; j < reached(i); j++) scores[j] = of_row[j] = 0;
            of_decay[i] -= sum;
        }
        lower_turned(n, k->scores, of_T, of_y, of_x, of_P);
        lower(n, of_scores, of_T, k->b, of_c, of_N);
        lower_turned(n, of_scores, of_T, k->c, of_b, of_N);

        turn_forth(s, k, e, k->b, of_b, g->vectors, of_angle);
        turn_forth(s, k, e, k->c, of_c, g->vectors + s->B * s->L * s->E * N, of_angle);
        for (I t = 0; t < n; t++) {
            const float *v = k->v + t * of_P, *x = of_x + t * of_P, *from = of_y + t * of_P;
            float *to = g->v + (k->first + t) * s->E * P + e * P;
            for (I p = 0; p < P; p++) to[p] = k->step[t] * x[p] + s->skip[e * P + p] * from[p];
            of_step[t] += dot(P, v, x);
        }
        if (s->shared && at > 0) continue;
        memcpy(g->angle + operators * M, of_angle, T * M * sizeof(float));
        memcpy(g->step + operators, of_step, T * sizeof(float));
    }
    write_state(of_S, g->state + head * P * N, N, P);
}

#define OVER_HEADS(ROOM, CALL)                                            \
    const I heads = B * E, size = ROOM(P, N, T);                          \
    _Pragma("omp parallel for num_threads(threads) schedule(static)")     \
    for (I part = 0; part < threads; part++) {                            \
        float *own = room + part * size;                                  \
        for (I k = heads * part / threads; k < heads * (part + 1) / threads; k++) { \
            const I b = k / E, e = k % E;                                 \
            CALL;                                                         \
        }                                                                 \
    }

void ssd_scan(I B, I L, I E, I P, I N, I T, I chunks, I shared, I v_row, const float *v, const float *b_,
              const float *c, const float *cos, const float *sin, const float *decay, const float *step,
              const float *skip, const int32_t *number, float *starts, const float *state, float *y, float *final,
              float *room, I threads) {
    const Scan s = {B, L, E, P, N, T, chunks, shared, v_row, v, b_, c, cos, sin, decay, step, skip, number, starts};
    OVER_HEADS(ssd_scan_room, scan_head(&s, b, e, state, y, final, own))
}

void ssd_scan_backward(I B, I L, I E, I P, I N, I T, I chunks, I shared, I v_row, const float *v, const float *b_,
                       const float *c, const float *cos, const float *sin, const float *decay, const float *step,
                       const float *skip, const int32_t *number, float *starts, const float *of_y,
                       const float *of_final, float *of_v, float *of_state, float *of_vectors, float *of_angle,
                       double *of_decay, float *of_step, float *of_skip, float *room, I threads) {
    const Scan s = {B, L, E, P, N, T, chunks, shared, v_row, v, b_, c, cos, sin, decay, step, skip, number, starts};
    const Gradients g = {of_y, of_final, of_v, of_state, of_vectors, of_angle, of_step, of_skip, of_decay};
    OVER_HEADS(ssd_scan_backward_room, scan_head_back(&s, &g, b, e, own))
}
"""
