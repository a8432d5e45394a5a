"""The C source of a decoding step on a CPU as a list of calls; native_library.py compiles it behind
native_layers_source.py and native_steps_source.py, native_step.py calls it.

`run` is a whole step: all threads go through the same list of calls together.
"""

SOURCE = r"""
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
