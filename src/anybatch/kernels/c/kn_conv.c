/* KNConv's stages around torch's convolution, in float32; `kn_stages.py` has them in formulas.

   Maps of one channel are (N, positions) without gaps. */

#include "maps.h"

/* Where windows lie, in three dimensions, the outermost first. */
typedef struct {
    int64_t size[3], windows[3], kernel[3], stride[3], pad[3], dilation[3];
} Windows;

/* Of every value of a sample whether dropout keeps it: two channels of a position share a hash of 32 bits. */
typedef struct {
    const int64_t *seed; /* NULL without dropout */
    int32_t threshold;
} Dropout;

/* The number of SplitMix64 for a sample, both halves of which are keys. */
INLINE uint64_t key_of(const Dropout *d, int64_t n) {
    uint64_t z = (uint64_t)*d->seed + (uint64_t)(n + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* Half of a hash. */
typedef int16_t __attribute__((may_alias)) Half;

INLINE uint32_t hashed(uint32_t place, uint32_t low, uint32_t high) {
    uint32_t z = place ^ low;
    z = (z ^ (z >> 16)) * 0x7FEB352Du;
    z = ((z ^ (z >> 15)) + high) * 0x846CA68Bu;
    return z ^ (z >> 16);
}

/* The hashes of position `s`: as int16, one for each channel, which is kept where it is not below the threshold. */
INLINE const Half *hash_row(const Dropout *d, int64_t n, int64_t s, int64_t c, uint32_t *restrict bits) {
    uint64_t key = key_of(d, n);
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32), pairs = (uint32_t)((c + 1) / 2);
    uint32_t first = (uint32_t)s * pairs;
    for (uint32_t j = 0; j < pairs; j++) bits[j] = hashed(first + j, low, high);
    return (const Half *)bits;
}

/* 1 where a value of two channels is kept, else 0, at positions from `s` on. */
INLINE void keep_columns(const Dropout *d, int64_t n, int64_t c, int64_t pair, int64_t s, int64_t count,
                         float *restrict keep, float *restrict keep_next) {
    uint64_t key = key_of(d, n);
    uint32_t low = (uint32_t)key, high = (uint32_t)(key >> 32), pairs = (uint32_t)((c + 1) / 2);
    uint32_t first = (uint32_t)s * pairs + (uint32_t)pair;
    int32_t threshold = d->threshold;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)hashed(first + (uint32_t)i * pairs, low, high);
        keep[i] = (int16_t)bits >= threshold ? 1.0f : 0.0f;
        keep_next[i] = bits >> 16 >= threshold ? 1.0f : 0.0f;
    }
}

/* Mean and biased variance over the channels of each position, after dropout. */
#define ROWS 4 /* taken together, since one alone is too short to keep the processor busy */

static void moments_of_rows(const Map *m, const float *x, const Dropout *d, float *mean, float *var) {
    int64_t rows = m->n * m->s, c = m->c;
#pragma omp parallel if (rows * c > SMALL)
    {
        float *kept = d->seed ? room(ROWS * c) : NULL;
        uint32_t *bits = d->seed ? (uint32_t *)room(c / 2 + 1) : NULL;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += ROWS) {
            int64_t row[ROWS];
            const float *v[ROWS];
            float sum[ROWS];
            for (int r = 0; r < ROWS; r++) {
                row[r] = MIN(first + r, rows - 1); /* the last one again behind it */
                int64_t n = row[r] / m->s, s = row[r] % m->s;
                v[r] = x + n * m->n_step + s * m->s_step;
                if (d->seed) {
                    const Half *hashes = hash_row(d, n, s, c, bits);
                    const float *restrict from = v[r];
                    float *restrict left = kept + r * c;
                    float some = 0;
                    int32_t threshold = d->threshold;
#pragma omp simd reduction(+ : some)
                    for (int64_t i = 0; i < c; i++) {
                        float u = from[i] * (hashes[i] >= threshold ? 1.0f : 0.0f);
                        left[i] = u;
                        some += u;
                    }
                    sum[r] = some;
                    v[r] = left;
                }
            }
            const float *restrict v0 = v[0], *restrict v1 = v[1], *restrict v2 = v[2], *restrict v3 = v[3];
            if (!d->seed) {
                float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
                for (int64_t i = 0; i < c; i++) s0 += v0[i], s1 += v1[i], s2 += v2[i], s3 += v3[i];
                sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
            }
            float m0 = sum[0] / c, m1 = sum[1] / c, m2 = sum[2] / c, m3 = sum[3] / c;
            float q0 = 0, q1 = 0, q2 = 0, q3 = 0;
#pragma omp simd reduction(+ : q0, q1, q2, q3)
            for (int64_t i = 0; i < c; i++) {
                float o0 = v0[i] - m0, o1 = v1[i] - m1, o2 = v2[i] - m2, o3 = v3[i] - m3;
                q0 += o0 * o0, q1 += o1 * o1, q2 += o2 * o2, q3 += o3 * o3;
            }
            mean[row[0]] = m0, mean[row[1]] = m1, mean[row[2]] = m2, mean[row[3]] = m3;
            var[row[0]] = q0 / c, var[row[1]] = q1 / c, var[row[2]] = q2 / c, var[row[3]] = q3 / c;
        }
        free(kept);
        free(bits);
    }
}

static void moments_of_planes(const Map *m, const float *x, const Dropout *d, float *mean, float *var) {
    int64_t step = together(m), blocks = (m->s + step - 1) / step, c = m->c;
#pragma omp parallel if (m->n * m->s * c > SMALL)
    {
        float *kept = d->seed ? room(step * c) : NULL; /* what dropout leaves of a block */
#pragma omp for schedule(static)
        for (int64_t job = 0; job < m->n * blocks; job++) {
            int64_t n = job / blocks, s = job % blocks * step, count = MIN(step, m->s - s), between = m->c_step;
            const float *v = x + n * m->n_step + s;
            float sum[MOST_POSITIONS] = {0}, squares[MOST_POSITIONS] = {0};
            float keep[2][MOST_POSITIONS];
            for (int64_t channel = 0; channel < c; channel++) {
                const float *restrict u = v + channel * m->c_step;
                if (d->seed) {
                    if (channel % 2 == 0) keep_columns(d, n, c, channel / 2, s, count, keep[0], keep[1]);
                    const float *restrict k = keep[channel % 2];
                    float *restrict left = kept + channel * step;
                    for (int64_t i = 0; i < count; i++) {
                        left[i] = k[i] * u[i];
                        sum[i] += left[i];
                    }
                } else
                    for (int64_t i = 0; i < count; i++) sum[i] += u[i];
            }
            for (int64_t i = 0; i < count; i++) sum[i] /= c;
            if (d->seed) v = kept, between = step;
            float off[MOST_POSITIONS] = {0};
            for (int64_t channel = 0; channel < c; channel++) add_around(count, v + channel * between, sum, off, squares);
            int64_t at = n * m->s + s;
            for (int64_t i = 0; i < count; i++) {
                off[i] /= c; /* what rounding left of the mean */
                mean[at + i] = sum[i] + off[i];
                var[at + i] = MAX(squares[i] / c - off[i] * off[i], 0);
            }
        }
        free(kept);
    }
}

void kn_pixels(const int64_t *map, const float *x, const int64_t *seed, int64_t threshold, float *mean, float *var) {
    const Map *m = (const Map *)map;
    Dropout d = {seed, (int32_t)threshold};
    (channels_last(m) ? moments_of_rows : moments_of_planes)(m, x, &d, mean, var);
}

/* The sum of each filter. */
void kn_sums(int64_t filters, int64_t size, const float *weight, float *total) {
#pragma omp parallel for schedule(static) if (filters * size > SMALL)
    for (int64_t o = 0; o < filters; o++) total[o] = sum_of(weight + o * size, size);
}

/* The windows of one row, from `low` to `high`, whose tap `j` lies on the map. */
INLINE void within(const Windows *at, int64_t j, int64_t *low, int64_t *high, int64_t *first) {
    int64_t off = j * at->dilation[2] - at->pad[2], stride = at->stride[2];
    *first = off;
    *low = off < 0 ? (-off + stride - 1) / stride : 0;
    *high = off >= at->size[2] ? 0 : MIN(at->windows[2], (at->size[2] - 1 - off) / stride + 1);
    *low = MIN(*low, at->windows[2]);
    *high = MAX(*high, *low);
}

/* The row of the map that taps (a, b) of the row of windows (d, h) lie on, or -1. */
INLINE int64_t row_of(const Windows *at, int64_t d, int64_t h, int64_t a, int64_t b) {
    int64_t i = d * at->stride[0] - at->pad[0] + a * at->dilation[0];
    int64_t j = h * at->stride[1] - at->pad[1] + b * at->dilation[1];
    return i < 0 || i >= at->size[0] || j < 0 || j >= at->size[1] ? -1 : i * at->size[1] + j;
}

INLINE void add_row(const float *restrict from, int64_t stride, int64_t count, float *restrict to) {
    if (stride == 1)
        for (int64_t i = 0; i < count; i++) to[i] += from[i];
    else
        for (int64_t i = 0; i < count; i++) to[i] += from[i * stride];
}

INLINE void add_squares(const float *restrict from, int64_t stride, int64_t count, const float *restrict mean,
                        float *restrict to) {
    for (int64_t i = 0; i < count; i++) {
        float off = (from ? from[i * stride] : 0) - mean[i];
        to[i] += off * off;
    }
}

/* Means over windows of the maps' means, and of their variances plus the squares of how the means differ. */
static void over_windows(int64_t samples, const Windows *at, const float *mean, const float *var, float p, float eps,
                         float *w_mean, float *w_scale) {
    int64_t rows = at->windows[0] * at->windows[1], width = at->windows[2];
    int64_t size = at->size[0] * at->size[1] * at->size[2], taps = at->kernel[0] * at->kernel[1] * at->kernel[2];
    float share = 1.0f / taps, kept = 1 - p;
#pragma omp parallel if (samples * rows * width * taps > SMALL)
    {
        float *sum = room(width);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < samples * rows; job++) {
            int64_t n = job / rows, d = job % rows / at->windows[1], h = job % at->windows[1];
            const float *means = mean + n * size, *vars = var + n * size;
            float *m = w_mean + job * width, *r = w_scale + job * width;
            int64_t low, high, first;
            memset(m, 0, width * sizeof(float));
            memset(r, 0, width * sizeof(float));
            for (int64_t a = 0; a < at->kernel[0]; a++)
                for (int64_t b = 0; b < at->kernel[1]; b++) {
                    int64_t row = row_of(at, d, h, a, b) * at->size[2];
                    if (row < 0) continue;
                    for (int64_t j = 0; j < at->kernel[2]; j++) {
                        within(at, j, &low, &high, &first);
                        int64_t from = row + low * at->stride[2] + first;
                        add_row(means + from, at->stride[2], high - low, m + low);
                        add_row(vars + from, at->stride[2], high - low, r + low);
                    }
                }
            for (int64_t i = 0; i < width; i++) m[i] *= share;
            memset(sum, 0, width * sizeof(float));
            for (int64_t a = 0; taps > 1 && a < at->kernel[0]; a++)
                for (int64_t b = 0; b < at->kernel[1]; b++) {
                    int64_t row = row_of(at, d, h, a, b) * at->size[2];
                    if (row < 0) {
                        for (int64_t j = 0; j < at->kernel[2]; j++) add_squares(NULL, 0, width, m, sum);
                        continue;
                    }
                    for (int64_t j = 0; j < at->kernel[2]; j++) {
                        within(at, j, &low, &high, &first);
                        add_squares(NULL, 0, low, m, sum);
                        add_squares(means + row + low * at->stride[2] + first, at->stride[2], high - low, m + low,
                                    sum + low);
                        add_squares(NULL, 0, width - high, m + high, sum + high);
                    }
                }
            for (int64_t i = 0; i < width; i++) {
                r[i] = 1 / sqrtf((r[i] + sum[i]) * share / (kept * kept) + eps);
                m[i] /= kept;
            }
        }
        free(sum);
    }
}

/* A window of one position, alone on it, has that position's moments. */
static void untouched(int64_t count, const float *mean, const float *var, float p, float eps, float *w_mean,
                      float *w_scale) {
    float kept = 1 - p;
    for (int64_t i = 0; i < count; i++) {
        w_mean[i] = mean[i] / kept;
        w_scale[i] = 1 / sqrtf(var[i] / (kept * kept) + eps);
    }
}

INLINE int is_untouched(const Windows *at) {
    for (int i = 0; i < 3; i++)
        if (at->kernel[i] != 1 || at->stride[i] != 1 || at->pad[i]) return 0;
    return 1;
}

/* NaN stays NaN. */
INLINE float positive(float v) { return v < 0 ? 0 : v; }

INLINE void finish_row(int64_t c, float *restrict z, float scale, float mean, const float *restrict total,
                       const float *restrict bias, const float *restrict residual, const int relu, const int adds) {
    for (int64_t i = 0; i < c; i++) {
        float v = (z[i] - mean * total[i]) * scale + bias[i];
        if (adds) v += residual[i];
        z[i] = relu ? positive(v) : v;
    }
}

INLINE void finish_plane(int64_t count, float *restrict z, const float *restrict scale, const float *restrict mean,
                         float total, float bias, const float *restrict residual, const int relu, const int adds) {
    for (int64_t i = 0; i < count; i++) {
        float v = (z[i] - mean[i] * total) * scale[i] + bias;
        if (adds) v += residual[i];
        z[i] = relu ? positive(v) : v;
    }
}

/* `do` with its last two arguments known to the compiler. */
#define SPECIALIZED(do, relu, adds, ...)                                                                               \
    switch ((relu ? 2 : 0) + (adds ? 1 : 0)) {                                                                         \
        case 0: do(__VA_ARGS__, 0, 0); break;                                                                          \
        case 1: do(__VA_ARGS__, 0, 1); break;                                                                          \
        case 2: do(__VA_ARGS__, 1, 0); break;                                                                          \
        default: do(__VA_ARGS__, 1, 1);                                                                                \
    }

/* In place of z: relu((z - mean total) / sqrt(var + eps) + bias + residual), and the windows' moments. */
void kn_normalized(const int64_t *map, const int64_t *windows, float *z, const float *mean, const float *var,
                   const float *total, const float *bias, const float *residual, double p, double eps, int64_t relu,
                   float *w_mean, float *w_scale) {
    const Map *m = (const Map *)map;
    const Windows *at = (const Windows *)windows;
    int64_t c = m->c;
    if (is_untouched(at))
        untouched(m->n * m->s, mean, var, p, eps, w_mean, w_scale);
    else
        over_windows(m->n, at, mean, var, p, eps, w_mean, w_scale);
    float *zeros = NULL;
    if (!bias) bias = zeros = memset(room(c), 0, c * sizeof(float));
    if (channels_last(m)) {
        int64_t rows = m->n * m->s;
#pragma omp parallel for schedule(static) if (rows * c > SMALL)
        for (int64_t row = 0; row < rows; row++) {
            int64_t start = row / m->s * m->n_step + row % m->s * m->s_step;
            const float *beside = residual ? residual + start : NULL;
            SPECIALIZED(finish_row, relu, residual, c, z + start, w_scale[row], w_mean[row], total, bias, beside);
        }
    } else {
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
        for (int64_t job = 0; job < m->n * c; job++) {
            int64_t n = job / c, i = job % c, start = n * m->n_step + i * m->c_step, at_n = n * m->s;
            const float *beside = residual ? residual + start : NULL;
            SPECIALIZED(finish_plane, relu, residual, m->s, z + start, w_scale + at_n, w_mean + at_n, total[i], bias[i],
                        beside);
        }
    }
    free(zeros);
}

INLINE void pull_row(int64_t c, const float *restrict gradient, const float *restrict y, const float *restrict residual,
                     const float *restrict bias, const float *restrict total, float scale, float mean,
                     float *restrict h, float *restrict masked, float *restrict g_bias, float *restrict g_total,
                     float *restrict g_var, float *restrict g_own, const int relu, const int adds) {
    float along = 0, own = 0;
#pragma omp simd reduction(+ : along, own)
    for (int64_t i = 0; i < c; i++) {
        float g = gradient[i];
        g = relu && y[i] <= 0 ? 0 : g;
        float alone = (adds ? y[i] - residual[i] : y[i]) - bias[i];
        float pulled = g * scale;
        h[i] = pulled;
        if (relu && adds) masked[i] = g;
        g_bias[i] += g;
        g_total[i] -= pulled * mean;
        along += g * alone;
        own += pulled * total[i];
    }
    *g_var = -0.5f * scale * scale * along;
    *g_own = own;
}

INLINE void pull_plane(int64_t count, const float *restrict gradient, const float *restrict y,
                       const float *restrict residual, float bias, float total, const float *restrict scale,
                       const float *restrict mean, float *restrict h, float *restrict masked, float *restrict g_bias,
                       float *restrict g_total, float *restrict along, float *restrict own, const int relu,
                       const int adds) {
    float of_bias = 0, of_total = 0;
#pragma omp simd reduction(+ : of_bias, of_total)
    for (int64_t i = 0; i < count; i++) {
        float g = gradient[i];
        g = relu && y[i] <= 0 ? 0 : g;
        float alone = (adds ? y[i] - residual[i] : y[i]) - bias;
        float pulled = g * scale[i];
        h[i] = pulled;
        if (relu && adds) masked[i] = g;
        of_bias += g;
        of_total -= pulled * mean[i];
        along[i] += g * alone;
        own[i] += pulled * total;
    }
    *g_bias += of_bias;
    *g_total += of_total;
}

/* Gradients in front of the epilogue: of the convolution's output, h; where a ReLU and a sum stand behind it of what
   was added, `masked`; of each window's variance and mean; of biases and of the filters' sums. */
void kn_pulled(const int64_t *map, const float *gradient, const float *y, const float *residual, const float *bias,
               const float *total, const float *scale, const float *mean, int64_t relu, float *h, float *masked,
               float *g_var, float *g_own, float *g_bias, float *g_total) {
    const Map *m = (const Map *)map;
    int64_t c = m->c, wide = (c + 15) / 16 * 16;
    int threads = m->n * m->s * c > SMALL ? omp_get_max_threads() : 1;
    float *zeros = NULL, *recent = memset(room(threads * 2 * wide), 0, threads * 2 * wide * sizeof(float));
    double *all = memset(double_room(threads * 2 * wide), 0, threads * 2 * wide * sizeof(double));
    if (!bias) bias = zeros = memset(room(c), 0, c * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *biases = recent + omp_get_thread_num() * 2 * wide, *totals = biases + wide;
        double *sums = all + omp_get_thread_num() * 2 * wide;
        if (channels_last(m)) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m->n * m->s; row++) {
                int64_t at = row / m->s * m->n_step + row % m->s * m->s_step;
                if (row % ROWS_SUMMED == 0) flush(biases, sums, 2 * wide);
                const float *beside = residual ? residual + at : NULL;
                float *left = masked ? masked + at : NULL;
                SPECIALIZED(pull_row, relu, residual, c, gradient + at, y + at, beside, bias, total, scale[row],
                            mean[row], h + at, left, biases, totals, g_var + row, g_own + row);
            }
        } else {
            int64_t step = stretch(m), blocks = (m->s + step - 1) / step;
            float *along = room(2 * step), *own = along + step;
#pragma omp for schedule(static)
            for (int64_t job = 0; job < m->n * blocks; job++) {
                int64_t n = job / blocks, s = job % blocks * step, count = MIN(step, m->s - s), row = n * m->s + s;
                memset(along, 0, 2 * step * sizeof(float));
                flush(biases, sums, 2 * wide);
                for (int64_t i = 0; i < c; i++) {
                    int64_t at = n * m->n_step + i * m->c_step + s;
                    const float *beside = residual ? residual + at : NULL;
                    float *left = masked ? masked + at : NULL;
                    SPECIALIZED(pull_plane, relu, residual, count, gradient + at, y + at, beside, bias[i], total[i],
                                scale + row, mean + row, h + at, left, biases + i, totals + i, along, own);
                }
                for (int64_t i = 0; i < count; i++) {
                    float r = scale[row + i];
                    g_var[row + i] = -0.5f * r * r * along[i];
                    g_own[row + i] = own[i];
                }
            }
            free(along);
        }
        flush(biases, sums, 2 * wide);
    }
    join_threads(all, threads, 2 * wide, c, g_bias);
    join_threads(all + wide, threads, 2 * wide, c, g_total);
    free(recent);
    free(all);
    free(zeros);
}

/* For each position the sums, over the windows that hold it, of two fields of theirs. */
static void spread(int64_t samples, const Windows *at, const float *first_field, const float *second_field,
                   float *first_sum, float *second_sum) {
    int64_t rows = at->size[0] * at->size[1], width = at->size[2];
    int64_t count = at->windows[0] * at->windows[1] * at->windows[2];
#pragma omp parallel for schedule(static) if (samples * rows * width > SMALL / 8)
    for (int64_t job = 0; job < samples * rows; job++) {
        int64_t n = job / rows, i = job % rows / at->size[1], j = job % at->size[1];
        float *restrict one = first_sum + job * width, *restrict two = second_sum + job * width;
        memset(one, 0, width * sizeof(float));
        memset(two, 0, width * sizeof(float));
        for (int64_t a = 0; a < at->kernel[0]; a++)
            for (int64_t b = 0; b < at->kernel[1]; b++) {
                int64_t d = i + at->pad[0] - a * at->dilation[0], h = j + at->pad[1] - b * at->dilation[1];
                if (d < 0 || h < 0 || d % at->stride[0] || h % at->stride[1]) continue;
                d /= at->stride[0], h /= at->stride[1];
                if (d >= at->windows[0] || h >= at->windows[1]) continue;
                int64_t row = n * count + (d * at->windows[1] + h) * at->windows[2];
                for (int64_t k = 0; k < at->kernel[2]; k++) {
                    int64_t low, high, off, stride = at->stride[2];
                    within(at, k, &low, &high, &off);
                    const float *restrict f = first_field + row, *restrict g = second_field + row;
                    if (stride == 1)
                        for (int64_t w = low; w < high; w++) one[w + off] += f[w], two[w + off] += g[w];
                    else
                        for (int64_t w = low; w < high; w++) one[w * stride + off] += f[w], two[w * stride + off] += g[w];
                }
            }
    }
}

/* Added in place to g_x: the gradient through the moments, of which `g_own` goes through the mean alone. */
void kn_through_moments(const int64_t *map, const int64_t *map_of_x, const int64_t *windows, float *g_x, const float *x,
                        const float *mean, const float *g_var, const float *g_own, double p, const int64_t *seed,
                        int64_t threshold) {
    const Map *m = (const Map *)map, *of_x = (const Map *)map_of_x;
    const Windows *at = (const Windows *)windows;
    int64_t count = m->n * at->windows[0] * at->windows[1] * at->windows[2], taps = 1, c = m->c;
    for (int i = 0; i < 3; i++) taps *= at->kernel[i];
    Dropout d = {seed, (int32_t)threshold};
    float kept = 1 - p, share = 1.0f / (taps * c);
    float *fields = room(2 * count + 2 * m->n * m->s), *slope = fields, *start = fields + count;
    for (int64_t i = 0; i < count; i++) {
        float v = share * g_var[i] / (kept * kept);
        slope[i] = 2 * v;
        start[i] = -share * g_own[i] / kept - 2 * v * mean[i] * kept;
    }
    if (!is_untouched(at)) {
        spread(m->n, at, slope, start, fields + 2 * count, fields + 2 * count + m->n * m->s);
        slope = fields + 2 * count, start = slope + m->n * m->s;
    }
    int last = channels_last(m);
    int64_t step = last ? 1 : stretch(m), blocks = (m->s + step - 1) / step;
#pragma omp parallel if (m->n * m->s * c > SMALL)
    {
        float *keep = room(2 * step);
        uint32_t *bits = (uint32_t *)room(c / 2 + 1);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < m->n * blocks; job++) {
            int64_t n = job / blocks, s = job % blocks * step, size = MIN(step, m->s - s), row = n * m->s + s;
            if (last) {
                float *restrict g = g_x + n * m->n_step + s * m->s_step;
                const float *restrict v = x + n * of_x->n_step + s * of_x->s_step;
                float a = start[row], b = slope[row];
                if (seed) {
                    const Half *hashes = hash_row(&d, n, s, c, bits);
                    for (int64_t i = 0; i < c; i++)
                        g[i] += (hashes[i] >= d.threshold ? 1.0f : 0.0f) * (a + b * v[i]);
                } else
                    for (int64_t i = 0; i < c; i++) g[i] += a + b * v[i];
                continue;
            }
            const float *restrict a = start + row, *restrict b = slope + row;
            for (int64_t channel = 0; channel < c; channel++) {
                float *restrict g = g_x + n * m->n_step + channel * m->c_step + s;
                const float *restrict v = x + n * of_x->n_step + channel * of_x->c_step + s;
                if (seed) {
                    if (channel % 2 == 0) keep_columns(&d, n, c, channel / 2, s, size, keep, keep + step);
                    const float *restrict k = keep + channel % 2 * step;
                    for (int64_t i = 0; i < size; i++) g[i] += k[i] * (a[i] + b[i] * v[i]);
                } else
                    for (int64_t i = 0; i < size; i++) g[i] += a[i] + b[i] * v[i];
            }
        }
        free(keep);
        free(bits);
    }
    free(fields);
}
