/* Codebooks of one row: the levels of least squared error, and the nearest level. No threads. */
#ifndef QK_CODEBOOK_H
#define QK_CODEBOOK_H

#include <stddef.h>
#include <stdint.h>

enum { QK_MAX_LEVELS = 256 };

/* Bytes of scratch that qk_fit_row needs; 0 if the product overflows. */
size_t qk_fit_scratch_bytes(size_t count, size_t levels);

/* The `levels` numbers, ascending, of least sum of weight * (value - nearest level)^2 over `count`
 * ascending values; weights >= 0, or NULL for all 1. Values of weight 0 count nothing, unless all
 * do: then they count the same. Levels that are not needed repeat the last value (none: 0).
 * `scratch` is aligned to a double. */
void qk_fit_row(void *levels, const void *values, const void *weights, size_t count,
                size_t level_count, void *scratch);

/* A codebook made ready to search: between neighbours that differ lies a middle. */
typedef struct qk_level_table {
    size_t half;                       /* half of the power of two that holds the levels */
    double middles[QK_MAX_LEVELS - 1]; /* ascending, infinities at the end */
    uint8_t codes[QK_MAX_LEVELS];      /* by rank; of equal levels the lowest */
} qk_level_table;

/* From `count` levels (float, 1..QK_MAX_LEVELS) in any order; level i has the code i. */
void qk_order_levels(qk_level_table *table, const void *levels, size_t count);

/* codes[k]: of the level nearest to x[k] / scale, compared as x against scale * middle in double;
 * the lower code where two are as near, so 0 under a scale of 0, and under a NaN or negative one;
 * the code of the lowest level for a NaN x. */
void qk_nearest_levels(uint8_t *codes, const void *x, size_t count, float scale,
                       const qk_level_table *table);

#endif
