/* Local context normalization with a ReLU or without, in float32; `methods/local_context_norm.py` is the definition.

   Groups of channels lie side by side, and what is done for one is done for all of them at once. Of each position and
   group are made the mean, less a constant near it, and the variance; of these, sums over windows, which move on by
   adding what comes in and taking what goes out, in double, so that the cost does not depend on the window. Rows of
   windows follow one another down the map, and rows of positions follow them. Windows stay inside the map: those of
   positions near its border are the nearest complete ones. Nothing but the input is kept for backward, which makes the
   moments anew. */

#define MOST_LANES 8 /* with more, blocks of large maps would have too many channels for every thread to get one */
#include "maps.h"

#if defined(__clang__)
#define SHUFFLED(v, w, Order, ...) __builtin_shufflevector(v, w, __VA_ARGS__)
#else
#define SHUFFLED(v, w, Order, ...) __builtin_shuffle(v, w, (Order){__VA_ARGS__})
#endif

/* Groups of two channels, the usual ones, are taken LANES at a time, two registers of channels. FIRSTS and SECONDS make
   of these the first and the second channel of each group, in an order that keeps to parts of four values, which
   processors shuffle at once. All that is held of these groups is in that order; of a register of it SPREAD and
   SPREAD_BEHIND make, for each channel of the two registers, what its group has. */
typedef int32_t Places __attribute__((vector_size(4 * LANES)));
#define FOUR(a, b, c, d, from) a + from, b + from, c + from, d + from
#if LANES == 8
#define FOURS(...) FOUR(__VA_ARGS__, 0), FOUR(__VA_ARGS__, 4)
#else
#define FOURS(...) FOUR(__VA_ARGS__, 0)
#endif
#define FIRSTS(v, w) SHUFFLED(v, w, Places, FOURS(0, 2, LANES, LANES + 2))
#define SECONDS(v, w) SHUFFLED(v, w, Places, FOURS(1, 3, LANES + 1, LANES + 3))
#define SPREAD(v) SHUFFLED(v, v, Places, FOURS(0, 0, 1, 1))
#define SPREAD_BEHIND(v) SHUFFLED(v, v, Places, FOURS(2, 2, 3, 3))

typedef struct {
    int64_t each, height, width, kernel_h, kernel_w; /* channels of a group; sizes */
    float eps;
    int64_t relu;
} Norm;

/* Rows and columns of complete windows. */
INLINE int64_t rows_of(const Norm *q) { return q->height - q->kernel_h + 1; }
INLINE int64_t columns_of(const Norm *q) { return q->width - q->kernel_w + 1; }

/* Rows of windows that backward holds at a time: those that hold a row of positions, and two at work. */
INLINE int64_t held_rows(const Norm *q) { return MIN(rows_of(q), q->kernel_h + 2); }

/* The window of a position along one dimension. */
INLINE int64_t window_of(int64_t at, int64_t size, int64_t kernel) {
    int64_t start = at - (kernel - 1) / 2;
    return MAX(0, MIN(start, size - kernel));
}

/* Some groups of a sample: positions lie `step` apart, channels one behind the other. */
typedef struct {
    const float *x, *g;
    float *y;
    int64_t x_step, g_step, y_step, groups, channels;
    const float *weight, *bias;
} Part;

/* What a thread works in. Of windows: (columns, groups) or, spread over channels, (columns, channels). */
typedef struct {
    double *column, *column_too; /* (W, groups): sums over the rows of a row of windows */
    float *counted, *counted_too; /* (kernel_h, W, groups): mean and variance of each group of the positions in those */
    double *sum, *sum_too;       /* (groups,) */
    double *of_weight;           /* (2, channels) */
    float *recent;               /* (2, channels) */
    float *middle;               /* (channels,): near the mean of each group */
    float *mean, *rstd;          /* (columns, channels) of a row of windows; the mean less the middle */
    float *mean_of, *rstd_of;    /* the same, (columns, groups) */
    float *scaled, *along;       /* (channels,): gradients of what is normalized, alone and times that; or (groups,) of
                                    what windows give a position, a and b */
    float *start, *slope;        /* (held rows, columns, groups): what windows give their positions, a + b x */
    float *values[3];            /* (positions, channels) each, where channels are not innermost in memory */
    void *memory[2];
} Room;

static Room room_for(const Norm *q, int64_t channels, int64_t fields, int64_t copied) {
    int64_t groups = channels / q->each, columns = columns_of(q), counted = q->kernel_h * q->width * groups;
    double *d = double_room(2 * (q->width + 1) * groups + 2 * channels);
    float *f = room(5 * channels + 2 * columns * (channels + groups) + 2 * fields * groups + 3 * copied + 2 * counted);
    Room r = {.memory = {d, f}};
    r.column = d, d += q->width * groups;
    r.column_too = d, d += q->width * groups;
    r.sum = d, d += groups;
    r.sum_too = d, d += groups;
    r.of_weight = d;
    r.recent = f, f += 2 * channels;
    r.middle = f, f += channels;
    r.mean = f, f += columns * channels;
    r.rstd = f, f += columns * channels;
    r.mean_of = f, f += columns * groups;
    r.rstd_of = f, f += columns * groups;
    r.scaled = f, f += channels;
    r.along = f, f += channels;
    r.counted = f, f += counted;
    r.counted_too = f, f += counted;
    r.start = f, f += fields * groups;
    r.slope = f, f += fields * groups;
    for (int i = 0; i < 3; i++) r.values[i] = f, f += copied;
    return r;
}

static void leave(Room *r) {
    free(r->memory[0]);
    free(r->memory[1]);
}

/* Asks for the values of a position AHEAD of one at work. Channels of a block have gaps between positions, before which
   processors stop looking ahead by themselves. */
#define AHEAD 3
INLINE void fetch(const float *v, int64_t step, int64_t channels) {
    if (step == channels) return;
    for (int64_t c = 0; c < channels; c += LINE) __builtin_prefetch(v + AHEAD * step + c);
}

/* `do` with the number of channels of a group, its last argument, known to the compiler where it is usual. */
#define OF_EACH(do, each, ...)                                                                                         \
    switch (each) {                                                                                                    \
        case 1: do(__VA_ARGS__, 1); break;                                                                             \
        case 2: do(__VA_ARGS__, 2); break;                                                                             \
        case 4: do(__VA_ARGS__, 4); break;                                                                             \
        default: do(__VA_ARGS__, each);                                                                                \
    }

/* Positions that the constant is taken from: few, since it need not be the mean itself. */
INLINE int64_t sampled(int64_t positions) { return MIN(MAX(positions / 4, 16), 48); }

/* A constant near each group's mean, for each of its channels, of some positions of all rows and columns: these follow
   Roberts' R2 sequence, since any fixed step would meet the same few columns in maps of some size. */
static void find_middle(const Norm *q, const Part *a, float *middle) {
    int64_t count = sampled(q->height * q->width);
    memset(middle, 0, a->channels * sizeof(float));
    for (uint32_t k = 1; k <= count; k++) {
        int64_t h = (int64_t)(k * 3242174889u) * q->height >> 32, w = (int64_t)(k * 2447445414u) * q->width >> 32;
        const float *restrict v = a->x + (h * q->width + w) * a->x_step;
        for (int64_t c = 0; c < a->channels; c++) middle[c] += v[c];
    }
    for (int64_t first = 0; first < a->channels; first += q->each) {
        float sum = 0;
        for (int64_t c = 0; c < q->each; c++) sum += middle[first + c];
        for (int64_t c = 0; c < q->each; c++) middle[first + c] = sum / (float)(count * q->each);
    }
}

/* Mean and variance of each group of one position. */
INLINE void count_position(int64_t groups, const float *restrict x, const float *restrict middle, float *restrict means,
                           float *restrict vars, const int64_t each) {
    int64_t i = 0;
    if (each == 2)
        for (; i + LANES <= groups; i += LANES) {
            const float *v = x + 2 * i, *m = middle + 2 * i;
            Lanes a = lanes(v) - lanes(m), b = lanes(v + LANES) - lanes(m + LANES);
            Lanes one = FIRSTS(a, b), two = SECONDS(a, b), off = (one - two) * 0.5f;
            put(means + i, (one + two) * 0.5f);
            put(vars + i, off * off);
        }
    for (; i < groups; i++) {
        float mean = 0, var = 0;
        for (int64_t c = 0; c < each; c++) mean += x[i * each + c] - middle[i * each + c];
        mean /= (float)each;
        for (int64_t c = 0; c < each; c++) {
            float off = (x[i * each + c] - middle[i * each + c]) - mean;
            var += off * off;
        }
        means[i] = mean, vars[i] = var / (float)each;
    }
}

/* The sums of columns with what a row of positions has counted, or with `sign` -1 without it. */
INLINE void add_counted(int64_t values, const float *restrict means, const float *restrict vars, double *restrict one,
                        double *restrict two, const double sign) {
    for (int64_t i = 0; i < values; i++) {
        double m = means[i];
        one[i] += sign * m, two[i] += sign * ((double)vars[i] + m * m);
    }
}

/* A row of positions comes into the sums of columns, in the place of the one that goes out of them, if one does. */
static void count_row(const Norm *q, const Part *a, Room *r, int64_t row) {
    int64_t groups = a->groups, values = q->width * groups, held = row % q->kernel_h * values;
    float *means = r->counted + held, *vars = r->counted_too + held;
    if (row >= q->kernel_h) add_counted(values, means, vars, r->column, r->column_too, -1);
    for (int64_t w = 0; w < q->width; w++) {
        const float *x = a->x + (row * q->width + w) * a->x_step;
        fetch(x, a->x_step, a->channels);
        OF_EACH(count_position, q->each, groups, x, r->middle, means + w * groups, vars + w * groups);
    }
    add_counted(values, means, vars, r->column, r->column_too, 1);
}

/* Adds two fields to sums, or with `sign` -1 takes them away. */
INLINE void add(int64_t count, const double *restrict v, const double *restrict v_too, double *restrict sum,
                double *restrict sum_too, const double sign) {
    for (int64_t i = 0; i < count; i++) sum[i] += sign * v[i], sum_too[i] += sign * v_too[i];
}

INLINE void as_moments(int64_t groups, const double *restrict one, const double *restrict two, double share, float eps,
                       float *restrict mean, float *restrict rstd) {
    for (int64_t i = 0; i < groups; i++) {
        double own = one[i] * share, spread = two[i] * share - own * own;
        float var = (float)spread;
        mean[i] = (float)own;
        rstd[i] = 1 / sqrtf((var < 0 ? 0 : var) + eps);
    }
}

INLINE void spread_out(int64_t groups, const float *restrict values, float *restrict to, const int64_t each) {
    int64_t i = 0;
    if (each == 2)
        for (; i + LANES <= groups; i += LANES) {
            put(to + 2 * i, SPREAD(lanes(values + i)));
            put(to + 2 * i + LANES, SPREAD_BEHIND(lanes(values + i)));
        }
    for (; i < groups; i++)
        for (int64_t c = 0; c < each; c++) to[i * each + c] = values[i];
}

/* Into the room the moments of row `i` of windows, behind those of the row before. */
static void moments(const Norm *q, const Part *a, Room *r, int64_t i) {
    int64_t groups = a->groups, kh = q->kernel_h, kw = q->kernel_w, columns = columns_of(q);
    if (i == 0) {
        find_middle(q, a, r->middle);
        memset(r->column, 0, q->width * groups * sizeof(double));
        memset(r->column_too, 0, q->width * groups * sizeof(double));
        for (int64_t h = 0; h < kh - 1; h++) count_row(q, a, r, h);
    }
    count_row(q, a, r, i + kh - 1);
    double share = 1.0 / ((double)kh * kw);
    memset(r->sum, 0, groups * sizeof(double));
    memset(r->sum_too, 0, groups * sizeof(double));
    for (int64_t w = 0; w < q->width; w++) {
        add(groups, r->column + w * groups, r->column_too + w * groups, r->sum, r->sum_too, 1);
        int64_t j = w - kw + 1;
        if (j < 0) continue;
        float *mean = r->mean_of + j * groups, *rstd = r->rstd_of + j * groups;
        float *means = r->mean + j * a->channels, *rstds = r->rstd + j * a->channels;
        as_moments(groups, r->sum, r->sum_too, share, q->eps, mean, rstd);
        OF_EACH(spread_out, q->each, groups, mean, means);
        OF_EACH(spread_out, q->each, groups, rstd, rstds);
        if (j < columns - 1) add(groups, r->column + j * groups, r->column_too + j * groups, r->sum, r->sum_too, -1);
    }
}

INLINE void normalize(int64_t channels, const float *restrict x, const float *restrict middle,
                      const float *restrict mean, const float *restrict rstd, const float *restrict weight,
                      const float *restrict bias, float floor, float *restrict y) {
    for (int64_t c = 0; c < channels; c++) {
        float made = ((x[c] - middle[c]) - mean[c]) * rstd[c] * weight[c] + bias[c];
        y[c] = made < floor ? floor : made;
    }
}

static void forward(const Norm *q, const Part *a, Room *r) {
    float floor = q->relu ? 0 : -INFINITY;
    for (int64_t h = 0, last = -1; h < q->height; h++) {
        int64_t i = window_of(h, q->height, q->kernel_h);
        if (i != last) moments(q, a, r, i);
        last = i;
        for (int64_t w = 0; w < q->width; w++) {
            int64_t p = h * q->width + w, j = window_of(w, q->width, q->kernel_w) * a->channels;
            fetch(a->x + p * a->x_step, a->x_step, a->channels);
            normalize(a->channels, a->x + p * a->x_step, r->middle, r->mean + j, r->rstd + j, a->weight, a->bias, floor,
                      a->y + p * a->y_step);
        }
    }
}

/* Through the ReLU and the scaling, with the sums for weight and bias. */
INLINE void pull(int64_t channels, const float *restrict x, const float *restrict g, const float *restrict middle,
                 const float *restrict mean, const float *restrict rstd, const float *restrict weight,
                 const float *restrict bias, float *restrict of_weight, float *restrict of_bias,
                 float *restrict scaled, float *restrict along, float *restrict gx, const int relu) {
    for (int64_t c = 0; c < channels; c++) {
        float z = ((x[c] - middle[c]) - mean[c]) * rstd[c], given = g[c];
        given = relu && z * weight[c] + bias[c] <= 0 ? 0 : given;
        float v = given * weight[c];
        of_weight[c] += given * z, of_bias[c] += given;
        scaled[c] = v, along[c] = v * z;
        gx[c] = v * rstd[c];
    }
}

/* Adds to a window what its position has from the mean and the variance of each group, a + b x. */
INLINE void of_window(int64_t groups, const float *restrict scaled, const float *restrict along,
                      const float *restrict mean, const float *restrict rstd, float share, float *restrict start,
                      float *restrict slope, const int64_t each) {
    int64_t i = 0;
    if (each == 2)
        for (; i + LANES <= groups; i += LANES) {
            Lanes v = lanes(scaled + 2 * i), w = lanes(scaled + 2 * i + LANES), r = lanes(rstd + i);
            Lanes total = FIRSTS(v, w) + SECONDS(v, w);
            v = lanes(along + 2 * i), w = lanes(along + 2 * i + LANES);
            Lanes b = r * r * (FIRSTS(v, w) + SECONDS(v, w)) * share;
            put(start + i, lanes(start + i) + (b * lanes(mean + i) - r * total * share));
            put(slope + i, lanes(slope + i) - b);
        }
    for (; i < groups; i++) {
        float total = 0, total_along = 0;
        for (int64_t c = 0; c < each; c++) total += scaled[i * each + c], total_along += along[i * each + c];
        float b = rstd[i] * rstd[i] * total_along * share;
        start[i] += b * mean[i] - rstd[i] * total * share;
        slope[i] -= b;
    }
}

INLINE void add_fields(int64_t count, const float *restrict start, const float *restrict slope, double *restrict one,
                       double *restrict two, const double sign) {
    for (int64_t i = 0; i < count; i++) one[i] += sign * start[i], two[i] += sign * slope[i];
}

INLINE void finish(int64_t groups, const float *restrict x, const float *restrict middle, const float *restrict start,
                   const float *restrict slope, float *restrict gx, const int64_t each) {
    int64_t i = 0;
    if (each == 2)
        for (; i + LANES <= groups; i += LANES) {
            int64_t c = 2 * i, d = c + LANES;
            Lanes a = lanes(start + i), b = lanes(slope + i);
            put(gx + c, lanes(gx + c) + (SPREAD(a) + SPREAD(b) * (lanes(x + c) - lanes(middle + c))));
            put(gx + d, lanes(gx + d) + (SPREAD_BEHIND(a) + SPREAD_BEHIND(b) * (lanes(x + d) - lanes(middle + d))));
        }
    for (; i < groups; i++)
        for (int64_t k = 0; k < each; k++)
            gx[i * each + k] += start[i] + slope[i] * (x[i * each + k] - middle[i * each + k]);
}

/* From sums over the windows that hold a position to those of the next: `in` are those that it has more, `out` those
   that it has no longer, and either may be NULL. */
INLINE void move_on(int64_t groups, const double *restrict in, const double *restrict in_too, const double *restrict out,
                    const double *restrict out_too, double *restrict sum, double *restrict sum_too,
                    float *restrict start, float *restrict slope) {
    for (int64_t i = 0; i < groups; i++) {
        double a = sum[i], b = sum_too[i];
        if (in) a += in[i], b += in_too[i];
        if (out) a -= out[i], b -= out_too[i];
        sum[i] = a, sum_too[i] = b;
        start[i] = (float)a, slope[i] = (float)b;
    }
}

/* Row `h` of positions gets what the windows that hold its positions give; `column` sums over their rows. */
static void finish_row(const Norm *q, const Part *a, Room *r, int64_t h, double *column, double *column_too) {
    int64_t groups = a->groups, columns = columns_of(q), row = columns * groups, past = h - q->kernel_h;
    int64_t in = h % held_rows(q) * row, out_of = MAX(past, 0) % held_rows(q) * row;
    if (h < rows_of(q)) add_fields(row, r->start + in, r->slope + in, column, column_too, 1);
    if (past >= 0) add_fields(row, r->start + out_of, r->slope + out_of, column, column_too, -1);
    memset(r->sum, 0, groups * sizeof(double));
    memset(r->sum_too, 0, groups * sizeof(double));
    for (int64_t w = 0; w < q->width; w++) {
        int64_t p = h * q->width + w, out = (w - q->kernel_w) * groups;
        const double *in = w < columns ? column + w * groups : NULL, *gone = out >= 0 ? column + out : NULL;
        int64_t too = column_too - column;
        move_on(groups, in, in ? in + too : NULL, gone, gone ? gone + too : NULL, r->sum, r->sum_too, r->scaled, r->along);
        const float *x = a->x + p * a->x_step;
        float *gx = a->y + p * a->y_step;
        fetch(x, a->x_step, a->channels);
        fetch(gx, a->y_step, a->channels);
        OF_EACH(finish, q->each, groups, x, r->middle, r->scaled, r->along, gx);
    }
}

/* `found` is (2, channels), of which the second row begins `between` behind the first. */
static void backward(const Norm *q, const Part *a, Room *r, float *found, int64_t between) {
    int64_t groups = a->groups, channels = a->channels, rows = rows_of(q), row = columns_of(q) * groups, done = 0;
    float share = 1 / ((float)q->each * q->kernel_h * q->kernel_w);
    double *column = double_room(2 * row), *column_too = column + row;
    memset(column, 0, 2 * row * sizeof(double));
    memset(r->of_weight, 0, 2 * channels * sizeof(double));
    memset(r->recent, 0, 2 * channels * sizeof(float));
    for (int64_t h = 0, last = -1; h < q->height; h++) {
        int64_t i = window_of(h, q->height, q->kernel_h), held = i % held_rows(q) * row;
        if (i != last) {
            moments(q, a, r, i);
            memset(r->start + held, 0, row * sizeof(float));
            memset(r->slope + held, 0, row * sizeof(float));
        }
        last = i;
        for (int64_t w = 0; w < q->width; w++) {
            int64_t p = h * q->width + w, j = window_of(w, q->width, q->kernel_w), at = held + j * groups;
            const float *x = a->x + p * a->x_step, *g = a->g + p * a->g_step;
            const float *mean = r->mean + j * channels, *rstd = r->rstd + j * channels;
            float *gx = a->y + p * a->y_step, *own = r->recent + channels;
            fetch(x, a->x_step, channels);
            fetch(g, a->g_step, channels);
            if (q->relu)
                pull(channels, x, g, r->middle, mean, rstd, a->weight, a->bias, r->recent, own, r->scaled, r->along, gx, 1);
            else
                pull(channels, x, g, r->middle, mean, rstd, a->weight, a->bias, r->recent, own, r->scaled, r->along, gx, 0);
            mean = r->mean_of + j * groups, rstd = r->rstd_of + j * groups;
            OF_EACH(of_window, q->each, groups, r->scaled, r->along, mean, rstd, share, r->start + at, r->slope + at);
            if (p % ROWS_SUMMED == 0) flush(r->recent, r->of_weight, 2 * channels);
        }
        /* Rows of windows to which nothing is added any more. */
        int64_t whole = h == q->height - 1 ? rows : window_of(h + 1, q->height, q->kernel_h);
        for (; done < (whole == rows ? q->height : whole); done++) finish_row(q, a, r, done, column, column_too);
    }
    flush(r->recent, r->of_weight, 2 * channels);
    for (int64_t c = 0; c < channels; c++) {
        found[c] = (float)r->of_weight[c];
        found[between + c] = (float)r->of_weight[channels + c];
    }
    free(column);
}

#define SIDE 16
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t FourPlaces __attribute__((vector_size(16)));
#define MIXED(a, b, ...) SHUFFLED(a, b, FourPlaces, __VA_ARGS__)

/* Four rows of four values become four columns. */
INLINE void turn_square(const float *from, int64_t step, float *to, int64_t to_step) {
    Four a = *(const Four *)from, b = *(const Four *)(from + step);
    Four c = *(const Four *)(from + 2 * step), d = *(const Four *)(from + 3 * step);
    Four ab = MIXED(a, b, 0, 4, 1, 5), cd = MIXED(c, d, 0, 4, 1, 5);
    Four ab_behind = MIXED(a, b, 2, 6, 3, 7), cd_behind = MIXED(c, d, 2, 6, 3, 7);
    *(Four *)to = MIXED(ab, cd, 0, 1, 4, 5);
    *(Four *)(to + to_step) = MIXED(ab, cd, 2, 3, 6, 7);
    *(Four *)(to + 2 * to_step) = MIXED(ab_behind, cd_behind, 0, 1, 4, 5);
    *(Four *)(to + 3 * to_step) = MIXED(ab_behind, cd_behind, 2, 3, 6, 7);
}

/* (rows, columns) to (columns, rows), in parts whose lines stay in cache. */
static void turn(const float *from, int64_t step, int64_t rows, int64_t columns, float *to, int64_t to_step) {
    int64_t whole = rows / 4 * 4, wide = columns / 4 * 4;
    for (int64_t first = 0; first < whole; first += SIDE)
        for (int64_t j = 0; j < wide; j += 4)
            for (int64_t i = first; i < MIN(first + SIDE, whole); i += 4)
                turn_square(from + i * step + j, step, to + j * to_step + i, to_step);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = i < whole ? wide : 0; j < columns; j++) to[j * to_step + i] = from[i * step + j];
}

/* Channels that are dealt with together, a whole number of groups: few enough that what is at work stays in cache, and
   that there is work for every thread. */
INLINE int64_t block_of(const Map *m, const Norm *q) {
    int64_t held = channels_last(m) ? 4 * q->width : m->s, jobs = MAX(1, omp_get_max_threads() / MAX(1, m->n));
    int64_t fit = MIN(65536 / MAX(1, held), (m->c + jobs - 1) / jobs);
    int64_t small = q->each == 2 ? 2 * LANES : 8, least = (m->s > 65536 ? small : 32) + q->each - 1;
    int64_t whole = least / q->each * q->each; /* so that all blocks take the same groups together, whatever their size */
    return MIN(m->c, MAX(whole, fit / whole * whole));
}

static Norm norm_of(const int64_t *sizes, int64_t each, double eps, int64_t relu) {
    return (Norm){each, sizes[0], sizes[1], sizes[2], sizes[3], (float)eps, relu};
}

/* `sizes` is height, width, and the kernel's. */
void local_context_norm(const int64_t *map, const int64_t *map_of_y, const int64_t *sizes, int64_t each, const float *x,
                        const float *weight, const float *bias, double eps, int64_t relu, float *y) {
    const Map *m = (const Map *)map, *of_y = (const Map *)map_of_y;
    Norm q = norm_of(sizes, each, eps, relu);
    int64_t last = channels_last(m), block = block_of(m, &q), blocks = (m->c + block - 1) / block;
#pragma omp parallel if (m->n * m->s * m->c > SMALL)
    {
        Room r = room_for(&q, block, 0, last ? 0 : block * m->s);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < m->n * blocks; job++) {
            int64_t n = job / blocks, first = job % blocks * block, count = MIN(block, m->c - first);
            const float *v = x + n * m->n_step + first * m->c_step;
            float *to = y + n * of_y->n_step + first * of_y->c_step;
            Part a = {v, NULL, to, m->s_step, 0, of_y->s_step, count / each, count, weight + first, bias + first};
            if (!last) {
                turn(v, m->c_step, count, m->s, r.values[0], count);
                a.x = r.values[0], a.y = r.values[1], a.x_step = a.y_step = count;
            }
            forward(&q, &a, &r);
            if (!last) turn(r.values[1], count, m->s, count, to, of_y->c_step);
        }
        leave(&r);
    }
}

/* `sums` is (2, C): the gradients of the weight and of the bias. */
void local_context_norm_backward(const int64_t *map, const int64_t *map_of_g, const int64_t *map_of_gx,
                                 const int64_t *sizes, int64_t each, const float *x, const float *g,
                                 const float *weight, const float *bias, double eps, int64_t relu, float *gx,
                                 float *sums) {
    const Map *m = (const Map *)map, *of_g = (const Map *)map_of_g, *of_gx = (const Map *)map_of_gx;
    Norm q = norm_of(sizes, each, eps, relu);
    int64_t last = channels_last(m), block = block_of(m, &q), blocks = (m->c + block - 1) / block;
    float *found = room(2 * m->n * m->c);
#pragma omp parallel if (m->n * m->s * m->c > SMALL)
    {
        Room r = room_for(&q, block, held_rows(&q) * columns_of(&q), last ? 0 : block * m->s);
#pragma omp for schedule(static)
        for (int64_t job = 0; job < m->n * blocks; job++) {
            int64_t n = job / blocks, first = job % blocks * block, count = MIN(block, m->c - first);
            const float *v = x + n * m->n_step + first * m->c_step, *given = g + n * of_g->n_step + first * of_g->c_step;
            float *to = gx + n * of_gx->n_step + first * of_gx->c_step;
            Part a = {v,           given,        to,    m->s_step,      of_g->s_step,
                      of_gx->s_step, count / each, count, weight + first, bias + first};
            if (!last) {
                turn(v, m->c_step, count, m->s, r.values[0], count);
                turn(given, of_g->c_step, count, m->s, r.values[1], count);
                a.x = r.values[0], a.g = r.values[1], a.y = r.values[2], a.x_step = a.g_step = a.y_step = count;
            }
            backward(&q, &a, &r, found + 2 * n * m->c + first, m->c);
            if (!last) turn(r.values[2], count, m->s, count, to, of_gx->c_step);
        }
        leave(&r);
    }
    join_samples(found, m->n, 2 * m->c, 2 * m->c, sums);
    free(found);
}
