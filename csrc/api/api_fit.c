#include "api/api.h"
#include "api/dispatch.h"
#include "api/parallel.h"

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
