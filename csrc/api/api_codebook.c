#include "api/api.h"
#include "api/codebook.h"
#include "api/parallel.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { GRAIN = 1 << 15 /* values that are worth a thread */ };

static size_t rows_worth_a_thread(size_t work_a_row)
{
    return work_a_row < GRAIN ? GRAIN / (work_a_row + 1) + 1 : 1;
}

/* ---- fit ---------------------------------------------------------------- */

typedef struct fit_job {
    char *levels;
    const char *values, *weights; /* doubles at any address; weights may be NULL */
    size_t count, level_count, scratch_bytes;
    atomic_int failed; /* no memory for scratch */
} fit_job;

static void fit_rows(size_t first, size_t last, void *context)
{
    fit_job *job = context;
    void *scratch = malloc(job->scratch_bytes);
    if (!scratch) {
        atomic_store(&job->failed, 1);
        return;
    }
    size_t row_bytes = job->count * sizeof(double);
    for (size_t row = first; row < last; row++)
        qk_fit_row(job->levels + row * job->level_count * sizeof(double),
                   job->values + row * row_bytes,
                   job->weights ? job->weights + row * row_bytes : NULL, job->count,
                   job->level_count, scratch);
    free(scratch);
}

qk_status qk_fit_levels(void *levels, size_t level_count, const void *values, const void *weights,
                        size_t rows, size_t count)
{
    size_t values_bytes, levels_bytes;
    QK_REQUIRE(level_count >= 1 && level_count <= QK_MAX_LEVELS, QK_BAD_CODES);
    QK_REQUIRE(qk_multiply(rows, count, &values_bytes) &&
                   qk_multiply(values_bytes, sizeof(double), &values_bytes) &&
                   qk_multiply(rows, level_count * sizeof(double), &levels_bytes),
               QK_BAD_SHAPE);
    QK_REQUIRE(!qk_overlap(levels, levels_bytes, values, values_bytes) &&
                   !qk_overlap(levels, levels_bytes, weights, values_bytes),
               QK_OVERLAP);
    fit_job job = {.levels = levels,
                   .values = values,
                   .weights = weights,
                   .count = count,
                   .level_count = level_count,
                   .scratch_bytes = qk_fit_scratch_bytes(count, level_count)};
    QK_REQUIRE(job.scratch_bytes, QK_BAD_SHAPE);
    QK_REQUIRE(qk_parallel_for(rows, rows_worth_a_thread(count * level_count), fit_rows, &job),
               QK_INTERRUPTED);
    return atomic_load(&job.failed) ? QK_OUT_OF_MEMORY : QK_OK;
}

/* ---- encode ------------------------------------------------------------- */

typedef struct encode_job {
    uint8_t *codes;
    const char *x;
    const qk_leveling *form;
    qk_level_table shared; /* of one codebook for all rows */
} encode_job;

static void encode_rows(size_t first, size_t last, void *context)
{
    const encode_job *job = context;
    const qk_leveling *form = job->form;
    size_t groups = qk_ceil_div(form->cols, form->group);
    for (size_t row = first; row < last; row++) {
        qk_level_table own;
        if (form->codebooks > 1)
            qk_order_levels(&own, (const char *)form->codebook + row * form->levels * sizeof(float),
                            form->levels);
        for (size_t group = 0; group < groups; group++) {
            float scale;
            memcpy(&scale, (const char *)form->scales + (row * groups + group) * sizeof scale,
                   sizeof scale);
            size_t column = group * form->group, left = form->cols - column;
            size_t at = row * form->cols + column;
            qk_nearest_levels(job->codes + at, job->x + at * sizeof(float),
                              left < form->group ? left : form->group, scale,
                              form->codebooks > 1 ? &own : &job->shared);
        }
    }
}

qk_status qk_encode_levels(uint8_t *codes, const void *x, const qk_leveling *form)
{
    size_t items, x_bytes, groups, codebook_bytes;
    QK_REQUIRE(form->levels >= 1 && form->levels <= QK_MAX_LEVELS, QK_BAD_CODES);
    QK_REQUIRE(form->group >= 1 && (form->codebooks == 1 || form->codebooks == form->rows) &&
                   qk_multiply(form->rows, form->cols, &items) &&
                   qk_multiply(items, sizeof(float), &x_bytes) &&
                   qk_multiply(form->codebooks, form->levels * sizeof(float), &codebook_bytes),
               QK_BAD_SHAPE);
    groups = form->rows * qk_ceil_div(form->cols, form->group);
    QK_REQUIRE(!qk_overlap(codes, items, x, x_bytes) &&
                   !qk_overlap(codes, items, form->scales, groups * sizeof(float)) &&
                   !qk_overlap(codes, items, form->codebook, codebook_bytes),
               QK_OVERLAP);
    encode_job job = {.codes = codes, .x = x, .form = form};
    if (form->codebooks == 1)
        qk_order_levels(&job.shared, form->codebook, form->levels);
    QK_REQUIRE(qk_parallel_for(form->rows, rows_worth_a_thread(form->cols), encode_rows, &job),
               QK_INTERRUPTED);
    return QK_OK;
}
