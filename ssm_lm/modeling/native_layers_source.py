"""The C source of what stands around the state spaces in a decoding step on a CPU: embeddings, products, norms, gates,
activations. It is behind native_vectors_source.py, in front of native_steps_source.py and native_source.py.

Every function is one operation on few tokens, in float32, and stands for the PyTorch code named beside it, which is its
twin in the tests. Weights may be bfloat16 (`half` = 1): a float's upper half. All threads call it together, and share
the loops that are marked `omp for`, at whose end they wait for one another.
"""

SOURCE = r"""
static inline float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline float at(const void *p, I i, I half) {
    return half ? widen(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

/* y = W x + bias: x (B, in), W (out, in), y (B, out). Of few rows bound by the reading of W; four of them share it. Two
   registers of W at a time meet x `far` apart; those of bfloat16 are the lower and the upper halves of 32 bits, which
   need no widening, so there x has been parted: what stands at even places, then the rest. A row's sums are the same
   beside any other rows. AHEAD: how many bytes further the memory is asked for what comes */
#define LANES (BYTES / 4)
#define AHEAD 4096
typedef uint32_t Bits __attribute__((vector_size(BYTES), aligned(2), may_alias));
INLINE void two_floats(const float *w, Register *a, Register *b) {
    __builtin_prefetch((const char *)w + AHEAD);
    if (BYTES > 32) __builtin_prefetch((const char *)w + AHEAD + 64);
    *a = AT(w);
    *b = AT(w + LANES);
}
INLINE void two_halves(const uint16_t *w, Register *a, Register *b) {
    __builtin_prefetch((const char *)w + AHEAD);
    const Bits both = *(const Bits *)w, low = both << 16, high = both & 0xffff0000;
    memcpy(a, &low, BYTES);
    memcpy(b, &high, BYTES);
}
static void part(I B, I in, const float *x, float *to) {
    for (I b = 0; b < B; b++, x += in, to += in) {
        for (I i = 0; i < in; i++) to[i / 2 + i % 2 * ((in + 1) / 2)] = x[i];
    }
}
INLINE float sum_of(Register x) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (I i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
#define TERM(r) if (r < count) s##r += a * AT(near + r * in), t##r += b * AT(near + r * in + far);
#define KEEP(r, ONE)                                                                                      \
    if (r < count) {                                                                                      \
        float sum = sum_of(s##r + t##r) + plus;                                                           \
        for (I i = whole; i < in; i++) sum += ONE(w[i]) * x[r * in + (halves ? i / 2 + i % 2 * far : i)]; \
        y[r * out] = sum;                                                                                 \
    }
#define LINEAR(NAME, TYPE, TWO, ONE)                                                                               \
    INLINE void NAME##_rows(I count, I out, I in, const float *x, const TYPE *w, float plus, float *y) {           \
        const I halves = sizeof(TYPE) == 2, far = halves ? (in + 1) / 2 : LANES, whole = in - in % (2 * LANES);    \
        Register a, b, s0 = {0}, s1 = s0, s2 = s0, s3 = s0, t0 = s0, t1 = s0, t2 = s0, t3 = s0;                    \
        for (I i = 0; i < whole; i += 2 * LANES) {                                                                 \
            const float *near = x + (halves ? i / 2 : i);                                                          \
            TWO(w + i, &a, &b);                                                                                    \
            TERM(0) TERM(1) TERM(2) TERM(3)                                                                        \
        }                                                                                                          \
        KEEP(0, ONE) KEEP(1, ONE) KEEP(2, ONE) KEEP(3, ONE)                                                        \
    }                                                                                                              \
    static void NAME(I B, I out, I in, const float *x, const TYPE *W, const void *bias, I half, float *y) {        \
        _Pragma("omp for schedule(static)")                                                                        \
        for (I o = 0; o < out; o++) {                                                                              \
            const float plus = bias ? at(bias, o, half) : 0;                                                       \
            I b = 0;                                                                                               \
            for (; b + 4 <= B; b += 4) NAME##_rows(4, out, in, x + b * in, W + o * in, plus, y + b * out + o);     \
            for (; b < B; b++) NAME##_rows(1, out, in, x + b * in, W + o * in, plus, y + b * out + o);             \
        }                                                                                                          \
    }
#define SAME(x) (x)
LINEAR(linear_float, float, two_floats, SAME)
LINEAR(linear_half, uint16_t, two_halves, widen)

#define BLOCK 64     /* rows of x that stay near while a row of W meets them */
#define ROOM 131072  /* numbers of x that a thread parts for itself, on its stack, but for a single row */
static void linear(I B, I out, I in, const float *x, const void *W, const void *bias, I half, float *y) {
    I block = half && in * BLOCK > ROOM ? ROOM / in : BLOCK;
    if (block < 1) block = 1;
    for (I b = 0; b < B; b += block) {
        const I rows = B - b < block ? B - b : block;
        if (half) {
            float parted[rows * in];
            part(rows, in, x + b * in, parted);
            linear_half(rows, out, in, parted, W, bias, half, y + b * out);
        } else {
            linear_float(rows, out, in, x + b * in, W, bias, half, y + b * out);
        }
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

/* y = f(a) b for `rows` rows of `width` numbers, which lie a_apart, b_apart and y_apart; f: 0 identity, 2 silu */
static void multiply(I f, I rows, I width, const float *a, I a_apart, const float *b, I b_apart, float *y, I y_apart) {
    for (I r = 0; r < rows; r++) {
        #pragma omp for simd schedule(static) nowait
        for (I i = 0; i < width; i++) y[r * y_apart + i] = activated(f, a[r * a_apart + i]) * b[r * b_apart + i];
    }
    #pragma omp barrier
}

/* y += D x: x, y (B, H) */
static void add_skip(I B, I H, const float *x, const float *D, float *y) {
    #pragma omp for schedule(static) collapse(2)
    for (I b = 0; b < B; b++) for (I h = 0; h < H; h++) y[b * H + h] += D[h] * x[b * H + h];
}

/* `activated` of n numbers, y may be x */
static void activate(I kind, I n, const float *x, float *y) {
    #pragma omp for simd schedule(static)
    for (I i = 0; i < n; i++) y[i] = activated(kind, x[i]);
}

/* the residual h (B, H) after a sublayer. mode 0: h += p; 1, "glu": h += p[:H] sigmoid(p[H:]), p (B, 2H);
   2, "half": h += y sigmoid(p) */
static void add_gated(I mode, I B, I H, const float *p, const float *y, float *h) {
    for (I b = 0; b < B; b++, p += mode == 1 ? 2 * H : H, y += H, h += H) {
        const float *of = mode == 2 ? y : p, *gate = mode == 1 ? p + H : p;
        #pragma omp for simd schedule(static) nowait
        for (I i = 0; i < H; i++) h[i] += mode == 0 ? of[i] : of[i] / (1 + exp_of(-gate[i]));
    }
    #pragma omp barrier
}

/* mixers.masked: x (B, H) *= by (B) */
static void mask(I B, I H, float *x, const float *by) {
    #pragma omp for schedule(static)
    for (I b = 0; b < B; b++) for (I i = 0; i < H; i++) x[b * H + i] *= by[b];
}
"""
