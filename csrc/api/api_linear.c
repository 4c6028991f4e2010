#include "api/api.h"
#include "api/dispatch.h"
#include "api/parallel.h"
#include "api/plan.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { SMALL_SCRATCH = 16384 /* bytes that a thread takes from its stack */ };

typedef void (*linear_kernel)(void *out, const void *in, const qk_linear_strip *strip);

/* A forward or backward call: rows of `out` from rows of `in`, in the pieces of `plan`. */
typedef struct linear_job {
    const qk_linear *linear;
    linear_kernel kernel;
    char *out;
    const char *in;
    size_t out_row_bytes, in_row_bytes;
    size_t features;      /* columns of out */
    size_t panel_tokens;  /* of the kernel */
    size_t scratch_bytes; /* of a chunk */
    atomic_int failed;    /* no memory for scratch */
    qk_linear_plan plan;
} linear_job;

/* Pieces [first, last), counted along the strips of one chunk of tokens after the other. */
static void run_with_scratch(const linear_job *job, size_t first, size_t last, void *scratch)
{
    const qk_linear_plan *plan = &job->plan;
    while (first < last) {
        size_t strip = first % plan->strips, token = first / plan->strips * plan->chunk;
        size_t count = plan->strips - strip;
        if (count > last - first)
            count = last - first;
        qk_linear piece = *job->linear;
        piece.tokens -= token;
        if (piece.tokens > plan->chunk)
            piece.tokens = plan->chunk;
        qk_linear_strip range = {&piece, strip * plan->strip, (strip + count) * plan->strip,
                                 scratch, plan->uses_weight_panels};
        if (range.last > job->features)
            range.last = job->features;
        job->kernel(job->out + token * job->out_row_bytes, job->in + token * job->in_row_bytes,
                    &range);
        first += count;
    }
}

static void *align(void *memory)
{
    return (void *)(((uintptr_t)memory + QK_SCRATCH_ALIGN - 1) / QK_SCRATCH_ALIGN *
                    QK_SCRATCH_ALIGN);
}

static void run_pieces(size_t first, size_t last, void *context)
{
    linear_job *job = context;
    char small[SMALL_SCRATCH + QK_SCRATCH_ALIGN];
    if (job->scratch_bytes <= SMALL_SCRATCH) {
        run_with_scratch(job, first, last, align(small));
        return;
    }
    void *memory = malloc(job->scratch_bytes + QK_SCRATCH_ALIGN);
    if (memory)
        run_with_scratch(job, first, last, align(memory));
    else
        atomic_store(&job->failed, 1);
    free(memory);
}

static qk_status run(linear_job *job, size_t depth, size_t (*scratch_bytes)(const qk_linear *))
{
    if (job->linear->tokens == 0 || job->features == 0)
        return QK_OK;
    job->plan = qk_plan_linear(job->linear->tokens, job->features, depth, job->panel_tokens);
    qk_linear chunk = *job->linear;
    if (chunk.tokens > job->plan.chunk)
        chunk.tokens = job->plan.chunk;
    job->scratch_bytes = scratch_bytes(&chunk);
    const qk_linear_plan *plan = &job->plan;
    QK_REQUIRE(
        qk_parallel_slices(plan->strips * plan->chunks, plan->grain, plan->first, run_pieces, job),
        QK_INTERRUPTED);
    return atomic_load(&job->failed) ? QK_OUT_OF_MEMORY : QK_OK;
}

size_t qk_packed_row_bytes(size_t count, size_t bits)
{
    return qk_row_bytes(count, bits);
}

static int is_float_or_uint8(qk_dtype dtype)
{
    return qk_is_source(dtype) || dtype == QK_UINT8;
}

static qk_status check_packed(const qk_packed *p, size_t out_features)
{
    QK_REQUIRE(p->bits <= 8, QK_BAD_BITS);
    QK_REQUIRE(p->group >= 1, QK_BAD_SHAPE);
    QK_REQUIRE(is_float_or_uint8(p->scales_dtype), QK_BAD_DTYPE);
    QK_REQUIRE(!p->scale_steps || (p->scales_dtype == QK_UINT8 && qk_is_source(p->steps_dtype)),
               QK_BAD_DTYPE);
    QK_REQUIRE(!p->zeros || is_float_or_uint8(p->zeros_dtype) || p->zeros_dtype == QK_INT8,
               QK_BAD_DTYPE);
    QK_REQUIRE(!p->codebook || qk_is_source(p->codebook_dtype), QK_BAD_DTYPE);
    QK_REQUIRE(!p->codebook || p->codebook_rows == 1 || p->codebook_rows == out_features,
               QK_BAD_SHAPE);
    QK_REQUIRE(p->bits != QK_BASE3 || (!p->zeros && !p->codebook), QK_BAD_CODES);
    return QK_OK;
}

/* What forward and backward have in common; *x_bytes and *y_bytes are the sizes of the matrices. */
static qk_status check(const qk_linear *l, size_t *x_bytes, size_t *y_bytes)
{
    size_t weights;
    QK_REQUIRE(qk_is_source(l->x_dtype) && qk_is_source(l->y_dtype), QK_BAD_DTYPE);
    QK_REQUIRE(l->packed || qk_is_source(l->scales_dtype), QK_BAD_DTYPE);
    QK_REQUIRE(qk_multiply(l->tokens, l->in_features, x_bytes) &&
                   qk_multiply(*x_bytes, qk_dtype_bytes(l->x_dtype), x_bytes) &&
                   qk_multiply(l->tokens, l->out_features, y_bytes) &&
                   qk_multiply(*y_bytes, qk_dtype_bytes(l->y_dtype), y_bytes) &&
                   qk_multiply(l->out_features, l->in_features, &weights) &&
                   qk_multiply(weights, sizeof(double), &weights),
               QK_BAD_SHAPE);
    return l->packed ? check_packed(l->packed, l->out_features) : QK_OK;
}

static int overlaps_packed(const void *out, size_t bytes, const qk_linear *l)
{
    const qk_packed *p = l->packed;
    size_t rows = l->out_features, groups = qk_groups(p, l->in_features),
           entries = p->codebook_rows << p->bits;
    size_t zeros = p->zeros_dtype == QK_UINT8 ? qk_row_bytes(groups, p->bits)
                                              : groups * qk_dtype_bytes(p->zeros_dtype);
    return qk_overlap(out, bytes, p->codes, rows * qk_row_bytes(l->in_features, p->bits)) ||
           qk_overlap(out, bytes, p->scales, rows * groups * qk_dtype_bytes(p->scales_dtype)) ||
           (p->zeros && qk_overlap(out, bytes, p->zeros, rows * zeros)) ||
           (p->scale_steps &&
            qk_overlap(out, bytes, p->scale_steps, rows * qk_dtype_bytes(p->steps_dtype))) ||
           (p->codebook &&
            qk_overlap(out, bytes, p->codebook, entries * qk_dtype_bytes(p->codebook_dtype)));
}

static int overlaps_weights(const void *out, size_t bytes, const qk_linear *l)
{
    if (l->packed)
        return overlaps_packed(out, bytes, l);
    return qk_overlap(out, bytes, l->weights, l->out_features * l->in_features) ||
           qk_overlap(out, bytes, l->scales, l->out_features * qk_dtype_bytes(l->scales_dtype));
}

static size_t panel_tokens(const qk_kernels *kernels, const qk_linear *linear)
{
    return linear->packed ? kernels->linear_packed_panel_tokens[linear->x_dtype]
                          : kernels->linear_panel_tokens[linear->x_dtype];
}

qk_status qk_linear_forward(void *y, const void *x, const qk_linear *linear)
{
    size_t x_bytes, y_bytes;
    qk_status status = check(linear, &x_bytes, &y_bytes);
    QK_REQUIRE(status == QK_OK, status);
    QK_REQUIRE(!linear->bias || qk_is_source(linear->bias_dtype), QK_BAD_DTYPE);
    QK_REQUIRE(!qk_overlap(y, y_bytes, x, x_bytes) && !overlaps_weights(y, y_bytes, linear),
               QK_OVERLAP);
    QK_REQUIRE(!linear->bias ||
                   !qk_overlap(y, y_bytes, linear->bias,
                               linear->out_features * qk_dtype_bytes(linear->bias_dtype)),
               QK_OVERLAP);
    const qk_kernels *kernels = qk_active_kernels();
    linear_job job = {
        .linear = linear,
        .kernel = linear->packed ? kernels->linear_packed[linear->x_dtype]
                                 : kernels->linear[linear->x_dtype],
        .panel_tokens = panel_tokens(kernels, linear),
        .out = y,
        .in = x,
        .out_row_bytes = linear->out_features * qk_dtype_bytes(linear->y_dtype),
        .in_row_bytes = linear->in_features * qk_dtype_bytes(linear->x_dtype),
        .features = linear->out_features,
    };
    return run(&job, linear->in_features, qk_linear_scratch_bytes);
}

qk_status qk_choose_linear(qk_linear_choice *choice, const qk_linear *linear)
{
    const qk_kernels *kernels = qk_active_kernels();
    QK_REQUIRE(qk_is_source(linear->x_dtype), QK_BAD_DTYPE);
    QK_REQUIRE(linear->tokens && linear->out_features, QK_BAD_SHAPE);
    if (linear->packed) {
        qk_status status = check_packed(linear->packed, linear->out_features);
        QK_REQUIRE(status == QK_OK, status);
    }
    qk_linear_plan plan = qk_plan_linear(linear->tokens, linear->out_features, linear->in_features,
                                         panel_tokens(kernels, linear));
    size_t threads = qk_ceil_div(plan.strips * plan.chunks, plan.grain);
    *choice = (qk_linear_choice){.isa = qk_active_isa()};
    qk_linear chunk = *linear;
    if (chunk.tokens > plan.chunk)
        chunk.tokens = plan.chunk;
    choice->chunk = chunk.tokens;
    choice->threads = threads < qk_get_threads() ? threads : qk_get_threads();
    choice->uses_weight_panels =
        (linear->packed ? kernels->linear_packed_tile : kernels->linear_tile)[linear->x_dtype](
            &chunk, plan.uses_weight_panels, &choice->tile_tokens, &choice->tile_features);
    return QK_OK;
}

qk_status qk_linear_backward(void *grad_x, const void *grad_y, const qk_linear *linear)
{
    size_t x_bytes, y_bytes;
    qk_status status = check(linear, &x_bytes, &y_bytes);
    QK_REQUIRE(status == QK_OK, status);
    QK_REQUIRE(!qk_overlap(grad_x, x_bytes, grad_y, y_bytes) &&
                   !overlaps_weights(grad_x, x_bytes, linear),
               QK_OVERLAP);
    linear_job job = {
        .linear = linear,
        .kernel = linear->packed ? qk_active_kernels()->linear_packed_backward[linear->y_dtype]
                                 : qk_active_kernels()->linear_backward[linear->y_dtype],
        .out = grad_x,
        .in = grad_y,
        .out_row_bytes = linear->in_features * qk_dtype_bytes(linear->x_dtype),
        .in_row_bytes = linear->out_features * qk_dtype_bytes(linear->y_dtype),
        .features = linear->in_features,
    };
    return run(&job, linear->out_features, qk_backward_scratch_bytes);
}
