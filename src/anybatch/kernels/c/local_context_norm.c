/* Local context normalization in float32, plane by plane; `methods/local_context_norm.py` is the definition.

   A plane is what a group of channels of a sample holds. Of it are made, at each position, the mean of the group's
   values, less that of the whole plane, and their variance; of these, sums over windows as differences of running sums,
   in double, whose cost does not depend on the window. Windows stay inside the map: those of positions near its border
   are the nearest complete ones. Nothing but the input is kept for backward, which makes the moments anew. */

#include "maps.h"

typedef struct {
    int64_t channels, height, width, kernel_h, kernel_w;
    const float *weight, *bias; /* (C,) */
    float eps;
} Norm;

/* Rows and columns of complete windows. */
INLINE int64_t rows_of(const Norm *q) { return q->height - q->kernel_h + 1; }
INLINE int64_t columns_of(const Norm *q) { return q->width - q->kernel_w + 1; }

/* The window of a position along one dimension. */
INLINE int64_t window_of(int64_t at, int64_t size, int64_t kernel) {
    int64_t start = at - (kernel - 1) / 2;
    return MAX(0, MIN(start, size - kernel));
}

/* What a thread works in, for one plane. */
typedef struct {
    double *first, *second;         /* (P,): two fields of positions */
    double *first_sum, *second_sum; /* (P,): the same of windows, or of positions again */
    double *columns;                /* (4, W + 1) */
    float *mean, *rstd;             /* (P,): of each position's window, the mean less the plane's */
    float *values[3];               /* (channels, P) each, where channels do not lie one behind the other */
} Room;

static Room room_for(int64_t positions, int64_t width, int64_t copied) {
    double *all = (double *)room(2 * (4 * positions + 4 * (width + 1)));
    float *more = room(2 * positions + 3 * copied);
    return (Room){all,
                  all + positions,
                  all + 2 * positions,
                  all + 3 * positions,
                  all + 4 * positions,
                  more,
                  more + positions,
                  {more + 2 * positions, more + 2 * positions + copied, more + 2 * positions + 2 * copied}};
}

static void leave(Room *r) {
    free(r->first);
    free(r->mean);
}

/* Sums over all complete windows, (rows, columns), of two fields of positions. */
static void over_windows(const Norm *q, Room *r) {
    int64_t width = q->width, rows = rows_of(q), columns = columns_of(q), kh = q->kernel_h, kw = q->kernel_w;
    double *restrict one = r->columns, *restrict two = one + width + 1;
    double *restrict so_far = two + width + 1, *restrict so_far_too = so_far + width + 1;
    memset(one, 0, 2 * (width + 1) * sizeof(double));
    for (int64_t i = 0; i < kh - 1; i++)
        for (int64_t w = 0; w < width; w++) one[w] += r->first[i * width + w], two[w] += r->second[i * width + w];
    for (int64_t i = 0; i < rows; i++) {
        const double *restrict f = r->first + (i + kh - 1) * width, *restrict g = r->second + (i + kh - 1) * width;
        for (int64_t w = 0; w < width; w++) one[w] += f[w], two[w] += g[w];
        so_far[0] = so_far_too[0] = 0;
        double sum = 0, sum_too = 0;
        for (int64_t w = 0; w < width; w++) {
            so_far[w + 1] = sum += one[w];
            so_far_too[w + 1] = sum_too += two[w];
        }
        double *restrict to = r->first_sum + i * columns, *restrict to_too = r->second_sum + i * columns;
        for (int64_t j = 0; j < columns; j++) {
            to[j] = so_far[j + kw] - so_far[j];
            to_too[j] = so_far_too[j + kw] - so_far_too[j];
        }
        f = r->first + i * width, g = r->second + i * width;
        for (int64_t w = 0; w < width; w++) one[w] -= f[w], two[w] -= g[w];
    }
}

/* The transpose: of two fields of windows, for each position the sums over the windows that hold it. */
static void over_positions(const Norm *q, Room *r) {
    int64_t width = q->width, rows = rows_of(q), columns = columns_of(q), kh = q->kernel_h, kw = q->kernel_w;
    double *restrict one = r->columns, *restrict two = one + width + 1;
    double *restrict so_far = two + width + 1, *restrict so_far_too = so_far + width + 1;
    memset(one, 0, 2 * (width + 1) * sizeof(double));
    for (int64_t h = 0; h < q->height; h++) {
        if (h < rows)
            for (int64_t j = 0; j < columns; j++)
                one[j] += r->first[h * columns + j], two[j] += r->second[h * columns + j];
        if (h >= kh)
            for (int64_t j = 0; j < columns; j++)
                one[j] -= r->first[(h - kh) * columns + j], two[j] -= r->second[(h - kh) * columns + j];
        so_far[0] = so_far_too[0] = 0;
        double sum = 0, sum_too = 0;
        for (int64_t j = 0; j < columns; j++) {
            so_far[j + 1] = sum += one[j];
            so_far_too[j + 1] = sum_too += two[j];
        }
        for (int64_t w = 0; w < width; w++) {
            int64_t to = MIN(w + 1, columns), from = MAX(0, w - kw + 1);
            r->first_sum[h * width + w] = so_far[to] - so_far[from];
            r->second_sum[h * width + w] = so_far_too[to] - so_far_too[from];
        }
    }
}

/* The plane's mean; into the room, of each position's window the mean less that, and 1 / std. */
static float moments(const Norm *q, const float *x, int64_t step, Room *r) {
    int64_t positions = q->height * q->width, channels = q->channels;
    double total = 0;
    for (int64_t c = 0; c < channels; c++) total += sum_of(x + c * step, positions);
    float middle = (float)(total / ((double)channels * positions));
    float *restrict mean = r->mean, *restrict var = r->rstd;
    memset(mean, 0, positions * sizeof(float));
    memset(var, 0, positions * sizeof(float));
    for (int64_t c = 0; c < channels; c++) {
        const float *restrict v = x + c * step;
        for (int64_t p = 0; p < positions; p++) mean[p] += v[p] - middle;
    }
    for (int64_t p = 0; p < positions; p++) mean[p] /= channels;
    for (int64_t c = 0; c < channels; c++) {
        const float *restrict v = x + c * step;
        for (int64_t p = 0; p < positions; p++) {
            float off = (v[p] - middle) - mean[p];
            var[p] += off * off;
        }
    }
    double *restrict first = r->first, *restrict second = r->second;
    for (int64_t p = 0; p < positions; p++) {
        double m = mean[p];
        first[p] = m;
        second[p] = (double)(var[p] / channels) + m * m;
    }
    over_windows(q, r);
    int64_t columns = columns_of(q), before = (q->kernel_w - 1) / 2;
    double share = 1.0 / ((double)q->kernel_h * q->kernel_w);
    for (int64_t h = 0; h < q->height; h++) {
        int64_t i = window_of(h, q->height, q->kernel_h);
        float *restrict m = mean + h * q->width, *restrict s = var + h * q->width;
        if (h && i == window_of(h - 1, q->height, q->kernel_h)) {
            memcpy(m, m - q->width, q->width * sizeof(float));
            memcpy(s, s - q->width, q->width * sizeof(float));
            continue;
        }
        const double *restrict one = r->first_sum + i * columns, *restrict two = r->second_sum + i * columns;
        for (int64_t j = 0; j < columns; j++) {
            double own = one[j] * share, spread = two[j] * share - own * own;
            m[before + j] = (float)own;
            s[before + j] = 1 / sqrtf((float)(spread < 0 ? 0 : spread) + q->eps);
        }
        for (int64_t w = 0; w < before; w++) m[w] = m[before], s[w] = s[before];
        for (int64_t w = before + columns; w < q->width; w++) m[w] = m[w - 1], s[w] = s[w - 1];
    }
    return middle;
}

static void forward_of_plane(const Norm *q, const float *x, int64_t step, int64_t first, float *y, int64_t y_step,
                             Room *r) {
    int64_t positions = q->height * q->width;
    float middle = moments(q, x, step, r);
    const float *restrict mean = r->mean, *restrict rstd = r->rstd;
    for (int64_t c = 0; c < q->channels; c++) {
        const float *restrict v = x + c * step;
        float *restrict to = y + c * y_step;
        float weight = q->weight[first + c], bias = q->bias[first + c];
        for (int64_t p = 0; p < positions; p++) to[p] = ((v[p] - middle) - mean[p]) * rstd[p] * weight + bias;
    }
}

INLINE void pull(int64_t positions, const float *restrict x, const float *restrict g, float middle,
                 const float *restrict mean, const float *restrict rstd, float weight, double *restrict along_mean,
                 double *restrict along, float *restrict gx, float *g_weight, float *g_bias) {
    float of_weight = 0, of_bias = 0;
#pragma omp simd reduction(+ : of_weight, of_bias)
    for (int64_t p = 0; p < positions; p++) {
        float z = ((x[p] - middle) - mean[p]) * rstd[p], scaled = g[p] * weight;
        of_weight += g[p] * z, of_bias += g[p];
        along_mean[p] += scaled, along[p] += scaled * z;
        gx[p] = scaled * rstd[p];
    }
    *g_weight = of_weight, *g_bias = of_bias;
}

/* `found` is (2, C): the gradients of the weight and of the bias, of this sample. */
static void backward_of_plane(const Norm *q, const float *x, int64_t step, const float *g, int64_t g_step, int64_t first,
                              float *gx, int64_t gx_step, float *found, int64_t c_all, Room *r) {
    int64_t positions = q->height * q->width, columns = columns_of(q);
    float middle = moments(q, x, step, r);
    double *along_mean = memset(r->first_sum, 0, positions * sizeof(double));
    double *along = memset(r->second_sum, 0, positions * sizeof(double));
    for (int64_t c = 0; c < q->channels; c++)
        pull(positions, x + c * step, g + c * g_step, middle, r->mean, r->rstd, q->weight[first + c], along_mean, along,
             gx + c * gx_step, found + first + c, found + c_all + first + c);
    /* Of each window: what its positions have from its mean and its variance, a + b x. */
    memset(r->first, 0, rows_of(q) * columns * sizeof(double));
    memset(r->second, 0, rows_of(q) * columns * sizeof(double));
    double share = 1.0 / ((double)q->channels * q->kernel_h * q->kernel_w);
    for (int64_t h = 0; h < q->height; h++) {
        int64_t row = window_of(h, q->height, q->kernel_h) * columns;
        for (int64_t w = 0; w < q->width; w++) {
            int64_t p = h * q->width + w, at = row + window_of(w, q->width, q->kernel_w);
            double s = r->rstd[p], slope = s * s * along[p] * share;
            r->first[at] += slope * r->mean[p] - s * along_mean[p] * share;
            r->second[at] -= slope;
        }
    }
    over_positions(q, r);
    float *restrict start = r->mean, *restrict slope = r->rstd;
    for (int64_t p = 0; p < positions; p++) start[p] = (float)r->first_sum[p], slope[p] = (float)r->second_sum[p];
    for (int64_t c = 0; c < q->channels; c++) {
        const float *restrict v = x + c * step;
        float *restrict to = gx + c * gx_step;
        for (int64_t p = 0; p < positions; p++) to[p] += start[p] + slope[p] * (v[p] - middle);
    }
}

/* (positions, channels) to (channels, positions) and back, of as many channels as a cache line holds or a group has. */
static void gather(const float *from, int64_t step, int64_t positions, int64_t channels, float *to) {
    for (int64_t p = 0; p < positions; p++)
        for (int64_t c = 0; c < channels; c++) to[c * positions + p] = from[p * step + c];
}

static void scatter(const float *from, int64_t positions, int64_t channels, float *to, int64_t step) {
    for (int64_t p = 0; p < positions; p++)
        for (int64_t c = 0; c < channels; c++) to[p * step + c] = from[c * positions + p];
}

/* Channels that are copied together where they are the innermost dimension; a whole number of groups. */
INLINE int64_t copied_together(const Map *m, int64_t channels) { return MIN(m->c, MAX(1, 16 / channels) * channels); }

/* `sizes` is height, width, and the kernel's. */
void local_context_norm(const int64_t *map, const int64_t *map_of_y, const int64_t *sizes, int64_t channels,
                        const float *x, const float *weight, const float *bias, double eps, float *y) {
    const Map *m = (const Map *)map, *of_y = (const Map *)map_of_y;
    Norm q = {channels, sizes[0], sizes[1], sizes[2], sizes[3], weight, bias, (float)eps};
    int64_t last = channels_last(m), block = last ? copied_together(m, channels) : channels;
    int64_t blocks = (m->c + block - 1) / block;
#pragma omp parallel if (m->n * m->s * m->c > SMALL)
    {
        Room r = room_for(m->s, q.width, last ? block * m->s : 0);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < m->n * blocks; job++) {
            int64_t n = job / blocks, first = job % blocks * block, count = MIN(block, m->c - first);
            const float *v = x + n * m->n_step + first * m->c_step;
            float *to = y + n * of_y->n_step + first * of_y->c_step;
            if (!last) {
                forward_of_plane(&q, v, m->c_step, first, to, of_y->c_step, &r);
                continue;
            }
            gather(v, m->s_step, m->s, count, r.values[0]);
            for (int64_t c = 0; c < count; c += channels)
                forward_of_plane(&q, r.values[0] + c * m->s, m->s, first + c, r.values[1] + c * m->s, m->s, &r);
            scatter(r.values[1], m->s, count, to, of_y->s_step);
        }
        leave(&r);
    }
}

/* `sums` is (2, C): the gradients of the weight and of the bias. */
void local_context_norm_backward(const int64_t *map, const int64_t *map_of_g, const int64_t *map_of_gx,
                                 const int64_t *sizes, int64_t channels, const float *x, const float *g,
                                 const float *weight, const float *bias, double eps, float *gx, float *sums) {
    const Map *m = (const Map *)map, *of_g = (const Map *)map_of_g, *of_gx = (const Map *)map_of_gx;
    Norm q = {channels, sizes[0], sizes[1], sizes[2], sizes[3], weight, bias, (float)eps};
    int64_t last = channels_last(m), block = last ? copied_together(m, channels) : channels;
    int64_t blocks = (m->c + block - 1) / block;
    float *found = room(2 * m->n * m->c);
#pragma omp parallel if (m->n * m->s * m->c > SMALL)
    {
        Room r = room_for(m->s, q.width, last ? block * m->s : 0);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < m->n * blocks; job++) {
            int64_t n = job / blocks, first = job % blocks * block, count = MIN(block, m->c - first);
            const float *v = x + n * m->n_step + first * m->c_step, *given = g + n * of_g->n_step + first * of_g->c_step;
            float *to = gx + n * of_gx->n_step + first * of_gx->c_step, *own = found + 2 * n * m->c;
            if (!last) {
                backward_of_plane(&q, v, m->c_step, given, of_g->c_step, first, to, of_gx->c_step, own, m->c, &r);
                continue;
            }
            gather(v, m->s_step, m->s, count, r.values[0]);
            gather(given, of_g->s_step, m->s, count, r.values[1]);
            for (int64_t c = 0; c < count; c += channels)
                backward_of_plane(&q, r.values[0] + c * m->s, m->s, r.values[1] + c * m->s, m->s, first + c,
                                  r.values[2] + c * m->s, m->s, own, m->c, &r);
            scatter(r.values[2], m->s, count, to, of_gx->s_step);
        }
        leave(&r);
    }
    join_threads(found, (int)m->n, 2 * m->c, 2 * m->c, sums);
    free(found);
}
