/* The extension module: its functions, constants and error, and the one file that knows NumPy. */
#include "python/binding.h"

#include <numpy/arrayobject.h>
#include <string.h>

#include "api/parallel.h"
#include "torch/torch_ops.h"

static PyObject *data_error; /* ValueError with args (message, flat index) */

/* ---- signals -------------------------------------------------------------- */

static unsigned long main_thread; /* the only one in which Python hears signals */
static PyObject *heard[3];        /* what a signal's handler raised in the middle of a call */

static int hear_signals(void)
{
    if (PyThread_get_thread_ident() != main_thread)
        return 0;
    PyGILState_STATE state = PyGILState_Ensure();
    PyObject *own[3];
    PyErr_Fetch(&own[0], &own[1], &own[2]);
    int stop = PyErr_CheckSignals() < 0;
    if (stop)
        PyErr_Fetch(&heard[0], &heard[1], &heard[2]);
    PyErr_Restore(own[0], own[1], own[2]);
    PyGILState_Release(state);
    return stop;
}

/* Raise what was heard, if anything was. */
static PyObject *py_raise_heard(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *type = heard[0];
    PyErr_Restore(type, heard[1], heard[2]);
    memset(heard, 0, sizeof heard);
    return type ? NULL : Py_NewRef(Py_None);
}

static int listen_for_signals(void)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *ident = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    main_thread = ident ? PyLong_AsUnsignedLong(ident) : 0;
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    qk_use_pause(hear_signals);
    return PyErr_Occurred() ? -1 : 0;
}

/* ---- arguments ------------------------------------------------------------ */

PyObject *qk_raise_status(qk_status status, size_t where)
{
    if (status == QK_OUT_OF_MEMORY)
        return PyErr_NoMemory();
    if (status == QK_INTERRUPTED)
        return py_raise_heard(NULL, NULL);
    if (status == QK_NON_FINITE || status == QK_NEGATIVE) {
        PyObject *args = Py_BuildValue("(sn)", qk_status_text(status), (Py_ssize_t)where);
        if (args)
            PyErr_SetObject(data_error, args);
        Py_XDECREF(args);
        return NULL;
    }
    PyErr_SetString(status == QK_BAD_DTYPE ? PyExc_TypeError : PyExc_ValueError,
                    qk_status_text(status));
    return NULL;
}

const char *qk_kinds(qk_dtype dtype)
{
    if (dtype == QK_FLOAT32 || dtype == QK_FLOAT64)
        return "f";
    return dtype == QK_FLOAT16 ? "f" QK_INTEGERS : QK_INTEGERS;
}

void *qk_array_data(PyObject *object, const char *name, size_t items, size_t item_bytes,
                    const char *kinds, int writable)
{
    if (!PyArray_Check(object)) {
        PyErr_Format(PyExc_TypeError, "%s must be a numpy.ndarray", name);
        return NULL;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    if (!PyArray_IS_C_CONTIGUOUS(array) || PyArray_ISBYTESWAPPED(array)) {
        PyErr_Format(PyExc_ValueError, "%s must be C-contiguous and in native byte order", name);
        return NULL;
    }
    if (writable && !PyArray_ISWRITEABLE(array)) {
        PyErr_Format(PyExc_ValueError, "%s must be writable", name);
        return NULL;
    }
    if ((size_t)PyArray_ITEMSIZE(array) != item_bytes || (size_t)PyArray_SIZE(array) != items) {
        PyErr_Format(PyExc_ValueError, "%s must hold %zu elements of %zu bytes, not %zd of %zd",
                     name, items, item_bytes, (Py_ssize_t)PyArray_SIZE(array),
                     (Py_ssize_t)PyArray_ITEMSIZE(array));
        return NULL;
    }
    char kind = PyArray_DESCR(array)->kind;
    if (!strchr(kinds, kind)) {
        PyErr_Format(PyExc_TypeError, "%s must be of NumPy's kind %s, not %c (%R)", name,
                     !strcmp(kinds, "f") ? "f (floats)" : "i or u (integers, or a float's bits)",
                     kind, (PyObject *)PyArray_DESCR(array));
        return NULL;
    }
    return PyArray_DATA(array);
}

int qk_count(size_t rows, size_t cols, size_t *items)
{
    if (cols && rows > (size_t)PY_SSIZE_T_MAX / cols / 8) {
        PyErr_Format(PyExc_ValueError, "%zu x %zu elements are more than memory can hold", rows,
                     cols);
        return 0;
    }
    *items = rows * cols;
    return 1;
}

size_t qk_blocks(size_t length, size_t block)
{
    return block ? length / block + (length % block != 0) : 0;
}

/* ---- instruction sets, threads, torch ----------------------------------- */

static PyObject *py_isas(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    const char *name;
    for (size_t i = 0; list && (name = qk_isa_name(i)); i++) {
        PyObject *item = PyUnicode_FromString(name);
        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

static PyObject *py_active_isa(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyUnicode_FromString(qk_active_isa());
}

static PyObject *py_set_isa(PyObject *module, PyObject *args)
{
    (void)module;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    qk_status status = qk_set_isa(name);
    if (status != QK_OK)
        return qk_raise_status(status, 0);
    Py_RETURN_NONE;
}

static PyObject *py_get_num_threads(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return PyLong_FromSize_t(qk_get_threads());
}

static PyObject *py_set_num_threads(PyObject *module, PyObject *args)
{
    (void)module;
    Py_ssize_t threads;
    if (!PyArg_ParseTuple(args, "n", &threads))
        return NULL;
    if (threads < 0 || threads > 1024) {
        PyErr_Format(PyExc_ValueError, "threads must be 0..1024, not %zd", threads);
        return NULL;
    }
    qk_set_threads((size_t)threads);
    Py_RETURN_NONE;
}

static PyObject *py_register_torch(PyObject *module, PyObject *args)
{
    (void)module;
    const char *path;
    if (!PyArg_ParseTuple(args, "s", &path))
        return NULL;
    return PyBool_FromLong(qk_register_torch(path));
}

static PyMethodDef methods[] = {
    {"quantize", qk_py_quantize, METH_VARARGS, NULL},
    {"measure", qk_py_measure, METH_VARARGS, NULL},
    {"encode", qk_py_encode, METH_VARARGS, NULL},
    {"decode", qk_py_decode, METH_VARARGS, NULL},
    {"pack", qk_py_pack, METH_VARARGS, NULL},
    {"unpack", qk_py_unpack, METH_VARARGS, NULL},
    {"pack_ternary", qk_py_pack_ternary, METH_VARARGS, NULL},
    {"unpack_ternary", qk_py_unpack_ternary, METH_VARARGS, NULL},
    {"fit_levels", qk_py_fit_levels, METH_VARARGS, NULL},
    {"encode_levels", qk_py_encode_levels, METH_VARARGS, NULL},
    {"fit_groups", qk_py_fit_groups, METH_VARARGS, NULL},
    {"descend", qk_py_descend, METH_VARARGS, NULL},
    {"round_in_order", qk_py_round_in_order, METH_VARARGS, NULL},
    {"linear", qk_py_linear, METH_VARARGS, NULL},
    {"linear_backward", qk_py_linear_backward, METH_VARARGS, NULL},
    {"linear_packed", qk_py_linear_packed, METH_VARARGS, NULL},
    {"linear_packed_backward", qk_py_linear_packed_backward, METH_VARARGS, NULL},
    {"choose_linear", qk_py_choose_linear, METH_VARARGS, NULL},
    {"isas", py_isas, METH_NOARGS, NULL},
    {"active_isa", py_active_isa, METH_NOARGS, NULL},
    {"set_isa", py_set_isa, METH_VARARGS, NULL},
    {"get_num_threads", py_get_num_threads, METH_NOARGS, NULL},
    {"set_num_threads", py_set_num_threads, METH_VARARGS, NULL},
    {"raise_heard", py_raise_heard, METH_NOARGS, NULL},
    {"register_torch", py_register_torch, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static const struct {
    const char *name;
    int value;
} constants[] = {
    {"FLOAT32", QK_FLOAT32},
    {"FLOAT64", QK_FLOAT64},
    {"FLOAT16", QK_FLOAT16},
    {"BFLOAT16", QK_BFLOAT16},
    {"FLOAT8_E4M3FN", QK_FLOAT8_E4M3FN},
    {"FLOAT8_E5M2", QK_FLOAT8_E5M2},
    {"INT8", QK_INT8},
    {"UINT8", QK_UINT8},
    {"INT16", QK_INT16},
    {"SYMMETRIC", QK_SYMMETRIC},
    {"ASYMMETRIC", QK_ASYMMETRIC},
    {"FITS_UNSIGNED", QK_FITS_UNSIGNED},
    {"FITS_SIGNED", QK_FITS_SIGNED},
    {"BINARY", QK_BINARY},
    {"FIT_NOTHING", QK_FIT_NOTHING},
    {"FIT_SCALE", QK_FIT_SCALE},
    {"FIT_ZERO", QK_FIT_ZERO},
    {"FIT_BOTH", QK_FIT_BOTH},
};

static int add_names(PyObject *module)
{
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (PyModule_AddIntConstant(module, constants[i].name, constants[i].value) < 0)
            return -1;
    data_error = PyErr_NewException("quantization._kernels.DataError", PyExc_ValueError, NULL);
    return data_error ? PyModule_AddObjectRef(module, "DataError", data_error) : -1;
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "quantization._kernels", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    import_array();
    PyObject *module = PyModule_Create(&definition);
    if (module && (add_names(module) < 0 || listen_for_signals() < 0))
        Py_CLEAR(module);
    if (module)
        (void)qk_active_isa(); /* detect before any thread exists */
    return module;
}
