/* What the passes share: how maps lie in memory, how work is split, and sums over a few thousand values.

   Loops are written for the compiler to turn into vector code; `omp simd` lets it reorder sums. Nothing depends on the
   number of samples but how the sums of parameters' gradients are split among threads. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* (N, C, S): so many samples, channels and positions, and the steps between them. One of the last two steps is 1. */
typedef struct {
    int64_t n, c, s, n_step, c_step, s_step;
} Map;

#define MAP_NUMBERS 6

/* Work below this many values is not worth a thread. */
#define SMALL 16384

/* Positions that are taken together where channels are far apart: few enough that all their channels stay in cache. */
#define MOST_POSITIONS 512
INLINE int64_t together(const Map *m) {
    int64_t fit = 65536 / MAX(m->c, 1) / 16 * 16;
    return MIN(MAX(fit, 32), MOST_POSITIONS);
}

/* The same where each value is taken once: long, for few jumps in memory, but with work for every thread. */
INLINE int64_t stretch(const Map *m) {
    int64_t share = m->n * m->s / omp_get_max_threads();
    return MAX(256, MIN(share, 4096)) / 16 * 16;
}

INLINE int channels_last(const Map *m) { return m->c_step == 1; }

#define TAKEN 4 /* rows taken together: sums in memory wait for one another */

/* Chunks of positions whose sums are taken apart: as many for a sample alone as for one among others. */
INLINE int64_t chunk_of(const Map *m) { return MAX(SMALL / 2 / MAX(m->c, 1), 16) / TAKEN * TAKEN; }

/* `do` for rows from `from` to `to`, four at once as long as there are. */
#define BY_FOURS(do, from, to, ...)                                                                                    \
    {                                                                                                                  \
        int64_t r = from;                                                                                              \
        for (; r + TAKEN <= to; r += TAKEN) do(TAKEN, __VA_ARGS__);                                                    \
        for (; r < to; r++) do(1, __VA_ARGS__);                                                                        \
    }

#define LINE 16 /* floats of a cache line */

/* Room for `count` floats that starts at a cache line. */
INLINE float *room(int64_t count) {
    void *found = NULL;
    if (posix_memalign(&found, LINE * sizeof(float), (size_t)MAX(count, LINE) * sizeof(float))) abort();
    return found;
}

INLINE double *double_room(int64_t count) { return (double *)room(2 * count); }

/* As many values as a register holds, wherever they start; wider ones compilers keep in memory. Sums are taken in four of
   them, since one addition waits for the one before. A file may ask for no more than MOST_LANES. */
#ifndef MOST_LANES
#define MOST_LANES 16
#endif
#if defined(__AVX512F__) && MOST_LANES >= 16
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE Lanes lanes(const float *v) { return *(const Lanes *)v; }
INLINE void put(float *to, Lanes v) { *(Lanes *)to = v; }

INLINE float joined(Lanes a, Lanes b, Lanes c, Lanes d) {
    typedef float Four __attribute__((vector_size(16)));
    Lanes all = (a + b) + (c + d);
    Four four[LANES / 4];
    memcpy(four, &all, sizeof all);
    for (int step = LANES / 8; step; step /= 2)
        for (int i = 0; i < step; i++) four[i] += four[i + step];
    return (four[0][0] + four[0][1]) + (four[0][2] + four[0][3]);
}

INLINE float sum_of(const float *v, int64_t size) {
    Lanes a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        const float *at = v + i;
        a += lanes(at), b += lanes(at + LANES), c += lanes(at + 2 * LANES), d += lanes(at + 3 * LANES);
    }
    for (; i + LANES <= size; i += LANES) a += lanes(v + i);
    float total = joined(a, b, c, d);
    for (; i < size; i++) total += v[i];
    return total;
}

INLINE float squares_around(const float *v, float mean, int64_t size) {
    Lanes a = {0}, b = {0}, c = {0}, d = {0};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        const float *at = v + i;
        Lanes p = lanes(at) - mean, q = lanes(at + LANES) - mean;
        Lanes r = lanes(at + 2 * LANES) - mean, s = lanes(at + 3 * LANES) - mean;
        a += p * p, b += q * q, c += r * r, d += s * s;
    }
    for (; i + LANES <= size; i += LANES) {
        Lanes p = lanes(v + i) - mean;
        a += p * p;
    }
    float total = joined(a, b, c, d);
    for (; i < size; i++) total += (v[i] - mean) * (v[i] - mean);
    return total;
}

/* By how much the mean of values is off `mean`, which rounding left so, and the squares around the right one. */
INLINE void around(const float *x, float mean, int64_t size, double *off, double *squares) {
    Lanes one[4] = {{0}}, two[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES) {
        const float *at = x + i;
        Lanes p = lanes(at) - mean, q = lanes(at + LANES) - mean;
        Lanes r = lanes(at + 2 * LANES) - mean, s = lanes(at + 3 * LANES) - mean;
        one[0] += p, one[1] += q, one[2] += r, one[3] += s;
        two[0] += p * p, two[1] += q * q, two[2] += r * r, two[3] += s * s;
    }
    for (; i + LANES <= size; i += LANES) {
        Lanes p = lanes(x + i) - mean;
        one[0] += p, two[0] += p * p;
    }
    float first = joined(one[0], one[1], one[2], one[3]), second = joined(two[0], two[1], two[2], two[3]);
    for (; i < size; i++) {
        float d = x[i] - mean;
        first += d, second += d * d;
    }
    *off = (double)first / size;
    *squares = second - first * *off;
}

/* Adds how far values are from means, and the squares of that. */
INLINE void add_around(int64_t count, const float *restrict x, const float *restrict mean, float *restrict off,
                       float *restrict squares) {
    for (int64_t i = 0; i < count; i++) {
        float d = x[i] - mean[i];
        off[i] += d, squares[i] += d * d;
    }
}

/* Sums of parameters' gradients over many rows: those of a few hundred rows first, whose digits are not yet lost. */
#define ROWS_SUMMED 256

INLINE void flush(float *restrict recent, double *restrict total, int64_t count) {
    for (int64_t i = 0; i < count; i++) total[i] += recent[i], recent[i] = 0;
}

/* The sums of all threads, which lie `step` apart. */
INLINE void join_threads(const double *total, int threads, int64_t step, int64_t count, float *sums) {
    for (int64_t i = 0; i < count; i++) {
        double sum = 0;
        for (int t = 0; t < threads; t++) sum += total[t * step + i];
        sums[i] = (float)sum;
    }
}

/* Sums over samples, which lie `step` apart. */
INLINE void join_samples(const float *found, int64_t samples, int64_t step, int64_t count, float *sums) {
    for (int64_t i = 0; i < count; i++) {
        double sum = 0;
        for (int64_t n = 0; n < samples; n++) sum += found[n * step + i];
        sums[i] = (float)sum;
    }
}
