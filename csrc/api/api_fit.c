#include "api/api.h"
#include "api/descent.h"
#include "api/dispatch.h"
#include "api/parallel.h"

#include "kernels/scalar.h"

#include <stdatomic.h>
#include <stdlib.h>

enum {
    GRAIN = 1 << 15, /* passes over a weight that are worth a thread */
    MAX_LEVELS = 256
};

typedef struct fit_job {
    qk_fit_strip strip;
    size_t scratch_bytes;
    const qk_kernels *kernels;
    atomic_int failed; /* no memory for scratch */
} fit_job;

static void fit_rows(size_t first, size_t last, void *context)
{
    fit_job *job = context;
    qk_fit_strip strip = job->strip;
    strip.first = first;
    strip.last = last;
    strip.scratch = malloc(job->scratch_bytes);
    if (!strip.scratch) {
        atomic_store(&job->failed, 1);
        return;
    }
    job->kernels->fit(&strip);
    free(strip.scratch);
}

static int is_whole(const qk_fit *fit)
{
    size_t items;
    return fit->group >= 1 && fit->group <= (SIZE_MAX >> 8) && fit->cols >= 1 &&
           qk_multiply(fit->rows, fit->cols, &items) && qk_multiply(items, sizeof(float), &items) &&
           (!fit->level_count || fit->codebooks == 1 || fit->codebooks == fit->rows);
}

qk_status qk_fit_groups(void *scales, void *zeros, void *errors, const qk_fit *fit)
{
    QK_REQUIRE(is_whole(fit), QK_BAD_SHAPE);
    QK_REQUIRE(fit->level_count <= MAX_LEVELS && fit->code_min < fit->code_max, QK_BAD_CODES);
    QK_REQUIRE((unsigned)fit->find <= QK_FIT_BOTH, QK_BAD_CODES);
    int finds_zeros = fit->find == QK_FIT_ZERO || fit->find == QK_FIT_BOTH;
    QK_REQUIRE(!finds_zeros || (zeros && !fit->level_count), QK_BAD_CODES);
    size_t items = fit->rows * fit->cols * sizeof(float);
    size_t blocks = fit->rows * qk_ceil_div(fit->cols, fit->group) * sizeof(float);
    const void *outputs[] = {scales, zeros, errors};
    for (size_t i = 0; i < 3; i++)
        QK_REQUIRE(!qk_overlap(outputs[i], blocks, fit->x, items) &&
                       !qk_overlap(outputs[i], blocks, outputs[(i + 1) % 3], blocks),
                   QK_OVERLAP);
    qk_fit clipped = *fit;
    clipped.group = fit->group < fit->cols ? fit->group : fit->cols;
    fit_job job = {.strip = {.fit = &clipped, .scales = scales, .zeros = zeros, .errors = errors},
                   .scratch_bytes = qk_fit_scratch_bytes_of(&clipped),
                   .kernels = qk_active_kernels()};
    size_t work = fit->cols * ((fit->starts + 1) * (fit->rounds + 1));
    size_t grain = GRAIN / work / QK_FIT_LANES * QK_FIT_LANES + QK_FIT_LANES;
    QK_REQUIRE(qk_parallel_for(fit->rows, grain, fit_rows, &job), QK_INTERRUPTED);
    return atomic_load(&job.failed) ? QK_OUT_OF_MEMORY : QK_OK;
}

/* ---- descent -------------------------------------------------------------- */

static int is_grid(const qk_grid_levels *grid, size_t rows)
{
    if (grid->level_count)
        return grid->level_count <= MAX_LEVELS && (grid->codebooks == 1 || grid->codebooks == rows);
    return grid->code_min < grid->code_max && grid->code_min >= -0x1p21f &&
           grid->code_max <= 0x1p21f;
}

static size_t rows_worth_a_thread(size_t cols)
{
    return GRAIN / (cols * cols + 1) + 1;
}

typedef struct descent_job {
    const qk_descent *form;
    const qk_kernels *kernels;
    atomic_int failed; /* no memory for scratch */
} descent_job;

static void descend_rows(size_t first, size_t last, void *context)
{
    descent_job *job = context;
    float *scratch = malloc(qk_descent_scratch(job->form) * sizeof(float));
    if (!scratch) {
        atomic_store(&job->failed, 1);
        return;
    }
    for (size_t row = first; row < last; row++)
        qk_descend_row(job->form, row, scratch, job->kernels);
    free(scratch);
}

qk_status qk_descend(const qk_descent *form)
{
    size_t items;
    QK_REQUIRE(form->group >= 1 && form->group <= form->cols &&
                   qk_multiply(form->rows, form->cols, &items) &&
                   qk_multiply(form->cols, form->cols * sizeof(float), &items),
               QK_BAD_SHAPE);
    QK_REQUIRE(is_grid(&form->grid, form->rows) && !(form->zeros && form->grid.level_count),
               QK_BAD_CODES);
    QK_REQUIRE(qk_is_source(form->scale_dtype) && qk_is_source(form->zero_dtype), QK_BAD_DTYPE);
    descent_job job = {.form = form, .kernels = qk_active_kernels()};
    QK_REQUIRE(qk_parallel_for(form->rows, rows_worth_a_thread(form->cols), descend_rows, &job),
               QK_INTERRUPTED);
    return atomic_load(&job.failed) ? QK_OUT_OF_MEMORY : QK_OK;
}

typedef struct rounding_job {
    const qk_rounding *form;
    const qk_kernels *kernels;
} rounding_job;

static void round_rows(size_t first, size_t last, void *context)
{
    const rounding_job *job = context;
    for (size_t row = first; row < last; row++)
        qk_round_row_in_order(job->form, row, job->kernels);
}

qk_status qk_round_in_order(const qk_rounding *form)
{
    size_t items;
    QK_REQUIRE(form->cols >= 1 && qk_multiply(form->rows, form->cols, &items) &&
                   qk_multiply(form->cols, form->cols * sizeof(float), &items),
               QK_BAD_SHAPE);
    QK_REQUIRE(is_grid(&form->grid, form->rows) && !(form->zeros && form->grid.level_count),
               QK_BAD_CODES);
    const int32_t *places = form->places;
    for (size_t k = 0; k < form->cols; k++)
        QK_REQUIRE((size_t)qk_load_int32(places, k) < form->groups, QK_BAD_SHAPE);
    rounding_job job = {form, qk_active_kernels()};
    QK_REQUIRE(qk_parallel_for(form->rows, rows_worth_a_thread(form->cols), round_rows, &job),
               QK_INTERRUPTED);
    return QK_OK;
}
