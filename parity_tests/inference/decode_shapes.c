/* Runs the decoding step over shapes that no vector's width divides; prints sums of the logits.

   test_native_memory.py compiles it with sanitizers: each array is an allocation of its own and of
   exactly its size, so that whatever is read or written beside it ends the program. */

#include "decode_cpu.c"

#include <stdio.h>
#include <stdlib.h>

static double uniform(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (state >> 8) / 16777216.0 - 0.5;
}

static stored *weights(int64_t n) {
    stored *made = malloc((size_t)n * sizeof *made);
    for (int64_t i = 0; i < n; i++) made[i] = narrow((real)uniform());
    return made;
}

static real *reals(int64_t n) {
    real *made = malloc((size_t)n * sizeof *made);
    for (int64_t i = 0; i < n; i++) made[i] = (real)uniform();
    return made;
}

static int64_t *integers(int64_t n) { return calloc((size_t)n, sizeof(int64_t)); }

static Layer layer(const Step *s) {
    int64_t queries = s->n_heads * s->head_dim, keys = s->n_kv_heads * s->head_dim;
    int64_t d = s->dim, f = s->hidden_dim, cache = s->rows * keys * s->columns;
    Layer made;
    made.attn_norm = weights(d);
    made.q = weights(queries * d);
    made.k = weights(keys * d);
    made.v = weights(keys * d);
    made.o = weights(d * queries);
    made.ffn_norm = weights(d);
    made.gate = weights(f * d);
    made.up = weights(f * d);
    made.down = weights(d * f);
    made.keys = weights(cache);
    made.values = weights(cache);
    return made;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Decode tokens into every column, with as many columns of padding in row i as it fits, and more. */
static void run(Step s) {
    int64_t heads = s.n_heads + 2 * s.n_kv_heads, mixed = s.n_heads * s.head_dim;
    Layer layers[3];
    for (int64_t i = 0; i < s.n_layers; i++) layers[i] = layer(&s);
    int64_t *tokens = integers(s.rows), *padding = integers(s.rows);
    for (int64_t b = 0; b < s.rows; b++) padding[b] = b % (s.columns + 1);
    s.widest = s.rows * larger(s.dim, larger(s.hidden_dim, mixed));
    s.eps = 1e-5;
    s.layers = layers, s.tokens = tokens, s.padding = padding;
    s.embed = weights(s.vocab_size * s.dim);
    s.norm = weights(s.dim);
    s.head = weights(s.vocab_size * s.dim);
    s.cos = reals(s.columns * s.head_dim);
    s.sin = reals(s.columns * s.head_dim);
    s.x = reals(s.rows * s.dim), s.normed = reals(s.n_threads * s.rows * s.dim);
    s.qkv = reals(s.rows * heads * s.head_dim), s.mixed = reals(s.rows * mixed);
    s.gate = reals(s.rows * s.hidden_dim), s.up = reals(s.rows * s.hidden_dim);
    s.scores = reals(s.n_threads * s.columns), s.packed = reals(s.n_threads * s.widest);
    s.logits = reals(s.rows * s.vocab_size);
    for (s.slot = 0; s.slot < s.columns; s.slot++) {
        for (int64_t b = 0; b < s.rows; b++) tokens[b] = (7 * b + s.slot) % s.vocab_size;
        if (decode(&s)) abort();
        double weighted = 0, absolute = 0;
        for (int64_t i = 0; i < s.rows * s.vocab_size; i++) {
            weighted += s.logits[i] * (double)(i % 13 - 6);
            absolute += fabs((double)s.logits[i]);
        }
        printf("%.17g %.17g\n", weighted, absolute);
    }
}

int main(void) {
    /* dim, layers, heads, key heads, head_dim, hidden_dim, vocabulary, rows, columns, _, threads */
    run((Step){1, 1, 1, 1, 2, 1, 1, 1, 1, 0, 1});
    run((Step){2, 1, 1, 1, 2, 3, 5, 2, 1, 0, 8});
    run((Step){33, 2, 4, 2, 6, 17, 19, 3, 5, 0, 3});
    run((Step){65, 1, 3, 3, 34, 101, 7, 9, 4, 0, 2});
    run((Step){31, 3, 6, 2, 18, 33, 129, 32, 3, 0, 5});
    run((Step){130, 2, 8, 1, 66, 257, 65, 15, 20, 0, 4});
    return 0;
}
