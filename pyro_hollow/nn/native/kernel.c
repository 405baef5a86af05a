/* Copyright Contributors to the pyro_hollow project.
   SPDX-License-Identifier: Apache-2.0

   Runge-Kutta steps of a hollow field with its divergence, and their backward pass: what HollowStepper does, for a block
   of samples at a time and one coordinate after the other, so that all that a coordinate needs stays in the cache.

   Arrays of numbers are row-major. Rows belong to samples, and columns, padded to whole vectors, to the units of a layer:
   so forward pass, backward pass and the gradients of the weights are products of one kind. States and slopes have the
   shape (batch, d + 1), the integral of the divergence in the last column. Defined when compiling: REAL, and UINT, the
   unsigned integer of its size. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX__)
#include <immintrin.h>
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES ((int64_t)(BYTES / sizeof(REAL)))
#define INLINE static inline __attribute__((always_inline))

typedef REAL vec __attribute__((vector_size(BYTES)));
typedef UINT bits __attribute__((vector_size(BYTES)));
typedef REAL unaligned __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));

/* The tensors of a field, or the sums of their gradients, one after the other, each as rows of padded columns; see
   BoundDense, BoundGraph, BoundLeaveOneOut and BoundClosedForm. FRONT is the first layer's weight of each group, HUBS that
   of hubs; or FRONT is the pool_weight, whose features come from FEATURE and its offsets. Offsets have one row, or one for
   each sample. */
enum {
    FRONT, OFFSET, SLOPE, HUBS, FEATURE, INNER_OFFSET, INNER_SLOPE, TERMS, TERM_OFFSET, TERM_SLOPE, INPUT, OUTPUT, SLOPES,
    LAYERS /* bias and weight of each of the later layers */
};

typedef struct {
    int64_t d, batch, groups, streams, depth, width;
    int64_t features, neighbours; /* 0 for a conditioner without */
    int64_t logistic_units, logistic_terms, offset_rows, inner_rows, term_rows, threads;
    double max_rate;      /* 0 for none */
    const int64_t *units; /* of each layer of a group, of which there are depth */
    const int64_t *index, *hubs; /* the neighbours of each coordinate; its row in HUBS, or -1 */
    const REAL *const *tensors, *const *transposed; /* the latter for matrices alone */
} Net;

/* A tensor of the caller, and where its copies begin: as it is, and transposed, or -1. */
typedef struct {
    int64_t groups, rows, columns, begin, transposed;
} Place;

typedef struct {
    const REAL *from;
    int64_t group, row, column; /* strides */
} Tensor;

typedef struct {
    int64_t stages;
    const double *a, *b, *c, *error; /* a with all its columns; error is NULL for a fixed step */
} Tableau;

/* Numbers in a vector, of which the columns of all tensors must be a multiple. */
int64_t lanes(void) { return LANES; }

static int64_t pad(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

static int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

/* The columns that a tile of a product takes at a time. */
#define VECTORS 2
#define PANEL (VECTORS * LANES)

/* Copies, and pads with zeros: in rows of all columns, or in panels, so that a product reads what it needs in a row. */
static void pack_one(
    REAL *to, const REAL *from, int64_t rows, int64_t columns, int64_t row, int64_t column, int64_t panel
) {
    for (int64_t begin = 0; begin < columns; begin += panel) {
        const int64_t width = smaller(panel, pad(columns - begin)), count = smaller(width, columns - begin);
        for (int64_t r = 0; r < rows; r++, to += width) {
            for (int64_t c = 0; c < count; c++) to[c] = from[r * row + (begin + c) * column];
            for (int64_t c = count; c < width; c++) to[c] = 0;
        }
    }
}

/* Copies tensors to memory, and tells where they are. Matrices, which are those with a transpose, lie in panels. */
void pack(
    const Place *places, const Tensor *tensors, int64_t count, REAL *memory, const REAL **copies, const REAL **transposed
) {
    for (int64_t k = 0; k < count; k++) {
        const Place p = places[k];
        const Tensor x = tensors[k];
        const int is_matrix = p.transposed >= 0;
        copies[k] = memory + p.begin, transposed[k] = is_matrix ? memory + p.transposed : NULL;
        for (int64_t g = 0; g < p.groups; g++) {
            const REAL *from = x.from + g * x.group;
            pack_one(memory + p.begin + g * p.rows * pad(p.columns), from, p.rows, p.columns, x.row, x.column,
                     is_matrix ? PANEL : pad(p.columns));
            if (is_matrix)
                pack_one(memory + p.transposed + g * p.columns * pad(p.rows), from, p.columns, p.rows, x.column, x.row,
                         PANEL);
        }
    }
}

INLINE vec broadcast(REAL value) { return value - (vec){0}; }

INLINE vec load(const REAL *from) { return *(const unaligned *)from; }

INLINE void store(REAL *to, vec value) { *(unaligned *)to = value; }

INLINE vec choose(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }

/* z between -limit and limit; NaN stays. */
INLINE vec clamp(vec z, REAL limit) {
#if defined(__AVX__) /* in half the time */
    if (sizeof(REAL) == 4) {
        const __m256 bound = _mm256_set1_ps(limit);
        return (vec)_mm256_max_ps(-bound, _mm256_min_ps(bound, (__m256)z));
    }
    const __m256d bound = _mm256_set1_pd(limit);
    return (vec)_mm256_max_pd(-bound, _mm256_min_pd(bound, (__m256d)z));
#else
    z = choose((bits)(z > limit), broadcast(limit), z);
    return choose((bits)(z < -limit), broadcast(-limit), z);
#endif
}

INLINE REAL total(vec value) {
    REAL lanes[LANES];
    store(lanes, value);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

/* 1 / (1 + exp(-z)), where exp(r + n log(2)) = 2^n exp(r) with |r| <= log(2) / 2 by the exponential series. */
INLINE vec logistic(vec z) {
    const int is_float = sizeof(REAL) == 4, digits = is_float ? 23 : 52, degree = is_float ? 6 : 12;
    const REAL limit = is_float ? 87 : 708, magic = is_float ? 12582912.0 : 6755399441055744.0; /* 1.5 * 2^digits */
    static const REAL series[] = {
        1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
        1.0 / 39916800, 1.0 / 479001600,
    };
    z = clamp(z, limit); /* where 2^n is a normal number */
    const vec shifted = z * (REAL)-1.4426950408889634 + magic, n = shifted - magic;
    vec r = -z - n * (REAL)(is_float ? 0.693359375 : 0.693147180369123816490); /* log(2) in two parts */
    r -= n * (REAL)(is_float ? -2.12194440e-4 : 1.90821492927058770002e-10);
    vec sum = broadcast(series[degree]);
    for (int k = degree - 1; k >= 0; k--) sum = series[k] + sum * r;
    const bits power = ((bits)shifted - (bits)broadcast(magic) + (UINT)(is_float ? 127 : 1023)) << digits;
    return 1 / (1 + sum * (vec)power);
}

#define ROWS 6

/* out[m][n] = start[m][n] + sum over k of left[m][k] right[k][n] for a tile, whose constant size fits the registers. A
   start of NULL is zero. */
INLINE void multiply_tile(
    REAL *out, int64_t out_stride, const REAL *start, int64_t start_stride, const REAL *left, int64_t row, int64_t column,
    const REAL *right, int64_t right_stride, int64_t inner, const int rows, const int vectors
) {
    vec sum[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        if (start != NULL) __builtin_prefetch(start + m * start_stride); /* which is added at the end, when it is there */
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[m][v] = (vec){0};
    }
    for (int64_t k = 0; k < inner; k++, left += column, right += right_stride) {
        vec factors[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) factors[v] = load(right + v * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[m][v] += left[m * row] * factors[v];
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            if (start != NULL) sum[m][v] += load(start + m * start_stride + v * LANES);
            store(out + m * out_stride + v * LANES, sum[m][v]);
        }
}

INLINE void multiply_rows(
    REAL *out, int64_t out_stride, const REAL *start, int64_t start_stride, const REAL *left, int64_t row, int64_t column,
    const REAL *right, int64_t right_stride, int64_t rows, int64_t inner, const int vectors
) {
#define TILE(n) multiply_tile(out, out_stride, start, start_stride, left, row, column, right, right_stride, inner, n, vectors)
    for (; rows >= ROWS; rows -= ROWS) {
        TILE(ROWS);
        out += ROWS * out_stride, left += ROWS * row;
        start = start == NULL ? NULL : start + ROWS * start_stride;
    }
    switch (rows) {
        case 5: TILE(5); break;
        case 4: TILE(4); break;
        case 3: TILE(3); break;
        case 2: TILE(2); break;
        case 1: TILE(1); break;
    }
#undef TILE
}

/* The same for matrices of any size with whole vectors of columns. Strides of left: from row to row, column to column;
   that of right is 0 if it lies in panels. */
static void multiply(
    REAL *out, int64_t out_stride, const REAL *start, int64_t start_stride, const REAL *left, int64_t row, int64_t column,
    const REAL *right, int64_t right_stride, int64_t rows, int64_t columns, int64_t inner
) {
    const int in_panels = right_stride == 0;
    for (int64_t n = 0; n < columns; n += PANEL) {
        const REAL *panel = right + n * (in_panels ? inner : 1);
        if (n + PANEL <= columns)
            multiply_rows(out + n, out_stride, start == NULL ? NULL : start + n, start_stride, left, row, column, panel,
                          in_panels ? PANEL : right_stride, rows, inner, VECTORS);
        else
            multiply_rows(out + n, out_stride, start == NULL ? NULL : start + n, start_stride, left, row, column, panel,
                          in_panels ? LANES : right_stride, rows, inner, 1);
    }
}

/* sum[r][k] += left[s][r] right[s][k] over the samples s: the gradient of a matrix. */
static void add_products(
    REAL *sum, int64_t columns, const REAL *left, int64_t left_stride, int64_t rows, const REAL *right, int64_t samples
) {
    multiply(sum, columns, sum, columns, left, 1, left_stride, right, columns, rows, columns, samples);
}

/* What an evaluation keeps of a block of samples, one array after the other. */
typedef struct {
    REAL *units, *unit_slopes;        /* (layers, groups, samples, columns); slopes only where units do not tell them */
    REAL *features, *feature_slopes;  /* (d, samples, columns) */
    REAL *terms, *arguments, *rates;  /* the logistic function u, its argument z where needed, and a */
} Saved;

static int64_t all_columns(const Net *net) {
    int64_t columns = 0;
    for (int64_t layer = 0; layer < net->depth; layer++) columns += net->groups * pad(net->units[layer]);
    return columns;
}

/* Numbers that an evaluation keeps of a sample. */
int64_t saved_size(const Net *net) {
    const int64_t units = all_columns(net) + net->d * pad(net->features), terms = net->d * pad(net->width);
    return units * (net->logistic_units ? 1 : 2) + terms * (net->logistic_terms ? 1 : 2) + net->d;
}

static Saved locate(const Net *net, REAL *memory, int64_t samples) {
    const int64_t units = samples * all_columns(net), features = samples * net->d * pad(net->features);
    const int64_t terms = samples * net->d * pad(net->width);
    Saved saved;
    saved.units = memory, memory += units;
    saved.features = memory, memory += features;
    saved.unit_slopes = net->logistic_units ? NULL : memory, memory += net->logistic_units ? 0 : units;
    saved.feature_slopes = net->logistic_units ? NULL : memory, memory += net->logistic_units ? 0 : features;
    saved.terms = memory, memory += terms;
    saved.arguments = net->logistic_terms ? NULL : memory, memory += net->logistic_terms ? 0 : terms;
    saved.rates = memory;
    return saved;
}

/* g in place of its arguments, and g' where it does not follow from g. */
static void activate(REAL *h, REAL *slopes, int64_t size) {
    for (int64_t k = 0; k < size; k += LANES) {
        const vec z = load(h + k), u = logistic(z);
        store(h + k, slopes == NULL ? u : z * u);
        if (slopes != NULL) store(slopes + k, u + z * (u - u * u));
    }
}

/* The gradients of the arguments in place of those of g. */
static void pull_activation(REAL *bar, const REAL *h, const REAL *slopes, int64_t size) {
    for (int64_t k = 0; k < size; k += LANES) {
        const vec u = load(h + k);
        store(bar + k, load(bar + k) * (slopes == NULL ? u - u * u : load(slopes + k)));
    }
}

/* A block of samples. */
typedef struct {
    int64_t samples, begin;
    REAL t;
    const REAL *x; /* (samples, columns), padded with zeros */
    Saved saved;
} Block;

/* Memory of one thread. */
typedef struct {
    REAL *start, *hidden, *p, *bar, *other, *direct;
    REAL *trace; /* (samples, LANES) */
    REAL *x_bar; /* as x */
} Work;

static int64_t hidden_dim(const Net *net) {
    const int64_t units = net->units[net->depth - 1];
    return net->streams == 1 ? units : net->streams * (units / net->d);
}

static int64_t widest(const Net *net) {
    int64_t columns = pad(net->features + net->neighbours); /* one of them is 0 */
    for (int64_t layer = 0; layer < net->depth; layer++)
        if (columns < pad(net->units[layer])) columns = pad(net->units[layer]);
    return columns < pad(hidden_dim(net)) ? pad(hidden_dim(net)) : columns;
}

static REAL *take(REAL **memory, int64_t size) {
    REAL *start = *memory;
    *memory += size;
    return start;
}

static int64_t work_size(const Net *net, int64_t samples) {
    const int64_t terms = pad(net->width + 2);
    return widest(net) + terms + samples * (3 * widest(net) + terms + 2 * LANES + pad(net->d)) + LANES;
}

static Work make_work(const Net *net, int64_t samples, REAL *memory) {
    Work work;
    work.start = take(&memory, widest(net) + pad(net->width + 2));
    work.hidden = take(&memory, samples * widest(net));
    work.bar = take(&memory, samples * widest(net));
    work.other = take(&memory, samples * widest(net));
    work.p = take(&memory, samples * pad(net->width + 2));
    work.direct = take(&memory, samples * LANES);
    work.trace = take(&memory, samples * LANES);
    work.x_bar = take(&memory, samples * pad(net->d));
    return work;
}

/* offset + t * slope for one of so many groups with so many columns: a row, or one for each sample, in to. */
static int64_t offset_at(
    REAL *to, const Block *block, const REAL *offset, const REAL *slope, int64_t group, int64_t groups, int64_t columns,
    int64_t rows
) {
    const int64_t shared = rows == 1;
    slope += group * columns, offset += group * columns + (shared ? 0 : block->begin * groups * columns);
    for (int64_t s = 0; s < (shared ? 1 : block->samples); s++, offset += groups * columns, to += columns)
        for (int64_t k = 0; k < columns; k += LANES) store(to + k, load(offset + k) + block->t * load(slope + k));
    return shared ? 0 : columns;
}

/* The gradients of the same. */
static void add_offset(
    const Block *block, REAL *offset, REAL *slope, int64_t group, int64_t groups, int64_t columns, int64_t rows,
    const REAL *bar
) {
    offset += group * columns + (rows == 1 ? 0 : block->begin * groups * columns);
    for (int64_t k = 0; k < columns; k += LANES) {
        vec sum = {0};
        for (int64_t s = 0; s < block->samples; s++) {
            const vec part = load(bar + s * columns + k);
            sum += part;
            REAL *each = offset + s * groups * columns + k;
            if (rows > 1) store(each, load(each) + part);
        }
        if (rows == 1) store(offset + k, load(offset + k) + sum);
        if (slope != NULL) store(slope + group * columns + k, load(slope + group * columns + k) + block->t * sum);
    }
}

/* The features of coordinate j, and its contribution to the pools of the others. */
static void pool(const Net *net, const Block *block, Work *work, int64_t j, REAL *out) {
    const int64_t columns = pad(net->features), size = block->samples * columns;
    REAL *features = block->saved.features + j * size;
    const REAL *weight = net->tensors[FEATURE] + j * columns;
    const int64_t stride = offset_at(work->bar, block, net->tensors[INNER_OFFSET], net->tensors[INNER_SLOPE], j, net->d,
                                     columns, net->inner_rows);
    for (int64_t s = 0; s < block->samples; s++)
        for (int64_t k = 0; k < columns; k += LANES)
            store(features + s * columns + k,
                  load(work->bar + s * stride + k) + block->x[s * pad(net->d) + j] * load(weight + k));
    activate(features, block->saved.feature_slopes == NULL ? NULL : block->saved.feature_slopes + j * size, size);
    multiply(out + j * size, columns, NULL, 0, features, columns, 1,
             net->transposed[FRONT] + j * net->features * columns, 0, block->samples, columns, net->features);
}

/* For each of d arrays the sum of the others, without ever adding it. */
static void sum_of_others(REAL *out, const REAL *values, int64_t d, int64_t size) {
    memset(out, 0, size * sizeof(REAL));
    for (int64_t j = 1; j < d; j++)
        for (int64_t k = 0; k < size; k++) out[j * size + k] = out[(j - 1) * size + k] + values[(j - 1) * size + k];
    for (int64_t k = 0; k < size; k += LANES) {
        vec after = {0};
        for (int64_t j = d - 1; j >= 0; j--) {
            store(out + j * size + k, load(out + j * size + k) + after);
            after += load(values + j * size + k);
        }
    }
}

/* The neighbours of a coordinate. */
static const REAL *gather(const Net *net, const Block *block, Work *work, int64_t i) {
    const int64_t count = net->neighbours, columns = pad(count);
    for (int64_t s = 0; s < block->samples; s++) {
        REAL *to = work->hidden + s * columns;
        for (int64_t k = 0; k < count; k++) to[k] = block->x[s * pad(net->d) + net->index[i * count + k]];
        for (int64_t k = count; k < columns; k++) to[k] = 0;
    }
    return work->hidden;
}

/* The arguments of a group's first units, from the offsets in work->bar. */
static void first_layer(const Net *net, const Block *block, Work *work, int64_t group, REAL *to, int64_t stride) {
    const int64_t samples = block->samples, d = net->d, columns = pad(net->units[0]), count = net->neighbours;
    if (count == 0) {
        multiply(to, columns, work->bar, stride, block->x, pad(d), 1, net->transposed[FRONT] + group * d * columns, 0, samples,
                 columns, d);
        return;
    }
    multiply(to, columns, work->bar, stride, gather(net, block, work, group), pad(count), 1,
             net->transposed[FRONT] + group * count * columns, 0, samples, columns, count);
    if (net->hubs[group] >= 0)
        multiply(to, columns, to, columns, block->x, pad(d), 1, net->transposed[HUBS] + net->hubs[group] * d * columns, 0,
                 samples, columns, d);
}

/* The units of all layers of a group. Pools are the sums of others, or NULL. */
static void layers(const Net *net, const Block *block, Work *work, int64_t group, const REAL *pools) {
    const int64_t samples = block->samples;
    REAL *before = NULL, *h = block->saved.units, *slopes = block->saved.unit_slopes;
    for (int64_t layer = 0; layer < net->depth; layer++) {
        const int64_t units = net->units[layer], columns = pad(units), size = samples * columns;
        REAL *to = h + group * size;
        if (layer == 0) {
            const int64_t stride = offset_at(work->bar, block, net->tensors[OFFSET], net->tensors[SLOPE], group,
                                             net->groups, columns, net->offset_rows);
            if (pools == NULL)
                first_layer(net, block, work, group, to, stride);
            else
                for (int64_t s = 0; s < samples; s++)
                    for (int64_t k = 0; k < columns; k += LANES)
                        store(to + s * columns + k,
                              load(pools + group * size + s * columns + k) + load(work->bar + s * stride + k));
        } else {
            const int64_t inputs = net->units[layer - 1], index = LAYERS + 2 * (layer - 1);
            multiply(to, columns, net->tensors[index] + group * columns, 0, before, pad(inputs), 1,
                     net->transposed[index + 1] + group * inputs * columns, 0, samples, columns, inputs);
        }
        activate(to, slopes == NULL ? NULL : slopes + group * size, size);
        before = to, h += net->groups * size, slopes = slopes == NULL ? NULL : slopes + net->groups * size;
    }
}

/* The hidden units of coordinate i: those of its group, or a part from each stream, put side by side. */
static const REAL *hidden_units(const Net *net, const Block *block, Work *work, int64_t i) {
    const int64_t units = net->units[net->depth - 1], size = block->samples * pad(units);
    const REAL *h = block->saved.units + block->samples * all_columns(net) - net->groups * size;
    if (net->streams == 1) return h + i * size;
    const int64_t part = units / net->d, columns = pad(hidden_dim(net));
    for (int64_t s = 0; s < block->samples; s++) {
        REAL *to = work->hidden + s * columns;
        for (int64_t stream = 0; stream < net->streams; stream++)
            memcpy(to + stream * part, h + stream * size + s * pad(units) + i * part, part * sizeof(REAL));
        for (int64_t k = net->streams * part; k < columns; k++) to[k] = 0;
    }
    return work->hidden;
}

/* The terms of coordinate i: fills f, with a stride of d + 1, and adds to the trace. */
static void terms(const Net *net, const Block *block, Work *work, int64_t i, REAL *f) {
    const int64_t samples = block->samples, width = net->width, columns = pad(width + 2), hidden = hidden_dim(net);
    const REAL *h = hidden_units(net, block, work, i);
    REAL *start = net->term_rows == 1 ? work->start : work->p;
    const int64_t stride = offset_at(start, block, net->tensors[TERM_OFFSET], net->tensors[TERM_SLOPE], i, net->d, columns,
                                     net->term_rows);
    multiply(work->p, columns, start, stride, h, pad(hidden), 1, net->transposed[TERMS] + i * hidden * columns, 0, samples,
             columns, hidden);
    REAL *rates = block->saved.rates + i * samples;
    for (int64_t s = 0; s < samples; s++) rates[s] = work->p[s * columns + width];
    if (net->max_rate > 0)
        for (int64_t s = 0; s < samples; s += LANES) {
            REAL lanes[LANES] = {0};
            const int64_t size = smaller(LANES, samples - s) * sizeof(REAL);
            memcpy(lanes, rates + s, size);
            store(lanes, 2 * (REAL)net->max_rate * logistic(load(lanes)) - (REAL)net->max_rate);
            memcpy(rates + s, lanes, size);
        }
    const int64_t padded = pad(width);
    const REAL *input = net->tensors[INPUT] + i * padded, *output = net->tensors[OUTPUT] + i * padded;
    const REAL *slopes = net->tensors[SLOPES] + i * padded;
    for (int64_t s = 0; s < samples; s++) {
        const REAL x = block->x[s * pad(net->d) + i], *p = work->p + s * columns;
        const int64_t at = (i * samples + s) * padded;
        vec value = {0}, trace = load(work->trace + s * LANES);
        for (int64_t m = 0; m < padded; m += LANES) {
            const vec z = load(p + m) + x * load(input + m), u = logistic(z), u1 = u - u * u;
            store(block->saved.terms + at + m, u);
            if (!net->logistic_terms) store(block->saved.arguments + at + m, z);
            value += load(output + m) * (net->logistic_terms ? u : z * u);
            trace += load(slopes + m) * (net->logistic_terms ? u1 : u + z * u1);
        }
        store(work->trace + s * LANES, trace);
        work->trace[s * LANES] += rates[s];
        f[s * (net->d + 1)] = p[width + 1] + rates[s] * x + total(value);
    }
}

/* The gradients of the terms' arguments in work->p, from those of f (with a stride) and the divergence; and of x. */
static void pull_terms(
    const Net *net, const Block *block, Work *work, int64_t i, const REAL *f_bar, int64_t stride, const REAL *divergence_bar,
    REAL *const *sums
) {
    const int64_t samples = block->samples, d = net->d, width = net->width, padded = pad(width), columns = pad(width + 2);
    const REAL *rates = block->saved.rates + i * samples, half = net->max_rate / 2;
    memset(work->direct, 0, samples * LANES * sizeof(REAL));
    for (int64_t m = 0; m < padded; m += LANES) {
        const int64_t im = i * padded + m;
        const vec input = load(net->tensors[INPUT] + im), output = load(net->tensors[OUTPUT] + im);
        const vec slopes = load(net->tensors[SLOPES] + im);
        vec input_bar = {0}, output_bar = {0}, slopes_bar = {0};
        for (int64_t s = 0; s < samples; s++) {
            const REAL f = f_bar[s * stride], q = divergence_bar[s];
            const int64_t at = (i * samples + s) * padded + m;
            const vec u = load(block->saved.terms + at), u1 = u - u * u, u2 = u1 - 2 * u1 * u;
            vec value = u, first = u1, second = u2;
            if (!net->logistic_terms) {
                const vec z = load(block->saved.arguments + at);
                value = z * u, first = u + z * u1, second = 2 * u1 + z * u2;
            }
            const vec bar = q * slopes * second + f * output * first;
            store(work->p + s * columns + m, bar);
            store(work->direct + s * LANES, load(work->direct + s * LANES) + input * bar);
            input_bar += block->x[s * pad(d) + i] * bar, output_bar += f * value, slopes_bar += q * first;
        }
        if (sums != NULL) {
            store(sums[INPUT] + im, load(sums[INPUT] + im) + input_bar);
            store(sums[OUTPUT] + im, load(sums[OUTPUT] + im) + output_bar);
            store(sums[SLOPES] + im, load(sums[SLOPES] + im) + slopes_bar);
        }
    }
    for (int64_t s = 0; s < samples; s++) {
        const REAL f = f_bar[s * stride], a = rates[s];
        const REAL bar = divergence_bar[s] + f * block->x[s * pad(d) + i];
        REAL *p = work->p + s * columns;
        p[width] = half > 0 ? bar * (half - a * a * (1 / (4 * half))) : bar, p[width + 1] = f;
        for (int64_t m = width + 2; m < columns; m++) p[m] = 0;
        work->x_bar[s * pad(d) + i] += f * a + total(load(work->direct + s * LANES));
    }
}

/* The gradient of the hidden units in bar, which belongs to the last layer of a group, or to parts of all streams. */
static void pull_hidden(const Net *net, const Block *block, Work *work, int64_t i, REAL *bar, REAL *const *sums) {
    const int64_t samples = block->samples, rows = net->width + 2, columns = pad(rows), hidden = hidden_dim(net);
    const int64_t padded = pad(hidden);
    if (sums != NULL) {
        const REAL *h = hidden_units(net, block, work, i);
        add_products(sums[TERMS] + i * rows * padded, padded, work->p, columns, rows, h, samples);
        add_offset(block, sums[TERM_OFFSET], sums[TERM_SLOPE], i, net->d, columns, net->term_rows, work->p);
    }
    REAL *to = net->streams == 1 ? bar : work->hidden;
    multiply(to, padded, NULL, 0, work->p, columns, 1, net->tensors[TERMS] + i * rows * padded, 0, samples, padded, rows);
    if (net->streams == 1) return;
    const int64_t units = net->units[net->depth - 1], part = units / net->d, size = samples * pad(units);
    for (int64_t s = 0; s < samples; s++)
        for (int64_t stream = 0; stream < net->streams; stream++)
            memcpy(bar + stream * size + s * pad(units) + i * part, to + s * padded + stream * part, part * sizeof(REAL));
}

/* From the gradient of a group's last units, which is overwritten, to those of the first layer's arguments, returned. */
static REAL *pull_layers(
    const Net *net, const Block *block, Work *work, int64_t group, REAL *bar, REAL *const *sums
) {
    const int64_t samples = block->samples;
    const REAL *h = block->saved.units + samples * all_columns(net), *slopes = block->saved.unit_slopes;
    slopes = slopes == NULL ? NULL : slopes + samples * all_columns(net);
    for (int64_t layer = net->depth - 1;; layer--) {
        const int64_t units = net->units[layer], columns = pad(units), size = samples * columns;
        h -= net->groups * size, slopes = slopes == NULL ? NULL : slopes - net->groups * size;
        pull_activation(bar, h + group * size, slopes == NULL ? NULL : slopes + group * size, size);
        if (layer == 0) return bar;
        const int64_t inputs = net->units[layer - 1], padded = pad(inputs), index = LAYERS + 2 * (layer - 1);
        if (sums != NULL) {
            const REAL *before = h - net->groups * samples * padded + group * samples * padded;
            add_products(sums[index + 1] + group * units * padded, padded, bar, columns, units, before, samples);
            add_offset(block, sums[index], NULL, group, net->groups, columns, 1, bar);
        }
        REAL *next = bar == work->bar ? work->other : work->bar;
        multiply(next, padded, NULL, 0, bar, columns, 1, net->tensors[index + 1] + group * units * padded, 0, samples, padded,
                 units);
        bar = next;
    }
}

/* The gradients of a matrix of a first layer that sees all of x, and of x. */
static void pull_dense(
    const Net *net, const Block *block, Work *work, const REAL *weight, REAL *sum, const REAL *bar
) {
    const int64_t units = net->units[0], columns = pad(units), padded = pad(net->d);
    if (sum != NULL) add_products(sum, padded, bar, columns, units, block->x, block->samples);
    multiply(work->x_bar, padded, work->x_bar, padded, bar, columns, 1, weight, 0, block->samples, padded, units);
}

/* The gradients of the first layer's weights, and of x. */
static void pull_front(const Net *net, const Block *block, Work *work, int64_t group, const REAL *bar, REAL *const *sums) {
    const int64_t samples = block->samples, d = net->d, units = net->units[0], columns = pad(units);
    const int64_t count = net->neighbours, padded = pad(count > 0 ? count : d), at = group * units * padded;
    const REAL *weight = net->tensors[FRONT] + at;
    REAL *sum = sums == NULL ? NULL : sums[FRONT] + at;
    if (count == 0) {
        pull_dense(net, block, work, weight, sum, bar);
        return;
    }
    if (sum != NULL) add_products(sum, padded, bar, columns, units, gather(net, block, work, group), samples);
    REAL *neighbours_bar = work->hidden;
    multiply(neighbours_bar, padded, NULL, 0, bar, columns, 1, weight, 0, samples, padded, units);
    for (int64_t s = 0; s < samples; s++)
        for (int64_t k = 0; k < count; k++)
            work->x_bar[s * pad(d) + net->index[group * count + k]] += neighbours_bar[s * padded + k];
    const int64_t hub = net->hubs[group] * units * pad(d);
    if (hub >= 0) pull_dense(net, block, work, net->tensors[HUBS] + hub, sums == NULL ? NULL : sums[HUBS] + hub, bar);
}

/* The same for features of coordinate j, from the gradient of its contribution to the pools. */
static void pull_pool(const Net *net, const Block *block, Work *work, int64_t j, const REAL *bar, REAL *const *sums) {
    const int64_t samples = block->samples, features = net->features, columns = pad(features), size = samples * columns;
    const REAL *h = block->saved.features + j * size, *slopes = block->saved.feature_slopes;
    multiply(work->bar, columns, NULL, 0, bar, columns, 1, net->tensors[FRONT] + j * features * columns, 0, samples, columns,
             features);
    pull_activation(work->bar, h, slopes == NULL ? NULL : slopes + j * size, size);
    const REAL *weight = net->tensors[FEATURE] + j * columns;
    for (int64_t s = 0; s < samples; s++) {
        vec sum = {0};
        for (int64_t k = 0; k < columns; k += LANES) sum += load(weight + k) * load(work->bar + s * columns + k);
        work->x_bar[s * pad(net->d) + j] += total(sum);
    }
    if (sums == NULL) return;
    add_products(sums[FRONT] + j * features * columns, columns, bar, columns, features, h, samples);
    add_products(sums[FEATURE] + j * columns, columns, block->x + j, pad(net->d), 1, work->bar, samples);
    add_offset(block, sums[INNER_OFFSET], sums[INNER_SLOPE], j, net->d, columns, net->inner_rows, work->bar);
}

/* Samples are taken in blocks of this size, so that what a layer needs of them stays in the cache. */
#define LARGEST_BLOCK 48

static int64_t block_size(const Net *net) {
    const int64_t blocks = (net->batch + LARGEST_BLOCK - 1) / LARGEST_BLOCK;
    return (net->batch + blocks - 1) / blocks;
}

/* Memory of all threads for a step or its backward pass. */
typedef struct {
    REAL *x, *saved;             /* of a block; saved where nothing is kept */
    REAL *pools, *others;        /* of all coordinates; or the gradients of the last units of all groups */
    Work *works;
    void *memory;
} Memory;

/* Numbers of a sample that all threads share. */
static int64_t shared_size(const Net *net) {
    const int64_t last = net->groups * pad(net->units[net->depth - 1]), pools = net->d * pad(net->features);
    return net->streams > 1 ? last : 2 * pools;
}

/* Memory, with so many numbers in extra; -1 if there is none. The caller frees memory and works. */
static int allocate(const Net *net, int64_t numbers, Memory *memory, REAL **extra) {
    const int64_t samples = block_size(net), size = pad(work_size(net, samples));
    const int64_t kept = saved_size(net);
    const int64_t all = samples * (pad(net->d) + shared_size(net) + kept) + net->threads * size + numbers;
    REAL *at = memory->memory = malloc(all * sizeof(REAL));
    memory->works = malloc(net->threads * sizeof(Work));
    if (at == NULL || memory->works == NULL) {
        free(at), free(memory->works);
        return -1;
    }
    memory->x = take(&at, samples * pad(net->d));
    memory->saved = take(&at, samples * kept);
    memory->pools = take(&at, samples * shared_size(net));
    memory->others = net->streams > 1 ? NULL : memory->pools + samples * net->d * pad(net->features);
    for (int64_t k = 0; k < net->threads; k++) memory->works[k] = make_work(net, samples, take(&at, size));
    *extra = at;
    return 0;
}

static void release(Memory *memory) { free(memory->memory), free(memory->works); }

static int thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static Block make_block(const Net *net, const Memory *memory, REAL t, const REAL *x, int64_t begin, REAL *saved) {
    const int64_t samples = smaller(block_size(net), net->batch - begin), columns = pad(net->d);
    for (int64_t s = 0; s < samples; s++) {
        REAL *to = memory->x + s * columns;
        memcpy(to, x + (begin + s) * (net->d + 1), net->d * sizeof(REAL));
        for (int64_t k = net->d; k < columns; k++) to[k] = 0;
    }
    saved = saved == NULL ? memory->saved : saved + begin * saved_size(net);
    return (Block){samples, begin, t, memory->x, locate(net, saved, samples)};
}

/* Fills the slope, with shape (batch, d + 1), and what the backward pass needs. */
static void evaluate(const Net *net, const Memory *memory, double t, const REAL *x, REAL *slope, REAL *saved) {
    const int64_t d = net->d;
    for (int64_t begin = 0; begin < net->batch; begin += block_size(net)) {
        const Block block = make_block(net, memory, t, x, begin, saved);
        const int64_t samples = block.samples;
        REAL *f = slope + begin * (d + 1);
        for (int64_t k = 0; k < net->threads; k++) /* some of which may not get to run */
            memset(memory->works[k].trace, 0, samples * LANES * sizeof(REAL));
#pragma omp parallel num_threads(net->threads) if (net->threads > 1)
        {
            Work *work = memory->works + thread();
            if (net->features > 0) {
#pragma omp for schedule(static)
                for (int64_t j = 0; j < d; j++) pool(net, &block, work, j, memory->pools);
#pragma omp single
                sum_of_others(memory->others, memory->pools, d, samples * pad(net->features));
            }
#pragma omp for schedule(static)
            for (int64_t group = 0; group < net->groups; group++) {
                layers(net, &block, work, group, net->features > 0 ? memory->others : NULL);
                if (net->streams == 1) terms(net, &block, work, group, f + group);
            }
            if (net->streams > 1) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < d; i++) terms(net, &block, work, i, f + i);
            }
        }
        for (int64_t s = 0; s < samples; s++) {
            vec trace = {0};
            for (int64_t k = 0; k < net->threads; k++) trace += load(memory->works[k].trace + s * LANES);
            f[s * (d + 1) + d] = total(trace);
        }
    }
}

/* The gradient of x, with shape (batch, d), from those of f (with a stride) and of the divergence; adds to sums, unless
   they are NULL. */
static void pull(
    const Net *net, const Memory *memory, double t, const REAL *x, REAL *saved, const REAL *f_bar, int64_t stride,
    const REAL *divergence_bar, REAL *x_bar, REAL *const *sums
) {
    const int64_t d = net->d, columns = pad(d);
    for (int64_t begin = 0; begin < net->batch; begin += block_size(net)) {
        const Block block = make_block(net, memory, t, x, begin, saved);
        const int64_t samples = block.samples, front = samples * pad(net->units[0]);
        const int64_t last = samples * pad(net->units[net->depth - 1]);
        const REAL *f = f_bar + begin * stride, *divergence = divergence_bar + begin;
        for (int64_t k = 0; k < net->threads; k++)
            memset(memory->works[k].x_bar, 0, samples * columns * sizeof(REAL));
#pragma omp parallel num_threads(net->threads) if (net->threads > 1)
        {
            Work *work = memory->works + thread();
            if (net->streams > 1) {
#pragma omp single
                memset(memory->pools, 0, net->groups * last * sizeof(REAL)); /* for the padding */
#pragma omp for schedule(static)
                for (int64_t i = 0; i < d; i++) {
                    pull_terms(net, &block, work, i, f + i, stride, divergence, sums);
                    pull_hidden(net, &block, work, i, memory->pools, sums);
                }
            }
#pragma omp for schedule(static)
            for (int64_t group = 0; group < net->groups; group++) {
                REAL *bar = work->bar;
                if (net->streams == 1) {
                    pull_terms(net, &block, work, group, f + group, stride, divergence, sums);
                    pull_hidden(net, &block, work, group, bar, sums);
                } else {
                    bar = memory->pools + group * last;
                }
                bar = pull_layers(net, &block, work, group, bar, sums);
                if (sums != NULL)
                    add_offset(&block, sums[OFFSET], sums[SLOPE], group, net->groups, pad(net->units[0]), net->offset_rows,
                               bar);
                if (net->features == 0)
                    pull_front(net, &block, work, group, bar, sums);
                else
                    memcpy(memory->pools + group * front, bar, front * sizeof(REAL));
            }
            if (net->features > 0) {
#pragma omp single
                sum_of_others(memory->others, memory->pools, d, front);
#pragma omp for schedule(static)
                for (int64_t j = 0; j < d; j++) pull_pool(net, &block, work, j, memory->others + j * front, sums);
            }
        }
        for (int64_t s = 0; s < samples; s++)
            for (int64_t i = 0; i < d; i++) {
                REAL sum = 0;
                for (int64_t k = 0; k < net->threads; k++) sum += memory->works[k].x_bar[s * columns + i];
                x_bar[(begin + s) * d + i] = sum;
            }
    }
}

/* out = x + h * (the sum of weight[stride * s] * slopes[s] for s from begin to end), all of a size. */
static void combine(
    REAL *out, const REAL *x, double h, const double *weights, int64_t stride, const REAL *slopes, int64_t begin,
    int64_t end, int64_t size
) {
    if (out != x) memcpy(out, x, size * sizeof(REAL));
    for (int64_t s = begin; s < end; s++) {
        const REAL weight = h * weights[stride * s];
        if (weight != 0)
            for (int64_t k = 0; k < size; k++) out[k] += weight * slopes[s * size + k];
    }
}

/* The square of the largest root mean square of error over tolerance in a part of the state, x or the integral, of any
   sample; NAN if one is not finite. */
static double largest_error(
    const REAL *error, const REAL *start, const REAL *end, int64_t d, int64_t batch, double rtol, double atol
) {
    double worst = 0;
    for (int64_t b = 0; b < batch; b++, error += d + 1, start += d + 1, end += d + 1) {
        double sum = 0, ratio = 0;
        for (int64_t k = 0; k <= d; k++) {
            ratio = error[k] / (atol + rtol * fmax(fabs(start[k]), fabs(end[k])));
            if (k < d) sum += ratio * ratio;
        }
        if (!isfinite(sum) || !isfinite(ratio)) return NAN;
        worst = fmax(worst, fmax(sum / d, ratio * ratio));
    }
    return worst;
}

/* One step: fills the states and slopes of its stages, of which the first slope is known if told so, what each of them
   keeps in saved, unless that is NULL, and the state at its end. With an error estimate evaluates there, too, and returns the square of the
   error's ratio; -1 if there is no memory. */
double step(
    const Net *net, const Tableau *tableau, double t, double h, const REAL *y, int64_t known, REAL *states,
    REAL *slopes, REAL *const *saved, REAL *end, double rtol, double atol
) {
    const int64_t stages = tableau->stages, size = net->batch * (net->d + 1);
    Memory memory;
    REAL *error;
    if (allocate(net, size, &memory, &error) < 0) return -1;
    for (int64_t s = 0; s < stages; s++) {
        combine(states + s * size, y, h, tableau->a + s * stages, 1, slopes, 0, s, size);
        if (s >= known)
            evaluate(net, &memory, t + tableau->c[s] * h, states + s * size, slopes + s * size,
                     saved == NULL ? NULL : saved[s]);
    }
    combine(end, y, h, tableau->b, 1, slopes, 0, stages, size);
    double worst = 0;
    if (tableau->error != NULL) {
        evaluate(net, &memory, t + h, end, slopes + stages * size, saved == NULL ? NULL : saved[stages]);
        memset(error, 0, size * sizeof(REAL));
        combine(error, error, h, tableau->error, 1, slopes, 0, stages + 1, size);
        worst = largest_error(error, y, end, net->d, net->batch, rtol, atol);
    }
    release(&memory);
    return worst;
}

/* Pulls the gradient at the end of a step back to its start, in place, and adds to those of the weights if these are
   wanted. Returns 0, or -1 if there is no memory. */
int step_vjp(
    const Net *net, REAL *const *sums, const Tableau *tableau, double t, double h, const REAL *states,
    REAL *const *saved, REAL *y_bar
) {
    const int64_t stages = tableau->stages, d = net->d, batch = net->batch, size = d * batch;
    Memory memory;
    REAL *x_bar;
    if (allocate(net, (2 + stages) * size + batch, &memory, &x_bar) < 0) return -1;
    REAL *slope_bar = x_bar + size, *states_bar = slope_bar + size, *divergence_bar = states_bar + stages * size;
    for (int64_t b = 0; b < batch; b++) memcpy(x_bar + b * d, y_bar + b * (d + 1), d * sizeof(REAL));
    for (int64_t s = stages - 1; s >= 0; s--) {
        memset(slope_bar, 0, size * sizeof(REAL));
        combine(slope_bar, slope_bar, h * tableau->b[s], (double[]){1}, 1, x_bar, 0, 1, size);
        combine(slope_bar, slope_bar, h, tableau->a + s, stages, states_bar, s + 1, stages, size);
        for (int64_t b = 0; b < batch; b++) divergence_bar[b] = h * tableau->b[s] * y_bar[b * (d + 1) + d];
        pull(net, &memory, t + tableau->c[s] * h, states + s * (size + batch), saved[s], slope_bar, d, divergence_bar,
             states_bar + s * size, sums);
    }
    for (int64_t s = 0; s < stages; s++)
        for (int64_t k = 0; k < size; k++) x_bar[k] += states_bar[s * size + k];
    for (int64_t b = 0; b < batch; b++) memcpy(y_bar + b * (d + 1), x_bar + b * d, d * sizeof(REAL));
    release(&memory);
    return 0;
}

/* Carries the score, with shape (batch, d), from the start of a step to its end, in place. Returns 0, or -1 if there is
   no memory. */
int step_score(
    const Net *net, const Tableau *tableau, double t, double h, const REAL *states, REAL *const *saved, REAL *score
) {
    const int64_t stages = tableau->stages, batch = net->batch, size = net->d * batch;
    Memory memory;
    REAL *slopes;
    if (allocate(net, (stages + 1) * size + batch, &memory, &slopes) < 0) return -1;
    REAL *stage = slopes + stages * size, *ones = stage + size;
    for (int64_t b = 0; b < batch; b++) ones[b] = 1;
    for (int64_t s = 0; s < stages; s++) {
        combine(stage, score, -h, tableau->a + s * stages, 1, slopes, 0, s, size);
        pull(net, &memory, t + tableau->c[s] * h, states + s * (size + batch), saved[s], stage, net->d, ones,
             slopes + s * size, NULL);
    }
    combine(score, score, -h, tableau->b, 1, slopes, 0, stages, size);
    release(&memory);
    return 0;
}
