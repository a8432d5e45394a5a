"""The C source of a decoding step's products, y = W x + bias, and of numbers that may be bfloat16 (`half` = 1), a
float's upper half. It is behind native_vectors_source.py, in front of native_layers_source.py.

Of few rows of x a product is bound by the reading of W, and four of them share it. Two registers of W at a time meet
numbers of x that lie `far` apart. Two registers of bfloat16 are the lower and the upper halves of 32 bits each, which
need no widening, so there x has been parted. A row's sums are the same beside any other rows.
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

#define LANES (BYTES / 4)
#define AHEAD 4096 /* how many bytes further the memory is asked for what comes */
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
/* Of each row what stands at even places, then the rest */
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
/* `count` rows of x, four or one, meet a row of W */
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
/* y = W x + bias: x (B, in), W (out, in), y (B, out) */
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
"""
