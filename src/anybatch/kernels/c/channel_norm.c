/* Group normalization and Batch-Channel Norm with a ReLU or without, in float32; `channel_moments.py` has the formulas.

   z = (x - center) * slope + start by given numbers of each channel, or x itself; each group of channels of a sample is
   normalized by its own moments. These follow from the mean and the sum of squared deviations of each channel, which
   are taken in two passes over a piece that stays in the cache and then joined as Chan, Golub and LeVeque join them.
   Kept for backward are the groups' means and 1 / std. */

#include "maps.h"

typedef struct {
    Map map;
    int64_t groups;
    const float *center, *slope, *start; /* (C,); all of them NULL where z is x */
    const float *weight, *bias;          /* (C,) */
    float *memory;                       /* of `slope` to `bias`, which whoever made them frees */
} Norm;

/* Sums of a channel over positions, `first` and `second` of what a pass adds up. */
typedef struct {
    float *first, *second;
} Sums;

/* z of `x`, a value of channel `i`, where BATCH has told the compiler that the numbers stay as they are. */
#define BATCH(q) const float *restrict center = q->center, *restrict slope = q->slope, *restrict start = q->start
#define Z(x, i) (batch ? ((x) - center[i]) * slope[i] + start[i] : (x))

/* Adds up `count` rows, which the compiler is to know, or how far they are from `mean`, and the squares of that. */
INLINE void add_rows(const float *x, int64_t step, int64_t c, int64_t count, const float *restrict mean, Sums into,
                     const int around) {
    float *restrict first = into.first, *restrict second = into.second;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0, square = 0, off = around ? mean[i] : 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float d = x[r * step + i] - off;
            sum += d;
            if (around) square += d * d;
        }
        first[i] += sum;
        if (around) second[i] += square;
    }
}

INLINE void pull_rows(const Norm *q, const float *x, const float *g, int64_t g_step, int64_t count,
                      const float *restrict mean, const float *restrict scale, Sums into, const int batch,
                      const int relu) {
    BATCH(q);
    float *restrict first = into.first, *restrict second = into.second;
    const float *restrict bias = q->bias;
    int64_t step = q->map.s_step, c = q->map.c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0, along = 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float d = Z(x[r * step + i], i) - mean[i], given = g[r * g_step + i];
            given = relu && d * scale[i] + bias[i] <= 0 ? 0 : given;
            sum += given;
            along += given * d;
        }
        first[i] += sum;
        second[i] += along;
    }
}

/* d z = a g - b - e (z - mean), with the sums of it and of it times (x - center). */
INLINE void finish_rows(const Norm *q, const float *x, const float *g, int64_t g_step, float *gx, int64_t gx_step,
                        int64_t count, const float *restrict mean, const float *restrict scale, const float *restrict b,
                        const float *restrict e, Sums into, const int batch, const int relu) {
    BATCH(q);
    float *restrict first = into.first, *restrict second = into.second;
    const float *restrict bias = q->bias;
    int64_t step = q->map.s_step, c = q->map.c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0, along = 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float d = Z(x[r * step + i], i) - mean[i], given = g[r * g_step + i];
            given = relu && d * scale[i] + bias[i] <= 0 ? 0 : given;
            float pulled = scale[i] * given - b[i] - e[i] * d;
            if (batch) {
                sum += pulled;
                along += pulled * (x[r * step + i] - center[i]);
                pulled *= slope[i];
            }
            gx[r * gx_step + i] = pulled;
        }
        if (batch) first[i] += sum, second[i] += along;
    }
}

/* The sums of all chunks of a sample, which lie one behind the other, in those of the first. */
static void join_chunks(float *sums, int64_t chunks, int64_t values) {
    for (int64_t k = 1; k < chunks; k++)
        for (int64_t i = 0; i < values; i++) sums[i] += sums[k * values + i];
}

/* One number a group, or `otherwise` where there are none, for each of its channels. */
static void by_channel(int64_t c, int64_t groups, const float *of_group, float otherwise, float *of_channel) {
    int64_t size = c / groups;
    for (int64_t j = 0; j < groups; j++) {
        float value = of_group ? of_group[j] : otherwise;
        for (int64_t i = j * size; i < (j + 1) * size; i++) of_channel[i] = value;
    }
}

/* Of channels: in double, since a float in the middle of its range has no digits for how means of pieces differ. */
typedef struct {
    double *mean, *squares;
} Moments;

INLINE Moments moments_at(double *all, int64_t c, int64_t k) { return (Moments){all + 2 * c * k, all + 2 * c * k + c}; }

/* Mean and sum of squared deviations of each channel over `count` rows. */
static void moments_of_chunk(const float *x, int64_t step, int64_t c, int64_t count, Moments of) {
    float *sums = room(3 * c), *mean = sums + 2 * c;
    Sums into = {sums, sums + c};
    memset(sums, 0, 2 * c * sizeof(float));
#define SUM_PASS(rows, around) add_rows(x + r * step, step, c, rows, mean, into, around)
    BY_FOURS(SUM_PASS, 0, count, 0)
    for (int64_t i = 0; i < c; i++) mean[i] = sums[i] / count;
    memset(sums, 0, c * sizeof(float));
    BY_FOURS(SUM_PASS, 0, count, 1)
    for (int64_t i = 0; i < c; i++) {
        double off = (double)sums[i] / count; /* what rounding left of the mean */
        of.mean[i] = mean[i] + off;
        of.squares[i] = sums[c + i] - sums[i] * off;
    }
    free(sums);
}

/* Into moments over `before` positions those of `count` others. */
static void join(Moments to, Moments other, int64_t c, double before, double count) {
    double share = count / (before + count);
    for (int64_t i = 0; i < c; i++) {
        double apart = other.mean[i] - to.mean[i];
        to.mean[i] += apart * share;
        to.squares[i] += other.squares[i] + apart * apart * share * before;
    }
}

/* Into the first of `chunks` moments those of all. Each is of `chunk` positions, but the last. */
static void join_moments(double *all, int64_t chunks, int64_t c, int64_t chunk, int64_t size) {
    for (int64_t k = 1; k < chunks; k++)
        join(moments_at(all, c, 0), moments_at(all, c, k), c, (double)k * chunk, MIN(chunk, size - k * chunk));
}

/* A group's mean and 1 / std from the moments of its channels over `positions`. */
static void moments_of_group(const Norm *q, int64_t group, Moments of, float eps, float *mean_g, float *rstd_g) {
    int64_t size = q->map.c / q->groups, first = group * size;
    double total = 0, spread = 0;
    for (int64_t i = first; i < first + size; i++)
        total += q->center ? (of.mean[i] - q->center[i]) * q->slope[i] + q->start[i] : of.mean[i];
    double middle = total / size;
    for (int64_t i = first; i < first + size; i++) {
        double slope = q->center ? q->slope[i] : 1;
        double z = q->center ? (of.mean[i] - q->center[i]) * slope + q->start[i] : of.mean[i];
        spread += of.squares[i] * slope * slope / q->map.s + (z - middle) * (z - middle);
    }
    *mean_g = (float)middle;
    *rstd_g = (float)(1 / sqrt(spread / size + eps));
}

INLINE void normalize_row(int64_t c, const float *restrict x, float *restrict y, const float *restrict center,
                          const float *restrict slope, const float *restrict start, const float *restrict mean,
                          const float *restrict scale, const float *restrict bias, float floor, const int batch) {
    for (int64_t i = 0; i < c; i++) {
        float made = (Z(x[i], i) - mean[i]) * scale[i] + bias[i];
        y[i] = made < floor ? floor : made;
    }
}

/* `known` are the moments of the sample's channels, or NULL. */
static void forward_of_rows(const Norm *q, const float *x, float eps, int relu, double *known, const Map *of_y, float *y,
                            float *mean_g, float *rstd_g, int inner) {
    const Map *m = &q->map;
    int64_t c = m->c, chunk = chunk_of(m), chunks = (m->s + chunk - 1) / chunk, batch = q->center != NULL;
    double *all = known ? known : double_room(2 * c * chunks);
    float *mean = room(2 * c), *scale = mean + c;
#pragma omp parallel for schedule(static) if (inner && chunks > 1)
    for (int64_t k = 0; k < (known ? 0 : chunks); k++)
        moments_of_chunk(x + k * chunk * m->s_step, m->s_step, c, MIN(chunk, m->s - k * chunk), moments_at(all, c, k));
    if (!known) join_moments(all, chunks, c, chunk, m->s);
    for (int64_t j = 0; j < q->groups; j++)
        moments_of_group(q, j, moments_at(all, c, 0), eps, mean_g + j, rstd_g + j);
    by_channel(c, q->groups, mean_g, 0, mean);
    by_channel(c, q->groups, rstd_g, 0, scale);
    for (int64_t i = 0; i < c; i++) scale[i] *= q->weight[i];
    float floor = relu ? 0 : -INFINITY;
#pragma omp parallel for schedule(static) if (inner && chunks > 1)
    for (int64_t k = 0; k < chunks; k++)
        for (int64_t r = k * chunk; r < MIN((k + 1) * chunk, m->s); r++) {
            const float *v = x + r * m->s_step;
            float *to = y + r * of_y->s_step;
            if (batch)
                normalize_row(c, v, to, q->center, q->slope, q->start, mean, scale, q->bias, floor, 1);
            else
                normalize_row(c, v, to, NULL, NULL, NULL, mean, scale, q->bias, floor, 0);
        }
    if (!known) free(all);
    free(mean);
}

#define PULL_PASS(count, batch, relu)                                                                                  \
    pull_rows(q, x + r * m->s_step, g + r * of_g->s_step, of_g->s_step, count, mean, scale, into, batch, relu)
#define FINISH_PASS(count, batch, relu)                                                                                \
    finish_rows(q, x + r * m->s_step, g + r * of_g->s_step, of_g->s_step, gx + r * of_gx->s_step, of_gx->s_step, count, \
                mean, scale, b, e, into, batch, relu)

/* Into `found`, (4, C), the sums of the gradient in front of the ReLU, and of it times (z - mean) / std; of the gradient
   of z, and of it times (x - center). */
static void backward_of_rows(const Norm *q, const float *x, const float *g, const Map *of_g, const float *mean_g,
                             const float *rstd_g, int relu, float *gx, const Map *of_gx, float *found, int inner) {
    const Map *m = &q->map;
    int64_t c = m->c, chunk = chunk_of(m), chunks = (m->s + chunk - 1) / chunk, batch = q->center != NULL;
    float *sums = room(2 * c * chunks + 4 * c), *mean = sums + 2 * c * chunks, *scale = mean + c, *b = mean + 2 * c;
    float *e = mean + 3 * c;
    by_channel(c, q->groups, mean_g, 0, mean);
    by_channel(c, q->groups, rstd_g, 0, scale);
    for (int64_t i = 0; i < c; i++) scale[i] *= q->weight[i];
    for (int pass = 0; pass < 2; pass++) {
#pragma omp parallel for schedule(static) if (inner && chunks > 1)
        for (int64_t k = 0; k < chunks; k++) {
            Sums into = {sums + 2 * c * k, sums + 2 * c * k + c};
            memset(into.first, 0, 2 * c * sizeof(float));
            int64_t from = k * chunk, to = MIN(from + chunk, m->s);
            switch (4 * pass + 2 * batch + relu) {
                case 0: BY_FOURS(PULL_PASS, from, to, 0, 0) break;
                case 1: BY_FOURS(PULL_PASS, from, to, 0, 1) break;
                case 2: BY_FOURS(PULL_PASS, from, to, 1, 0) break;
                case 3: BY_FOURS(PULL_PASS, from, to, 1, 1) break;
                case 4: BY_FOURS(FINISH_PASS, from, to, 0, 0) break;
                case 5: BY_FOURS(FINISH_PASS, from, to, 0, 1) break;
                case 6: BY_FOURS(FINISH_PASS, from, to, 1, 0) break;
                default: BY_FOURS(FINISH_PASS, from, to, 1, 1)
            }
        }
        join_chunks(sums, chunks, 2 * c);
        memcpy(found + 2 * c * pass, sums, 2 * c * sizeof(float));
        if (pass) break;
        int64_t size = c / q->groups;
        for (int64_t j = 0; j < q->groups; j++) {
            double first = 0, second = 0, values = (double)size * m->s, r = rstd_g[j];
            for (int64_t i = j * size; i < (j + 1) * size; i++)
                first += (double)q->weight[i] * sums[i], second += (double)q->weight[i] * sums[c + i];
            for (int64_t i = j * size; i < (j + 1) * size; i++) {
                found[c + i] *= rstd_g[j];
                b[i] = (float)(r * first / values);
                e[i] = (float)(r * r * r * second / values);
            }
        }
    }
    free(sums);
}

/* Mean and sum of squared deviations of a plane, piece by piece. */
static void moments_of_plane(const float *x, int64_t size, double *mean, double *squares) {
    const int64_t piece = 4096;
    double middle = 0, total = 0;
    for (int64_t i = 0; i < size; i += piece) {
        int64_t count = MIN(piece, size - i);
        float first = sum_of(x + i, count) / count;
        double off, own;
        around(x + i, first, count, &off, &own);
        double apart = first + off - middle, share = (double)count / (i + count);
        total += own + apart * apart * share * i;
        middle += apart * share;
    }
    *mean = middle, *squares = total;
}

INLINE void normalize(int64_t size, const float *restrict x, float *restrict y, float center, float slope, float start,
                      float scale, float bias, float floor) {
    for (int64_t i = 0; i < size; i++) {
        float made = ((x[i] - center) * slope + start) * scale + bias;
        y[i] = made < floor ? floor : made;
    }
}

/* A group's planes, where positions lie one behind the other. `of` are the moments of all channels, or room for them. */
static void forward_of_planes(const Norm *q, const float *x, int64_t group, float eps, int relu, Moments of, int known,
                              const Map *of_y, float *y, float *mean_g, float *rstd_g) {
    const Map *m = &q->map;
    int64_t size = m->c / q->groups, first = group * size, batch = q->center != NULL;
    for (int64_t i = first; !known && i < first + size; i++)
        moments_of_plane(x + i * m->c_step, m->s, of.mean + i, of.squares + i);
    moments_of_group(q, group, of, eps, mean_g + group, rstd_g + group);
    float mean = mean_g[group], floor = relu ? 0 : -INFINITY;
    for (int64_t i = first; i < first + size; i++) {
        float center = batch ? q->center[i] : mean, slope = batch ? q->slope[i] : 1;
        float start = batch ? q->start[i] - mean : 0, scale = rstd_g[group] * q->weight[i];
        normalize(m->s, x + i * m->c_step, y + i * of_y->c_step, center, slope, start, scale, q->bias[i], floor);
    }
}

INLINE void pull_channel(int64_t size, const float *restrict v, const float *restrict g, float center, float slope,
                         float start, float scale, float bias, float *total, float *along, const int relu) {
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t s = 0; s < size; s++) {
        float d = (v[s] - center) * slope + start;
        float given = g[s];
        given = relu && d * scale + bias <= 0 ? 0 : given;
        first += given, second += given * d;
    }
    *total = first, *along = second;
}

INLINE void finish_channel(int64_t size, const float *restrict v, const float *restrict g, float *restrict gx,
                           float center, float slope, float start, float scale, float bias, float b, float e,
                           float *total, float *along, const int relu, const int batch) {
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t s = 0; s < size; s++) {
        float d = (v[s] - center) * slope + start;
        float given = g[s];
        given = relu && d * scale + bias <= 0 ? 0 : given;
        float pulled = scale * given - b - e * d;
        if (batch) first += pulled, second += pulled * (v[s] - center);
        gx[s] = pulled * slope;
    }
    *total = first, *along = second;
}

static void backward_of_planes(const Norm *q, const float *x, const float *g, const Map *of_g, int64_t group,
                               const float *mean_g, const float *rstd_g, int relu, float *gx, const Map *of_gx,
                               float *found) {
    const Map *m = &q->map;
    int64_t size = m->c / q->groups, first = group * size, batch = q->center != NULL, c = m->c;
    double total = 0, along = 0, values = (double)size * m->s, r = rstd_g[group];
    float mean = mean_g[group];
#define NUMBERS                                                                                                        \
    const float *restrict v = x + i * m->c_step, *restrict given = g + i * of_g->c_step;                               \
    float center = batch ? q->center[i] : mean, slope = batch ? q->slope[i] : 1;                                       \
    float start = batch ? q->start[i] - mean : 0, scale = rstd_g[group] * q->weight[i], bias = q->bias[i];
    for (int64_t i = first; i < first + size; i++) {
        NUMBERS
        float *a = found + i, *b = found + c + i;
        if (relu)
            pull_channel(m->s, v, given, center, slope, start, scale, bias, a, b, 1);
        else
            pull_channel(m->s, v, given, center, slope, start, scale, bias, a, b, 0);
        total += (double)q->weight[i] * *a, along += (double)q->weight[i] * *b;
        *b *= rstd_g[group];
    }
    float b = (float)(r * total / values), e = (float)(r * r * r * along / values);
    for (int64_t i = first; i < first + size; i++) {
        NUMBERS
        float *to = gx + i * of_gx->c_step, *sums = found + 2 * c + i;
        switch (2 * batch + relu) {
            case 0: finish_channel(m->s, v, given, to, center, slope, start, scale, bias, b, e, sums, sums + c, 0, 0); break;
            case 1: finish_channel(m->s, v, given, to, center, slope, start, scale, bias, b, e, sums, sums + c, 1, 0); break;
            case 2: finish_channel(m->s, v, given, to, center, slope, start, scale, bias, b, e, sums, sums + c, 0, 1); break;
            default: finish_channel(m->s, v, given, to, center, slope, start, scale, bias, b, e, sums, sums + c, 1, 1);
        }
    }
}

/* The numbers of channels from what a layer has: moments, or NULL for group normalization, with the scale and the shift
   behind, each (C,); and those of `scales` groups or channels, or NULL. */
static Norm norm_of(const Map *m, int64_t groups, const float *center, const float *var, const float *batch_weight,
                    const float *batch_bias, const float *weight, const float *bias, int64_t scales, float eps) {
    int64_t c = m->c;
    float *made = room(4 * c), *slope = made, *start = made + c, *of_weight = made + 2 * c, *of_bias = made + 3 * c;
    for (int64_t i = 0; center && i < c; i++) {
        slope[i] = 1 / sqrtf(var[i] + eps) * (batch_weight ? batch_weight[i] : 1);
        start[i] = batch_bias ? batch_bias[i] : 0;
    }
    by_channel(c, scales, weight, 1, of_weight);
    by_channel(c, scales, bias, 0, of_bias);
    return (Norm){*m, groups, center, slope, start, of_weight, of_bias, made};
}

/* `known` are the moments of all channels of all samples, or NULL. */
static void forward(const Norm *q, const float *x, float eps, int relu, double *known, const Map *of_y, float *y,
                    float *mean, float *rstd) {
    const Map *m = &q->map;
    int64_t groups = q->groups;
    if (channels_last(m)) {
        int inner = m->n < omp_get_max_threads();
#pragma omp parallel for schedule(static) if (!inner && m->n * m->s * m->c > SMALL)
        for (int64_t n = 0; n < m->n; n++)
            forward_of_rows(q, x + n * m->n_step, eps, relu, known ? known + 2 * m->c * n : NULL, of_y,
                            y + n * of_y->n_step, mean + n * groups, rstd + n * groups, inner);
        return;
    }
    double *all = known ? known : double_room(2 * m->n * m->c);
#pragma omp parallel for schedule(static) if (m->n * m->s * m->c > SMALL)
    for (int64_t job = 0; job < m->n * groups; job++) {
        int64_t n = job / groups;
        forward_of_planes(q, x + n * m->n_step, job % groups, eps, relu, moments_at(all, m->c, n), known != NULL, of_y,
                          y + n * of_y->n_step, mean + n * groups, rstd + n * groups);
    }
    if (!known) free(all);
}

/* `center` to `batch_bias` NULL for group normalization; `mean` is (2, N, G), with 1 / std behind the means. */
void channel_norm(const int64_t *map, const int64_t *map_of_y, int64_t groups, const float *x, const float *center,
                  const float *var, const float *batch_weight, const float *batch_bias, const float *weight,
                  const float *bias, int64_t scales, double eps, int64_t relu, float *y, float *mean) {
    const Map *m = (const Map *)map;
    Norm q = norm_of(m, groups, center, var, batch_weight, batch_bias, weight, bias, scales, (float)eps);
    forward(&q, x, (float)eps, (int)relu, NULL, (const Map *)map_of_y, y, mean, mean + m->n * groups);
    free(q.memory);
}

/* Those of a group's channels, of which they are the same number, in the place of the first. */
static void join_groups(float *values, int64_t c, int64_t scales) {
    int64_t size = c / scales;
    for (int64_t j = 0; j < scales && size > 1; j++) {
        double sum = 0;
        for (int64_t i = j * size; i < (j + 1) * size; i++) sum += values[i];
        values[j] = (float)sum;
    }
}

/* `made` is (6, C): the gradients of the batch part's mean, variance, scale and shift, and of weight and bias, of which
   there are `scales`. */
void channel_norm_backward(const int64_t *map, const int64_t *map_of_g, const int64_t *map_of_gx, int64_t groups,
                           const float *x, const float *center, const float *var, const float *batch_weight,
                           const float *batch_bias, const float *weight, const float *bias, int64_t scales, double eps,
                           const float *mean, int64_t relu, const float *g, float *gx, float *made) {
    const Map *m = (const Map *)map, *of_g = (const Map *)map_of_g, *of_gx = (const Map *)map_of_gx;
    const float *rstd = mean + m->n * groups;
    Norm q = norm_of(m, groups, center, var, batch_weight, batch_bias, weight, bias, scales, (float)eps);
    int64_t threads = omp_get_max_threads(), values = 4 * m->c;
    float *found = room(m->n * values);
    if (channels_last(m)) {
        int inner = m->n < threads;
#pragma omp parallel for schedule(static) if (!inner && m->n * m->s * m->c > SMALL)
        for (int64_t n = 0; n < m->n; n++)
            backward_of_rows(&q, x + n * m->n_step, g + n * of_g->n_step, of_g, mean + n * groups, rstd + n * groups,
                             (int)relu, gx + n * of_gx->n_step, of_gx, found + n * values, inner);
    } else {
#pragma omp parallel for schedule(static) if (m->n * m->s * m->c > SMALL)
        for (int64_t job = 0; job < m->n * groups; job++) {
            int64_t n = job / groups;
            backward_of_planes(&q, x + n * m->n_step, g + n * of_g->n_step, of_g, job % groups, mean + n * groups,
                               rstd + n * groups, (int)relu, gx + n * of_gx->n_step, of_gx, found + n * values);
        }
    }
    int64_t c = m->c;
    float *of_mean = made, *of_var = made + c, *of_slope = made + 2 * c, *of_start = made + 3 * c;
    float *of_weight = made + 4 * c, *of_bias = made + 5 * c;
    join_samples(found, m->n, values, c, of_bias);
    join_samples(found + c, m->n, values, c, of_weight);
    join_groups(of_bias, c, scales);
    join_groups(of_weight, c, scales);
    if (center) {
        join_samples(found + 2 * c, m->n, values, c, of_start);
        join_samples(found + 3 * c, m->n, values, c, of_slope);
    }
    for (int64_t i = 0; center && i < c; i++) {
        float r = 1 / sqrtf(var[i] + (float)eps);
        of_mean[i] = -q.slope[i] * of_start[i];
        of_var[i] = -0.5f * r * r * q.slope[i] * of_slope[i];
        of_slope[i] *= r;
    }
    free(found);
    free(q.memory);
}

/* Mean and sum of squared deviations of each channel over all samples and positions, 2 C, and those of each sample. */
static double *moments_of_batch(const Map *m, const float *x) {
    int64_t c = m->c, last = channels_last(m), chunk = last ? chunk_of(m) : m->s;
    int64_t chunks = (m->s + chunk - 1) / chunk, jobs = m->n * chunks;
    double *total = double_room(2 * c * (jobs + 1)), *all = total + 2 * c;
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
    for (int64_t job = 0; job < (last ? jobs : jobs * c); job++) {
        int64_t k = last ? job : job / c, n = k / chunks, from = k % chunks * chunk, i = job % c;
        const float *v = x + n * m->n_step;
        Moments of = moments_at(all, c, k);
        if (last)
            moments_of_chunk(v + from * m->s_step, m->s_step, c, MIN(chunk, m->s - from), of);
        else
            moments_of_plane(v + i * m->c_step, m->s, of.mean + i, of.squares + i);
    }
    for (int64_t n = 0; n < m->n; n++) {
        join_moments(all + 2 * c * n * chunks, chunks, c, chunk, m->s);
        if (n) memmove(all + 2 * c * n, all + 2 * c * n * chunks, 2 * c * sizeof(double));
        if (n)
            join(moments_at(total, c, 0), moments_at(all, c, n), c, (double)n * m->s, (double)m->s);
        else
            memcpy(total, all, 2 * c * sizeof(double));
    }
    return total;
}

void channel_moments(const int64_t *map, const float *x, float *mean, float *squares) {
    const Map *m = (const Map *)map;
    double *all = moments_of_batch(m, x);
    for (int64_t i = 0; i < m->c; i++) mean[i] = (float)all[i], squares[i] = (float)all[m->c + i];
    free(all);
}

/* `channel_norm` by estimates, `running_mean` and `running_var`, into which the batch goes first: `updated_estimates` of
   `methods/batch_channel_norm.py`. `center` and `var` are what they are then, for backward. */
void estimated_channel_norm(const int64_t *map, const int64_t *map_of_y, int64_t groups, const float *x, float *center,
                            float *var, const float *batch_weight, const float *batch_bias, const float *weight,
                            const float *bias, int64_t scales, double eps, int64_t relu, float *y, float *mean,
                            double rate, int64_t warm, float *running_mean, float *running_var, int64_t *batches) {
    const Map *m = (const Map *)map;
    double *all = moments_of_batch(m, x), count = (double)m->n * m->s;
    if (warm) rate = MAX(rate, 1 / (*batches + 1 + 1 / count));
    double drifts = warm && *batches == 0 ? 0 : 1;
    for (int64_t i = 0; i < m->c; i++) {
        double drift = all[i] - running_mean[i], spread = drift * drifts;
        running_mean[i] = center[i] = (float)(running_mean[i] + rate * drift);
        double now = all[m->c + i] / count + spread * spread;
        running_var[i] = var[i] = (float)(running_var[i] + rate * (now - running_var[i]));
    }
    *batches += 1;
    Norm q = norm_of(m, groups, center, var, batch_weight, batch_bias, weight, bias, scales, (float)eps);
    forward(&q, x, (float)eps, (int)relu, all + 2 * m->c, (const Map *)map_of_y, y, mean, mean + m->n * groups);
    free(q.memory);
    free(all);
}
