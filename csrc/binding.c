/* The only file that knows Python and NumPy: parse, check the arrays, drop the GIL, call qk.h,
 * turn a status into an exception. Names and defaults live in Python: all arguments are positional.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <numpy/arrayobject.h>

#include "qk.h"
#include "torch_ops.h"

static PyObject *data_error; /* ValueError with args (message, flat index) */

static PyObject *raise_status(qk_status status, size_t where)
{
    if (status == QK_OUT_OF_MEMORY)
        return PyErr_NoMemory();
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

#define RUN(call)                                                                                  \
    do {                                                                                           \
        Py_BEGIN_ALLOW_THREADS status = (call);                                                    \
        Py_END_ALLOW_THREADS if (status != QK_OK) return raise_status(status, where);              \
        Py_RETURN_NONE;                                                                            \
    } while (0)

/* Data of an ndarray that is C-contiguous, in native byte order, of `items` elements of
 * `item_bytes` each; written to when `writable`. Any address will do. NULL with an exception set.
 */
static void *array_data(PyObject *object, const char *name, size_t items, size_t item_bytes,
                        int writable)
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
    return PyArray_DATA(array);
}

#define ARRAY(target, object, items, item_bytes, writable)                                         \
    do {                                                                                           \
        (target) = array_data(object, #object, items, item_bytes, writable);                       \
        if (!(target))                                                                             \
            return NULL;                                                                           \
    } while (0)

#define ARRAY_OR_NONE(target, object, items, item_bytes, writable)                                 \
    do {                                                                                           \
        (target) = NULL;                                                                           \
        if ((object) != Py_None)                                                                   \
            ARRAY(target, object, items, item_bytes, writable);                                    \
    } while (0)

/* The number of elements of a [rows][cols] array, refusing a product that overflows. */
static int count_of(size_t rows, size_t cols, size_t *items)
{
    if (cols && rows > (size_t)PY_SSIZE_T_MAX / cols / 8) {
        PyErr_Format(PyExc_ValueError, "%zu x %zu elements are more than memory can hold", rows,
                     cols);
        return 0;
    }
    *items = rows * cols;
    return 1;
}

static size_t blocks_of(size_t length, size_t block)
{
    return block ? length / block + (length % block != 0) : 0;
}

static int grid_counts(const qk_grid *grid, size_t *items, size_t *blocks)
{
    return count_of(grid->rows, grid->cols, items) &&
           count_of(blocks_of(grid->rows, grid->block_rows),
                    blocks_of(grid->cols, grid->block_cols), blocks);
}

/* ---- quantize ----------------------------------------------------------- */

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
    size_t items, blocks, compute = call->spec.source == QK_FLOAT64 ? 8 : 4;
    if (!grid_counts(&call->grid, &items, &blocks))
        return NULL;
    PyObject *codes = call->codes, *scale = call->scale, *zero = call->zero, *source = call->source;
    ARRAY(call->source_data, source, items, qk_dtype_bytes(call->spec.source), 0);
    ARRAY(call->scale_data, scale, blocks, compute, writes_scale);
    ARRAY_OR_NONE(call->zero_data, zero, blocks, sizeof(int32_t), writes_scale);
    if (codes)
        ARRAY(call->codes_data, codes, items, qk_dtype_bytes(call->spec.code), writes_codes);
    return Py_None;
}

static PyObject *py_quantize(PyObject *module, PyObject *args)
{
    (void)module;
    quantize_call call = {0};
    PyObject **objects[] = {&call.codes, &call.scale, &call.zero, &call.source};
    if (!parse_grid_and_spec(args, &call, objects, 4) || !bind_arrays(&call, 1, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    RUN(qk_quantize(call.codes_data, call.scale_data, call.zero_data, call.source_data, &call.grid,
                    &call.spec, &where));
}

static PyObject *py_measure(PyObject *module, PyObject *args)
{
    (void)module;
    quantize_call call = {0};
    PyObject **objects[] = {&call.scale, &call.zero, &call.source};
    if (!parse_grid_and_spec(args, &call, objects, 3) || !bind_arrays(&call, 0, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    RUN(qk_measure(call.scale_data, call.zero_data, call.source_data, &call.grid, &call.spec,
                   &where));
}

static PyObject *py_encode(PyObject *module, PyObject *args)
{
    (void)module;
    quantize_call call = {0};
    PyObject **objects[] = {&call.codes, &call.source, &call.scale, &call.zero};
    if (!parse_grid_and_spec(args, &call, objects, 4) || !bind_arrays(&call, 1, 0))
        return NULL;
    size_t where = 0;
    qk_status status;
    RUN(qk_encode(call.codes_data, call.source_data, call.scale_data, call.zero_data, &call.grid,
                  &call.spec));
}

static PyObject *py_decode(PyObject *module, PyObject *args)
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
    ARRAY(out_data, out, items, qk_dtype_bytes((qk_dtype)out_dtype), 1);
    ARRAY(codes_data, codes, items, qk_dtype_bytes((qk_dtype)code_dtype), 0);
    ARRAY(scale_data, scale, blocks, out_dtype == QK_FLOAT64 ? 8u : 4u, 0);
    ARRAY_OR_NONE(zero_data, zero, blocks, sizeof(int32_t), 0);
    qk_status status;
    RUN(qk_decode(out_data, (qk_dtype)out_dtype, codes_data, (qk_dtype)code_dtype, scale_data,
                  zero_data, &grid));
}

/* ---- pack --------------------------------------------------------------- */

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
        (p->container_bytes & (p->container_bytes - 1)) || (p->axis != 0 && p->axis != 1))
        return raise_status(QK_BAD_BITS, 0);
    size_t rows = p->axis == 0 ? qk_packed_length(p->rows, p) : p->rows;
    size_t cols = p->axis == 1 ? qk_packed_length(p->cols, p) : p->cols;
    size_t code_items, packed_items;
    if (!count_of(p->rows, p->cols, &code_items) || !count_of(rows, cols, &packed_items))
        return NULL;
    PyObject *packed = call->packed, *codes = call->codes;
    ARRAY(call->packed_data, packed, packed_items, p->container_bytes, packs);
    ARRAY(call->codes_data, codes, code_items, 1, !packs);
    return Py_None;
}

static PyObject *py_pack(PyObject *module, PyObject *args)
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
    RUN(qk_pack(call.packed_data, call.codes_data, p));
}

static PyObject *py_unpack(PyObject *module, PyObject *args)
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
    RUN(qk_unpack(call.codes_data, call.packed_data, p, call.is_signed));
}

static PyObject *bind_ternary(PyObject *args, pack_call *call, int packs)
{
    PyObject *first, *second;
    size_t rows, cols, code_items, packed_items;
    if (!PyArg_ParseTuple(args, "OOnn", &first, &second, &rows, &cols) ||
        !count_of(rows, cols, &code_items))
        return NULL;
    packed_items = rows * blocks_of(cols, 5);
    PyObject *packed = packs ? first : second, *codes = packs ? second : first;
    ARRAY(call->packed_data, packed, packed_items, 1, packs);
    ARRAY(call->codes_data, codes, code_items, 1, !packs);
    call->packing.rows = rows;
    call->packing.cols = cols;
    return Py_None;
}

static PyObject *py_pack_ternary(PyObject *module, PyObject *args)
{
    (void)module;
    pack_call call = {0};
    if (!bind_ternary(args, &call, 1))
        return NULL;
    size_t where = 0;
    qk_status status;
    RUN(qk_pack_ternary(call.packed_data, call.codes_data, call.packing.rows, call.packing.cols));
}

static PyObject *py_unpack_ternary(PyObject *module, PyObject *args)
{
    (void)module;
    pack_call call = {0};
    if (!bind_ternary(args, &call, 0))
        return NULL;
    size_t where = 0;
    qk_status status;
    RUN(qk_unpack_ternary(call.codes_data, call.packed_data, call.packing.rows, call.packing.cols));
}

/* ---- linear ------------------------------------------------------------- */

static PyObject *py_linear(PyObject *module, PyObject *args)
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
    if (!count_of(linear.tokens, linear.in_features, &x_items) ||
        !count_of(linear.tokens, linear.out_features, &y_items) ||
        !count_of(linear.out_features, linear.in_features, &weight_items))
        return NULL;
    void *y_data, *x_data;
    ARRAY(y_data, y, y_items, qk_dtype_bytes(linear.y_dtype), 1);
    ARRAY(x_data, x, x_items, qk_dtype_bytes(linear.x_dtype), 0);
    ARRAY(linear.weights, weights, weight_items, 1, 0);
    ARRAY(linear.scales, scales, linear.out_features, qk_dtype_bytes(linear.scales_dtype), 0);
    ARRAY_OR_NONE(linear.bias, bias, linear.out_features, qk_dtype_bytes(linear.bias_dtype), 0);
    qk_status status;
    RUN(qk_linear_forward(y_data, x_data, &linear));
}

static PyObject *py_linear_backward(PyObject *module, PyObject *args)
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
    if (!count_of(linear.tokens, linear.in_features, &x_items) ||
        !count_of(linear.tokens, linear.out_features, &y_items) ||
        !count_of(linear.out_features, linear.in_features, &weight_items))
        return NULL;
    void *grad_x_data, *grad_y_data;
    ARRAY(grad_x_data, grad_x, x_items, qk_dtype_bytes(linear.x_dtype), 1);
    ARRAY(grad_y_data, grad_y, y_items, qk_dtype_bytes(linear.y_dtype), 0);
    ARRAY(linear.weights, weights, weight_items, 1, 0);
    ARRAY(linear.scales, scales, linear.out_features, qk_dtype_bytes(linear.scales_dtype), 0);
    qk_status status;
    RUN(qk_linear_backward(grad_x_data, grad_y_data, &linear));
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
        return raise_status(status, 0);
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
    {"quantize", py_quantize, METH_VARARGS, NULL},
    {"measure", py_measure, METH_VARARGS, NULL},
    {"encode", py_encode, METH_VARARGS, NULL},
    {"decode", py_decode, METH_VARARGS, NULL},
    {"pack", py_pack, METH_VARARGS, NULL},
    {"unpack", py_unpack, METH_VARARGS, NULL},
    {"pack_ternary", py_pack_ternary, METH_VARARGS, NULL},
    {"unpack_ternary", py_unpack_ternary, METH_VARARGS, NULL},
    {"linear", py_linear, METH_VARARGS, NULL},
    {"linear_backward", py_linear_backward, METH_VARARGS, NULL},
    {"isas", py_isas, METH_NOARGS, NULL},
    {"active_isa", py_active_isa, METH_NOARGS, NULL},
    {"set_isa", py_set_isa, METH_VARARGS, NULL},
    {"get_num_threads", py_get_num_threads, METH_NOARGS, NULL},
    {"set_num_threads", py_set_num_threads, METH_VARARGS, NULL},
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
    {"BINARY", QK_BINARY},
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
    if (module && add_names(module) < 0)
        Py_CLEAR(module);
    if (module)
        (void)qk_active_isa(); /* detect before any thread exists */
    return module;
}
