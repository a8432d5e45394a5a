"""C that others begin with: a register; exp, erf and the activations, of which the compiler makes vectors, where the C
library's are a call for every number. native_library.py puts it in front of their sources.
"""

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t I;

#define INLINE static inline __attribute__((always_inline))

/* A register, by name: of an array of sums the compiler keeps a copy in memory */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float Register __attribute__((vector_size(BYTES), aligned(4), may_alias));
#define AT(address) (*(Register *)(address))

/* exp(x), to a unit of the last digit: 2^n exp(r), x = n log(2) + r; 0 below -87, infinite above 88 */
INLINE float exp_of(float x) {
    const float whole = x * 1.44269504f + 12582912.0f, n = whole - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1;
    y = y * r + 1;
    uint32_t bits;
    memcpy(&bits, &whole, 4);
    bits = (bits << 23) + 0x3f800000;
    float scale;
    memcpy(&scale, &bits, 4);
    return x < -87 ? 0 : x > 88 ? INFINITY : y * scale;
}

/* erf(x), to four units of the last digit: x P(x^2) / Q(x^2), fitted to the least relative error below where it is 1 */
INLINE float erf_of(float x) {
    const float z = x * x;
    float p = 2.05091538e-6f, q = 3.80999332e-5f;
    p = p * z + 2.84875972e-4f;
    p = p * z + 3.76376072e-3f;
    p = p * z + 5.27431067e-2f;
    p = p * z + 0.190358555f;
    p = p * z + 1.12837915f;
    q = q * z + 1.16215061e-3f;
    q = q * z + 1.4965469e-2f;
    q = q * z + 0.114089963f;
    q = q * z + 0.502033622f;
    q = q * z + 1;
    return x > 3.9192f ? 1 : x < -3.9192f ? -1 : x * p / q;
}

/* The activations of activations.py and of the gates: 0 identity, 1 gelu, 2 silu */
INLINE float activated(I kind, float x) {
    if (kind == 1) return 0.5f * x * (1 + erf_of(x * 0.70710678f));
    return kind == 2 ? x / (1 + exp_of(-x)) : x;
}
"""
