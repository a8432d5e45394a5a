"""C that the libraries of scans and operators on a CPU begin with: products of small matrices in cache.

native_library.py puts it in front of their sources, behind native_vectors_source.py.
"""

SOURCE = r"""
#define APART static __attribute__((noinline)) /* compiled once, not in every loop */

INLINE float dot(I n, const float *a, const float *b) {
    float sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (I i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}
INLINE void add(I n, float *x, float a, const float *y) {
    #pragma omp simd
    for (I i = 0; i < n; i++) x[i] += a * y[i];
}

#define COLUMNS (2 * BYTES / 4)

/* count rows, 4 or 1, and COLUMNS columns of C = A B, or C += A B: see `product` */
#define ROW(r)                                                                   \
    Register left##r = {0}, right##r = {0};                                      \
    if (more && r < count) left##r = AT(C + r * c_row), right##r = AT(C + r * c_row + COLUMNS / 2);
#define TERM(r)                                                                  \
    if (r < count) left##r += a[r * a_row] * b_left, right##r += a[r * a_row] * b_right;
#define KEEP(r)                                                                  \
    if (r < count) AT(C + r * c_row) = left##r, AT(C + r * c_row + COLUMNS / 2) = right##r;
INLINE void tile(I count, I terms, const float *A, I a_row, I a_term, const float *B, I b_term, float *C, I c_row,
                 I more) {
    ROW(0) ROW(1) ROW(2) ROW(3)
    for (I k = 0; k < terms; k++) {
        const float *a = A + k * a_term;
        const Register b_left = AT(B + k * b_term), b_right = AT(B + k * b_term + COLUMNS / 2);
        TERM(0) TERM(1) TERM(2) TERM(3)
    }
    KEEP(0) KEEP(1) KEEP(2) KEEP(3)
}
/* C (rows, n) = A B, or C += A B where more, with A (rows, terms) and B (terms, n); n a multiple of 32. a_row, a_term,
   b_term, c_row: how far rows and terms lie apart */
APART void product(I rows, I terms, I n, const float *A, I a_row, I a_term, const float *B, I b_term, float *C, I c_row,
                   I more) {
    I i = 0;
    for (; i + 4 <= rows; i += 4) {
        for (I c = 0; c < n; c += COLUMNS) {
            tile(4, terms, A + i * a_row, a_row, a_term, B + c, b_term, C + i * c_row + c, c_row, more);
        }
    }
    for (; i < rows; i++) {
        for (I c = 0; c < n; c += COLUMNS) {
            tile(1, terms, A + i * a_row, a_row, a_term, B + c, b_term, C + i * c_row + c, c_row, more);
        }
    }
}

/* Matrices lie in rows of whole registers, zeros behind, as `product` reads them */
INLINE I columns(I n) { return (n + 31) / 32 * 32; }
/* Rows of `width` numbers as rows of columns(width), zeros behind */
APART void pad_rows(float *to, const float *from, I rows, I width) {
    const I wide = columns(width);
    for (I r = 0; r < rows; r++) {
        memcpy(to + r * wide, from + r * width, width * sizeof(float));
        memset(to + r * wide + width, 0, (wide - width) * sizeof(float));
    }
}
/* The transposed: from (rows, width), rows `apart`, to (width, wide), zeros behind */
APART void turn(float *to, I wide, const float *from, I apart, I rows, I width) {
    memset(to, 0, width * wide * sizeof(float));
    for (I first = 0; first < rows; first += 16) {
        const I last = first + 16 < rows ? first + 16 : rows;
        for (I c = 0; c < width; c++) for (I r = first; r < last; r++) to[c * wide + r] = from[r * apart + c];
    }
}
"""
