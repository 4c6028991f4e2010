/* What the binding files share. The only files that know Python are binding*.c: they parse, check
 * the arrays, drop the GIL, call qk.h and turn a status into an exception. They hold no arithmetic
 * and no defaults: all arguments are positional, names and defaults live in Python. */
#ifndef QK_BINDING_H
#define QK_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "qk.h"

/* Set the exception of a status (`where`: flat index of a culprit) and return NULL. */
PyObject *qk_raise_status(qk_status status, size_t where);

/* What numbers an array may hold, as letters of NumPy's kinds: i, u and f. 16-bit floats may come
 * as their bits, and those that NumPy lacks do. */
#define QK_INTEGERS "iu"
const char *qk_kinds(qk_dtype dtype);

/* Data of an ndarray that is C-contiguous, in native byte order, of `items` elements of
 * `item_bytes` each and of those kinds; writable when written to. Any address will do. NULL with an
 * exception set. */
void *qk_array_data(PyObject *object, const char *name, size_t items, size_t item_bytes,
                    const char *kinds, int writable);

/* The number of elements of a [rows][cols] array; 0 with an exception set if it overflows. */
int qk_count(size_t rows, size_t cols, size_t *items);

/* Blocks of `block` that cover `length`; 0 for a block of nothing, which qk.h refuses. */
size_t qk_blocks(size_t length, size_t block);

#define QK_RUN(call)                                                                               \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS status = (call);                                                    \
        Py_END_ALLOW_THREADS if (status != QK_OK) return qk_raise_status(status, where);           \
        Py_RETURN_NONE;                                                                            \
    } while (0)

#define QK_ARRAY_OF(target, object, items, item_bytes, kinds, writable)                            \
    do {                                                                                           \
        (target) = qk_array_data(object, #object, items, item_bytes, kinds, writable);             \
        if (!(target))                                                                             \
            return NULL;                                                                           \
    } while (0)

#define QK_ARRAY(target, object, items, dtype, writable)                                           \
    QK_ARRAY_OF(target, object, items, qk_dtype_bytes(dtype), qk_kinds(dtype), writable)

#define QK_ARRAY_OR_NONE(target, object, items, dtype, writable)                                   \
    do {                                                                                           \
        (target) = NULL;                                                                           \
        if ((object) != Py_None)                                                                   \
            QK_ARRAY(target, object, items, dtype, writable);                                      \
    } while (0)

PyObject *qk_py_quantize(PyObject *module, PyObject *args);
PyObject *qk_py_measure(PyObject *module, PyObject *args);
PyObject *qk_py_encode(PyObject *module, PyObject *args);
PyObject *qk_py_decode(PyObject *module, PyObject *args);
PyObject *qk_py_pack(PyObject *module, PyObject *args);
PyObject *qk_py_unpack(PyObject *module, PyObject *args);
PyObject *qk_py_pack_ternary(PyObject *module, PyObject *args);
PyObject *qk_py_unpack_ternary(PyObject *module, PyObject *args);
PyObject *qk_py_fit_levels(PyObject *module, PyObject *args);
PyObject *qk_py_encode_levels(PyObject *module, PyObject *args);
PyObject *qk_py_fit_groups(PyObject *module, PyObject *args);
PyObject *qk_py_descend(PyObject *module, PyObject *args);
PyObject *qk_py_round_in_order(PyObject *module, PyObject *args);
PyObject *qk_py_linear(PyObject *module, PyObject *args);
PyObject *qk_py_linear_backward(PyObject *module, PyObject *args);
PyObject *qk_py_linear_packed(PyObject *module, PyObject *args);
PyObject *qk_py_linear_packed_backward(PyObject *module, PyObject *args);
PyObject *qk_py_choose_linear(PyObject *module, PyObject *args);

#endif
