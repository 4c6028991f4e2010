#include "python/binding.h"

PyObject *qk_py_fit_groups(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *scales, *zeros, *errors, *x, *importance, *levels;
    qk_fit fit = {0};
    size_t items, blocks, level_items, where = 0;
    int find;
    if (!PyArg_ParseTuple(args, "OOOOOOnnnnnnnifffffff", &scales, &zeros, &errors, &x, &importance,
                          &levels, &fit.rows, &fit.cols, &fit.group, &fit.codebooks,
                          &fit.level_count, &fit.starts, &fit.rounds, &find, &fit.shrink,
                          &fit.code_min, &fit.code_max, &fit.scale_min, &fit.zero_min,
                          &fit.zero_max, &fit.zero_step) ||
        !qk_count(fit.rows, fit.cols, &items) ||
        !qk_count(fit.rows, qk_blocks(fit.cols, fit.group), &blocks) ||
        !qk_count(fit.codebooks, fit.level_count, &level_items))
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
    fit.levels = level_data;
    qk_status status;
    QK_RUN(qk_fit_groups(scale_data, zero_data, error_data, &fit));
}
