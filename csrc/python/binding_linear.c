#include "python/binding.h"

PyObject *qk_py_linear(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *y, *x, *weights, *scales, *bias;
    qk_linear linear = {0};
    int y_dtype, x_dtype, scales_dtype, bias_dtype;
    if (!PyArg_ParseTuple(args, "OOOOOnnniiii", &y, &x, &weights, &scales, &bias, &linear.tokens,
                          &linear.out_features, &linear.in_features, &y_dtype, &x_dtype,
                          &scales_dtype, &bias_dtype))
        return NULL;
    linear.y_dtype = (qk_dtype)y_dtype;
    linear.x_dtype = (qk_dtype)x_dtype;
    linear.scales_dtype = (qk_dtype)scales_dtype;
    linear.bias_dtype = (qk_dtype)bias_dtype;
    size_t x_items, y_items, weight_items, where = 0;
    if (!qk_count(linear.tokens, linear.in_features, &x_items) ||
        !qk_count(linear.tokens, linear.out_features, &y_items) ||
        !qk_count(linear.out_features, linear.in_features, &weight_items))
        return NULL;
    void *y_data, *x_data;
    QK_ARRAY(y_data, y, y_items, linear.y_dtype, 1);
    QK_ARRAY(x_data, x, x_items, linear.x_dtype, 0);
    QK_ARRAY(linear.weights, weights, weight_items, QK_INT8, 0);
    QK_ARRAY(linear.scales, scales, linear.out_features, linear.scales_dtype, 0);
    QK_ARRAY_OR_NONE(linear.bias, bias, linear.out_features, linear.bias_dtype, 0);
    qk_status status;
    QK_RUN(qk_linear_forward(y_data, x_data, &linear));
}

PyObject *qk_py_linear_backward(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *grad_x, *grad_y, *weights, *scales;
    qk_linear linear = {0};
    int x_dtype, y_dtype, scales_dtype;
    if (!PyArg_ParseTuple(args, "OOOOnnniii", &grad_x, &grad_y, &weights, &scales, &linear.tokens,
                          &linear.out_features, &linear.in_features, &x_dtype, &y_dtype,
                          &scales_dtype))
        return NULL;
    linear.y_dtype = (qk_dtype)y_dtype;
    linear.x_dtype = (qk_dtype)x_dtype;
    linear.scales_dtype = (qk_dtype)scales_dtype;
    size_t x_items, y_items, weight_items, where = 0;
    if (!qk_count(linear.tokens, linear.in_features, &x_items) ||
        !qk_count(linear.tokens, linear.out_features, &y_items) ||
        !qk_count(linear.out_features, linear.in_features, &weight_items))
        return NULL;
    void *grad_x_data, *grad_y_data;
    QK_ARRAY(grad_x_data, grad_x, x_items, linear.x_dtype, 1);
    QK_ARRAY(grad_y_data, grad_y, y_items, linear.y_dtype, 0);
    QK_ARRAY(linear.weights, weights, weight_items, QK_INT8, 0);
    QK_ARRAY(linear.scales, scales, linear.out_features, linear.scales_dtype, 0);
    qk_status status;
    QK_RUN(qk_linear_backward(grad_x_data, grad_y_data, &linear));
}

/* With bits, group, zeros (0: none, 1: packed, 2: floats) and has_codebook of packed weights; a
 * group of 0: int8 rows. */
PyObject *qk_py_choose_linear(PyObject *module, PyObject *args)
{
    (void)module;
    static const char some_numbers[8]; /* never read */
    qk_packed packed = {.codebook_rows = 1};
    qk_linear linear = {0};
    qk_linear_choice choice;
    int x_dtype, zeros, has_codebook;
    if (!PyArg_ParseTuple(args, "nnninnii", &linear.tokens, &linear.out_features,
                          &linear.in_features, &x_dtype, &packed.bits, &packed.group, &zeros,
                          &has_codebook))
        return NULL;
    linear.x_dtype = (qk_dtype)x_dtype;
    packed.zeros = zeros ? some_numbers : NULL;
    packed.zeros_dtype = zeros == 1 ? QK_UINT8 : QK_FLOAT32;
    packed.codebook = has_codebook ? some_numbers : NULL;
    linear.packed = packed.group ? &packed : NULL;
    qk_status status = qk_choose_linear(&choice, &linear);
    if (status != QK_OK)
        return qk_raise_status(status, 0);
    return Py_BuildValue("(snnnnN)", choice.isa, choice.tile_tokens, choice.tile_features,
                         choice.chunk, choice.threads, PyBool_FromLong(choice.uses_weight_panels));
}
