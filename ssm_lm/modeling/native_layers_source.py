"""The C source of what stands around the state spaces in a decoding step on a CPU: embeddings, norms, gates,
activations. It is behind native_linear_source.py, which has the products, in front of native_steps_source.py.

Every function is one operation on few tokens, in float32, and stands for the PyTorch code named beside it, which is its
twin in the tests. Weights may be bfloat16 (`half` = 1). All threads call it together, and share the loops that are
marked `omp for`, at whose end they wait for one another.
"""

SOURCE = r"""
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
    const I width = mode == 1 ? 2 * H : H;
    for (I b = 0; b < B; b++) {
        const float *of = mode == 2 ? y + b * H : p + b * width, *gate = p + (b + 1) * width - H;
        float *to = h + b * H;
        #pragma omp for simd schedule(static) nowait
        for (I i = 0; i < H; i++) to[i] += mode == 0 ? of[i] : of[i] / (1 + exp_of(-gate[i]));
    }
    #pragma omp barrier
}

/* mixers.masked: x (B, H) *= by (B) */
static void mask(I B, I H, float *x, const float *by) {
    #pragma omp for schedule(static)
    for (I b = 0; b < B; b++) for (I i = 0; i < H; i++) x[b * H + i] *= by[b];
}
"""
