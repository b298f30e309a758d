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
    float *along;                   /* (2, P): sums over channels of gradients, and of them with what is normalized */
    float *mean, *rstd;             /* (P,): of each position's window, the mean less the plane's */
    float *values[3];               /* (channels, P) each, where channels do not lie one behind the other */
} Room;

static Room room_for(int64_t positions, int64_t width, int64_t copied) {
    double *all = (double *)room(2 * (4 * positions + 4 * (width + 1)));
    float *more = room(4 * positions + 3 * copied), *along = more + 2 * positions, *copies = more + 4 * positions;
    return (Room){all,
                  all + positions,
                  all + 2 * positions,
                  all + 3 * positions,
                  all + 4 * positions,
                  along,
                  more,
                  more + positions,
                  {copies, copies + copied, copies + 2 * copied}};
}

static void leave(Room *r) {
    free(r->first);
    free(r->mean);
}

/* Two fields are dealt with at a time, so that the sums of one need not wait for those of the other. */
INLINE void add(int64_t count, const double *restrict f, const double *restrict g, double *restrict one,
                double *restrict two) {
    for (int64_t i = 0; i < count; i++) one[i] += f[i], two[i] += g[i];
}

INLINE void take(int64_t count, const double *restrict f, const double *restrict g, double *restrict one,
                 double *restrict two) {
    for (int64_t i = 0; i < count; i++) one[i] -= f[i], two[i] -= g[i];
}

INLINE void run(int64_t count, const double *restrict one, const double *restrict two, double *restrict so_far,
                double *restrict so_far_too) {
    double sum = 0, sum_too = 0;
    so_far[0] = so_far_too[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        so_far[i + 1] = sum += one[i];
        so_far_too[i + 1] = sum_too += two[i];
    }
}

INLINE void differ(int64_t count, const double *high, const double *low, double *restrict to) {
    for (int64_t i = 0; i < count; i++) to[i] = high[i] - low[i];
}

/* Sums over all complete windows, (rows, columns), of two fields of positions. */
static void over_windows(const Norm *q, Room *r) {
    int64_t width = q->width, rows = rows_of(q), columns = columns_of(q), kh = q->kernel_h, kw = q->kernel_w;
    double *one = r->columns, *two = one + width + 1, *so_far = two + width + 1, *so_far_too = so_far + width + 1;
    memset(one, 0, 2 * (width + 1) * sizeof(double));
    for (int64_t i = 0; i < kh - 1; i++) add(width, r->first + i * width, r->second + i * width, one, two);
    for (int64_t i = 0; i < rows; i++) {
        add(width, r->first + (i + kh - 1) * width, r->second + (i + kh - 1) * width, one, two);
        run(width, one, two, so_far, so_far_too);
        differ(columns, so_far + kw, so_far, r->first_sum + i * columns);
        differ(columns, so_far_too + kw, so_far_too, r->second_sum + i * columns);
        take(width, r->first + i * width, r->second + i * width, one, two);
    }
}

/* Of sums so far over windows of a row, those that hold each position. */
INLINE void cover(const Norm *q, const double *so_far, double *to) {
    int64_t columns = columns_of(q), kw = q->kernel_w, w = 0;
    for (; w < kw - 1; w++) to[w] = so_far[MIN(w + 1, columns)] - so_far[0];
    differ(MAX(0, columns - w), so_far + w + 1, so_far + w - kw + 1, to + w);
    for (w = MAX(w, columns); w < q->width; w++) to[w] = so_far[columns] - so_far[w - kw + 1];
}

/* The transpose: of two fields of windows, for each position the sums over the windows that hold it. */
static void over_positions(const Norm *q, Room *r) {
    int64_t width = q->width, rows = rows_of(q), columns = columns_of(q), kh = q->kernel_h;
    double *one = r->columns, *two = one + width + 1, *so_far = two + width + 1, *so_far_too = so_far + width + 1;
    memset(one, 0, 2 * (width + 1) * sizeof(double));
    for (int64_t h = 0; h < q->height; h++) {
        int64_t gone = h - kh;
        if (h < rows) add(columns, r->first + h * columns, r->second + h * columns, one, two);
        if (gone >= 0) take(columns, r->first + gone * columns, r->second + gone * columns, one, two);
        run(columns, one, two, so_far, so_far_too);
        cover(q, so_far, r->first_sum + h * width);
        cover(q, so_far_too, r->second_sum + h * width);
    }
}

INLINE void add_off(int64_t count, const float *restrict x, float middle, float *restrict mean) {
    for (int64_t p = 0; p < count; p++) mean[p] += x[p] - middle;
}

INLINE void add_squares(int64_t count, const float *restrict x, float middle, const float *restrict mean,
                        float *restrict var) {
    for (int64_t p = 0; p < count; p++) {
        float off = (x[p] - middle) - mean[p];
        var[p] += off * off;
    }
}

INLINE void as_fields(int64_t count, const float *restrict mean, const float *restrict var, float share,
                      double *restrict first, double *restrict second) {
    for (int64_t p = 0; p < count; p++) {
        double m = mean[p];
        first[p] = m;
        second[p] = (double)(var[p] * share) + m * m;
    }
}

INLINE void as_moments(int64_t count, const double *restrict one, const double *restrict two, double share, float eps,
                       float *restrict mean, float *restrict rstd) {
    for (int64_t j = 0; j < count; j++) {
        double own = one[j] * share, spread = two[j] * share - own * own;
        float var = (float)spread;
        mean[j] = (float)own;
        rstd[j] = 1 / sqrtf((var < 0 ? 0 : var) + eps);
    }
}

/* The plane's mean; into the room, of each position's window the mean less that, and 1 / std. */
static float moments(const Norm *q, const float *x, int64_t step, Room *r) {
    int64_t positions = q->height * q->width, channels = q->channels;
    double total = 0;
    for (int64_t c = 0; c < channels; c++) total += sum_of(x + c * step, positions);
    float middle = (float)(total / ((double)channels * positions));
    float *mean = r->mean, *var = r->rstd;
    memset(mean, 0, positions * sizeof(float));
    memset(var, 0, positions * sizeof(float));
    for (int64_t c = 0; c < channels; c++) add_off(positions, x + c * step, middle, mean);
    for (int64_t p = 0; p < positions; p++) mean[p] /= channels;
    for (int64_t c = 0; c < channels; c++) add_squares(positions, x + c * step, middle, mean, var);
    as_fields(positions, mean, var, 1.0f / channels, r->first, r->second);
    over_windows(q, r);
    int64_t columns = columns_of(q), before = (q->kernel_w - 1) / 2;
    double share = 1.0 / ((double)q->kernel_h * q->kernel_w);
    for (int64_t h = 0; h < q->height; h++) {
        int64_t i = window_of(h, q->height, q->kernel_h);
        float *m = mean + h * q->width, *s = var + h * q->width;
        if (h && i == window_of(h - 1, q->height, q->kernel_h)) {
            memcpy(m, m - q->width, q->width * sizeof(float));
            memcpy(s, s - q->width, q->width * sizeof(float));
            continue;
        }
        as_moments(columns, r->first_sum + i * columns, r->second_sum + i * columns, share, q->eps, m + before,
                   s + before);
        for (int64_t w = 0; w < before; w++) m[w] = m[before], s[w] = s[before];
        for (int64_t w = before + columns; w < q->width; w++) m[w] = m[w - 1], s[w] = s[w - 1];
    }
    return middle;
}

INLINE void normalize(int64_t count, const float *restrict x, float middle, const float *restrict mean,
                      const float *restrict rstd, float weight, float bias, float *restrict y) {
    for (int64_t p = 0; p < count; p++) y[p] = ((x[p] - middle) - mean[p]) * rstd[p] * weight + bias;
}

static void forward_of_plane(const Norm *q, const float *x, int64_t step, int64_t first, float *y, int64_t y_step,
                             Room *r) {
    int64_t positions = q->height * q->width;
    float middle = moments(q, x, step, r);
    for (int64_t c = 0; c < q->channels; c++)
        normalize(positions, x + c * step, middle, r->mean, r->rstd, q->weight[first + c], q->bias[first + c],
                  y + c * y_step);
}

INLINE void pull(int64_t positions, const float *restrict x, const float *restrict g, float middle,
                 const float *restrict mean, const float *restrict rstd, float weight, float *restrict along_mean,
                 float *restrict along, float *restrict gx, float *g_weight, float *g_bias) {
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

/* Adds to windows what their positions have from the mean and the variance of each, a + b x. */
INLINE void of_windows(int64_t count, const float *restrict mean, const float *restrict rstd,
                       const float *restrict along_mean, const float *restrict along, double share,
                       double *restrict start, double *restrict slope) {
    for (int64_t i = 0; i < count; i++) {
        double s = rstd[i], b = s * s * along[i] * share;
        start[i] += b * mean[i] - s * along_mean[i] * share;
        slope[i] -= b;
    }
}

INLINE void finish(int64_t count, const float *restrict x, float middle, const double *restrict start,
                   const double *restrict slope, float *restrict gx) {
    for (int64_t p = 0; p < count; p++) gx[p] += (float)start[p] + (float)slope[p] * (x[p] - middle);
}

/* `found` is (2, C): the gradients of the weight and of the bias, of this sample. */
static void backward_of_plane(const Norm *q, const float *x, int64_t step, const float *g, int64_t g_step, int64_t first,
                              float *gx, int64_t gx_step, float *found, int64_t c_all, Room *r) {
    int64_t positions = q->height * q->width, columns = columns_of(q);
    float middle = moments(q, x, step, r);
    float *along_mean = memset(r->along, 0, 2 * positions * sizeof(float)), *along = along_mean + positions;
    for (int64_t c = 0; c < q->channels; c++)
        pull(positions, x + c * step, g + c * g_step, middle, r->mean, r->rstd, q->weight[first + c], along_mean, along,
             gx + c * gx_step, found + first + c, found + c_all + first + c);
    memset(r->first, 0, rows_of(q) * columns * sizeof(double));
    memset(r->second, 0, rows_of(q) * columns * sizeof(double));
    double share = 1.0 / ((double)q->channels * q->kernel_h * q->kernel_w);
    int64_t before = (q->kernel_w - 1) / 2;
    for (int64_t h = 0; h < q->height; h++) {
        int64_t row = window_of(h, q->height, q->kernel_h) * columns, p = h * q->width;
        double *one = r->first + row, *two = r->second + row;
        const float *mean = r->mean + p, *rstd = r->rstd + p, *a = along_mean + p, *b = along + p;
        for (int64_t w = 0; w < before; w++) of_windows(1, mean + w, rstd + w, a + w, b + w, share, one, two);
        of_windows(columns, mean + before, rstd + before, a + before, b + before, share, one, two);
        for (int64_t w = before + columns; w < q->width; w++)
            of_windows(1, mean + w, rstd + w, a + w, b + w, share, one + columns - 1, two + columns - 1);
    }
    over_positions(q, r);
    for (int64_t c = 0; c < q->channels; c++)
        finish(positions, x + c * step, middle, r->first_sum, r->second_sum, gx + c * gx_step);
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
    join_samples(found, m->n, 2 * m->c, sums);
    free(found);
}
