#include "api.h"
#include "dispatch.h"
#include "parallel.h"
#include "plan.h"

typedef void (*linear_kernel)(void *out, const void *in, const qk_linear_strip *strip);

/* A forward or backward call: rows of `out` from rows of `in`, in the pieces of `plan`. */
typedef struct linear_job {
    const qk_linear *linear;
    linear_kernel kernel;
    char *out;
    const char *in;
    size_t out_row_bytes, in_row_bytes;
    size_t features; /* columns of out */
    qk_linear_plan plan;
} linear_job;

/* Pieces [first, last), counted along the strips of one chunk of tokens after the other. */
static void run_pieces(size_t first, size_t last, void *context)
{
    const linear_job *job = context;
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
        qk_linear_strip range = {&piece, strip * plan->strip, (strip + count) * plan->strip};
        if (range.last > job->features)
            range.last = job->features;
        job->kernel(job->out + token * job->out_row_bytes, job->in + token * job->in_row_bytes,
                    &range);
        first += count;
    }
}

static void run(linear_job *job, size_t depth)
{
    if (job->linear->tokens == 0 || job->features == 0)
        return;
    job->plan = qk_plan_linear(job->linear->tokens, job->features, depth, qk_cache_bytes());
    qk_parallel_for(job->plan.strips * job->plan.chunks, job->plan.grain, run_pieces, job);
}

/* What forward and backward have in common; *x_bytes and *y_bytes are the sizes of the matrices. */
static qk_status check(const qk_linear *l, size_t *x_bytes, size_t *y_bytes)
{
    size_t weights;
    QK_REQUIRE(qk_is_source(l->x_dtype) && qk_is_source(l->y_dtype) &&
                   qk_is_source(l->scales_dtype),
               QK_BAD_DTYPE);
    QK_REQUIRE(qk_multiply(l->tokens, l->in_features, x_bytes) &&
                   qk_multiply(*x_bytes, qk_dtype_bytes(l->x_dtype), x_bytes) &&
                   qk_multiply(l->tokens, l->out_features, y_bytes) &&
                   qk_multiply(*y_bytes, qk_dtype_bytes(l->y_dtype), y_bytes) &&
                   qk_multiply(l->out_features, l->in_features, &weights),
               QK_BAD_SHAPE);
    return QK_OK;
}

static int overlaps_weights(const void *out, size_t bytes, const qk_linear *l)
{
    return qk_overlap(out, bytes, l->weights, l->out_features * l->in_features) ||
           qk_overlap(out, bytes, l->scales, l->out_features * qk_dtype_bytes(l->scales_dtype));
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
    linear_job job = {
        .linear = linear,
        .kernel = qk_active_kernels()->linear[linear->x_dtype],
        .out = y,
        .in = x,
        .out_row_bytes = linear->out_features * qk_dtype_bytes(linear->y_dtype),
        .in_row_bytes = linear->in_features * qk_dtype_bytes(linear->x_dtype),
        .features = linear->out_features,
    };
    run(&job, linear->in_features);
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
        .kernel = qk_active_kernels()->linear_backward[linear->y_dtype],
        .out = grad_x,
        .in = grad_y,
        .out_row_bytes = linear->in_features * qk_dtype_bytes(linear->x_dtype),
        .in_row_bytes = linear->out_features * qk_dtype_bytes(linear->y_dtype),
        .features = linear->in_features,
    };
    run(&job, linear->out_features);
    return QK_OK;
}
