/* The decoding step of a few rows on a CPU: every product reads its weights once.

   inference/native_library.py compiles it for each type of the weights: -DSTORED=32 (float),
   64 (double) or 16 (bfloat16, widened to float in registers). One call computes one token of every
   row. Its threads are OpenMP's, the same as torch's where both have one library, and wait for each
   other actively within a call. The number of threads changes no bit: each output has one thread.

   Axes: B row, D dim, H query heads, N key/value heads, K head_dim, F hidden_dim, S key position
   (cache column), V vocabulary. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if STORED == 64
typedef double real, stored;
#define EXP exp
#elif STORED == 32
typedef float real, stored;
#define EXP expf
#else
typedef float real;
typedef uint16_t stored;
#define EXP expf
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define LANES ((int)(WIDTH / sizeof(real)))
#define INLINE static inline __attribute__((always_inline))

typedef real vector __attribute__((vector_size(WIDTH), aligned(sizeof(real)), may_alias));
typedef real part __attribute__((vector_size(16)));
#if STORED == 16
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a word's low half must be the first of its two weights"
#endif
typedef uint32_t words __attribute__((vector_size(WIDTH), aligned(sizeof(stored)), may_alias));
#define LINE (2 * LANES) /* weights that one load takes */
#else
#define LINE LANES
#endif

/* A block's weights [out, in], and its layer of the cache [B, N, S, K]. */
typedef struct {
    const stored *attn_norm, *q, *k, *v, *o, *ffn_norm, *gate, *up, *down;
    stored *keys, *values;
} Layer;

/* What one call reads and writes; native_step.py has the same fields in the same order. */
typedef struct {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size;
    int64_t rows, columns, slot, n_threads, widest; /* widest: elements of packed for a thread */
    double eps;
    const Layer *layers;
    const stored *embed, *norm, *head;
    const real *cos, *sin;           /* [S, K], the sine's first half negated */
    const int64_t *tokens, *padding; /* [B] */
    real *x, *normed;                /* [B, D], [threads, B, D] */
    real *qkv, *mixed;               /* [B, (H + 2 N) K], [B, H K] */
    real *gate, *up;                 /* [B, F] */
    real *scores;                    /* [threads, S] */
    real *packed;                    /* [threads, widest]: inputs in a product's order */
    real *logits;                    /* [B, V] */
} Step;

INLINE vector load(const real *from) { return *(const vector *)from; }

/* Return sum + weights[0:LINE] * x[0:LINE], lane by lane; x is packed. */
INLINE vector multiply_add(vector sum, const stored *weights, const real *x) {
#if STORED == 16
    words pairs = *(const words *)weights;
    sum += (vector)(pairs << 16) * load(x);
    return sum + (vector)(pairs & 0xffff0000) * load(x + LANES);
#else
    return sum + load(weights) * load(x);
#endif
}

#if STORED == 16
INLINE real widen(stored bits) {
    uint32_t word = (uint32_t)bits << 16;
    real value;
    memcpy(&value, &word, sizeof value);
    return value;
}

INLINE void add_scaled(real *sums, real by, const stored *from) {
    words pairs = *(const words *)from;
    *(vector *)sums += by * (vector)(pairs << 16);
    *(vector *)(sums + LANES) += by * (vector)(pairs & 0xffff0000);
}

/* Round to the nearest bfloat16, ties to even. */
INLINE stored narrow(real value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (value != value) return (stored)(word >> 16 | 0x40);
    return (stored)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

/* Put the even elements of each line before the odd ones, as a line of words is taken apart. */
static const real *packed(const real *x, int64_t n, int64_t rows, real *out) {
    for (int64_t b = 0; b < rows; b++, x += n, out += n) {
        int64_t i = 0;
        for (; i + LINE <= n; i += LINE)
            for (int64_t j = 0; j < LANES; j++) {
                out[i + j] = x[i + 2 * j];
                out[i + LANES + j] = x[i + 2 * j + 1];
            }
        for (; i < n; i++) out[i] = x[i];
    }
    return out - rows * n;
}

/* out = x / total, x packed. */
static void unpack(const real *x, int64_t n, real total, real *out) {
    for (int64_t i = 0; i < n; i++) {
        int64_t j = i % LINE, line = i - j;
        out[i] = (line + LINE > n ? x[i] : x[line + (j % 2) * LANES + j / 2]) / total;
    }
}
#else
INLINE void add_scaled(real *sums, real by, const stored *from) {
    *(vector *)sums += by * load(from);
}
INLINE void unpack(const real *x, int64_t n, real total, real *out) {
    for (int64_t i = 0; i < n; i++) out[i] = x[i] / total;
}
INLINE real widen(stored value) { return value; }
INLINE stored narrow(real value) { return value; }
INLINE const real *packed(const real *x, int64_t n, int64_t rows, real *out) { return x; }
#endif

/* Sum a vector's lanes, in pairs. */
INLINE real sum(vector v) {
    part parts[WIDTH / 16];
    memcpy(parts, &v, sizeof parts);
#if WIDTH == 64
    parts[0] += parts[2];
    parts[1] += parts[3];
#endif
#if WIDTH >= 32
    parts[0] += parts[1];
#endif
#if STORED == 64
    return parts[0][0] + parts[0][1];
#else
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
#endif
}

/* Bytes of weights asked for ahead, where a line takes so long that the processor itself does not
   look far enough; its own guess was better for one float32 row. */
#define AHEAD 8192
#define L1_BYTES 32768 /* of the processor's first cache; more inputs than it holds are halved */

#define UNROLLED _Pragma("GCC unroll 8")

/* Multiply one row of weights [n] by `batch` packed inputs: out[b] (+)= weights . x[b].
   A sum is kept in `parts` vectors. Both counts are constants where it is called, so that all of
   them stay in registers. Rows are read one after the other: several at once were slower. */
INLINE void tile(int batch, int parts, const stored *weights, int64_t n, const real *x, real *out,
                 int64_t out_stride, int add) {
    vector sums[8];
    UNROLLED for (int j = 0; j < batch * parts; j++) sums[j] = (vector){0};
    int64_t i = 0;
    for (; i + parts * LINE <= n; i += parts * LINE)
        UNROLLED for (int p = 0; p < parts; p++) {
            const stored *line = weights + i + p * LINE;
            if (batch > 1 || STORED == 16) __builtin_prefetch((const char *)line + AHEAD);
            UNROLLED for (int b = 0; b < batch; b++)
                sums[b * parts + p] =
                    multiply_add(sums[b * parts + p], line, x + b * n + i + p * LINE);
        }
    for (; i + LINE <= n; i += LINE)
        UNROLLED for (int b = 0; b < batch; b++)
            sums[b * parts] = multiply_add(sums[b * parts], weights + i, x + b * n + i);
    UNROLLED for (int b = 0; b < batch; b++) {
        vector all = sums[b * parts];
        UNROLLED for (int p = 1; p < parts; p++) all += sums[b * parts + p];
        real total = sum(all);
        for (int64_t j = i; j < n; j++) total += widen(weights[j]) * x[b * n + j];
        real *to = out + b * out_stride;
        *to = add ? *to + total : total;
    }
}

/* out[b][row] (+)= weights[row] . x[b], x packed [B, n], for the rows from `from` up to `to`. */
static void product(const stored *weights, int64_t n, int64_t from, int64_t to, const real *x,
                    int64_t rows, real *out, int64_t out_stride, int add) {
    for (int64_t r = from; r < to; r++) {
        int64_t b = 0;
#define TILE(batch, parts)                                                                        \
    for (; b + batch <= rows; b += batch)                                                         \
        tile(batch, parts, weights + r * n, n, x + b * n, out + b * out_stride + r, out_stride, add);
        if (8 * n * (int64_t)sizeof(real) <= L1_BYTES) TILE(8, 1)
        TILE(4, 1) TILE(2, 2) TILE(1, 4)
#undef TILE
    }
}

/* RMSNorm of all rows [B, D]: x / sqrt(mean(x^2) + eps) * weight. */
static const real *rms_norm(const Step *s, const stored *weight, real *out) {
    for (int64_t b = 0; b < s->rows; b++) {
        const real *x = s->x + b * s->dim;
        vector squares = {0};
        int64_t i = 0;
        for (; i + LANES <= s->dim; i += LANES) squares += load(x + i) * load(x + i);
        real total = sum(squares);
        for (; i < s->dim; i++) total += x[i] * x[i];
        real scale = (real)(1 / sqrt((double)total / (double)s->dim + s->eps));
        for (i = 0; i < s->dim; i++) out[b * s->dim + i] = x[i] * scale * widen(weight[i]);
    }
    return out;
}

/* Rotate the halves of a head [K] in place: x' = x cos + swapped(x) sin. */
static void rotate(real *x, const real *cos, const real *sin, int64_t size) {
    for (int64_t i = 0, j = size / 2; j < size; i++, j++) {
        real first = x[i], second = x[j];
        x[i] = first * cos[i] + second * sin[i];
        x[j] = second * cos[j] + first * sin[j];
    }
}

/* Rotate the queries, and write the rotated keys and the values into the cache's column `slot`. */
static void extend(const Step *s, const Layer *layer, int64_t thread, int64_t n_threads) {
    int64_t size = s->head_dim, heads = s->n_heads + s->n_kv_heads, all = heads + s->n_kv_heads;
    for (int64_t job = thread; job < s->rows * all; job += n_threads) {
        int64_t b = job / all, head = job % all;
        int64_t position = s->slot > s->padding[b] ? s->slot - s->padding[b] : 0;
        real *from = s->qkv + job * size;
        if (head < heads) rotate(from, s->cos + position * size, s->sin + position * size, size);
        if (head < s->n_heads) continue;
        int64_t n = head - (head < heads ? s->n_heads : heads);
        stored *to = head < heads ? layer->keys : layer->values;
        to += ((b * s->n_kv_heads + n) * s->columns + s->slot) * size;
        for (int64_t i = 0; i < size; i++) to[i] = narrow(from[i]);
    }
}

/* softmax(q k^T / sqrt(K)) v of one head [K] of one row, over its columns. */
static void attend(const Step *s, const Layer *layer, int64_t b, int64_t head, int64_t thread) {
    int64_t size = s->head_dim, first = s->padding[b] < s->slot ? s->padding[b] : s->slot;
    int64_t length = s->slot + 1 - first; /* a column of padding sees itself */
    int64_t n = head / (s->n_heads / s->n_kv_heads);
    int64_t at = ((b * s->n_kv_heads + n) * s->columns + first) * size;
    const real *q = s->qkv + (b * (s->n_heads + 2 * s->n_kv_heads) + head) * size;
    real *scores = s->scores + thread * s->columns, *sums = s->packed + thread * s->widest;
    product(layer->keys + at, size, 0, length, packed(q, size, 1, sums), 1, scores, 0, 0);
    real most = scores[0], total = 0, scale = (real)(1 / sqrt((double)size));
    for (int64_t i = 1; i < length; i++) most = scores[i] > most ? scores[i] : most;
    for (int64_t i = 0; i < length; i++) scores[i] = EXP((scores[i] - most) * scale);
    for (int64_t i = 0; i < length; i++) total += scores[i];
    memset(sums, 0, size * sizeof *sums);
    int64_t lines = size / LINE * LINE;
    const stored *value = layer->values + at;
    for (int64_t i = 0; i < length; i++, value += size) {
        for (int64_t k = 0; k < lines; k += LINE) add_scaled(sums + k, scores[i], value + k);
        for (int64_t k = lines; k < size; k++) sums[k] += scores[i] * widen(value[k]);
    }
    unpack(sums, size, total, s->mixed + (b * s->n_heads + head) * size);
}

/* One thread's share of a block; every thread norms for itself. */
static void block(const Step *s, const Layer *layer, int64_t thread, int64_t n_threads) {
    int64_t d = s->dim, f = s->hidden_dim, rows = s->rows;
    int64_t queries = s->n_heads * s->head_dim, keys = s->n_kv_heads * s->head_dim;
    int64_t qkv = queries + 2 * keys;
    real *normed = s->normed + thread * rows * d, *own = s->packed + thread * s->widest;
#define FROM(n) ((n) * thread / n_threads)
#define TO(n) ((n) * (thread + 1) / n_threads)
    const real *x = packed(rms_norm(s, layer->attn_norm, normed), d, rows, own);
    product(layer->q, d, FROM(queries), TO(queries), x, rows, s->qkv, qkv, 0);
    product(layer->k, d, FROM(keys), TO(keys), x, rows, s->qkv + queries, qkv, 0);
    product(layer->v, d, FROM(keys), TO(keys), x, rows, s->qkv + queries + keys, qkv, 0);
#pragma omp barrier
    extend(s, layer, thread, n_threads);
#pragma omp barrier
    for (int64_t job = FROM(rows * s->n_heads); job < TO(rows * s->n_heads); job++)
        attend(s, layer, job / s->n_heads, job % s->n_heads, thread);
#pragma omp barrier
    x = packed(s->mixed, queries, rows, own);
    product(layer->o, queries, FROM(d), TO(d), x, rows, s->x, d, 1);
#pragma omp barrier
    x = packed(rms_norm(s, layer->ffn_norm, normed), d, rows, own);
    product(layer->gate, d, FROM(f), TO(f), x, rows, s->gate, f, 0);
    product(layer->up, d, FROM(f), TO(f), x, rows, s->up, f, 0);
    for (int64_t b = 0; b < rows; b++)
        for (int64_t i = b * f + FROM(f); i < b * f + TO(f); i++)
            s->up[i] *= s->gate[i] / (1 + EXP(-s->gate[i]));
#pragma omp barrier
    x = packed(s->up, f, rows, own);
    product(layer->down, f, FROM(d), TO(d), x, rows, s->x, d, 1);
#pragma omp barrier
}

/* Compute the logits [B, V] after one token of every row; write its keys and values.
   Return 0, or without doing anything 1 where a token is outside the vocabulary. */
int decode(const Step *s) {
    for (int64_t b = 0; b < s->rows; b++)
        if (s->tokens[b] < 0 || s->tokens[b] >= s->vocab_size) return 1;
#pragma omp parallel num_threads((int)s->n_threads)
    {
        int64_t thread = omp_get_thread_num(), n_threads = omp_get_num_threads();
        int64_t d = s->dim, v = s->vocab_size, total = s->rows * d;
        for (int64_t i = FROM(total); i < TO(total); i++)
            s->x[i] = widen(s->embed[s->tokens[i / d] * d + i % d]);
#pragma omp barrier
        for (int64_t i = 0; i < s->n_layers; i++) block(s, s->layers + i, thread, n_threads);
        real *normed = s->normed + thread * total;
        const real *x = packed(rms_norm(s, s->norm, normed), d, s->rows,
                               s->packed + thread * s->widest);
        product(s->head, d, FROM(v), TO(v), x, s->rows, s->logits, v, 0);
    }
    return 0;
}
