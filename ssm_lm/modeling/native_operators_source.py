"""The C source of the operators of a chunk of S4 on a CPU; native_library.py compiles it, native_operators.py calls it.

It is the recurrences of triton_dplr_operators.py, where they are derived, in float32, a channel at a time, in memory
that stays in a core's cache. But for the carry: A^T = E^T - sum_j (E^(T-1-j) F) v_j, in real form, is one small product
of the vectors that the recurrences leave, and so is what its gradient sends to either factor.

Every vector of N = 2 half numbers lies here as two halves of `wide` numbers each, zeros behind: whole registers. The
loops over channels are compiled twice: for the 64 states and rank 1 that models have, with known lengths, and for all.
"""

SOURCE = r"""
#define REGISTERS 16                           /* numbers of one, or of several */
#define MOST 4                                 /* largest rank */

INLINE I widened(I half) { return (half + REGISTERS - 1) / REGISTERS * REGISTERS; }

/* A vector of which the numbers lie `apart`, as its two halves of `wide` numbers, and back */
APART void widen(float *to, const float *from, I apart, I half, I wide) {
    memset(to, 0, 2 * wide * sizeof(float));
    for (I n = 0; n < half; n++) {
        to[n] = from[n * apart];
        to[wide + n] = from[(half + n) * apart];
    }
}
APART void narrow(float *to, const float *from, I apart, I half, I wide) {
    for (I n = 0; n < half; n++) {
        to[n * apart] = from[n];
        to[(half + n) * apart] = from[wide + n];
    }
}

/* y = (R(e) - sum_r f_r g_r^T) x; with sign -1, and g before f, x^T (R(e) - sum_r f_r g_r^T). y may be x */
INLINE void multiply(I wide, I rank, const float *e, float sign, const float *f, const float *g, const float *x,
                     float *y) {
    float low[MOST];
    for (I r = 0; r < rank; r++) low[r] = dot(2 * wide, g + r * 2 * wide, x);
    #pragma omp simd
    for (I n = 0; n < wide; n++) {
        const float angle = sign * e[wide + n];
        float re = e[n] * x[n] - angle * x[wide + n], im = e[n] * x[wide + n] + angle * x[n];
        for (I r = 0; r < rank; r++) {
            re -= f[r * 2 * wide + n] * low[r];
            im -= f[r * 2 * wide + wide + n] * low[r];
        }
        y[n] = re;
        y[wide + n] = im;
    }
}

/* Adds the gradients of l^T (R(e) - sum_r f_r g_r^T) x in e, f and g */
INLINE void add_gradients(I wide, I rank, const float *f, const float *g, const float *x, const float *l, float *of_e,
                          float *of_f, float *of_g) {
    #pragma omp simd
    for (I n = 0; n < wide; n++) {
        of_e[n] += x[n] * l[n] + x[wide + n] * l[wide + n];
        of_e[wide + n] += x[n] * l[wide + n] - x[wide + n] * l[n];
    }
    for (I r = 0; r < rank; r++) {
        const I at = r * 2 * wide;
        const float by_f = dot(2 * wide, g + at, x), by_g = dot(2 * wide, f + at, l);
        #pragma omp simd
        for (I n = 0; n < 2 * wide; n++) {
            of_f[at + n] -= by_f * l[n];
            of_g[at + n] -= by_g * x[n];
        }
    }
}

/* A system, and its gradients. Of emit, inject and carry, or their gradients, a channel's matrix lies `head` numbers
   after the last one, and a row `row`: gradients come as parts of other tensors */
typedef struct { float *at; I head, row; } Matrices;
typedef struct { I N, rank, T; const float *E, *F, *G, *B, *C, *skip; } System; /* skip: D, or NULL */
typedef struct { float *E, *F, *G, *B, *C; } Gradients;

/* One channel's vectors of n = 2 wide numbers: e, f_r, g_r; x_j = A^j B; y_j = C A^j; v_jr = g_r A^j; w_jr = E^j f_r;
   power = E^(T-1); j up to T. rest: room for what else is made */
typedef struct { I half, n; float *e, *f, *g, *x, *y, *v, *w, *power, *rest; } Walk;

INLINE Walk walk_in(float *room, const System *s, I wide, I rank) {
    Walk k = {s->N / 2, 2 * wide};
    const I vectors = (s->T + 1) * k.n;
    k.e = room;
    k.f = k.e + k.n;
    k.g = k.f + rank * k.n;
    k.x = k.g + rank * k.n;
    k.y = k.x + vectors;
    k.v = k.y + vectors;
    k.w = k.v + rank * vectors;
    k.power = k.w + rank * vectors;
    k.rest = k.power + k.n;
    return k;
}

/* Numbers of room that a thread needs: those of a Walk, and what the backward makes of them, which is more than the
   forward does */
I operators_room(I N, I rank, I T) {
    const I n = 2 * widened(N / 2), walk = (2 + 2 * rank) * n + (2 + 2 * rank) * (T + 1) * n;
    return walk + 2 * n * n + (1 + 2 * rank) * T * n + (5 + 4 * rank) * n;
}

INLINE Walk walk(const System *s, I h, I wide, I rank, float *room) {
    Walk k = walk_in(room, s, wide, rank);
    const I N = s->N, n = 2 * wide, T = s->T;
    widen(k.e, s->E + h * N, 1, k.half, wide);
    widen(k.x, s->B + h * N, 1, k.half, wide);
    widen(k.y, s->C + h * N, 1, k.half, wide);
    for (I r = 0; r < rank; r++) {
        widen(k.f + r * n, s->F + h * N * rank + r, rank, k.half, wide);
        widen(k.g + r * n, s->G + h * N * rank + r, rank, k.half, wide);
    }
    memcpy(k.v, k.g, rank * n * sizeof(float));
    memcpy(k.w, k.f, rank * n * sizeof(float));
    for (I i = 0; i < n; i++) k.power[i] = i < wide;
    for (I t = 0; t < T; t++) {
        multiply(wide, rank, k.e, 1, k.f, k.g, k.x + t * n, k.x + (t + 1) * n);
        multiply(wide, rank, k.e, -1, k.g, k.f, k.y + t * n, k.y + (t + 1) * n);
        for (I r = 0; r < rank; r++) {
            const I at = (t * rank + r) * n, next = at + rank * n;
            multiply(wide, rank, k.e, -1, k.g, k.f, k.v + at, k.v + next);
            multiply(wide, 0, k.e, 1, k.f, k.g, k.w + at, k.w + next);
        }
        if (t < T - 1) multiply(wide, 0, k.e, 1, k.f, k.g, k.power, k.power);
    }
    return k;
}

/* The rows of x, the last one first, as columns (N, T), and back */
APART void to_columns(float *to, I row, const float *x, I T, I half, I wide) {
    for (I part = 0; part < 2; part++) {
        for (I m = 0; m < half; m++) {
            float *column = to + (part * half + m) * row;
            const float *from = x + part * wide + m;
            for (I t = 0; t < T; t++) column[T - 1 - t] = from[t * 2 * wide];
        }
    }
}
APART void from_columns(float *x, const float *from, I row, I T, I half, I wide) {
    memset(x, 0, T * 2 * wide * sizeof(float));
    for (I part = 0; part < 2; part++) {
        for (I m = 0; m < half; m++) {
            const float *column = from + (part * half + m) * row;
            float *to = x + part * wide + m;
            for (I t = 0; t < T; t++) to[t * 2 * wide] = column[T - 1 - t];
        }
    }
}

INLINE void operators_of(const System *s, I h, I wide, I rank, float *taps, Matrices emit, Matrices inject,
                         Matrices carry, float *room) {
    const Walk k = walk(s, h, wide, rank, room);
    const I T = s->T, half = k.half, n = 2 * wide;
    for (I t = 0; t < T; t++) {
        taps[h * T + t] = dot(n, k.y, k.x + t * n) + (t == 0 && s->skip ? s->skip[h] : 0);
        float *row = emit.at + h * emit.head + t * emit.row;
        memcpy(row, k.y + (t + 1) * n, half * sizeof(float));
        memcpy(row + half, k.y + (t + 1) * n + wide, half * sizeof(float));
    }
    to_columns(inject.at + h * inject.head, inject.row, k.x, T, half, wide);
    /* E^T - sum_j w_(T-1-j) v_j */
    float *back = k.rest, *sum = back + T * rank * n;
    for (I t = 0; t < T; t++) memcpy(back + t * rank * n, k.w + (T - 1 - t) * rank * n, rank * n * sizeof(float));
    product(n, T * rank, n, back, 1, n, k.v, n, sum, n, 0);
    multiply(wide, 0, k.e, 1, k.f, k.g, k.power, k.power);
    for (I m = 0; m < n; m++) for (I c = 0; c < n; c++) sum[m * n + c] = -sum[m * n + c];
    for (I m = 0; m < half; m++) {
        float *re = sum + m * n, *im = sum + (wide + m) * n;
        re[m] += k.power[m];
        re[wide + m] -= k.power[wide + m];
        im[m] += k.power[wide + m];
        im[wide + m] += k.power[m];
        float *to = carry.at + h * carry.head + m * carry.row;
        narrow(to, re, 1, half, wide);
        narrow(to + half * carry.row, im, 1, half, wide);
    }
}

INLINE void gradients_of(const System *s, I h, I wide, I rank, const float *of_taps, Matrices of_emit,
                         Matrices of_inject, Matrices of_carry, Gradients out, float *room) {
    const Walk k = walk(s, h, wide, rank, room);
    const I T = s->T, N = s->N, half = k.half, n = 2 * wide;
    float *of_A = k.rest, *turned = of_A + n * n, *of_v = turned + n * n, *of_w = of_v + T * rank * n;
    float *of_x = of_w + T * rank * n, *of_e = of_x + T * n, *of_f = of_e + n, *of_g = of_f + rank * n;
    float *of_c = of_g + rank * n, *lx = of_c + n, *ly = lx + n, *lv = ly + n, *lw = lv + rank * n;
    memset(of_A, 0, n * n * sizeof(float));
    for (I m = 0; m < N; m++) {
        widen(of_A + (m < half ? m : m - half + wide) * n, of_carry.at + h * of_carry.head + m * of_carry.row, 1, half,
              wide);
    }
    for (I m = 0; m < n; m++) for (I c = 0; c < n; c++) turned[m * n + c] = of_A[c * n + m];
    from_columns(of_x, of_inject.at + h * of_inject.head, of_inject.row, T, half, wide);
    /* minus the gradient of v_(T-1-j) in row j, and of w_(T-1-j) */
    product(T * rank, n, n, k.w, n, 1, of_A, n, of_v, n, 0);
    product(T * rank, n, n, k.v, n, 1, turned, n, of_w, n, 0);
    memset(of_e, 0, (5 + 4 * rank) * n * sizeof(float));
    /* T conj(E)^(T-1) times the diagonal, as of the complex product */
    for (I m = 0; m < half; m++) {
        const float re = of_A[m * n + m] + of_A[(wide + m) * n + wide + m];
        const float im = of_A[(wide + m) * n + m] - of_A[m * n + wide + m];
        of_e[m] = T * (k.power[m] * re + k.power[wide + m] * im);
        of_e[wide + m] = T * (k.power[m] * im - k.power[wide + m] * re);
    }
    for (I t = T - 1; t >= 0; t--) {
        /* x_{t+1} = A x_t, and C x_t is a tap */
        const float *x = k.x + t * n, *y = k.y + t * n, tap = of_taps[h * T + t];
        add_gradients(wide, rank, k.f, k.g, x, lx, of_e, of_f, of_g);
        add(n, of_c, tap, x);
        multiply(wide, rank, k.e, -1, k.g, k.f, lx, lx);
        add(n, lx, 1, of_x + t * n);
        add(n, lx, tap, k.y);
        /* y_{t+1} = y_t A */
        const float *row = of_emit.at + h * of_emit.head + t * of_emit.row;
        add(half, ly, 1, row);
        add(half, ly + wide, 1, row + half);
        add_gradients(wide, rank, k.f, k.g, ly, y, of_e, of_f, of_g);
        multiply(wide, rank, k.e, 1, k.f, k.g, ly, ly);
        /* v_t = v_{t-1} A, w_t = E w_{t-1}; v_0 is G, w_0 is F */
        for (I r = 0; r < rank; r++) {
            const I of = r * n, at = ((t - 1) * rank + r) * n, back = ((T - 1 - t) * rank + r) * n;
            add(n, lv + of, -1, of_v + back);
            add(n, lw + of, -1, of_w + back);
            if (t == 0) continue;
            add_gradients(wide, rank, k.f, k.g, lv + of, k.v + at, of_e, of_f, of_g);
            multiply(wide, rank, k.e, 1, k.f, k.g, lv + of, lv + of);
            add_gradients(wide, 0, k.f, k.g, k.w + at, lw + of, of_e, of_f, of_g);
            multiply(wide, 0, k.e, -1, k.f, k.g, lw + of, lw + of);
        }
    }
    add(n, of_c, 1, ly);
    add(rank * n, of_f, 1, lw);
    add(rank * n, of_g, 1, lv);
    narrow(out.E + h * N, of_e, 1, half, wide);
    narrow(out.B + h * N, lx, 1, half, wide);
    narrow(out.C + h * N, of_c, 1, half, wide);
    for (I r = 0; r < rank; r++) {
        narrow(out.F + h * N * rank + r, of_f + r * n, rank, half, wide);
        narrow(out.G + h * N * rank + r, of_g + r * n, rank, half, wide);
    }
}

/* Channels first .. last of each; `wide` and rank known, or not */
#define CHANNELS(NAME, WIDE, RANK)                                                                             \
    APART void NAME(const System *s, I first, I last, float *taps, Matrices emit, Matrices inject,             \
                    Matrices carry, const Gradients *out, float *room) {                                       \
        for (I h = first; h < last; h++) {                                                                     \
            if (out) gradients_of(s, h, WIDE, RANK, taps, emit, inject, carry, *out, room);                    \
            else operators_of(s, h, WIDE, RANK, taps, emit, inject, carry, room);                              \
        }                                                                                                      \
    }
CHANNELS(usual_channels, 32, 1)
CHANNELS(all_channels, widened(s->N / 2), s->rank)

APART void run(I H, const System *s, float *taps, Matrices emit, Matrices inject, Matrices carry, const Gradients *out,
               float *room, I threads) {
    const I usual = widened(s->N / 2) == 32 && s->rank == 1, size = operators_room(s->N, s->rank, s->T);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (I part = 0; part < threads; part++) {
        const I first = H * part / threads, last = H * (part + 1) / threads;
        (usual ? usual_channels : all_channels)(s, first, last, taps, emit, inject, carry, out, room + part * size);
    }
}

void operators(I H, I N, I rank, I T, const float *E, const float *F, const float *G, const float *B, const float *C,
               const float *skip, float *taps, float *emit, float *inject, float *carry, float *room, I threads) {
    const System s = {N, rank, T, E, F, G, B, C, skip};
    run(H, &s, taps, (Matrices){emit, T * N, N}, (Matrices){inject, N * T, T}, (Matrices){carry, N * N, N}, NULL, room,
        threads);
}

void operators_backward(I H, I N, I rank, I T, const float *E, const float *F, const float *G, const float *B,
                        const float *C, float *of_taps, float *of_emit, I emit_head, I emit_row, float *of_inject,
                        I inject_head, I inject_row, float *of_carry, I carry_head, I carry_row, float *of_E,
                        float *of_F, float *of_G, float *of_B, float *of_C, float *room, I threads) {
    const System s = {N, rank, T, E, F, G, B, C, NULL};
    const Gradients out = {of_E, of_F, of_G, of_B, of_C};
    run(H, &s, of_taps, (Matrices){of_emit, emit_head, emit_row}, (Matrices){of_inject, inject_head, inject_row},
        (Matrices){of_carry, carry_head, carry_row}, &out, room, threads);
}
"""
