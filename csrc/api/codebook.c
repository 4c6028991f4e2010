/* One-dimensional k-means, exactly: for sorted values the clusters of an optimum are runs, and the
 * best run to end at value i begins no earlier as i grows, so each further cluster costs
 * O(n log n) by divide and conquer (H. Wang and M. Song, Ckmeans.1d.dp, 2011; A. Gronlund et al.,
 * Fast exact k-means, k-medians and Bregman divergence clustering in 1D, 2017).
 *
 * The squared error of a run is sum w x^2 - (sum w x)^2 / sum w. The first sum is the same for all
 * clusterings, so the sum of the second, the gain, is what is made large. */
#include "api/codebook.h"

#include <math.h>
#include <string.h>

#include "kernels/scalar.h"

typedef struct fit_work {
    double *weight, *moment; /* prefix sums of w and w * (x - centre), count + 1 each */
    double *before, *gain;   /* best gain of the first i values, with one cluster less, and now */
    uint32_t *begin;         /* [levels][count + 1]: where the last run of such a best begins */
    size_t count;            /* values that have a weight */
    double centre;           /* of the values: keeps the sums small */
} fit_work;

size_t qk_fit_scratch_bytes(size_t count, size_t levels)
{
    size_t row = 4 * sizeof(double) + levels * sizeof(uint32_t);
    return count < SIZE_MAX / row - 1 && count < UINT32_MAX ? (count + 1) * row : 0;
}

static fit_work work_in(void *scratch, size_t count)
{
    double *first = scratch;
    size_t length = count + 1;
    return (fit_work){.weight = first,
                      .moment = first + length,
                      .before = first + 2 * length,
                      .gain = first + 3 * length,
                      .begin = (uint32_t *)(first + 4 * length)};
}

static double weight_at(const void *weights, size_t index, int all_equal)
{
    return all_equal ? 1 : qk_load_float64(weights, index);
}

/* Prefix sums over the values that have a weight. */
static void sum_up(fit_work *work, const void *values, const void *weights, size_t count)
{
    double total = 0, moment = 0;
    for (size_t i = 0; weights && i < count; i++)
        total += qk_load_float64(weights, i);
    int all_equal = !(total > 0);
    for (size_t i = 0; i < count; i++)
        moment += weight_at(weights, i, all_equal) * qk_load_float64(values, i);
    work->centre = count ? moment / (all_equal ? (double)count : total) : 0;
    work->weight[0] = work->moment[0] = 0;
    work->count = 0;
    for (size_t i = 0; i < count; i++) {
        double weight = weight_at(weights, i, all_equal);
        if (!(weight > 0))
            continue;
        double offset = qk_load_float64(values, i) - work->centre;
        size_t last = work->count++;
        work->weight[last + 1] = work->weight[last] + weight;
        work->moment[last + 1] = work->moment[last] + weight * offset;
    }
}

/* Gain of the run of values [first, last). */
static inline double run_gain(const fit_work *work, size_t first, size_t last)
{
    double weight = work->weight[last] - work->weight[first];
    double moment = work->moment[last] - work->moment[first];
    return weight > 0 ? moment * moment / weight : 0;
}

/* Best gain of the first i values for each i in [low, high], where the last run begins somewhere
 * in [least, most]. */
static void best_runs(fit_work *work, uint32_t *begin, size_t low, size_t high, size_t least,
                      size_t most)
{
    while (low <= high) {
        size_t middle = low + (high - low) / 2, end = most < middle - 1 ? most : middle - 1;
        double best = -1;
        size_t at = least;
        for (size_t first = least; first <= end; first++) {
            double gain = work->before[first] + run_gain(work, first, middle);
            if (gain > best) {
                best = gain;
                at = first;
            }
        }
        work->gain[middle] = best;
        begin[middle] = (uint32_t)at;
        if (middle > low)
            best_runs(work, begin, low, middle - 1, least, at);
        low = middle + 1;
        least = at;
    }
}

/* Fill `begin` for 1 .. clusters runs. */
static void cluster(fit_work *work, size_t clusters)
{
    size_t count = work->count, length = count + 1;
    for (size_t i = 0; i <= count; i++) {
        work->gain[i] = run_gain(work, 0, i);
        work->begin[i] = 0;
    }
    for (size_t runs = 2; runs <= clusters; runs++) {
        double *spare = work->before;
        work->before = work->gain;
        work->gain = spare;
        size_t low = runs < clusters ? runs : count; /* the last cluster ends with the last value */
        size_t high = count - (clusters - runs);     /* the others leave one value for each */
        best_runs(work, work->begin + (runs - 1) * length, low, high, runs - 1, high - 1);
    }
}

void qk_fit_row(void *levels, const void *values, const void *weights, size_t count,
                size_t level_count, void *scratch)
{
    fit_work work = work_in(scratch, count);
    sum_up(&work, values, weights, count);
    size_t clusters = level_count < work.count ? level_count : work.count, last = work.count;
    if (clusters)
        cluster(&work, clusters);
    double level = count ? qk_load_float64(values, count - 1) : 0;
    for (size_t i = level_count; i > clusters; i--)
        qk_store_float64(levels, i - 1, level);
    for (size_t runs = clusters; runs > 0; runs--) {
        size_t first = work.begin[(runs - 1) * (work.count + 1) + last];
        double weight = work.weight[last] - work.weight[first];
        double moment = work.moment[last] - work.moment[first];
        if (weight > 0 && work.centre + moment / weight < level) /* rounding keeps the order */
            level = work.centre + moment / weight;
        qk_store_float64(levels, runs - 1, level);
        last = first;
    }
}

/* ---- the nearest level -------------------------------------------------- */

/* Values and codes by rank, equal levels once; how many there are. */
static size_t sort_levels(double *values, uint8_t *codes, const void *levels, size_t count)
{
    size_t sorted = 0;
    for (size_t code = 0; code < count; code++) {
        double value = (double)qk_load_float32(levels, code);
        size_t rank = sorted;
        while (rank && values[rank - 1] > value)
            rank--;
        if (rank && values[rank - 1] == value)
            continue;
        memmove(values + rank + 1, values + rank, (sorted - rank) * sizeof *values);
        memmove(codes + rank + 1, codes + rank, sorted - rank);
        values[rank] = value;
        codes[rank] = (uint8_t)code;
        sorted++;
    }
    return sorted;
}

/* The middle, or a number just below it that no product with a float can tell from it otherwise. */
static double middle_of(double low, double high, int is_tie_up)
{
    double middle = (low + high) / 2;
    if (!is_tie_up)
        return middle;
    return middle != 0 ? middle - fabs(middle) * 0x1p-50 : -0x1p-800;
}

void qk_order_levels(qk_level_table *table, const void *levels, size_t count)
{
    double values[QK_MAX_LEVELS + 1];
    uint8_t codes[QK_MAX_LEVELS + 1];
    size_t sorted = sort_levels(values, codes, levels, count);
    memcpy(table->codes, codes, sorted);
    table->half = 0;
    for (size_t power = 1; power < sorted; power *= 2)
        table->half = power;
    for (size_t rank = 0; rank < QK_MAX_LEVELS - 1; rank++)
        table->middles[rank] = rank + 1 < sorted ? middle_of(values[rank], values[rank + 1],
                                                             codes[rank + 1] < codes[rank])
                                                 : INFINITY;
}

void qk_nearest_levels(uint8_t *codes, const void *x, size_t count, float scale,
                       const qk_level_table *table)
{
    const double step = (double)scale;
    if (!(scale > 0)) {
        memset(codes, 0, count);
        return;
    }
    for (size_t k = 0; k < count; k++) {
        double value = (double)qk_load_float32(x, k);
        size_t rank = 0;
        for (size_t half = table->half; half; half /= 2)
            rank += value > step * table->middles[rank + half - 1] ? half : 0;
        codes[k] = table->codes[rank];
    }
}
