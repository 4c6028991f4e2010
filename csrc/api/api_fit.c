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

/* The bytes of floats [rows][cols]; 0 if there cannot be so many. */
static size_t matrix_bytes(size_t rows, size_t cols)
{
    size_t bytes;
    return qk_multiply(rows, cols, &bytes) && qk_multiply(bytes, sizeof(float), &bytes) ? bytes : 0;
}

static int is_grid(const qk_grid_levels *grid, size_t rows)
{
    if (grid->level_count)
        return grid->level_count <= MAX_LEVELS && (grid->codebooks == 1 || grid->codebooks == rows);
    return grid->code_min < grid->code_max && grid->code_min >= -0x1p21f &&
           grid->code_max <= 0x1p21f;
}

static size_t levels_bytes(const qk_grid_levels *grid)
{
    return grid->codebooks * grid->level_count * sizeof(float);
}

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

qk_status qk_fit_groups(void *scales, void *zeros, void *errors, const qk_fit *fit)
{
    QK_REQUIRE(fit->group >= 1 && fit->group <= (SIZE_MAX >> 8) && fit->cols >= 1, QK_BAD_SHAPE);
    QK_REQUIRE(is_grid(&fit->grid, fit->rows), QK_BAD_CODES);
    QK_REQUIRE((unsigned)fit->find <= QK_FIT_BOTH, QK_BAD_CODES);
    int finds_zeros = fit->find == QK_FIT_ZERO || fit->find == QK_FIT_BOTH;
    QK_REQUIRE(!finds_zeros || (zeros && !fit->grid.level_count), QK_BAD_CODES);
    size_t items = matrix_bytes(fit->rows, fit->cols);
    QK_REQUIRE(items || !fit->rows, QK_BAD_SHAPE);
    size_t blocks = fit->rows * qk_ceil_div(fit->cols, fit->group) * sizeof(float);
    qk_span spans[] = {{scales, blocks},
                       {zeros, blocks},
                       {errors, blocks},
                       {fit->x, items},
                       {fit->importance, fit->cols * sizeof(float)},
                       {fit->grid.levels, levels_bytes(&fit->grid)}};
    QK_REQUIRE(qk_are_apart(spans, 3, sizeof(spans) / sizeof(*spans)), QK_OVERLAP);
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
    QK_REQUIRE(form->group >= 1 && form->group <= form->cols, QK_BAD_SHAPE);
    size_t items = matrix_bytes(form->rows, form->cols);
    size_t square = matrix_bytes(form->cols, form->cols);
    QK_REQUIRE((items || !form->rows) && square, QK_BAD_SHAPE);
    QK_REQUIRE(is_grid(&form->grid, form->rows) && !(form->zeros && form->grid.level_count),
               QK_BAD_CODES);
    QK_REQUIRE(qk_is_source(form->scale_dtype) && qk_is_source(form->zero_dtype), QK_BAD_DTYPE);
    size_t blocks = form->rows * qk_ceil_div(form->cols, form->group) * sizeof(float);
    qk_span spans[] = {{form->values, items},
                       {form->slopes, items},
                       {form->scales, blocks},
                       {form->zeros, blocks},
                       {form->hessian, square},
                       {form->steps, form->rows * sizeof(float)},
                       {form->grid.levels, levels_bytes(&form->grid)}};
    QK_REQUIRE(qk_are_apart(spans, 4, sizeof(spans) / sizeof(*spans)), QK_OVERLAP);
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
    size_t items = matrix_bytes(form->rows, form->cols);
    size_t square = matrix_bytes(form->cols, form->cols);
    size_t blocks = matrix_bytes(form->rows, form->groups);
    QK_REQUIRE((items || !form->rows) && (blocks || !form->rows) && square, QK_BAD_SHAPE);
    QK_REQUIRE(is_grid(&form->grid, form->rows) && !(form->zeros && form->grid.level_count),
               QK_BAD_CODES);
    qk_span spans[] = {{form->x, items},
                       {form->values, items},
                       {form->factor, square},
                       {form->places, form->cols * sizeof(int32_t)},
                       {form->scales, blocks},
                       {form->zeros, blocks},
                       {form->grid.levels, levels_bytes(&form->grid)}};
    QK_REQUIRE(qk_are_apart(spans, 2, sizeof(spans) / sizeof(*spans)), QK_OVERLAP);
    const int32_t *places = form->places;
    for (size_t k = 0; k < form->cols; k++)
        QK_REQUIRE((size_t)qk_load_int32(places, k) < form->groups, QK_BAD_SHAPE);
    rounding_job job = {form, qk_active_kernels()};
    QK_REQUIRE(qk_parallel_for(form->rows, rows_worth_a_thread(form->cols), round_rows, &job),
               QK_INTERRUPTED);
    return QK_OK;
}
