#include "torch/torch_call.h"

#include <string.h>

#if !defined(_WIN32)

torch_shim qk_shim;

qk_dtype qk_dtype_of_torch(int64_t torch_dtype)
{
    if (torch_dtype == qk_shim.aoti_torch_dtype_float32())
        return QK_FLOAT32;
    if (torch_dtype == qk_shim.aoti_torch_dtype_bfloat16())
        return QK_BFLOAT16;
    if (torch_dtype == qk_shim.aoti_torch_dtype_float16())
        return QK_FLOAT16;
    if (torch_dtype == qk_shim.aoti_torch_dtype_float64())
        return QK_FLOAT64;
    if (torch_dtype == qk_shim.aoti_torch_dtype_uint8())
        return QK_UINT8;
    return torch_dtype == qk_shim.aoti_torch_dtype_int8() ? QK_INT8 : QK_DTYPES;
}

/* Replace the handle by one of the same values in row-major order. */
static int make_contiguous(qk_call *c, qk_tensor *t)
{
    bool is_contiguous = true;
    qk_shim.aoti_torch_is_contiguous(t->handle, &is_contiguous);
    if (is_contiguous)
        return 1;
    uint64_t stack[2] = {(uint64_t)(uintptr_t)t->handle,
                         (uint32_t)qk_shim.aoti_torch_memory_format_contiguous_format()};
    t->handle = NULL; /* the dispatcher takes it over */
    if (qk_shim.torch_call_dispatcher("aten::contiguous", "", stack, qk_abi_version) != 0)
        return QK_FAIL(c, "%s could not be made contiguous", t->name);
    t->handle = (tensor_handle)(uintptr_t)stack[0];
    return 1;
}

/* Own the cell's tensor and look at it. */
static int open_tensor(qk_call *c, qk_tensor *t)
{
    int32_t device = -1, dtype = -1;
    qk_shim.aoti_torch_get_device_type(t->handle, &device);
    if (device != qk_shim.aoti_torch_device_type_cpu())
        return QK_FAIL(c, "%s must be a CPU tensor: these kernels run on the CPU only", t->name);
    if (!make_contiguous(c, t))
        return 0;
    qk_shim.aoti_torch_get_dtype(t->handle, &dtype);
    t->dtype = qk_dtype_of_torch(dtype);
    if (qk_shim.aoti_torch_get_dim(t->handle, &t->dim) != 0 ||
        qk_shim.aoti_torch_get_sizes(t->handle, &t->sizes) != 0 ||
        qk_shim.aoti_torch_get_data_ptr(t->handle, &t->data) != 0)
        return QK_FAIL(c, "%s has no strided memory on the CPU", t->name);
    return 1;
}

void qk_take(qk_call *c, const char *name, uint64_t cell)
{
    qk_tensor *t = &c->tensors[c->count++];
    t->name = name;
    t->handle = (tensor_handle)(uintptr_t)cell;
}

int qk_open_tensors(qk_call *c)
{
    for (size_t i = 0; i < c->count; i++)
        if (!open_tensor(c, &c->tensors[i]))
            return 0;
    return 1;
}

void qk_finish(qk_call *c, const char *name)
{
    for (size_t i = 0; i < c->count; i++)
        if (c->tensors[i].handle)
            qk_shim.aoti_torch_delete_tensor_object(c->tensors[i].handle);
    if (c->message[0])
        qk_shim.aoti_torch_check(false, name, __FILE__, __LINE__, c->message);
}

/* ---- checks ------------------------------------------------------------- */

int qk_check_float(qk_call *c, const qk_tensor *t)
{
    if ((unsigned)t->dtype > QK_BFLOAT16)
        return QK_FAIL(c, "%s must be float32, bfloat16, float16 or float64", t->name);
    return 1;
}

int qk_check_vector(qk_call *c, const qk_tensor *t, int64_t length)
{
    if (t->dim != 1)
        return QK_FAIL(c, "%s must have 1 dimension [out_features], not %lld", t->name,
                       (long long)t->dim);
    if (t->sizes[0] != length)
        return QK_FAIL(c, "%s has %lld elements, but weights have %lld rows (out_features)",
                       t->name, (long long)t->sizes[0], (long long)length);
    return qk_check_float(c, t);
}

/* ---- the result --------------------------------------------------------- */

int qk_make_output(qk_call *c, const qk_tensor *input, int64_t columns, int64_t torch_dtype,
                   tensor_handle *output, void **data)
{
    int64_t sizes[QK_MAX_DIMS], strides[QK_MAX_DIMS], stride = 1;
    if ((unsigned)qk_dtype_of_torch(torch_dtype) > QK_BFLOAT16)
        return QK_FAIL(c, "the output's dtype must be float32, bfloat16, float16 or float64");
    memcpy(sizes, input->sizes, (size_t)input->dim * sizeof *sizes);
    sizes[input->dim - 1] = columns;
    for (int64_t i = input->dim; i-- > 0;) {
        strides[i] = stride;
        stride *= sizes[i] > 0 ? sizes[i] : 1;
    }
    if (qk_shim.aoti_torch_empty_strided(input->dim, sizes, strides, (int32_t)torch_dtype,
                                         qk_shim.aoti_torch_device_type_cpu(), 0, output) != 0)
        return QK_FAIL(c, "the output could not be allocated");
    if (qk_shim.aoti_torch_get_data_ptr(*output, data) != 0) {
        qk_shim.aoti_torch_delete_tensor_object(*output);
        return QK_FAIL(c, "the output has no memory");
    }
    return 1;
}

size_t qk_rows_of(const qk_tensor *input)
{
    size_t rows = 1;
    for (int64_t i = 0; i + 1 < input->dim; i++)
        rows *= (size_t)input->sizes[i];
    return rows;
}

int qk_return_output(qk_call *c, uint64_t *stack, tensor_handle output, qk_status status)
{
    if (status != QK_OK) {
        qk_shim.aoti_torch_delete_tensor_object(output);
        return QK_FAIL(c, "%s", qk_status_text(status));
    }
    stack[0] = (uint64_t)(uintptr_t)output;
    return 1;
}

#endif
