#include "python/binding.h"

static int grid_counts(const qk_grid *grid, size_t *items, size_t *blocks)
{
    return qk_count(grid->rows, grid->cols, items) &&
           qk_count(qk_blocks(grid->rows, grid->block_rows),
                    qk_blocks(grid->cols, grid->block_cols), blocks);
}

#define GRID_AND_SPEC "nnnniiiiddi"

typedef struct quantize_call {
    PyObject *codes, *scale, *zero, *source;
    qk_grid grid;
    qk_spec spec;
    void *codes_data, *scale_data, *source_data;
    int32_t *zero_data;
} quantize_call;

/* Parse `prefix` objects (in the order of `objects`) and the grid and spec behind them. */
static int parse_grid_and_spec(PyObject *args, quantize_call *call, PyObject **objects[],
                               Py_ssize_t count)
{
    Py_ssize_t size = PyTuple_Size(args);
    PyObject *tail = size < count ? NULL : PyTuple_GetSlice(args, count, size);
    if (!tail) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "too few arguments");
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        *objects[i] = PyTuple_GetItem(args, i);
    int source, code, scale, mode;
    int parsed = PyArg_ParseTuple(tail, GRID_AND_SPEC, &call->grid.rows, &call->grid.cols,
                                  &call->grid.block_rows, &call->grid.block_cols, &source, &code,
                                  &scale, &mode, &call->spec.code_min, &call->spec.code_max,
                                  &call->spec.keep_non_finite);
    Py_DECREF(tail);
    if (!parsed)
        return 0;
    call->spec.source = (qk_dtype)source;
    call->spec.code = (qk_dtype)code;
    call->spec.scale = (qk_dtype)scale;
    call->spec.mode = (qk_mode)mode;
    return 1;
}

/* Check the arrays that `call` names (codes may be absent: NULL). */
static PyObject *bind_arrays(quantize_call *call, int writes_codes, int writes_scale)
{
    size_t items, blocks;
    qk_dtype compute = call->spec.source == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32;
    if (!grid_counts(&call->grid, &items, &blocks))
        return NULL;
    PyObject *codes = call->codes, *scale = call->scale, *zero = call->zero, *source = call->source;
    QK_ARRAY(call->source_data, source, items, call->spec.source, 0);
    QK_ARRAY(call->scale_data, scale, blocks, compute, writes_scale);
    call->zero_data = NULL;
    if (zero != Py_None)
        QK_ARRAY_OF(call->zero_data, zero, blocks, sizeof(int32_t), "i", writes_scale);
    if (codes)
        QK_ARRAY(call->codes_data, codes, items, call->spec.code, writes_codes);
    return Py_None;
}

PyObject *qk_py_quantize(PyObject *module, PyObject *args)
{
    (void)module;
    quantize_call call = {0};
    PyObject **objects[] = {&call.codes, &call.scale, &call.zero, &call.source};
    if (!parse_grid_and_spec(args, &call, objects, 4) || !bind_arrays(&call, 1, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    QK_RUN(qk_quantize(call.codes_data, call.scale_data, call.zero_data, call.source_data,
                       &call.grid, &call.spec, &where));
}

PyObject *qk_py_measure(PyObject *module, PyObject *args)
{
    (void)module;
    quantize_call call = {0};
    PyObject **objects[] = {&call.scale, &call.zero, &call.source};
    if (!parse_grid_and_spec(args, &call, objects, 3) || !bind_arrays(&call, 0, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    QK_RUN(qk_measure(call.scale_data, call.zero_data, call.source_data, &call.grid, &call.spec,
                      &where));
}

PyObject *qk_py_encode(PyObject *module, PyObject *args)
{
    (void)module;
    quantize_call call = {0};
    PyObject **objects[] = {&call.codes, &call.source, &call.scale, &call.zero};
    if (!parse_grid_and_spec(args, &call, objects, 4) || !bind_arrays(&call, 1, 0))
        return NULL;
    size_t where = 0;
    qk_status status;
    QK_RUN(qk_encode(call.codes_data, call.source_data, call.scale_data, call.zero_data, &call.grid,
                     &call.spec));
}

PyObject *qk_py_decode(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *out, *codes, *scale, *zero;
    qk_grid grid;
    int out_dtype, code_dtype;
    if (!PyArg_ParseTuple(args, "OOOOnnnnii", &out, &codes, &scale, &zero, &grid.rows, &grid.cols,
                          &grid.block_rows, &grid.block_cols, &out_dtype, &code_dtype))
        return NULL;
    size_t items, blocks, where = 0;
    if (!grid_counts(&grid, &items, &blocks))
        return NULL;
    void *out_data, *codes_data, *scale_data, *zero_data;
    QK_ARRAY(out_data, out, items, (qk_dtype)out_dtype, 1);
    QK_ARRAY(codes_data, codes, items, (qk_dtype)code_dtype, 0);
    QK_ARRAY(scale_data, scale, blocks, out_dtype == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32, 0);
    zero_data = NULL;
    if (zero != Py_None)
        QK_ARRAY_OF(zero_data, zero, blocks, sizeof(int32_t), "i", 0);
    qk_status status;
    QK_RUN(qk_decode(out_data, (qk_dtype)out_dtype, codes_data, (qk_dtype)code_dtype, scale_data,
                     zero_data, &grid));
}
