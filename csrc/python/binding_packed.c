#include "python/binding.h"

/* The objects and numbers that say what packed weights are. */
typedef struct packed_args {
    PyObject *codes, *scales, *scale_steps, *zeros, *codebook;
    int scales_dtype, steps_dtype, zeros_dtype, codebook_dtype;
} packed_args;

/* The arrays of `args`, checked against the sizes in `linear` and `packed`; NULL: an exception. */
static PyObject *open_packed(qk_packed *packed, const qk_linear *linear, const packed_args *args)
{
    PyObject *codes = args->codes, *scales = args->scales, *scale_steps = args->scale_steps;
    PyObject *zeros = args->zeros, *codebook = args->codebook;
    size_t rows = linear->out_features, code_bytes, items, zero_items, entries;
    packed->scales_dtype = (qk_dtype)args->scales_dtype;
    packed->steps_dtype = (qk_dtype)args->steps_dtype;
    packed->zeros_dtype = (qk_dtype)args->zeros_dtype;
    packed->codebook_dtype = (qk_dtype)args->codebook_dtype;
    if (packed->bits > 8)
        return qk_raise_status(QK_BAD_BITS, 0);
    size_t groups = qk_blocks(linear->in_features, packed->group);
    size_t zero_columns =
        packed->zeros_dtype == QK_UINT8 ? qk_packed_row_bytes(groups, packed->bits) : groups;
    if (!qk_count(rows, qk_packed_row_bytes(linear->in_features, packed->bits), &code_bytes) ||
        !qk_count(rows, groups, &items) || !qk_count(rows, zero_columns, &zero_items) ||
        !qk_count(packed->codebook_rows, (size_t)1 << packed->bits, &entries))
        return NULL;
    QK_ARRAY(packed->codes, codes, code_bytes, QK_UINT8, 0);
    QK_ARRAY(packed->scales, scales, items, packed->scales_dtype, 0);
    QK_ARRAY_OR_NONE(packed->scale_steps, scale_steps, rows, packed->steps_dtype, 0);
    QK_ARRAY_OR_NONE(packed->zeros, zeros, zero_items, packed->zeros_dtype, 0);
    QK_ARRAY_OR_NONE(packed->codebook, codebook, entries, packed->codebook_dtype, 0);
    return Py_None;
}

/* Rows of x (or grad_y) and of y (or grad_x) as flat counts. */
static int count_activations(const qk_linear *linear, size_t *x_items, size_t *y_items)
{
    return qk_count(linear->tokens, linear->in_features, x_items) &&
           qk_count(linear->tokens, linear->out_features, y_items);
}

PyObject *qk_py_linear_packed(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *y, *x, *bias;
    packed_args given;
    qk_packed packed = {0};
    qk_linear linear = {.packed = &packed};
    int y_dtype, x_dtype, bias_dtype;
    if (!PyArg_ParseTuple(args, "OOOOOOOOnnnnnniiiiiii", &y, &x, &given.codes, &given.scales,
                          &given.scale_steps, &given.zeros, &given.codebook, &bias, &linear.tokens,
                          &linear.out_features, &linear.in_features, &packed.bits, &packed.group,
                          &packed.codebook_rows, &y_dtype, &x_dtype, &given.scales_dtype,
                          &given.steps_dtype, &given.zeros_dtype, &given.codebook_dtype,
                          &bias_dtype))
        return NULL;
    linear.y_dtype = (qk_dtype)y_dtype;
    linear.x_dtype = (qk_dtype)x_dtype;
    linear.bias_dtype = (qk_dtype)bias_dtype;
    size_t x_items, y_items, where = 0;
    if (!count_activations(&linear, &x_items, &y_items) || !open_packed(&packed, &linear, &given))
        return NULL;
    void *y_data, *x_data;
    QK_ARRAY(y_data, y, y_items, linear.y_dtype, 1);
    QK_ARRAY(x_data, x, x_items, linear.x_dtype, 0);
    QK_ARRAY_OR_NONE(linear.bias, bias, linear.out_features, linear.bias_dtype, 0);
    qk_status status;
    QK_RUN(qk_linear_forward(y_data, x_data, &linear));
}

PyObject *qk_py_linear_packed_backward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *grad_x, *grad_y;
    packed_args given;
    qk_packed packed = {0};
    qk_linear linear = {.packed = &packed};
    int x_dtype, y_dtype;
    if (!PyArg_ParseTuple(args, "OOOOOOOnnnnnniiiiii", &grad_x, &grad_y, &given.codes,
                          &given.scales, &given.scale_steps, &given.zeros, &given.codebook,
                          &linear.tokens, &linear.out_features, &linear.in_features, &packed.bits,
                          &packed.group, &packed.codebook_rows, &x_dtype, &y_dtype,
                          &given.scales_dtype, &given.steps_dtype, &given.zeros_dtype,
                          &given.codebook_dtype))
        return NULL;
    linear.y_dtype = (qk_dtype)y_dtype;
    linear.x_dtype = (qk_dtype)x_dtype;
    size_t x_items, y_items, where = 0;
    if (!count_activations(&linear, &x_items, &y_items) || !open_packed(&packed, &linear, &given))
        return NULL;
    void *grad_x_data, *grad_y_data;
    QK_ARRAY(grad_x_data, grad_x, x_items, linear.x_dtype, 1);
    QK_ARRAY(grad_y_data, grad_y, y_items, linear.y_dtype, 0);
    qk_status status;
    QK_RUN(qk_linear_backward(grad_x_data, grad_y_data, &linear));
}
