/* Positional normalization with a ReLU or without, in float32; `pixel_moments.py` has it in formulas. */

#include "maps.h"

/* How values of a position become its result: y = (x - mean) rstd weight + bias, not below the floor. */
typedef struct {
    const float *weight, *bias; /* (C,) */
    float eps, floor;
    int64_t divisor; /* of the sum of squared deviations */
} Norm;

INLINE void normalize_row(int64_t c, const float *restrict x, const float *restrict weight, const float *restrict bias,
                          float mean, float rstd, float floor, float *restrict y) {
    for (int64_t i = 0; i < c; i++) {
        float made = (x[i] - mean) * rstd * weight[i] + bias[i];
        y[i] = made < floor ? floor : made;
    }
}

INLINE void normalize_column(int64_t count, const float *restrict x, float weight, float bias,
                             const float *restrict mean, const float *restrict rstd, float floor, float *restrict y) {
    for (int64_t i = 0; i < count; i++) {
        float made = (x[i] - mean[i]) * rstd[i] * weight + bias;
        y[i] = made < floor ? floor : made;
    }
}

/* `mean` is (2, N, S), with 1 / std behind the means. */
void positional_norm(const int64_t *map, const int64_t *map_of_y, const float *x, const float *weight,
                     const float *bias, double eps, int64_t divisor, int64_t relu, float *y, float *mean) {
    const Map *m = (const Map *)map, *of_y = (const Map *)map_of_y;
    int64_t c = m->c, s = m->s;
    float *rstd = mean + m->n * s;
    float floor = relu ? 0 : -INFINITY;
    if (channels_last(m)) {
#pragma omp parallel for schedule(static) if (m->n * s * c > SMALL)
        for (int64_t row = 0; row < m->n * s; row++) {
            const float *v = x + row / s * m->n_step + row % s * m->s_step;
            float middle = sum_of(v, c) / c, scale = 1 / sqrtf(squares_around(v, middle, c) / divisor + (float)eps);
            mean[row] = middle, rstd[row] = scale;
            normalize_row(c, v, weight, bias, middle, scale, floor, y + row / s * of_y->n_step + row % s * of_y->s_step);
        }
        return;
    }
    int64_t step = together(m), blocks = (s + step - 1) / step;
#pragma omp parallel for schedule(static) if (m->n * s * c > SMALL)
    for (int64_t job = 0; job < m->n * blocks; job++) {
        int64_t n = job / blocks, from = job % blocks * step, count = MIN(step, s - from);
        const float *v = x + n * m->n_step + from;
        float *to = y + n * of_y->n_step + from, middle[MOST_POSITIONS] = {0}, scale[MOST_POSITIONS] = {0};
        float off[MOST_POSITIONS] = {0};
        for (int64_t channel = 0; channel < c; channel++) {
            const float *restrict u = v + channel * m->c_step;
            for (int64_t i = 0; i < count; i++) middle[i] += u[i];
        }
        for (int64_t i = 0; i < count; i++) middle[i] /= c;
        for (int64_t channel = 0; channel < c; channel++) add_around(count, v + channel * m->c_step, middle, off, scale);
        for (int64_t i = 0; i < count; i++) {
            off[i] /= c; /* what rounding left of the mean */
            middle[i] += off[i];
            scale[i] = 1 / sqrtf(MAX(scale[i] - off[i] * off[i] * c, 0) / divisor + (float)eps);
        }
        for (int64_t i = 0; i < c; i++)
            normalize_column(count, v + i * m->c_step, weight[i], bias[i], middle, scale, floor, to + i * of_y->c_step);
        memcpy(mean + n * s + from, middle, count * sizeof(float));
        memcpy(rstd + n * s + from, scale, count * sizeof(float));
    }
}

/* The gradient of the normalized values, in `gx`, and its sums; `divisor` is that of the variance. */
INLINE void pull_row(int64_t c, const float *restrict x, const float *restrict g, const float *restrict weight,
                     const float *restrict bias, float mean, float rstd, float divisor, float *restrict gx,
                     float *restrict g_weight, float *restrict g_bias, const int relu) {
    float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
    for (int64_t i = 0; i < c; i++) {
        float z = (x[i] - mean) * rstd, given = g[i];
        given = relu && z * weight[i] + bias[i] <= 0 ? 0 : given;
        g_bias[i] += given;
        g_weight[i] += given * z;
        given *= weight[i];
        sum += given, along += given * z;
        gx[i] = given;
    }
    sum /= c, along /= divisor;
    for (int64_t i = 0; i < c; i++) gx[i] = rstd * (gx[i] - sum - along * ((x[i] - mean) * rstd));
}

INLINE void pull_column(int64_t count, const float *restrict x, const float *restrict g, float weight, float bias,
                        const float *restrict mean, const float *restrict rstd, float *restrict sum,
                        float *restrict along, float *restrict gx, float *restrict g_weight, float *restrict g_bias,
                        const int relu) {
    float of_weight = 0, of_bias = 0;
#pragma omp simd reduction(+ : of_weight, of_bias)
    for (int64_t i = 0; i < count; i++) {
        float z = (x[i] - mean[i]) * rstd[i], given = g[i];
        given = relu && z * weight + bias <= 0 ? 0 : given;
        of_bias += given;
        of_weight += given * z;
        given *= weight;
        sum[i] += given, along[i] += given * z;
        gx[i] = given;
    }
    *g_weight += of_weight, *g_bias += of_bias;
}

INLINE void finish_column(int64_t count, const float *restrict x, const float *restrict mean, const float *restrict rstd,
                          const float *restrict sum, const float *restrict along, float *restrict gx) {
    for (int64_t i = 0; i < count; i++) gx[i] = rstd[i] * (gx[i] - sum[i] - along[i] * ((x[i] - mean[i]) * rstd[i]));
}

/* `sums` is (2, C): the gradients of the weight and of the bias. */
void positional_norm_backward(const int64_t *map, const int64_t *map_of_g, const int64_t *map_of_gx, const float *x,
                              const float *g, const float *weight, const float *bias, const float *mean,
                              int64_t divisor, int64_t relu, float *gx, float *sums) {
    const Map *m = (const Map *)map, *of_g = (const Map *)map_of_g, *of_gx = (const Map *)map_of_gx;
    int64_t c = m->c, s = m->s, wide = (c + LINE - 1) / LINE * LINE;
    const float *rstd = mean + m->n * s;
    int threads = m->n * s * c > SMALL ? omp_get_max_threads() : 1;
    float *recent = memset(room(threads * 2 * wide), 0, threads * 2 * wide * sizeof(float));
    double *totals = memset(double_room(threads * 2 * wide), 0, threads * 2 * wide * sizeof(double));
#pragma omp parallel num_threads(threads)
    {
        float *g_weight = recent + omp_get_thread_num() * 2 * wide, *g_bias = g_weight + wide;
        double *total = totals + omp_get_thread_num() * 2 * wide;
        if (channels_last(m)) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m->n * s; row++) {
                int64_t n = row / s, i = row % s;
                if (row % ROWS_SUMMED == 0) flush(g_weight, total, 2 * wide);
                const float *v = x + n * m->n_step + i * m->s_step, *given = g + n * of_g->n_step + i * of_g->s_step;
                float *to = gx + n * of_gx->n_step + i * of_gx->s_step;
                if (relu)
                    pull_row(c, v, given, weight, bias, mean[row], rstd[row], divisor, to, g_weight, g_bias, 1);
                else
                    pull_row(c, v, given, weight, bias, mean[row], rstd[row], divisor, to, g_weight, g_bias, 0);
            }
        } else {
            int64_t step = together(m), blocks = (s + step - 1) / step;
#pragma omp for schedule(static)
            for (int64_t job = 0; job < m->n * blocks; job++) {
                int64_t n = job / blocks, from = job % blocks * step, count = MIN(step, s - from), at = n * s + from;
                float sum[MOST_POSITIONS] = {0}, along[MOST_POSITIONS] = {0};
                flush(g_weight, total, 2 * wide);
                const float *v = x + n * m->n_step + from, *given = g + n * of_g->n_step + from;
                float *to = gx + n * of_gx->n_step + from;
                for (int64_t i = 0; i < c; i++) {
                    const float *u = v + i * m->c_step, *own = given + i * of_g->c_step;
                    float *made = to + i * of_gx->c_step;
                    if (relu)
                        pull_column(count, u, own, weight[i], bias[i], mean + at, rstd + at, sum, along, made,
                                    g_weight + i, g_bias + i, 1);
                    else
                        pull_column(count, u, own, weight[i], bias[i], mean + at, rstd + at, sum, along, made,
                                    g_weight + i, g_bias + i, 0);
                }
                for (int64_t i = 0; i < count; i++) sum[i] /= c, along[i] /= divisor;
                for (int64_t i = 0; i < c; i++)
                    finish_column(count, v + i * m->c_step, mean + at, rstd + at, sum, along, to + i * of_gx->c_step);
            }
        }
        flush(g_weight, total, 2 * wide);
    }
    join_threads(totals, threads, 2 * wide, c, sums);
    join_threads(totals + wide, threads, 2 * wide, c, sums + c);
    free(recent);
    free(totals);
}
