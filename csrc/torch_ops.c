/* The only file that knows torch, through its stable C shim (torch_shim.h).
 *
 * A kernel gets its arguments as 64-bit cells. A Tensor is a handle that the kernel owns and must
 * delete; a ScalarType is torch's number of the dtype. The result goes into cell 0. */
#include "torch_ops.h"

#include <stdio.h>
#include <string.h>

#include "parallel.h"
#include "qk.h"
#include "torch_shim.h"

#if defined(_WIN32)

int qk_register_torch(const char *libtorch_cpu)
{
    (void)libtorch_cpu;
    return 0;
}

#else

#include <dlfcn.h>

static torch_shim shim;

/* The meaning of the cells above: that of torch 2.10. Later ones translate. */
static const uint64_t abi_version = (uint64_t)2 << 56 | (uint64_t)10 << 48;

enum { MAX_DIMS = 64, MAX_TENSORS = 4, MESSAGE = 400 };

/* ---- one call ----------------------------------------------------------- */

typedef struct tensor {
    const char *name;
    tensor_handle handle; /* owned */
    void *data;
    int64_t *sizes, dim;
    qk_dtype dtype;
} tensor;

typedef struct call {
    tensor tensors[MAX_TENSORS];
    size_t count;
    char message[MESSAGE]; /* empty: no error */
} call;

#define FAIL(call, ...) (snprintf((call)->message, MESSAGE, __VA_ARGS__), 0)

/* QK_DTYPES for a type that no argument of ours may have. */
static qk_dtype dtype_of(int64_t torch_dtype)
{
    if (torch_dtype == shim.aoti_torch_dtype_float32())
        return QK_FLOAT32;
    if (torch_dtype == shim.aoti_torch_dtype_bfloat16())
        return QK_BFLOAT16;
    if (torch_dtype == shim.aoti_torch_dtype_float16())
        return QK_FLOAT16;
    if (torch_dtype == shim.aoti_torch_dtype_float64())
        return QK_FLOAT64;
    return torch_dtype == shim.aoti_torch_dtype_int8() ? QK_INT8 : QK_DTYPES;
}

/* Replace the handle by one of the same values in row-major order. */
static int make_contiguous(call *c, tensor *t)
{
    bool is_contiguous = true;
    shim.aoti_torch_is_contiguous(t->handle, &is_contiguous);
    if (is_contiguous)
        return 1;
    uint64_t stack[2] = {(uint64_t)(uintptr_t)t->handle,
                         (uint32_t)shim.aoti_torch_memory_format_contiguous_format()};
    t->handle = NULL; /* the dispatcher takes it over */
    if (shim.torch_call_dispatcher("aten::contiguous", "", stack, abi_version) != 0)
        return FAIL(c, "%s could not be made contiguous", t->name);
    t->handle = (tensor_handle)(uintptr_t)stack[0];
    return 1;
}

/* Own the cell's tensor and look at it. */
static int open_tensor(call *c, tensor *t)
{
    int32_t device = -1, dtype = -1;
    shim.aoti_torch_get_device_type(t->handle, &device);
    if (device != shim.aoti_torch_device_type_cpu())
        return FAIL(c, "%s must be a CPU tensor: these kernels run on the CPU only", t->name);
    if (!make_contiguous(c, t))
        return 0;
    shim.aoti_torch_get_dtype(t->handle, &dtype);
    t->dtype = dtype_of(dtype);
    if (shim.aoti_torch_get_dim(t->handle, &t->dim) != 0 ||
        shim.aoti_torch_get_sizes(t->handle, &t->sizes) != 0 ||
        shim.aoti_torch_get_data_ptr(t->handle, &t->data) != 0)
        return FAIL(c, "%s has no strided memory on the CPU", t->name);
    return 1;
}

static void take(call *c, const char *name, uint64_t cell)
{
    tensor *t = &c->tensors[c->count++];
    t->name = name;
    t->handle = (tensor_handle)(uintptr_t)cell;
}

static int open_tensors(call *c)
{
    for (size_t i = 0; i < c->count; i++)
        if (!open_tensor(c, &c->tensors[i]))
            return 0;
    return 1;
}

/* Free the inputs; then report the error, if any. The report is a C++ exception: it must be last.
 */
static void finish(call *c, const char *name)
{
    for (size_t i = 0; i < c->count; i++)
        if (c->tensors[i].handle)
            shim.aoti_torch_delete_tensor_object(c->tensors[i].handle);
    if (c->message[0])
        shim.aoti_torch_check(false, name, __FILE__, __LINE__, c->message);
}

/* ---- checks ------------------------------------------------------------- */

static int check_float(call *c, const tensor *t)
{
    if ((unsigned)t->dtype > QK_BFLOAT16)
        return FAIL(c, "%s must be float32, bfloat16, float16 or float64", t->name);
    return 1;
}

static int check_vector(call *c, const tensor *t, int64_t length)
{
    if (t->dim != 1)
        return FAIL(c, "%s must have 1 dimension [out_features], not %lld", t->name,
                    (long long)t->dim);
    if (t->sizes[0] != length)
        return FAIL(c, "%s has %lld elements, but weights have %lld rows (out_features)", t->name,
                    (long long)t->sizes[0], (long long)length);
    return check_float(c, t);
}

/* input is [..., columns], where columns is weights' size in dimension `side`. */
static int check_input(call *c, const tensor *input, const tensor *weights, int side)
{
    if (weights->dtype != QK_INT8)
        return FAIL(c, "weights must be int8 codes, as quantize makes them");
    if (weights->dim != 2)
        return FAIL(c, "weights must have 2 dimensions [out_features, in_features], not %lld",
                    (long long)weights->dim);
    if (input->dim < 1 || input->dim > MAX_DIMS)
        return FAIL(c, "%s must have 1..%d dimensions, not %lld", input->name, MAX_DIMS,
                    (long long)input->dim);
    if (input->sizes[input->dim - 1] != weights->sizes[side])
        return FAIL(c, "%s has %lld columns, but weights [%lld, %lld] ask for %lld", input->name,
                    (long long)input->sizes[input->dim - 1], (long long)weights->sizes[0],
                    (long long)weights->sizes[1], (long long)weights->sizes[side]);
    return check_float(c, input);
}

/* ---- the result --------------------------------------------------------- */

/* A new tensor like `input`, but with `columns` columns; its address goes to *data. */
static int make_output(call *c, const tensor *input, int64_t columns, int64_t torch_dtype,
                       tensor_handle *output, void **data)
{
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS], stride = 1;
    if ((unsigned)dtype_of(torch_dtype) > QK_BFLOAT16)
        return FAIL(c, "the output's dtype must be float32, bfloat16, float16 or float64");
    memcpy(sizes, input->sizes, (size_t)input->dim * sizeof *sizes);
    sizes[input->dim - 1] = columns;
    for (int64_t i = input->dim; i-- > 0;) {
        strides[i] = stride;
        stride *= sizes[i] > 0 ? sizes[i] : 1;
    }
    if (shim.aoti_torch_empty_strided(input->dim, sizes, strides, (int32_t)torch_dtype,
                                      shim.aoti_torch_device_type_cpu(), 0, output) != 0)
        return FAIL(c, "the output could not be allocated");
    if (shim.aoti_torch_get_data_ptr(*output, data) != 0) {
        shim.aoti_torch_delete_tensor_object(*output);
        return FAIL(c, "the output has no memory");
    }
    return 1;
}

static size_t rows_of(const tensor *input)
{
    size_t rows = 1;
    for (int64_t i = 0; i + 1 < input->dim; i++)
        rows *= (size_t)input->sizes[i];
    return rows;
}

/* Hand the output over, or keep nothing of it. */
static int return_output(call *c, uint64_t *stack, tensor_handle output, qk_status status)
{
    if (status != QK_OK) {
        shim.aoti_torch_delete_tensor_object(output);
        return FAIL(c, "%s", qk_status_text(status));
    }
    stack[0] = (uint64_t)(uintptr_t)output;
    return 1;
}

/* ---- the operators ------------------------------------------------------ */

/* Tensors x, weights, scales[, bias]. */
static int run_forward(call *c, uint64_t *stack, int64_t torch_dtype)
{
    if (!open_tensors(c))
        return 0;
    const tensor *x = &c->tensors[0], *weights = &c->tensors[1], *scales = &c->tensors[2];
    const tensor *bias = c->count > 3 ? &c->tensors[3] : NULL;
    if (!check_input(c, x, weights, 1) || !check_vector(c, scales, weights->sizes[0]) ||
        (bias && !check_vector(c, bias, weights->sizes[0])))
        return 0;
    tensor_handle output;
    void *y;
    if (!make_output(c, x, weights->sizes[0], torch_dtype, &output, &y))
        return 0;
    qk_linear linear = {
        .tokens = rows_of(x),
        .out_features = (size_t)weights->sizes[0],
        .in_features = (size_t)weights->sizes[1],
        .weights = weights->data,
        .scales = scales->data,
        .bias = bias ? bias->data : NULL,
        .scales_dtype = scales->dtype,
        .bias_dtype = bias ? bias->dtype : QK_FLOAT32,
        .x_dtype = x->dtype,
        .y_dtype = dtype_of(torch_dtype),
    };
    return return_output(c, stack, output, qk_linear_forward(y, x->data, &linear));
}

/* Tensors grad, weights, scales. */
static int run_backward(call *c, uint64_t *stack, int64_t torch_dtype)
{
    if (!open_tensors(c))
        return 0;
    const tensor *grad = &c->tensors[0], *weights = &c->tensors[1], *scales = &c->tensors[2];
    if (!check_input(c, grad, weights, 0) || !check_vector(c, scales, weights->sizes[0]))
        return 0;
    tensor_handle output;
    void *grad_x;
    if (!make_output(c, grad, weights->sizes[1], torch_dtype, &output, &grad_x))
        return 0;
    qk_linear linear = {
        .tokens = rows_of(grad),
        .out_features = (size_t)weights->sizes[0],
        .in_features = (size_t)weights->sizes[1],
        .weights = weights->data,
        .scales = scales->data,
        .scales_dtype = scales->dtype,
        .x_dtype = dtype_of(torch_dtype),
        .y_dtype = grad->dtype,
    };
    return return_output(c, stack, output, qk_linear_backward(grad_x, grad->data, &linear));
}

static void linear(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    call c = {0};
    take(&c, "x", stack[0]);
    take(&c, "weights", stack[1]);
    take(&c, "scales", stack[2]);
    run_forward(&c, stack, (int32_t)stack[3]);
    finish(&c, "quantization::linear");
}

static void linear_bias(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    call c = {0};
    take(&c, "x", stack[0]);
    take(&c, "weights", stack[1]);
    take(&c, "scales", stack[2]);
    take(&c, "bias", stack[3]);
    run_forward(&c, stack, (int32_t)stack[4]);
    finish(&c, "quantization::linear_bias");
}

static void linear_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    call c = {0};
    take(&c, "grad", stack[0]);
    take(&c, "weights", stack[1]);
    take(&c, "scales", stack[2]);
    run_backward(&c, stack, (int32_t)stack[3]);
    finish(&c, "quantization::linear_backward");
}

/* ---- registration ------------------------------------------------------- */

static const struct {
    const char *name, *schema;
    stable_kernel kernel;
} operators[] = {
    {"linear", "linear(Tensor x, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor",
     linear},
    {"linear_bias",
     "linear_bias(Tensor x, Tensor weights, Tensor scales, Tensor bias, ScalarType dtype) -> "
     "Tensor",
     linear_bias},
    {"linear_backward",
     "linear_backward(Tensor grad, Tensor weights, Tensor scales, ScalarType dtype) -> Tensor",
     linear_backward},
};

static int load_shim(const char *libtorch_cpu)
{
    void *library = dlopen(libtorch_cpu, RTLD_LAZY | RTLD_NOLOAD);
    if (!library)
        return 0;
    void *symbol;
#define FIND(type, name, arguments)                                                                \
    symbol = dlsym(library, #name);                                                                \
    if (!symbol)                                                                                   \
        return 0;                                                                                  \
    memcpy(&shim.name, &symbol, sizeof symbol);
    SHIM(FIND)
#undef FIND
    return 1;
}

/* The two library objects stay: deleting them would unregister the operators. */
static int register_operators(void)
{
    library_handle schemas, kernels;
    if (shim.aoti_torch_library_init_fragment("quantization", __FILE__, __LINE__, &schemas) != 0 ||
        shim.aoti_torch_library_init_impl("quantization", "CPU", __FILE__, __LINE__, &kernels) != 0)
        return 0;
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
        if (shim.aoti_torch_library_def(schemas, operators[i].schema) != 0 ||
            shim.torch_library_impl(kernels, operators[i].name, operators[i].kernel, abi_version) !=
                0)
            return 0;
    return 1;
}

int qk_register_torch(const char *libtorch_cpu)
{
    static int done; /* under the GIL */
    if (!done && load_shim(libtorch_cpu) && register_operators()) {
        qk_use_torch_threads(shim.torch_parallel_for, shim.torch_get_num_threads);
        done = 1;
    }
    return done;
}

#endif
