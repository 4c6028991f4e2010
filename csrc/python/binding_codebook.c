#include "python/binding.h"

PyObject *qk_py_fit_levels(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *levels, *values, *weights;
    size_t rows, count, level_count, value_items, level_items, where = 0;
    if (!PyArg_ParseTuple(args, "OOOnnn", &levels, &values, &weights, &rows, &count,
                          &level_count) ||
        !qk_count(rows, count, &value_items) || !qk_count(rows, level_count, &level_items))
        return NULL;
    void *levels_data, *values_data, *weights_data;
    QK_ARRAY(levels_data, levels, level_items, QK_FLOAT64, 1);
    QK_ARRAY(values_data, values, value_items, QK_FLOAT64, 0);
    QK_ARRAY_OR_NONE(weights_data, weights, value_items, QK_FLOAT64, 0);
    qk_status status;
    QK_RUN(qk_fit_levels(levels_data, level_count, values_data, weights_data, rows, count));
}

PyObject *qk_py_encode_levels(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *codes, *x, *scales, *codebook;
    qk_leveling form;
    size_t items, scale_items, level_items, where = 0;
    if (!PyArg_ParseTuple(args, "OOOOnnnnn", &codes, &x, &scales, &codebook, &form.rows, &form.cols,
                          &form.group, &form.codebooks, &form.levels) ||
        !qk_count(form.rows, form.cols, &items) ||
        !qk_count(form.rows, qk_blocks(form.cols, form.group), &scale_items) ||
        !qk_count(form.codebooks, form.levels, &level_items))
        return NULL;
    void *codes_data, *x_data, *scales_data, *codebook_data;
    QK_ARRAY(codes_data, codes, items, QK_UINT8, 1);
    QK_ARRAY(x_data, x, items, QK_FLOAT32, 0);
    QK_ARRAY(scales_data, scales, scale_items, QK_FLOAT32, 0);
    QK_ARRAY(codebook_data, codebook, level_items, QK_FLOAT32, 0);
    form.scales = scales_data;
    form.codebook = codebook_data;
    qk_status status;
    QK_RUN(qk_encode_levels(codes_data, x_data, &form));
}
