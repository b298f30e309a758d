/* Weight Standardization of filters as rows, in float32; `methods/filters.py` has the rules in formulas. */

#include "maps.h"

enum { INSIDE, OUTSIDE, FLOOR };

INLINE void centre(int64_t size, const float *restrict x, float mean, float factor, float *restrict y) {
    for (int64_t i = 0; i < size; i++) y[i] = (x[i] - mean) * factor;
}

/* Each of `filters` rows less its mean, times the rule's factor and a gain, or NULL; the mean, the factor and the pull
   of each. `divisor` is of the squared norm, and `place` where eps goes. */
void standardized_rows(int64_t filters, int64_t size, const float *rows, const float *gain, int64_t place, double divisor,
                       double eps, float *made, float *mean, float *scale, float *pull) {
#pragma omp parallel for schedule(static) if (filters * size > SMALL)
    for (int64_t o = 0; o < filters; o++) {
        const float *x = rows + o * size;
        float middle = sum_of(x, size) / size;
        double off, squares, s, q;
        around(x, middle, size, &off, &squares);
        middle += (float)off;
        double v = squares / divisor;
        if (place == OUTSIDE) {
            s = 1 / (sqrt(v) + eps);
            q = squares > 0 ? 1 / sqrt(squares * divisor) : 0;
        } else {
            s = 1 / sqrt(place == INSIDE ? v + eps : MAX(v, eps));
            q = place == INSIDE ? s / divisor : squares >= eps ? s : 0;
        }
        mean[o] = middle, scale[o] = (float)s, pull[o] = (float)q;
        centre(size, x, middle, (float)s * (gain ? gain[o] : 1), made + o * size);
    }
}

INLINE void pull_row(int64_t size, const float *restrict g, const float *restrict x, float mean, float own, float start,
                     float slope, float *restrict to) {
    for (int64_t i = 0; i < size; i++) to[i] = own * g[i] - start - slope * (x[i] - mean);
}

INLINE float product(int64_t size, const float *restrict g, const float *restrict x, float mean, float *total) {
    float along = 0, sum = 0;
#pragma omp simd reduction(+ : along, sum)
    for (int64_t i = 0; i < size; i++) along += g[i] * (x[i] - mean), sum += g[i];
    *total = sum;
    return along;
}

/* The gradients of the rows, and of the gains; `values` are the rows or, with `mean` NULL, what was made of them. */
void pulled_rows(int64_t filters, int64_t size, const float *gradient, const float *values, const float *mean,
                 const float *scale, const float *pull, const float *gain, float *made, float *along) {
#pragma omp parallel for schedule(static) if (filters * size > SMALL)
    for (int64_t o = 0; o < filters; o++) {
        const float *g = gradient + o * size, *x = values + o * size;
        float factor = mean ? scale[o] : 1, middle = mean ? mean[o] : 0, times = gain ? gain[o] : 1;
        float total, own = scale[o] * times;
        along[o] = product(size, g, x, middle, &total) * factor;
        pull_row(size, g, x, middle, own, own * total / size, pull[o] * times * along[o] * factor, made + o * size);
    }
}
