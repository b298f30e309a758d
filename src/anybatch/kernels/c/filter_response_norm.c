/* Filter response normalization and its threshold, in float32; `methods/filter_response_norm.py` has the formulas.

   With s = 1 / sqrt(mean x^2 + eps + |eps_l|) of a channel of a sample: y = max(x s weight + bias, tau). Where both are
   alike each gets half of the gradient, as of torch's maximum. Kept for backward are s. */

#include "maps.h"

/* (C,); with -infinity for a threshold that is none. */
typedef struct {
    const float *weight, *bias, *tau;
} Scales;

/* What a pass over positions adds up, of each channel: the gradient in front of the threshold, the same times x, and
   what is left for the threshold. */
typedef struct {
    float *own, *along, *rest;
} Sums;

/* NaN of either is the result. */
INLINE float cut(float z, float tau) { return z >= tau || z != z ? z : tau; }

INLINE float kept(float z, float tau, float g) { return z < tau ? 0 : z == tau ? g / 2 : g; }

INLINE void square_rows(int64_t count, const float *x, int64_t step, int64_t c, float *restrict squares) {
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float sum = 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) sum += x[r * step + i] * x[r * step + i];
        squares[i] += sum;
    }
}

INLINE void cut_row(int64_t c, const float *restrict x, const float *restrict scale, Scales of, float *restrict y) {
    const float *restrict bias = of.bias, *restrict tau = of.tau;
    for (int64_t i = 0; i < c; i++) y[i] = cut(x[i] * scale[i] + bias[i], tau[i]);
}

INLINE void pull_rows(int64_t count, const float *x, int64_t step, const float *g, int64_t g_step, int64_t c,
                      const float *restrict scale, Scales of, Sums into) {
    const float *restrict bias = of.bias, *restrict tau = of.tau;
    float *restrict own = into.own, *restrict along = into.along, *restrict rest = into.rest;
#pragma omp simd
    for (int64_t i = 0; i < c; i++) {
        float a = 0, b = 0, left = 0;
#pragma GCC unroll 4
        for (int64_t r = 0; r < count; r++) {
            float v = x[r * step + i], given = g[r * g_step + i], h = kept(v * scale[i] + bias[i], tau[i], given);
            a += h, b += h * v, left += given - h;
        }
        own[i] += a, along[i] += b, rest[i] += left;
    }
}

INLINE void finish_row(int64_t c, const float *restrict x, const float *restrict g, const float *restrict scale, Scales of,
                       const float *restrict slope, float *restrict gx) {
    const float *restrict bias = of.bias, *restrict tau = of.tau;
    for (int64_t i = 0; i < c; i++) gx[i] = kept(x[i] * scale[i] + bias[i], tau[i], g[i]) * scale[i] - slope[i] * x[i];
}

INLINE void cut_plane(int64_t size, const float *restrict x, float scale, float bias, float tau, float *restrict y) {
    for (int64_t i = 0; i < size; i++) y[i] = cut(x[i] * scale + bias, tau);
}

INLINE void pull_plane(int64_t size, const float *restrict x, const float *restrict g, float scale, float bias, float tau,
                       float *own, float *along, float *rest) {
    float a = 0, b = 0, left = 0;
#pragma omp simd reduction(+ : a, b, left)
    for (int64_t i = 0; i < size; i++) {
        float h = kept(x[i] * scale + bias, tau, g[i]);
        a += h, b += h * x[i], left += g[i] - h;
    }
    *own = a, *along = b, *rest = left;
}

INLINE void finish_plane(int64_t size, const float *restrict x, const float *restrict g, float scale, float bias,
                         float tau, float slope, float *restrict gx) {
    for (int64_t i = 0; i < size; i++) gx[i] = kept(x[i] * scale + bias, tau, g[i]) * scale - slope * x[i];
}

#define PIECE 4096 /* values of a plane whose sums are taken in float */

INLINE int64_t rows_of(const Map *m) { return MIN(chunk_of(m), ROWS_SUMMED); }

/* One channel is a plane, whatever its step is. */
INLINE int by_rows(const Map *m) { return channels_last(m) && !(m->c == 1 && m->s_step == 1); }

/* s of a channel. `eps_l` is (C,), (1,) if `one`, or NULL. */
INLINE float scale_of(double squares, int64_t positions, double eps, const float *eps_l, int64_t one, int64_t i) {
    return (float)(1 / sqrt(squares / positions + eps + (eps_l ? fabs(eps_l[one ? 0 : i]) : 0)));
}

/* `rstd` is (N, C). */
void filter_response_norm(const int64_t *map, const int64_t *map_of_y, const float *x, const float *weight,
                          const float *bias, const float *tau, const float *eps_l, int64_t one, double eps, float *y,
                          float *rstd) {
    const Map *m = (const Map *)map, *of_y = (const Map *)map_of_y;
    Scales of = {weight, bias, tau};
    int64_t c = m->c;
    if (!by_rows(m)) {
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
        for (int64_t job = 0; job < m->n * c; job++) {
            int64_t n = job / c, i = job % c;
            const float *v = x + n * m->n_step + i * m->c_step;
            double squares = 0;
            for (int64_t s = 0; s < m->s; s += PIECE) squares += squares_around(v + s, 0, MIN(PIECE, m->s - s));
            rstd[job] = scale_of(squares, m->s, eps, eps_l, one, i);
            cut_plane(m->s, v, rstd[job] * weight[i], bias[i], tau[i], y + n * of_y->n_step + i * of_y->c_step);
        }
        return;
    }
    int64_t chunk = rows_of(m), chunks = (m->s + chunk - 1) / chunk, jobs = m->n * chunks;
    float *squares = memset(room(jobs * c), 0, jobs * c * sizeof(float)), *scale = room(m->n * c);
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
    for (int64_t job = 0; job < jobs; job++) {
        const float *v = x + job / chunks * m->n_step;
        int64_t from = job % chunks * chunk, to = MIN(from + chunk, m->s);
#define SQUARE_PASS(count, into) square_rows(count, v + r * m->s_step, m->s_step, c, into)
        BY_FOURS(SQUARE_PASS, from, to, squares + job * c)
    }
    for (int64_t row = 0; row < m->n * c; row++) {
        int64_t n = row / c, i = row % c;
        double sum = 0;
        for (int64_t k = 0; k < chunks; k++) sum += squares[(n * chunks + k) * c + i];
        rstd[row] = scale_of(sum, m->s, eps, eps_l, one, i);
        scale[row] = rstd[row] * weight[i];
    }
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
    for (int64_t job = 0; job < jobs; job++) {
        int64_t n = job / chunks, from = job % chunks * chunk;
        for (int64_t r = from; r < MIN(from + chunk, m->s); r++)
            cut_row(c, x + n * m->n_step + r * m->s_step, scale + n * c, of, y + n * of_y->n_step + r * of_y->s_step);
    }
    free(squares);
    free(scale);
}

/* `made` is (4, C): the gradients of weight, bias, tau, and of eps + |eps_l|. */
void filter_response_norm_backward(const int64_t *map, const int64_t *map_of_g, const int64_t *map_of_gx, const float *x,
                                   const float *g, const float *weight, const float *bias, const float *tau,
                                   const float *rstd, float *gx, float *made) {
    const Map *m = (const Map *)map, *of_g = (const Map *)map_of_g, *of_gx = (const Map *)map_of_gx;
    Scales of = {weight, bias, tau};
    int64_t c = m->c, last = by_rows(m), chunk = last ? rows_of(m) : PIECE;
    int64_t chunks = (m->s + chunk - 1) / chunk, jobs = m->n * chunks;
    float *sums = memset(room(3 * jobs * c), 0, 3 * jobs * c * sizeof(float)); /* (N, chunks, 3, C) */
    float *scale = room(2 * m->n * c), *slope = scale + m->n * c, *found = room(4 * m->n * c);
    for (int64_t row = 0; row < m->n * c; row++) scale[row] = rstd[row] * weight[row % c];
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
    for (int64_t job = 0; job < (last ? jobs : jobs * c); job++) {
        int64_t k = last ? job : job / c, i = job % c, n = k / chunks, from = k % chunks * chunk;
        int64_t to = MIN(from + chunk, m->s);
        float *at = sums + 3 * k * c;
        Sums into = {at, at + c, at + 2 * c};
        const float *v = x + n * m->n_step, *h = g + n * of_g->n_step;
#define PULL_PASS(count, into)                                                                                         \
    pull_rows(count, v + r * m->s_step, m->s_step, h + r * of_g->s_step, of_g->s_step, c, scale + n * c, of, into)
        if (last)
            BY_FOURS(PULL_PASS, from, to, into)
        else
            pull_plane(to - from, v + i * m->c_step + from, h + i * of_g->c_step + from, scale[n * c + i], bias[i], tau[i],
                       into.own + i, into.along + i, into.rest + i);
    }
    for (int64_t row = 0; row < m->n * c; row++) {
        int64_t n = row / c, i = row % c;
        double own = 0, along = 0, rest = 0, r = rstd[row];
        for (int64_t k = n * chunks; k < (n + 1) * chunks; k++) {
            const float *at = sums + 3 * k * c + i;
            own += at[0], along += at[c], rest += at[2 * c];
        }
        double pulled = r * r * r * weight[i] * along;
        slope[row] = (float)(pulled / m->s);
        float *to = found + 4 * n * c + i;
        to[0] = (float)(r * along), to[c] = (float)own, to[2 * c] = (float)rest, to[3 * c] = (float)(-0.5 * pulled);
    }
    join_samples(found, m->n, 4 * c, 4 * c, made);
#pragma omp parallel for schedule(static) if (m->n * m->s * c > SMALL)
    for (int64_t job = 0; job < (last ? jobs : m->n * c); job++) {
        int64_t n = last ? job / chunks : job / c;
        const float *v = x + n * m->n_step, *h = g + n * of_g->n_step;
        float *to = gx + n * of_gx->n_step;
        if (last) {
            int64_t from = job % chunks * chunk;
            for (int64_t r = from; r < MIN(from + chunk, m->s); r++)
                finish_row(c, v + r * m->s_step, h + r * of_g->s_step, scale + n * c, of, slope + n * c,
                           to + r * of_gx->s_step);
        } else {
            int64_t i = job % c;
            finish_plane(m->s, v + i * m->c_step, h + i * of_g->c_step, scale[job], bias[i], tau[i], slope[job],
                         to + i * of_gx->c_step);
        }
    }
    free(sums);
    free(scale);
    free(found);
}
