/* Adaptive gradient clipping of units that are rows in memory, in float32: unit by unit norms, factor and product, so that
   a gradient that is scaled is still in the cache.

   Norms are to the last bit those that torch takes: eight sums side by side, whose products are rounded before they are
   added, then added up one by one; what is left of a row behind, products of fours rounded too, the last three fused. */

#include "maps.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
#define WIDE 8

typedef struct {
    const float *weight;
    float *gradient;
    int64_t units, size;
} Rows;

typedef struct {
    float factor, eps, least, scale;
} Clip;

static float norm_of(Eight sums, const float *v, int64_t size) {
    float sum = sums[0];
    for (int j = 1; j < WIDE; j++) sum += sums[j];
    int64_t i = size / WIDE * WIDE, fours = size / 4 * 4;
    for (; i < fours; i++) sum += v[i] * v[i];
    for (; i < size; i++) sum = fmaf(v[i], v[i], sum);
    return sqrtf(sum);
}

/* Clips a unit: the ratio of its gradient, which is `scale` times too large, to its weights, and whether it was over. */
static void clip_unit(const Clip *q, const float *weight, float *gradient, int64_t size, float *ratio, uint8_t *over) {
    Eight weights = {0}, gradients = {0}; /* together, since each addition waits for the one before */
    for (int64_t i = 0; i + WIDE <= size; i += WIDE) {
        Eight w = *(const Eight *)(weight + i), g = *(const Eight *)(gradient + i);
        weights += w * w, gradients += g * g;
    }
    float own = norm_of(weights, weight, size), norm = norm_of(gradients, gradient, size) / q->scale;
    own = own < q->eps ? q->eps : own; /* what is no number stays so */
    float most = q->factor * own, by = most / (norm < q->least ? q->least : norm);
    *ratio = norm / own;
    *over = norm > most && norm < INFINITY;
    for (int64_t i = 0; *over && i < size; i++) gradient[i] *= by;
}

/* `table` has four numbers for each parameter: where its weights and its gradients lie, its units and their size.
   `ratios` and `over` have one for each unit. */
void clip_units(int64_t parameters, const int64_t *table, double factor, double eps, double least, double scale,
                float *ratios, uint8_t *over) {
    const Rows *all = (const Rows *)table;
    Clip q = {(float)factor, (float)eps, (float)least, (float)scale};
#pragma omp parallel
    {
        int64_t before = 0;
        for (int64_t j = 0; j < parameters; before += all[j].units, j++) {
#pragma omp for schedule(static) nowait
            for (int64_t o = 0; o < all[j].units; o++) {
                int64_t at = o * all[j].size, unit = before + o;
                clip_unit(&q, all[j].weight + at, all[j].gradient + at, all[j].size, ratios + unit, over + unit);
            }
        }
    }
}
