/* The torch operators of packed weights. */
#include "torch/torch_call.h"

#if !defined(_WIN32)

/* Bits of `present`: which of a packed operator's tensors are there. In the place of one that is
 * not, scales are given. */
enum { HAS_STEPS = 1, HAS_ZEROS = 2, HAS_CODEBOOK = 4, HAS_BIAS = 8 };
enum { CODES = 1, SCALES, STEPS, ZEROS, CODEBOOK, BIAS };

static int check_matrix(qk_call *c, const qk_tensor *t, size_t rows, size_t cols)
{
    if (t->dim != 2 || t->sizes[0] != (int64_t)rows || t->sizes[1] != (int64_t)cols)
        return QK_FAIL(c, "%s must have shape [%zu, %zu]", t->name, rows, cols);
    return 1;
}

/* `packed` from the call's tensors, whose shapes must fit linear->in_features. */
static int open_packed(qk_call *c, qk_packed *packed, qk_linear *linear, int64_t present)
{
    const qk_tensor *codes = &c->tensors[CODES], *scales = &c->tensors[SCALES];
    const qk_tensor *steps = &c->tensors[STEPS], *zeros = &c->tensors[ZEROS];
    const qk_tensor *codebook = &c->tensors[CODEBOOK];
    if (packed->bits > 8 || (int64_t)packed->group < 1)
        return QK_FAIL(c, "bits must be 0 (base 3) or 1..8, and group at least 1");
    if (packed->bits == QK_BASE3 && present & (HAS_ZEROS | HAS_CODEBOOK))
        return QK_FAIL(c,
                       "base-3 codes have neither zero points nor a codebook: bits must be 1..8");
    if (codes->dtype != QK_UINT8 || codes->dim != 2)
        return QK_FAIL(c, "weights must be uint8 [out_features, bytes of a packed row]");
    size_t rows = (size_t)codes->sizes[0], cols = linear->in_features, bits = packed->bits;
    size_t groups = cols / packed->group + (cols % packed->group != 0);
    if (!check_matrix(c, codes, rows, qk_packed_row_bytes(cols, bits)) ||
        !check_matrix(c, scales, rows, groups))
        return 0;
    if (scales->dtype != QK_UINT8 && !qk_check_float(c, scales))
        return 0;
    linear->packed = packed;
    linear->out_features = rows;
    packed->codes = codes->data;
    packed->scales = scales->data;
    packed->scales_dtype = scales->dtype;
    if (present & HAS_STEPS) {
        if (scales->dtype != QK_UINT8)
            return QK_FAIL(c, "scale_steps must be [out_features], of uint8 scales");
        if (!qk_check_vector(c, steps, (int64_t)rows))
            return 0;
        packed->scale_steps = steps->data;
        packed->steps_dtype = steps->dtype;
    }
    if (present & HAS_ZEROS) {
        int is_packed = zeros->dtype == QK_UINT8;
        if (!check_matrix(c, zeros, rows, is_packed ? qk_packed_row_bytes(groups, bits) : groups) ||
            (!is_packed && zeros->dtype != QK_INT8 && !qk_check_float(c, zeros)))
            return 0;
        packed->zeros = zeros->data;
        packed->zeros_dtype = zeros->dtype;
    }
    if (present & HAS_CODEBOOK) {
        packed->codebook_rows = codebook->dim == 2 && codebook->sizes[0] == 1 ? 1 : rows;
        if (!check_matrix(c, codebook, packed->codebook_rows, (size_t)1 << bits) ||
            !qk_check_float(c, codebook))
            return 0;
        packed->codebook = codebook->data;
        packed->codebook_dtype = codebook->dtype;
    }
    return 1;
}

/* The last size of `rows`, or -1. */
static int64_t last_size(const qk_tensor *rows)
{
    return rows->dim < 1 || rows->dim > QK_MAX_DIMS ? -1 : rows->sizes[rows->dim - 1];
}

static int run_packed(qk_call *c, uint64_t *stack, int64_t present, qk_packed packed, int32_t dtype)
{
    if (!qk_open_tensors(c))
        return 0;
    const qk_tensor *x = &c->tensors[0], *bias = &c->tensors[BIAS];
    qk_linear linear = {.x_dtype = x->dtype, .y_dtype = qk_dtype_of_torch(dtype)};
    if (last_size(x) < 0)
        return QK_FAIL(c, "x must have 1..%d dimensions, not %lld", QK_MAX_DIMS, (long long)x->dim);
    linear.in_features = (size_t)last_size(x);
    if (!qk_check_float(c, x) || !open_packed(c, &packed, &linear, present))
        return 0;
    if (present & HAS_BIAS) {
        if (!qk_check_vector(c, bias, (int64_t)linear.out_features))
            return 0;
        linear.bias = bias->data;
        linear.bias_dtype = bias->dtype;
    }
    linear.tokens = qk_rows_of(x);
    tensor_handle output;
    void *y;
    if (!qk_make_output(c, x, (int64_t)linear.out_features, dtype, &output, &y))
        return 0;
    return qk_return_output(c, stack, output, qk_linear_forward(y, x->data, &linear));
}

static int run_packed_backward(qk_call *c, uint64_t *stack, int64_t in_features, int64_t present,
                               qk_packed packed, int32_t dtype)
{
    if (!qk_open_tensors(c))
        return 0;
    if (in_features < 0)
        return QK_FAIL(c, "in_features must be 0 or more, not %lld", (long long)in_features);
    const qk_tensor *grad = &c->tensors[0];
    qk_linear linear = {.x_dtype = qk_dtype_of_torch(dtype), .y_dtype = grad->dtype};
    linear.in_features = (size_t)in_features;
    if (!qk_check_float(c, grad) || !open_packed(c, &packed, &linear, present))
        return 0;
    if (last_size(grad) != (int64_t)linear.out_features)
        return QK_FAIL(c, "grad must have %zu columns (out_features)", linear.out_features);
    linear.tokens = qk_rows_of(grad);
    tensor_handle output;
    void *grad_x;
    if (!qk_make_output(c, grad, in_features, dtype, &output, &grad_x))
        return 0;
    return qk_return_output(c, stack, output, qk_linear_backward(grad_x, grad->data, &linear));
}

static const char *const packed_names[] = {"x",           "weights",  "scales", "scale_steps",
                                           "zero_points", "codebook", "bias"};

/* x, the packed weights, bias; bits, group, present, dtype. */
void qk_torch_packed(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    qk_call c = {0};
    for (int i = 0; i <= BIAS; i++)
        qk_take(&c, packed_names[i], stack[i]);
    qk_packed weights = {.bits = (size_t)stack[7], .group = (size_t)stack[8]};
    run_packed(&c, stack, (int64_t)stack[9], weights, (int32_t)stack[10]);
    qk_finish(&c, "quantization::packed");
}

/* grad, the packed weights; in_features, bits, group, present, dtype. */
void qk_torch_packed_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    qk_call c = {0};
    qk_take(&c, "grad", stack[0]);
    for (int i = CODES; i <= CODEBOOK; i++)
        qk_take(&c, packed_names[i], stack[i]);
    qk_packed weights = {.bits = (size_t)stack[7], .group = (size_t)stack[8]};
    run_packed_backward(&c, stack, (int64_t)stack[6], (int64_t)stack[9], weights,
                        (int32_t)stack[10]);
    qk_finish(&c, "quantization::packed_backward");
}

#endif
