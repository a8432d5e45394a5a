"""The C source of the chunk scan of S4 and S4D on a CPU; native_library.py compiles it, native_scan.py calls it, and
chunked.py has the equations.

A thread takes some channels, whose numbers lie side by side in a token, and some chunks of them at a time, so that all
that is made of them stays in its cache: rows of T tokens, turned out of the sequence and back into it. In them chunk c
of batch element b is row c B + b. The states at the chunks' starts are rows too, B more of them; so are the gradients
that reach these, of which the last are those of the final state.
"""

SOURCE = r"""
#define CHANNELS_AT_ONCE 16
#define TOKENS_AT_ONCE 4096

/* chunks: of the sequence; carry (H, N, N), or (H, N) where it is diagonal, in real form; keep (B, chunks), or NULL;
   starts (H, chunks B, N) */
typedef struct {
    I B, H, N, T, chunks, diagonal;
    const float *taps, *emit, *inject, *carry;
    const uint8_t *keep;
    float *starts;
} Scan;

INLINE I chunks_at_once(const Scan *s) {
    const I most = TOKENS_AT_ONCE / (s->B * s->T);
    return most < 1 ? 1 : most < s->chunks ? most : s->chunks;
}

/* `count` channels of chunks first .. last of a sequence (B, L, H), and their rows, of columns(T), `apart` for each */
APART void cut(const Scan *s, float *rows, I apart, const float *sequence, I h, I count, I first, I last) {
    const I T = s->T, wide = columns(T);
    for (I c = first; c < last; c++) {
        for (I b = 0; b < s->B; b++) {
            const float *from = sequence + (b * s->chunks + c) * T * s->H + h;
            float *to = rows + ((c - first) * s->B + b) * wide;
            for (I t0 = 0; t0 < T; t0 += 16) {
                const I t1 = t0 + 16 < T ? t0 + 16 : T;
                for (I i = 0; i < count; i++) for (I t = t0; t < t1; t++) to[i * apart + t] = from[t * s->H + i];
            }
            for (I i = 0; i < count; i++) memset(to + i * apart + T, 0, (wide - T) * sizeof(float));
        }
    }
}
APART void paste(const Scan *s, const float *rows, I apart, float *sequence, I h, I count, I first, I last) {
    const I T = s->T, wide = columns(T);
    for (I c = first; c < last; c++) {
        for (I b = 0; b < s->B; b++) {
            float *to = sequence + (b * s->chunks + c) * T * s->H + h;
            const float *from = rows + ((c - first) * s->B + b) * wide;
            for (I t = 0; t < T; t++) for (I i = 0; i < count; i++) to[t * s->H + i] = from[i * apart + t];
        }
    }
}

/* The rows (B, width) of a state (B, H, N) in one channel, and back; NULL: zeros, nothing */
INLINE void read_state(const Scan *s, float *rows, const float *state, I h) {
    memset(rows, 0, s->B * columns(s->N) * sizeof(float));
    for (I b = 0; state && b < s->B; b++) {
        memcpy(rows + b * columns(s->N), state + (b * s->H + h) * s->N, s->N * sizeof(float));
    }
}
INLINE void write_state(const Scan *s, const float *rows, float *state, I h) {
    for (I b = 0; state && b < s->B; b++) {
        memcpy(state + (b * s->H + h) * s->N, rows + b * columns(s->N), s->N * sizeof(float));
    }
}
/* Zeros in the rows of documents that begin with chunk c */
INLINE void reset(const Scan *s, float *rows, I c) {
    for (I b = 0; s->keep && b < s->B; b++) {
        if (!s->keep[b * s->chunks + c]) memset(rows + b * columns(s->N), 0, columns(s->N) * sizeof(float));
    }
}

/* to += from A^T for the rows (B, N) of a chunk and the carry A of one channel; with sign -1, from A. carry: that
   matrix, laid out for it, where A is dense */
INLINE void carry_over(const Scan *s, I h, const float *carry, float sign, const float *from, float *to) {
    const I N = s->N, half = N / 2, of_N = columns(N);
    if (!s->diagonal) {
        product(s->B, N, of_N, from, of_N, 1, carry, of_N, to, of_N, 1);
        return;
    }
    const float *re = s->carry + h * N, *im = re + half;
    for (I b = 0; b < s->B; b++, from += of_N, to += of_N) {
        #pragma omp simd
        for (I n = 0; n < half; n++) {
            const float angle = sign * im[n], x = from[n], y = from[half + n];
            to[n] += re[n] * x - angle * y;
            to[half + n] += re[n] * y + angle * x;
        }
    }
}

/* Sums over R rows of driven^T starts: all (N, N), or where the carry is diagonal what its gradient is made of */
INLINE void carry_sums(const Scan *s, I R, const float *driven, const float *starts, float *sums, I wide, float *room) {
    const I N = s->N, half = N / 2, of_N = columns(N);
    if (!s->diagonal) {
        product(N, R, of_N, driven, 1, of_N, starts, of_N, sums, wide, 0);
        return;
    }
    float *rr = room, *ri = rr + half, *ir = ri + half, *ii = ir + half;
    memset(room, 0, 2 * N * sizeof(float));
    for (I r = 0; r < R; r++, driven += of_N, starts += of_N) {
        #pragma omp simd
        for (I n = 0; n < half; n++) {
            rr[n] += driven[n] * starts[n];
            ri[n] += driven[n] * starts[half + n];
            ir[n] += driven[half + n] * starts[n];
            ii[n] += driven[half + n] * starts[half + n];
        }
    }
    for (I n = 0; n < N; n++) memset(sums + n * wide, 0, of_N * sizeof(float));
    for (I n = 0; n < half; n++) {
        float *re = sums + n * wide, *im = sums + (half + n) * wide;
        re[n] = rr[n], re[half + n] = ri[n], im[n] = ir[n], im[half + n] = ii[n];
    }
}

/* Numbers of room that a thread needs; the backward's is more */
I scan_room(I B, I N, I T, I chunks) {
    const Scan s = {B, 0, N, T, chunks};
    const I rows = chunks_at_once(&s) * B, of_T = columns(T), of_N = columns(N);
    const I weights = T * of_T + T * of_N + N * of_T + N * of_N + (T + N) * (of_T + of_N) + of_T;
    return weights + (2 * CHANNELS_AT_ONCE + 1) * rows * of_T + (2 * rows + B) * of_N;
}

/* From `state` (B, H, N), or NULL, to `final` (B, H, N). y may be NULL, and so may starts */
APART void scan_channels(const Scan *s, I h, I count, const float *u, const float *state, float *y, float *final,
                         float *room) {
    const I T = s->T, N = s->N, B = s->B, of_T = columns(T), of_N = columns(N), step = chunks_at_once(s);
    const I apart = step * B * of_T;
    float *within = room, *emit = within + T * of_T, *inject = emit + N * of_T, *carry = inject + T * of_N;
    float *rows = carry + N * of_N, *out = rows + CHANNELS_AT_ONCE * apart, *starts = out + apart;
    for (I first = 0; first < s->chunks; first += step) {
        const I last = first + step < s->chunks ? first + step : s->chunks, R = (last - first) * B;
        cut(s, rows, apart, u, h, count, first, last);
        for (I i = 0; i < count; i++) {
            const I at = h + i;
            float *own = rows + i * apart;
            turn(inject, of_N, s->inject + at * N * T, T, N, T);
            if (!s->diagonal) turn(carry, of_N, s->carry + at * N * N, N, N, N);
            read_state(s, starts, first == 0 ? state : final, at);
            product(R, T, of_N, own, of_T, 1, inject, of_N, starts + B * of_N, of_N, 0);
            for (I c = first; c < last; c++) {
                float *start = starts + (c - first) * B * of_N;
                reset(s, start, c);
                carry_over(s, at, carry, 1, start, start + B * of_N);
            }
            write_state(s, starts + R * of_N, final, at);
            for (I r = 0; s->starts && r < R; r++) {
                memcpy(s->starts + ((at * s->chunks + first) * B + r) * N, starts + r * of_N, N * sizeof(float));
            }
            if (!y) continue;
            turn(emit, of_T, s->emit + at * T * N, N, T, N);
            memset(within, 0, T * of_T * sizeof(float));
            for (I t = 0; t < T; t++) memcpy(within + t * of_T + t, s->taps + at * T, (T - t) * sizeof(float));
            for (I c = 0; c < of_T; c += 32) { /* of a token the later ones know nothing */
                const I terms = c + 32 < T ? c + 32 : T;
                product(R, terms, 32, own, of_T, 1, within + c, of_T, out + c, of_T, 0);
            }
            product(R, N, of_T, starts, of_N, 1, emit, of_T, out, of_T, 1);
            memcpy(own, out, R * of_T * sizeof(float));
        }
        if (y) paste(s, rows, apart, y, h, count, first, last);
    }
}

/* of_final may be NULL; gram (H, T + N, T + N), of which the first T rows and columns are left out; of_state (B, H, N)
   is written in any case, for the gradients of a segment's starts pass through it */
APART void scan_channels_back(const Scan *s, I h, I count, const float *u, const float *of_y, const float *of_final,
                              float *of_u, float *of_state, float *of_taps, float *gram, float *room) {
    const I T = s->T, N = s->N, B = s->B, of_T = columns(T), of_N = columns(N), step = chunks_at_once(s);
    const I apart = step * B * of_T, all = T + N;
    float *within = room, *emit = within + T * of_T, *inject = emit + T * of_N, *carry = inject + N * of_T;
    float *sums = carry + N * of_N, *along = sums + (T + N) * (of_T + of_N), *rows = along + of_T;
    float *of_rows = rows + CHANNELS_AT_ONCE * apart, *out = of_rows + CHANNELS_AT_ONCE * apart;
    float *starts = out + apart, *reached = starts + step * B * of_N;
    for (I first = (s->chunks - 1) / step * step; first >= 0; first -= step) {
        const I last = first + step < s->chunks ? first + step : s->chunks, R = (last - first) * B;
        const I is_first = last == s->chunks; /* of the segments that are met */
        cut(s, rows, apart, u, h, count, first, last);
        cut(s, of_rows, apart, of_y, h, count, first, last);
        for (I i = 0; i < count; i++) {
            const I at = h + i;
            float *own = rows + i * apart, *of_own = of_rows + i * apart, *driven = reached + B * of_N;
            pad_rows(emit, s->emit + at * T * N, T, N);
            pad_rows(inject, s->inject + at * N * T, N, T);
            if (!s->diagonal) pad_rows(carry, s->carry + at * N * N, N, N);
            pad_rows(starts, s->starts + (at * s->chunks + first) * B * N, R, N);
            memset(within, 0, T * of_T * sizeof(float));
            for (I t = 0; t < T; t++) for (I j = 0; j <= t; j++) within[t * of_T + j] = s->taps[at * T + t - j];
            product(R, T, of_N, of_own, of_T, 1, emit, of_N, reached, of_N, 0);
            read_state(s, reached + R * of_N, is_first ? of_final : of_state, at);
            for (I c = last - 1; c >= first; c--) {
                float *start = reached + (c - first) * B * of_N;
                carry_over(s, at, carry, -1, start + B * of_N, start);
                reset(s, start, c);
            }
            write_state(s, reached, of_state, at);
            /* sums over rows of [of_y | driven]^T [u | starts] */
            const I wide = of_T + of_N;
            product(T, R, of_T, of_own, 1, of_T, own, of_T, sums, wide, 0);
            product(T, R, of_N, of_own, 1, of_T, starts, of_N, sums + of_T, wide, 0);
            product(N, R, of_T, driven, 1, of_N, own, of_T, sums + T * wide, wide, 0);
            carry_sums(s, R, driven, starts, sums + T * wide + of_T, wide, carry);
            memset(along, 0, T * sizeof(float));
            for (I t = 0; t < T; t++) add(t + 1, along + T - 1 - t, 1, sums + t * wide);
            if (is_first) {
                memset(of_taps + at * T, 0, T * sizeof(float));
                memset(gram + at * all * all, 0, all * all * sizeof(float));
            }
            for (I t = 0; t < T; t++) of_taps[at * T + t] += along[T - 1 - t];
            for (I r = 0; r < all; r++) {
                float *to = gram + (at * all + r) * all;
                if (r >= T) add(T, to, 1, sums + r * wide);
                add(N, to + T, 1, sums + r * wide + of_T);
            }
            product(R, N, of_T, driven, of_N, 1, inject, of_T, out, of_T, 0);
            product(R, T, of_T, of_own, of_T, 1, within, of_T, out, of_T, 1);
            memcpy(own, out, R * of_T * sizeof(float));
        }
        paste(s, rows, apart, of_u, h, count, first, last);
    }
}

/* Fewer channels at a time where there are many threads */
#define OVER_CHANNELS(CALL)                                                                               \
    const I share = (H + threads - 1) / threads, each = share < CHANNELS_AT_ONCE ? share : CHANNELS_AT_ONCE; \
    const I blocks = (H + each - 1) / each, size = scan_room(B, N, T, chunks);                            \
    _Pragma("omp parallel for num_threads(threads) schedule(static)")                                     \
    for (I part = 0; part < threads; part++) {                                                            \
        float *own = room + part * size;                                                                  \
        for (I k = blocks * part / threads; k < blocks * (part + 1) / threads; k++) {                     \
            const I h = k * each, count = H - h < each ? H - h : each;                                    \
            CALL;                                                                                         \
        }                                                                                                 \
    }

void scan(I B, I H, I N, I T, I chunks, I diagonal, const float *u, const float *taps, const float *emit,
          const float *inject, const float *carry, const uint8_t *keep, const float *state, float *y, float *final,
          float *starts, float *room, I threads) {
    const Scan s = {B, H, N, T, chunks, diagonal, taps, emit, inject, carry, keep, starts};
    OVER_CHANNELS(scan_channels(&s, h, count, u, state, y, final, own))
}

void scan_backward(I B, I H, I N, I T, I chunks, I diagonal, const float *u, const float *taps, const float *emit,
                   const float *inject, const float *carry, const uint8_t *keep, const float *of_y,
                   const float *of_final, float *of_u, float *of_state, float *of_taps, float *gram, float *starts,
                   float *room, I threads) {
    const Scan s = {B, H, N, T, chunks, diagonal, taps, emit, inject, carry, keep, starts};
    OVER_CHANNELS(scan_channels_back(&s, h, count, u, of_y, of_final, of_u, of_state, of_taps, gram, own))
}
"""
