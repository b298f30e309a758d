/* Group normalization and Batch-Channel Norm with a ReLU or without, in float32; `channel_moments.py` has the formulas.

   z = (x - center) * slope + start by given numbers of each channel, or x itself; each group of channels of a sample is
   normalized by its own moments, taken in two passes of which the second corrects the mean of the first. Kept for
   backward are the groups' means and 1 / std. */

#include "maps.h"

typedef struct {
    Map map;
    int64_t groups;
    const float *center, *slope, *start; /* (C,); all of them NULL where z is x */
    const float *weight, *bias;          /* (C,) */
} Norm;

#define TAKEN 4 /* rows taken together: sums in memory wait for one another */

/* Sums of a channel over positions, `first` and `second` of what a pass adds up. */
typedef struct {
    float *first, *second;
} Sums;

INLINE float z_of(const Norm *q, float x, int64_t c, const int batch) {
    return batch ? (x - q->center[c]) * q->slope[c] + q->start[c] : x;
}

/* Chunks of positions whose sums are taken apart: as many for a sample alone as for one among others. */
INLINE int64_t chunk_of(const Map *m) { return MAX(SMALL / MAX(m->c, 1), 16) / TAKEN * TAKEN; }

/* What passes over rows do with `count` rows at once, which the compiler is to know. */
INLINE void add_rows(const Norm *q, const float *x, int64_t count, const float *restrict mean, Sums into,
                     const int batch, const int squares) {
    float *restrict first = into.first, *restrict second = into.second;
    int64_t step = q->map.s_step, c = q->map.c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0, square = 0, off = squares ? mean[i] : 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float d = z_of(q, x[r * step + i], i, batch) - off;
            sum += d;
            if (squares) square += d * d;
        }
        first[i] += sum;
        if (squares) second[i] += square;
    }
}

INLINE void pull_rows(const Norm *q, const float *x, const float *g, int64_t g_step, int64_t count,
                      const float *restrict mean, const float *restrict scale, Sums into, const int batch,
                      const int relu) {
    float *restrict first = into.first, *restrict second = into.second;
    const float *restrict bias = q->bias;
    int64_t step = q->map.s_step, c = q->map.c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0, along = 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float d = z_of(q, x[r * step + i], i, batch) - mean[i], given = g[r * g_step + i];
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
    float *restrict first = into.first, *restrict second = into.second;
    const float *restrict bias = q->bias;
    int64_t step = q->map.s_step, c = q->map.c;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0, along = 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float d = z_of(q, x[r * step + i], i, batch) - mean[i], given = g[r * g_step + i];
            given = relu && d * scale[i] + bias[i] <= 0 ? 0 : given;
            float pulled = scale[i] * given - b[i] - e[i] * d;
            if (batch) {
                sum += pulled;
                along += pulled * (x[r * step + i] - q->center[i]);
                pulled *= q->slope[i];
            }
            gx[r * gx_step + i] = pulled;
        }
        if (batch) first[i] += sum, second[i] += along;
    }
}

/* `do` for rows from `from` to `to`, four at once as long as there are. */
#define BY_FOURS(do, from, to, ...)                                                                                    \
    {                                                                                                                  \
        int64_t r = from;                                                                                              \
        for (; r + TAKEN <= to; r += TAKEN) do(TAKEN, __VA_ARGS__);                                                    \
        for (; r < to; r++) do(1, __VA_ARGS__);                                                                        \
    }

/* The sums of all chunks of a sample, which lie one behind the other, in those of the first. */
static void join_chunks(float *sums, int64_t chunks, int64_t values) {
    for (int64_t k = 1; k < chunks; k++)
        for (int64_t i = 0; i < values; i++) sums[i] += sums[k * values + i];
}

/* By group of channels, the mean of sums over their positions; in double, since groups can be large. */
static void group_means(const Map *m, int64_t groups, const float *sums, float *means) {
    int64_t size = m->c / groups;
    for (int64_t j = 0; j < groups; j++) {
        double total = 0;
        for (int64_t i = j * size; i < (j + 1) * size; i++) total += sums[i];
        means[j] = (float)(total / ((double)size * m->s));
    }
}

static void by_channel(const Map *m, int64_t groups, const float *of_group, float *of_channel) {
    int64_t size = m->c / groups;
    for (int64_t i = 0; i < m->c; i++) of_channel[i] = of_group[i / size];
}

#define SUM_PASS(count, batch, squares) add_rows(q, v + r * m->s_step, count, mean, into, batch, squares)

static void forward_of_rows(const Norm *q, const float *x, float eps, int relu, const Map *of_y, float *y, float *mean_g,
                            float *rstd_g, int inner) {
    const Map *m = &q->map;
    int64_t c = m->c, chunk = chunk_of(m), chunks = (m->s + chunk - 1) / chunk, batch = q->center != NULL;
    float *sums = room(2 * c * chunks + 2 * c), *mean = sums + 2 * c * chunks, *scale = mean + c;
    for (int pass = 0; pass < 2; pass++) {
#pragma omp parallel for schedule(static) if (inner && chunks > 1)
        for (int64_t k = 0; k < chunks; k++) {
            Sums into = {sums + 2 * c * k, sums + 2 * c * k + c};
            memset(into.first, 0, 2 * c * sizeof(float));
            const float *v = x;
            int64_t from = k * chunk, to = MIN(from + chunk, m->s);
            if (pass == 0 && !batch)
                BY_FOURS(SUM_PASS, from, to, 0, 0)
            else if (pass == 0)
                BY_FOURS(SUM_PASS, from, to, 1, 0)
            else if (!batch)
                BY_FOURS(SUM_PASS, from, to, 0, 1)
            else
                BY_FOURS(SUM_PASS, from, to, 1, 1)
        }
        join_chunks(sums, chunks, 2 * c);
        if (pass == 0) {
            group_means(m, q->groups, sums, mean_g);
            by_channel(m, q->groups, mean_g, mean);
        }
    }
    int64_t size = c / q->groups;
    for (int64_t j = 0; j < q->groups; j++) {
        double off = 0, square = 0, values = (double)size * m->s;
        for (int64_t i = j * size; i < (j + 1) * size; i++) off += sums[i], square += sums[c + i];
        off /= values;
        mean_g[j] += (float)off;
        rstd_g[j] = (float)(1 / sqrt(MAX(square / values - off * off, 0) + eps));
    }
    by_channel(m, q->groups, mean_g, mean);
    by_channel(m, q->groups, rstd_g, scale);
    for (int64_t i = 0; i < c; i++) scale[i] *= q->weight[i];
#pragma omp parallel for schedule(static) if (inner && chunks > 1)
    for (int64_t k = 0; k < chunks; k++)
        for (int64_t r = k * chunk; r < MIN((k + 1) * chunk, m->s); r++) {
            const float *restrict v = x + r * m->s_step, *restrict bias = q->bias;
            float *restrict to = y + r * of_y->s_step;
            if (batch)
                for (int64_t i = 0; i < c; i++) {
                    float made = (z_of(q, v[i], i, 1) - mean[i]) * scale[i] + bias[i];
                    to[i] = relu && made < 0 ? 0 : made;
                }
            else
                for (int64_t i = 0; i < c; i++) {
                    float made = (v[i] - mean[i]) * scale[i] + bias[i];
                    to[i] = relu && made < 0 ? 0 : made;
                }
        }
    free(sums);
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
    by_channel(m, q->groups, mean_g, mean);
    by_channel(m, q->groups, rstd_g, scale);
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

/* A group's planes, where positions lie one behind the other. */
static void forward_of_planes(const Norm *q, const float *x, int64_t group, float eps, int relu, const Map *of_y,
                              float *y, float *mean_g, float *rstd_g) {
    const Map *m = &q->map;
    int64_t size = m->c / q->groups, first = group * size, batch = q->center != NULL;
    double total = 0, off = 0, square = 0, values = (double)size * m->s;
    for (int64_t i = first; i < first + size; i++) {
        const float *restrict v = x + i * m->c_step;
        float sum = sum_of(v, m->s);
        total += batch ? ((double)sum - (double)m->s * q->center[i]) * q->slope[i] + (double)m->s * q->start[i] : sum;
    }
    float mean = (float)(total / values);
    for (int64_t i = first; i < first + size; i++) {
        const float *restrict v = x + i * m->c_step;
        float sum = 0, squares = 0;
        if (batch) {
            float center = q->center[i], slope = q->slope[i], start = q->start[i] - mean;
#pragma omp simd reduction(+ : sum, squares)
            for (int64_t s = 0; s < m->s; s++) {
                float d = (v[s] - center) * slope + start;
                sum += d, squares += d * d;
            }
        } else {
#pragma omp simd reduction(+ : sum, squares)
            for (int64_t s = 0; s < m->s; s++) {
                float d = v[s] - mean;
                sum += d, squares += d * d;
            }
        }
        off += sum, square += squares;
    }
    off /= values;
    mean += (float)off;
    float rstd = (float)(1 / sqrt(MAX(square / values - off * off, 0) + eps));
    mean_g[group] = mean, rstd_g[group] = rstd;
    for (int64_t i = first; i < first + size; i++) {
        const float *restrict v = x + i * m->c_step;
        float *restrict to = y + i * of_y->c_step;
        float scale = rstd * q->weight[i], bias = q->bias[i];
        if (batch) {
            float center = q->center[i], slope = q->slope[i], start = q->start[i] - mean;
            for (int64_t s = 0; s < m->s; s++) {
                float made = ((v[s] - center) * slope + start) * scale + bias;
                to[s] = relu && made < 0 ? 0 : made;
            }
        } else
            for (int64_t s = 0; s < m->s; s++) {
                float made = (v[s] - mean) * scale + bias;
                to[s] = relu && made < 0 ? 0 : made;
            }
    }
}

INLINE void pull_channel(int64_t size, const float *restrict v, const float *restrict g, float center, float slope,
                         float start, float scale, float bias, float *total, float *along, const int relu) {
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t s = 0; s < size; s++) {
        float d = (v[s] - center) * slope + start;
        float given = relu && d * scale + bias <= 0 ? 0 : g[s];
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
        float given = relu && d * scale + bias <= 0 ? 0 : g[s];
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

/* `center` to `start` NULL for group normalization; `mean` and `rstd` are (N, G). */
void channel_norm(const int64_t *map, const int64_t *map_of_y, int64_t groups, const float *x, const float *center,
                  const float *slope, const float *start, const float *weight, const float *bias, double eps,
                  int64_t relu, float *y, float *mean, float *rstd) {
    const Map *m = (const Map *)map, *of_y = (const Map *)map_of_y;
    Norm q = {*m, groups, center, slope, start, weight, bias};
    int64_t threads = omp_get_max_threads();
    if (channels_last(m)) {
        int inner = m->n < threads;
#pragma omp parallel for schedule(static) if (!inner && m->n * m->s * m->c > SMALL)
        for (int64_t n = 0; n < m->n; n++)
            forward_of_rows(&q, x + n * m->n_step, (float)eps, (int)relu, of_y, y + n * of_y->n_step, mean + n * groups,
                            rstd + n * groups, inner);
        return;
    }
#pragma omp parallel for schedule(static) if (m->n * m->s * m->c > SMALL)
    for (int64_t job = 0; job < m->n * groups; job++) {
        int64_t n = job / groups;
        forward_of_planes(&q, x + n * m->n_step, job % groups, (float)eps, (int)relu, of_y, y + n * of_y->n_step,
                          mean + n * groups, rstd + n * groups);
    }
}

/* `sums` is (4, C): what `backward_of_rows` says, over all samples. */
void channel_norm_backward(const int64_t *map, const int64_t *map_of_g, const int64_t *map_of_gx, int64_t groups,
                           const float *x, const float *center, const float *slope, const float *start,
                           const float *weight, const float *bias, const float *mean, const float *rstd, int64_t relu,
                           const float *g, float *gx, float *sums) {
    const Map *m = (const Map *)map, *of_g = (const Map *)map_of_g, *of_gx = (const Map *)map_of_gx;
    Norm q = {*m, groups, center, slope, start, weight, bias};
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
    memcpy(sums, found, values * sizeof(float));
    for (int64_t n = 1; n < m->n; n++)
        for (int64_t i = 0; i < values; i++) sums[i] += found[n * values + i];
    free(found);
}

/* Mean and sum of squared deviations of each channel over all samples and positions. */
void channel_moments(const int64_t *map, const float *x, float *mean, float *squares) {
    const Map *m = (const Map *)map;
    int64_t c = m->c;
    double count = (double)m->n * m->s;
    if (!channels_last(m)) {
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
        for (int64_t i = 0; i < c; i++) {
            double total = 0, off = 0, square = 0;
            for (int64_t n = 0; n < m->n; n++) total += sum_of(x + n * m->n_step + i * m->c_step, m->s);
            float middle = (float)(total / count);
            for (int64_t n = 0; n < m->n; n++) {
                const float *restrict v = x + n * m->n_step + i * m->c_step;
                float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
                for (int64_t s = 0; s < m->s; s++) {
                    float d = v[s] - middle;
                    first += d, second += d * d;
                }
                off += first, square += second;
            }
            mean[i] = middle + (float)(off / count);
            squares[i] = (float)MAX(square - off * off / count, 0);
        }
        return;
    }
    Norm norm = {*m, 1, NULL, NULL, NULL, NULL, NULL}, *q = &norm;
    int64_t chunk = chunk_of(m), chunks = (m->s + chunk - 1) / chunk, jobs = m->n * chunks;
    float *sums = room(2 * c * jobs);
    for (int pass = 0; pass < 2; pass++) {
#pragma omp parallel for schedule(static) if (jobs > 1)
        for (int64_t job = 0; job < jobs; job++) {
            Sums into = {sums + 2 * c * job, sums + 2 * c * job + c};
            memset(into.first, 0, 2 * c * sizeof(float));
            const float *v = x + job / chunks * m->n_step;
            int64_t from = job % chunks * chunk, to = MIN(from + chunk, m->s);
            if (pass)
                BY_FOURS(SUM_PASS, from, to, 0, 1)
            else
                BY_FOURS(SUM_PASS, from, to, 0, 0)
        }
        join_chunks(sums, jobs, 2 * c);
        for (int64_t i = 0; i < c; i++) {
            double off = sums[i] / count;
            if (pass) squares[i] = (float)MAX(sums[c + i] - off * off * count, 0);
            mean[i] = (float)off + (pass ? mean[i] : 0);
        }
    }
    free(sums);
}
