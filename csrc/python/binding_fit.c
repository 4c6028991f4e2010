#include "python/binding.h"

PyObject *qk_py_fit_groups(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *scales, *zeros, *errors, *x, *importance, *levels;
    qk_fit fit = {0};
    size_t items, blocks, level_items, where = 0;
    int find;
    if (!PyArg_ParseTuple(args, "OOOOOOnnnnnnnifffffff", &scales, &zeros, &errors, &x, &importance,
                          &levels, &fit.rows, &fit.cols, &fit.group, &fit.grid.codebooks,
                          &fit.grid.level_count, &fit.starts, &fit.rounds, &find, &fit.shrink,
                          &fit.grid.code_min, &fit.grid.code_max, &fit.scale_min, &fit.zero_min,
                          &fit.zero_max, &fit.zero_step) ||
        !qk_count(fit.rows, fit.cols, &items) ||
        !qk_count(fit.rows, qk_blocks(fit.cols, fit.group), &blocks) ||
        !qk_count(fit.grid.codebooks, fit.grid.level_count, &level_items))
        return NULL;
    fit.find = (qk_fit_find)find;
    void *scale_data, *zero_data, *error_data, *x_data, *importance_data, *level_data;
    QK_ARRAY(scale_data, scales, blocks, QK_FLOAT32, 1);
    QK_ARRAY_OR_NONE(zero_data, zeros, blocks, QK_FLOAT32, 1);
    QK_ARRAY_OR_NONE(error_data, errors, blocks, QK_FLOAT32, 1);
    QK_ARRAY(x_data, x, items, QK_FLOAT32, 0);
    QK_ARRAY(importance_data, importance, fit.cols, QK_FLOAT32, 0);
    QK_ARRAY_OR_NONE(level_data, levels, level_items, QK_FLOAT32, 0);
    fit.x = x_data;
    fit.importance = importance_data;
    fit.grid.levels = level_data;
    qk_status status;
    QK_RUN(qk_fit_groups(scale_data, zero_data, error_data, &fit));
}

/* codes' bounds, the table (or None) and how many tables and levels */
#define GRID_FORMAT "Onnff"
#define GRID_PLACES(levels, grid)                                                                  \
    &(levels), &(grid).codebooks, &(grid).level_count, &(grid).code_min, &(grid).code_max

PyObject *qk_py_descend(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *values, *slopes, *scales, *zeros, *hessian, *steps, *levels;
    qk_descent form = {0};
    size_t items, blocks, square, level_items, where = 0;
    int scale_dtype, zero_dtype;
    if (!PyArg_ParseTuple(args, "OOOOOOnnn" GRID_FORMAT "iiffffni", &values, &slopes, &scales,
                          &zeros, &hessian, &steps, &form.rows, &form.cols, &form.group,
                          GRID_PLACES(levels, form.grid), &scale_dtype, &zero_dtype,
                          &form.scale_min, &form.zero_min, &form.zero_max, &form.zero_step,
                          &form.sweeps, &form.refits) ||
        !qk_count(form.rows, form.cols, &items) || !qk_count(form.cols, form.cols, &square) ||
        !qk_count(form.rows, qk_blocks(form.cols, form.group), &blocks) ||
        !qk_count(form.grid.codebooks, form.grid.level_count, &level_items))
        return NULL;
    form.scale_dtype = (qk_dtype)scale_dtype;
    form.zero_dtype = (qk_dtype)zero_dtype;
    void *hessian_data, *steps_data, *level_data;
    QK_ARRAY(form.values, values, items, QK_FLOAT32, 1);
    QK_ARRAY(form.slopes, slopes, items, QK_FLOAT32, 1);
    QK_ARRAY(form.scales, scales, blocks, QK_FLOAT32, 1);
    QK_ARRAY_OR_NONE(form.zeros, zeros, blocks, QK_FLOAT32, 1);
    QK_ARRAY(hessian_data, hessian, square, QK_FLOAT32, 0);
    QK_ARRAY_OR_NONE(steps_data, steps, form.rows, QK_FLOAT32, 0);
    QK_ARRAY_OR_NONE(level_data, levels, level_items, QK_FLOAT32, 0);
    form.hessian = hessian_data;
    form.steps = steps_data;
    form.grid.levels = level_data;
    qk_status status;
    QK_RUN(qk_descend(&form));
}

PyObject *qk_py_round_in_order(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *values, *x, *factor, *places, *scales, *zeros, *levels;
    qk_rounding form = {0};
    size_t items, blocks, square, level_items, where = 0;
    if (!PyArg_ParseTuple(args, "OOOOOOnnn" GRID_FORMAT, &values, &x, &factor, &places, &scales,
                          &zeros, &form.rows, &form.cols, &form.groups,
                          GRID_PLACES(levels, form.grid)) ||
        !qk_count(form.rows, form.cols, &items) || !qk_count(form.cols, form.cols, &square) ||
        !qk_count(form.rows, form.groups, &blocks) ||
        !qk_count(form.grid.codebooks, form.grid.level_count, &level_items))
        return NULL;
    void *factor_data, *place_data, *scale_data, *zero_data, *level_data;
    QK_ARRAY(form.values, values, items, QK_FLOAT32, 1);
    QK_ARRAY(form.x, x, items, QK_FLOAT32, 1);
    QK_ARRAY(factor_data, factor, square, QK_FLOAT32, 0);
    QK_ARRAY_OF(place_data, places, form.cols, sizeof(int32_t), QK_INTEGERS, 0);
    QK_ARRAY(scale_data, scales, blocks, QK_FLOAT32, 0);
    QK_ARRAY_OR_NONE(zero_data, zeros, blocks, QK_FLOAT32, 0);
    QK_ARRAY_OR_NONE(level_data, levels, level_items, QK_FLOAT32, 0);
    form.factor = factor_data;
    form.places = place_data;
    form.scales = scale_data;
    form.zeros = zero_data;
    form.grid.levels = level_data;
    qk_status status;
    QK_RUN(qk_round_in_order(&form));
}
