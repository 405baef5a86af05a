/* Copyright Contributors to the pyro_hollow project.
   SPDX-License-Identifier: Apache-2.0

   Runge-Kutta steps of a hollow field (grouped conditioner, closed-form transformer) with its divergence, and their
   backward pass. It does what HollowStepper does, on as many samples at a time as a vector register holds: so all that a
   coordinate needs stays in the cache, and nothing is kept of a stage but its state.

   Arrays of the caller are coordinate-major: states and slopes (d + 1, batch), the integral of the divergence in the
   last row, and those of all stages (stages, d + 1, batch). Defined when compiling: REAL, and UINT, the unsigned integer
   of its size. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define LANES ((int64_t)(BYTES / sizeof(REAL)))

typedef REAL vec __attribute__((vector_size(BYTES)));
typedef UINT bits __attribute__((vector_size(BYTES)));

/* The bound tensors; see BoundDense and BoundClosedForm. Offsets have one column, or one for each sample. */
typedef struct {
    int64_t d, batch, depth, width, logistic_units, logistic_terms, offset_columns, term_columns;
    double max_rate; /* 0 for none */
    const int64_t *units; /* of each layer of the conditioner, of which there are depth */
    const REAL *const *biases, *const *weights; /* of all but the first */
    const REAL *weight, *offset; /* of the first, time in the last column */
    const REAL *term_weight, *term_time, *term_offset, *input_weight, *output_weight, *slopes;
} Net;

/* The sums of the gradients; see the same. */
typedef struct {
    REAL *const *biases, *const *weights;
    REAL *weight, *offset, *term_weight, *term_time, *term_offset, *input_weight, *output_weight, *slopes;
} Sums;

typedef struct {
    int64_t stages;
    const double *a, *b, *c, *error; /* a with all its columns; error is NULL for a fixed step */
} Tableau;

/* What is known of one group of samples: of all coordinates, and then of the one at hand. */
typedef struct {
    vec *x, *x_bar, *f_bar;
    vec *h, *slope, *z_bar; /* the units of all layers, one after the other; g'; the gradients of their arguments */
    vec *p, *p_bar, *value, *first, *second; /* the terms: their arguments with gradients, g, g' and g'' */
} Work;

static int64_t all_units(const Net *net) {
    int64_t total = 0;
    for (int64_t layer = 0; layer < net->depth; layer++) total += net->units[layer];
    return total;
}

static vec broadcast(REAL value) { return value - (vec){0}; }

static vec load(const REAL *from, int64_t count) {
    vec value = {0};
    if (count == LANES)
        memcpy(&value, from, sizeof value);
    else
        memcpy(&value, from, count * sizeof(REAL));
    return value;
}

static void store(REAL *to, vec value, int64_t count) {
    if (count == LANES)
        memcpy(to, &value, sizeof value);
    else
        memcpy(to, &value, count * sizeof(REAL));
}

static vec choose(bits mask, vec yes, vec no) { return (vec)((mask & (bits)yes) | (~mask & (bits)no)); }

/* exp(z) = 2^n exp(r) with |r| <= log(2) / 2, by the exponential series. Where 2^n is no normal number: 0, or infinite. */
static vec exponential(vec z) {
    const int is_float = sizeof(REAL) == 4, digits = is_float ? 23 : 52;
    const REAL limit = is_float ? 87 : 708, magic = is_float ? 12582912.0 : 6755399441055744.0; /* 1.5 * 2^digits */
    static const REAL series[] = {
        1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
        1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800,
    };
    vec shifted = z * (REAL)1.4426950408889634 + magic, n = shifted - magic;
    bits exponent = ((bits)shifted - (bits)broadcast(magic)) << digits;
    vec r = z - n * (REAL)(is_float ? 0.693359375 : 0.693147180369123816490); /* log(2) in two parts */
    r -= n * (REAL)(is_float ? -2.12194440e-4 : 1.90821492927058770002e-10);
    vec sum = broadcast(series[is_float ? 7 : 13]);
    for (int k = is_float ? 6 : 12; k >= 0; k--) sum = series[k] + sum * r;
    sum = choose((bits)(z == z), (vec)((bits)sum + exponent), z);
    sum = choose((bits)(z > limit), broadcast(INFINITY), sum);
    return choose((bits)(z < -limit), broadcast(0), sum);
}

/* g, g' and g'' of nn/activations.py for "silu" and "tanh". */
static inline void activate(int64_t logistic, vec z, vec *value, vec *slope, vec *curvature) {
    vec u = 1 / (1 + exponential(-z)), u1 = u - u * u, u2 = u1 - 2 * u1 * u;
    *value = logistic ? u : z * u;
    *slope = logistic ? u1 : u + z * u1;
    *curvature = logistic ? u2 : 2 * u1 + z * u2;
}

#define TILE 8

/* out[r] += sum over k of weight[r][k] in[k]. */
static void multiply(vec *out, const REAL *weight, int64_t stride, int64_t rows, int64_t columns, const vec *in) {
    int64_t r = 0;
    for (; r + TILE <= rows; r += TILE) {
        const REAL *w = weight + r * stride;
        vec sum[TILE];
        for (int j = 0; j < TILE; j++) sum[j] = out[r + j];
        for (int64_t k = 0; k < columns; k++)
            for (int j = 0; j < TILE; j++) sum[j] += w[j * stride + k] * in[k];
        for (int j = 0; j < TILE; j++) out[r + j] = sum[j];
    }
    for (; r < rows; r++)
        for (int64_t k = 0; k < columns; k++) out[r] += weight[r * stride + k] * in[k];
}

/* out[k] += sum over r of weight[r][k] in[r]. */
static void multiply_transposed(
    vec *out, const REAL *weight, int64_t stride, int64_t rows, int64_t columns, const vec *in
) {
    int64_t k = 0;
    for (; k + TILE <= columns; k += TILE) {
        vec sum[TILE];
        for (int j = 0; j < TILE; j++) sum[j] = out[k + j];
        for (int64_t r = 0; r < rows; r++)
            for (int j = 0; j < TILE; j++) sum[j] += weight[r * stride + k + j] * in[r];
        for (int j = 0; j < TILE; j++) out[k + j] = sum[j];
    }
    for (; k < columns; k++)
        for (int64_t r = 0; r < rows; r++) out[k] += weight[r * stride + k] * in[r];
}

static vec offset_at(const REAL *offset, int64_t row, int64_t columns, int64_t begin, int64_t count) {
    return columns == 1 ? broadcast(offset[row]) : load(offset + row * columns + begin, count);
}

/* Everything about coordinate i up to its terms; returns the rate a. */
static vec coordinate(const Net *net, Work *work, int64_t i, REAL t, int64_t begin, int64_t count) {
    const int64_t d = net->d, terms = net->width + 2;
    vec *h = work->h, *slope = work->slope, unused;
    for (int64_t layer = 0; layer < net->depth; layer++) {
        const int64_t units = net->units[layer], first = i * units;
        if (layer == 0) {
            for (int64_t r = 0; r < units; r++)
                h[r] = offset_at(net->offset, first + r, net->offset_columns, begin, count)
                     + t * net->weight[(first + r) * (d + 1) + d];
            multiply(h, net->weight + first * (d + 1), d + 1, units, d, work->x);
        } else {
            const int64_t before = net->units[layer - 1];
            for (int64_t r = 0; r < units; r++) h[r] = broadcast(net->biases[layer - 1][first + r]);
            multiply(h, net->weights[layer - 1] + first * before, before, units, before, h - before);
        }
        for (int64_t r = 0; r < units; r++) activate(net->logistic_units, h[r], &h[r], &slope[r], &unused);
        h += units, slope += units;
    }
    const int64_t units = net->units[net->depth - 1], first = i * terms;
    for (int64_t r = 0; r < terms; r++)
        work->p[r] = offset_at(net->term_offset, first + r, net->term_columns, begin, count)
                   + t * net->term_time[first + r];
    multiply(work->p, net->term_weight + first * units, units, terms, units, h - units);
    for (int64_t m = 0; m < net->width; m++) {
        vec z = work->p[m] + net->input_weight[i * net->width + m] * work->x[i];
        activate(net->logistic_terms, z, &work->value[m], &work->first[m], &work->second[m]);
    }
    vec a = work->p[net->width];
    const REAL max_rate = net->max_rate;
    return max_rate > 0 ? 2 * max_rate / (1 + exponential(-a)) - max_rate : a;
}

static void evaluate(const Net *net, Work *work, double t, const REAL *x, REAL *f, REAL *divergence) {
    const int64_t d = net->d, batch = net->batch, width = net->width;
    for (int64_t begin = 0; begin < batch; begin += LANES) {
        const int64_t count = batch - begin < LANES ? batch - begin : LANES;
        for (int64_t i = 0; i < d; i++) work->x[i] = load(x + i * batch + begin, count);
        vec trace = {0};
        for (int64_t i = 0; i < d; i++) {
            vec a = coordinate(net, work, i, t, begin, count);
            vec value = work->p[width + 1] + a * work->x[i];
            trace += a;
            for (int64_t m = 0; m < width; m++) {
                value += net->output_weight[i * width + m] * work->value[m];
                trace += net->slopes[i * width + m] * work->first[m];
            }
            store(f + i * batch + begin, value, count);
        }
        store(divergence + begin, trace, count);
    }
}

/* Every second lane of two vectors, from lane 0 or 1 on. */
static vec alternate(vec one, vec other, int from) {
#ifdef __clang__
    vec lanes;
    for (int l = 0; l < LANES; l++) lanes[l] = 2 * l < LANES ? one[2 * l + from] : other[2 * l + from - LANES];
    return lanes;
#else
    bits order;
    for (int l = 0; l < LANES; l++) order[l] = 2 * l + from;
    return __builtin_shuffle(one, other, order);
#endif
}

static REAL total(vec value) {
    REAL sum = 0;
    for (int l = 0; l < LANES; l++) sum += value[l];
    return sum;
}

/* As many sums at a time as there are lanes: so many of the right, times as many of the left. */
#define RIGHT (LANES < 4 ? LANES : 4)
#define LEFT (LANES / RIGHT)

static inline __attribute__((always_inline)) void add_products(
    vec *sum, const REAL *const *right, const REAL *const *left, int64_t c, int64_t lanes
) {
    vec factor[RIGHT];
    for (int j = 0; j < RIGHT; j++) factor[j] = load(right[j] + c, lanes);
    for (int i = 0; i < LEFT; i++) {
        const vec other = load(left[i] + c, lanes);
        for (int j = 0; j < RIGHT; j++) sum[i * RIGHT + j] += other * factor[j];
    }
}

/* For a tile of so many rows and columns, which are constants where it is a full one. */
static inline __attribute__((always_inline)) void multiply_tile(
    REAL *out, int64_t stride, const REAL *left, int64_t rows, const REAL *right, int64_t columns, int64_t count
) {
    const REAL *rights[RIGHT], *lefts[LEFT]; /* beyond the edges the first ones again */
    for (int j = 0; j < RIGHT; j++) rights[j] = right + (j < columns ? j : 0) * count;
    for (int i = 0; i < LEFT; i++) lefts[i] = left + (i < rows ? i : 0) * count;
    vec sum[LANES] = {{0}};
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) add_products(sum, rights, lefts, c, LANES);
    if (c < count) add_products(sum, rights, lefts, c, count - c);
    for (int64_t lanes = LANES; lanes > 1; lanes /= 2)
        for (int j = 0; j < lanes / 2; j++)
            sum[j] = alternate(sum[2 * j], sum[2 * j + 1], 0) + alternate(sum[2 * j], sum[2 * j + 1], 1);
    REAL totals[LANES];
    store(totals, sum[0], LANES);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) out[i * stride + j] += totals[i * RIGHT + j];
}

/* out[r][k] += sum over c of left[r][c] right[k][c]. */
static void multiply_rows(
    REAL *out, int64_t stride, const REAL *left, int64_t rows, const REAL *right, int64_t columns, int64_t count
) {
    for (int64_t k = 0; k < columns; k += RIGHT)
        for (int64_t r = 0; r < rows; r += LEFT) {
            REAL *to = out + r * stride + k;
            const REAL *some = left + r * count, *others = right + k * count;
            if (r + LEFT <= rows && k + RIGHT <= columns)
                multiply_tile(to, stride, some, LEFT, others, RIGHT, count);
            else
                multiply_tile(to, stride, some, rows - r < LEFT ? rows - r : LEFT, others,
                              columns - k < RIGHT ? columns - k : RIGHT, count);
        }
}

/* Copies vectors to rows, if there are any; returns where the next ones go. */
static REAL *put(REAL *rows, int64_t columns, const vec *from, int64_t number, int64_t count) {
    if (rows == NULL) return NULL;
    for (int64_t r = 0; r < number; r++) store(rows + r * columns, from[r], count);
    return rows + number * columns;
}

/* Pulls gradients of f and the divergence back to x. Rows, with so many columns, gets what the gradients of the weights
   are made of: x; then for each coordinate the units of all layers, the gradients of their arguments and of those of
   the terms, the terms and their slopes. */
static void pull(
    const Net *net, Work *work, double t, const REAL *x, const REAL *f_bar, const REAL *divergence_bar, REAL *x_bar,
    REAL *rows, int64_t columns
) {
    const int64_t d = net->d, batch = net->batch, width = net->width, last = net->depth - 1, all = all_units(net);
    const REAL half = net->max_rate / 2;
    for (int64_t begin = 0; begin < batch; begin += LANES) {
        const int64_t count = batch - begin < LANES ? batch - begin : LANES;
        const vec q_bar = load(divergence_bar + begin, count);
        for (int64_t i = 0; i < d; i++) {
            work->x[i] = load(x + i * batch + begin, count);
            work->f_bar[i] = load(f_bar + i * batch + begin, count);
            work->x_bar[i] = broadcast(0);
        }
        REAL *to = put(rows == NULL ? NULL : rows + begin, columns, work->x, d, count);
        for (int64_t i = 0; i < d; i++) {
            const vec a = coordinate(net, work, i, t, begin, count), f_i = work->f_bar[i];
            vec direct = f_i * a, a_bar = q_bar + f_i * work->x[i];
            for (int64_t m = 0; m < width; m++) {
                const int64_t im = i * width + m;
                work->p_bar[m] = net->slopes[im] * q_bar * work->second[m]
                               + net->output_weight[im] * f_i * work->first[m];
                direct += net->input_weight[im] * work->p_bar[m];
            }
            work->x_bar[i] += direct;
            work->p_bar[width] = half > 0 ? a_bar * (half - a * a * (1 / (4 * half))) : a_bar;
            work->p_bar[width + 1] = f_i;
            int64_t end = all - net->units[last];
            for (int64_t r = 0; r < all; r++) work->z_bar[r] = broadcast(0);
            multiply_transposed(work->z_bar + end, net->term_weight + i * (width + 2) * net->units[last],
                                net->units[last], width + 2, net->units[last], work->p_bar);
            for (int64_t layer = last;; layer--) {
                const int64_t units = net->units[layer];
                vec *z_bar = work->z_bar + end;
                for (int64_t r = 0; r < units; r++) z_bar[r] *= work->slope[end + r];
                if (layer == 0) {
                    multiply_transposed(work->x_bar, net->weight + i * units * (d + 1), d + 1, units, d, z_bar);
                    break;
                }
                const int64_t before = net->units[layer - 1];
                end -= before;
                multiply_transposed(work->z_bar + end, net->weights[layer - 1] + i * units * before, before, units,
                                    before, z_bar);
            }
            to = put(to, columns, work->h, all, count);
            to = put(to, columns, work->z_bar, all, count);
            to = put(to, columns, work->p_bar, width + 2, count);
            to = put(to, columns, work->value, width, count);
            to = put(to, columns, work->first, width, count);
        }
        for (int64_t i = 0; i < d; i++) store(x_bar + i * batch + begin, work->x_bar[i], count);
    }
}

static vec *take(vec **memory, int64_t count) {
    vec *start = *memory;
    *memory += count;
    return start;
}

static int64_t work_size(const Net *net) { return 3 * (net->d + all_units(net)) + 5 * (net->width + 2); }

static Work make_work(const Net *net, vec *memory) {
    Work work;
    vec **of_coordinates[] = {&work.x, &work.x_bar, &work.f_bar}, **of_units[] = {&work.h, &work.slope, &work.z_bar};
    vec **of_terms[] = {&work.p, &work.p_bar, &work.value, &work.first, &work.second};
    for (int k = 0; k < 3; k++) *of_coordinates[k] = take(&memory, net->d);
    for (int k = 0; k < 3; k++) *of_units[k] = take(&memory, all_units(net));
    for (int k = 0; k < 5; k++) *of_terms[k] = take(&memory, net->width + 2);
    return work;
}

/* Memory for a Work and, behind it, so many numbers; NULL if there is none. The caller frees block. */
static vec *allocate(const Net *net, int64_t numbers, void **block) {
    *block = malloc((work_size(net) + 1) * sizeof(vec) + numbers * sizeof(REAL));
    return *block == NULL ? NULL : (vec *)(((uintptr_t)*block + BYTES - 1) / BYTES * BYTES);
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

/* The mean square of a step's error relative to the tolerance in so many rows, for the worst sample; NAN if it is not
   finite. */
static double largest_error(
    const REAL *error, const REAL *start, const REAL *end, int64_t rows, int64_t batch, double rtol, double atol
) {
    double worst = 0;
    for (int64_t b = 0; b < batch; b++) {
        double total = 0;
        for (int64_t k = b; k < rows * batch; k += batch) {
            const double ratio = error[k] / (atol + rtol * fmax(fabs(start[k]), fabs(end[k])));
            total += ratio * ratio;
        }
        if (!isfinite(total)) return NAN;
        worst = fmax(worst, total / rows);
    }
    return worst;
}

/* One step: fills the states and slopes of its stages, of which the first slope is known if told so, and the state at
   its end. With an error estimate evaluates there, too, and returns the square of the error's ratio; -1 if there is no
   memory. */
double step(
    const Net *net, const Tableau *tableau, double t, double h, const REAL *y, int64_t known, REAL *states,
    REAL *slopes, REAL *end, double rtol, double atol
) {
    const int64_t stages = tableau->stages, batch = net->batch, rows = net->d * batch, size = rows + batch;
    void *block;
    vec *memory = allocate(net, size, &block);
    if (memory == NULL) return -1;
    Work work = make_work(net, memory);
    REAL *error = (REAL *)(memory + work_size(net));
    for (int64_t s = 0; s < stages; s++) {
        REAL *state = states + s * size, *slope = slopes + s * size;
        combine(state, y, h, tableau->a + s * stages, 1, slopes, 0, s, size);
        if (s >= known) evaluate(net, &work, t + tableau->c[s] * h, state, slope, slope + rows);
    }
    combine(end, y, h, tableau->b, 1, slopes, 0, stages, size);
    double worst = 0;
    if (tableau->error != NULL) {
        REAL *slope = slopes + stages * size;
        evaluate(net, &work, t + h, end, slope, slope + rows);
        memset(error, 0, size * sizeof(REAL));
        combine(error, error, h, tableau->error, 1, slopes, 0, stages + 1, size);
        const double state = largest_error(error, y, end, net->d, batch, rtol, atol);
        const double integral = largest_error(error + rows, y + rows, end + rows, 1, batch, rtol, atol);
        worst = isnan(state) || isnan(integral) ? NAN : fmax(state, integral);
    }
    free(block);
    return worst;
}

/* Adds to the gradients of an offset and its slope those of the arguments it is a part of. */
static void add_offset(
    REAL *offset, int64_t offset_columns, REAL *slope, int64_t stride, const REAL *z_bar, int64_t rows,
    const Tableau *tableau, double t, double h, int64_t batch
) {
    for (int64_t r = 0; r < rows; r++) {
        vec all = {0}, weighted = {0};
        for (int64_t s = 0; s < tableau->stages; s++, z_bar += batch) {
            const REAL time = t + tableau->c[s] * h;
            for (int64_t b = 0; b < batch; b += LANES) {
                const vec part = load(z_bar + b, batch - b < LANES ? batch - b : LANES);
                all += part, weighted += time * part;
            }
            for (int64_t b = 0; b < batch && offset_columns > 1; b++) offset[r * batch + b] += z_bar[b];
        }
        if (offset_columns == 1) offset[r] += total(all);
        slope[r * stride] += total(weighted);
    }
}

/* Adds what the stages of a step contribute. */
static void add_gradients(
    const Net *net, const Sums *sums, const Tableau *tableau, double t, double h, const REAL *rows,
    const REAL *divergence_bar
) {
    const int64_t d = net->d, width = net->width, all = all_units(net), terms = width + 2;
    const int64_t columns = tableau->stages * net->batch;
    for (int64_t i = 0; i < d; i++) {
        const REAL *x = rows + i * columns, *units = rows + (d + i * (2 * all + terms + 2 * width)) * columns;
        const REAL *z_bar = units + all * columns, *p_bar = z_bar + all * columns;
        const REAL *value = p_bar + terms * columns, *slope = value + width * columns;
        int64_t n = net->units[0], first = i * n;
        REAL *weight = sums->weight + first * (d + 1);
        multiply_rows(weight, d + 1, z_bar, n, rows, d, columns);
        add_offset(sums->offset + first * net->offset_columns, net->offset_columns, weight + d, d + 1, z_bar, n,
                   tableau, t, h, net->batch);
        for (int64_t layer = 0; layer < net->depth - 1; layer++) {
            const int64_t before = n;
            z_bar += n * columns;
            n = net->units[layer + 1], first = i * n;
            multiply_rows(sums->weights[layer] + first * before, before, z_bar, n, units, before, columns);
            for (int64_t r = 0; r < n; r++) {
                vec sum = {0};
                for (int64_t c = 0; c < columns; c += LANES)
                    sum += load(z_bar + r * columns + c, columns - c < LANES ? columns - c : LANES);
                sums->biases[layer][first + r] += total(sum);
            }
            units += before * columns;
        }
        multiply_rows(sums->term_weight + i * terms * n, n, p_bar, terms, units, n, columns);
        add_offset(sums->term_offset + i * terms * net->term_columns, net->term_columns, sums->term_time + i * terms,
                   1, p_bar, terms, tableau, t, h, net->batch);
        multiply_rows(sums->input_weight + i * width, width, x, 1, p_bar, width, columns);
        multiply_rows(sums->output_weight + i * width, width, p_bar + (width + 1) * columns, 1, value, width, columns);
        multiply_rows(sums->slopes + i * width, width, divergence_bar, 1, slope, width, columns);
    }
}

/* Pulls the gradient at the end of a step back to its start, in place, and adds to those of the weights if these are
   wanted. Returns 0, or -1 if there is no memory. */
int step_vjp(
    const Net *net, const Sums *sums, const Tableau *tableau, double t, double h, const REAL *states, REAL *y_bar
) {
    const int64_t stages = tableau->stages, batch = net->batch, size = net->d * batch;
    const int64_t rows_of_coordinate = sums == NULL ? 0 : 1 + 2 * all_units(net) + 3 * net->width + 2;
    void *block;
    vec *memory = allocate(net, ((1 + stages) * net->d + (1 + net->d * rows_of_coordinate) * stages) * batch, &block);
    if (memory == NULL) return -1;
    Work work = make_work(net, memory);
    REAL *slope_bar = (REAL *)(memory + work_size(net)), *states_bar = slope_bar + size;
    REAL *divergence_bar = states_bar + stages * size, *rows = divergence_bar + stages * batch;
    const REAL *integral_bar = y_bar + size;
    for (int64_t s = stages - 1; s >= 0; s--) {
        memset(slope_bar, 0, size * sizeof(REAL));
        combine(slope_bar, slope_bar, h * tableau->b[s], (double[]){1}, 1, y_bar, 0, 1, size);
        combine(slope_bar, slope_bar, h, tableau->a + s, stages, states_bar, s + 1, stages, size);
        for (int64_t b = 0; b < batch; b++) divergence_bar[s * batch + b] = h * tableau->b[s] * integral_bar[b];
        pull(net, &work, t + tableau->c[s] * h, states + s * (size + batch), slope_bar, divergence_bar + s * batch,
             states_bar + s * size, sums == NULL ? NULL : rows + s * batch, stages * batch);
    }
    for (int64_t s = 0; s < stages; s++)
        for (int64_t k = 0; k < size; k++) y_bar[k] += states_bar[s * size + k];
    if (sums != NULL) add_gradients(net, sums, tableau, t, h, rows, divergence_bar);
    free(block);
    return 0;
}

/* Carries the score, with shape (d, batch), from the start of a step to its end, in place. Returns 0, or -1 if there is
   no memory. */
int step_score(const Net *net, const Tableau *tableau, double t, double h, const REAL *states, REAL *score) {
    const int64_t stages = tableau->stages, batch = net->batch, size = net->d * batch;
    void *block;
    vec *memory = allocate(net, (stages + 1) * size + batch, &block);
    if (memory == NULL) return -1;
    Work work = make_work(net, memory);
    REAL *slopes = (REAL *)(memory + work_size(net)), *stage = slopes + stages * size, *ones = stage + size;
    for (int64_t b = 0; b < batch; b++) ones[b] = 1;
    for (int64_t s = 0; s < stages; s++) {
        combine(stage, score, -h, tableau->a + s * stages, 1, slopes, 0, s, size);
        pull(net, &work, t + tableau->c[s] * h, states + s * (size + batch), stage, ones, slopes + s * size, NULL, 0);
    }
    combine(score, score, -h, tableau->b, 1, slopes, 0, stages, size);
    free(block);
    return 0;
}
