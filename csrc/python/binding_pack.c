#include "python/binding.h"

typedef struct pack_call {
    PyObject *packed, *codes;
    qk_packing packing;
    void *packed_data, *codes_data;
    int is_signed;
} pack_call;

static PyObject *bind_packing(pack_call *call, int packs)
{
    const qk_packing *p = &call->packing;
    if (p->bits < 1 || p->bits > 8 || p->container_bytes < 1 || p->container_bytes > 8 ||
        (p->container_bytes & (p->container_bytes - 1)))
        return qk_raise_status(QK_BAD_BITS, 0);
    if (p->axis != 0 && p->axis != 1)
        return qk_raise_status(QK_BAD_SHAPE, 0);
    size_t rows = p->axis == 0 ? qk_packed_length(p->rows, p) : p->rows;
    size_t cols = p->axis == 1 ? qk_packed_length(p->cols, p) : p->cols;
    size_t code_items, packed_items;
    if (!qk_count(p->rows, p->cols, &code_items) || !qk_count(rows, cols, &packed_items))
        return NULL;
    PyObject *packed = call->packed, *codes = call->codes;
    QK_ARRAY_OF(call->packed_data, packed, packed_items, p->container_bytes, QK_INTEGERS, packs);
    QK_ARRAY(call->codes_data, codes, code_items, QK_UINT8, !packs);
    return Py_None;
}

PyObject *qk_py_pack(PyObject *module, PyObject *args)
{
    (void)module;
    pack_call call = {0};
    qk_packing *p = &call.packing;
    if (!PyArg_ParseTuple(args, "OOnnnnii", &call.packed, &call.codes, &p->rows, &p->cols, &p->bits,
                          &p->container_bytes, &p->axis, &p->straddle) ||
        !bind_packing(&call, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    int fits = 0;
    Py_BEGIN_ALLOW_THREADS status = qk_pack(call.packed_data, call.codes_data, p, &fits);
    Py_END_ALLOW_THREADS return status == QK_OK ? PyLong_FromLong(fits)
                                                : qk_raise_status(status, where);
}

PyObject *qk_py_unpack(PyObject *module, PyObject *args)
{
    (void)module;
    pack_call call = {0};
    qk_packing *p = &call.packing;
    if (!PyArg_ParseTuple(args, "OOnnnniii", &call.codes, &call.packed, &p->rows, &p->cols,
                          &p->bits, &p->container_bytes, &p->axis, &p->straddle, &call.is_signed) ||
        !bind_packing(&call, 0))
        return NULL;
    size_t where = 0;
    qk_status status;
    QK_RUN(qk_unpack(call.codes_data, call.packed_data, p, call.is_signed));
}

static PyObject *bind_ternary(PyObject *args, pack_call *call, int packs)
{
    PyObject *first, *second;
    size_t rows, cols, code_items, packed_items;
    if (!PyArg_ParseTuple(args, "OOnn", &first, &second, &rows, &cols) ||
        !qk_count(rows, cols, &code_items))
        return NULL;
    packed_items = rows * qk_blocks(cols, 5);
    PyObject *packed = packs ? first : second, *codes = packs ? second : first;
    QK_ARRAY(call->packed_data, packed, packed_items, QK_UINT8, packs);
    QK_ARRAY(call->codes_data, codes, code_items, QK_UINT8, !packs);
    call->packing.rows = rows;
    call->packing.cols = cols;
    return Py_None;
}

PyObject *qk_py_pack_ternary(PyObject *module, PyObject *args)
{
    (void)module;
    pack_call call = {0};
    if (!bind_ternary(args, &call, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    QK_RUN(
        qk_pack_ternary(call.packed_data, call.codes_data, call.packing.rows, call.packing.cols));
}

PyObject *qk_py_unpack_ternary(PyObject *module, PyObject *args)
{
    (void)module;
    pack_call call = {0};
    if (!bind_ternary(args, &call, 0))
        return NULL;
    size_t where = 0;
    qk_status status;
    QK_RUN(
        qk_unpack_ternary(call.codes_data, call.packed_data, call.packing.rows, call.packing.cols));
}
