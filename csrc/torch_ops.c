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

enum { MAX_DIMS = 64, MAX_TENSORS = 8, MESSAGE = 400 };

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
    if (torch_dtype == shim.aoti_torch_dtype_uint8())
        return QK_UINT8;
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

/* ---- packed weights ----------------------------------------------------- */

/* Bits of `present`: which of a packed operator's tensors are there. In the place of one that is
 * not, scales are given. */
enum { HAS_STEPS = 1, HAS_ZEROS = 2, HAS_CODEBOOK = 4, HAS_BIAS = 8 };
enum { CODES = 1, SCALES, STEPS, ZEROS, CODEBOOK, BIAS };

static int check_matrix(call *c, const tensor *t, size_t rows, size_t cols)
{
    if (t->dim != 2 || t->sizes[0] != (int64_t)rows || t->sizes[1] != (int64_t)cols)
        return FAIL(c, "%s must have shape [%zu, %zu]", t->name, rows, cols);
    return 1;
}

/* `packed` from the call's tensors, whose shapes must fit linear->in_features. */
static int open_packed(call *c, qk_packed *packed, qk_linear *linear, int64_t present)
{
    const tensor *codes = &c->tensors[CODES], *scales = &c->tensors[SCALES];
    const tensor *steps = &c->tensors[STEPS], *zeros = &c->tensors[ZEROS];
    const tensor *codebook = &c->tensors[CODEBOOK];
    if (packed->bits > 8 || packed->group < 1)
        return FAIL(c, "bits must be 0 (base 3) or 1..8, and group at least 1");
    if (codes->dtype != QK_UINT8 || codes->dim != 2)
        return FAIL(c, "weights must be uint8 [out_features, bytes of a packed row]");
    size_t rows = (size_t)codes->sizes[0], cols = linear->in_features, bits = packed->bits;
    size_t groups = cols / packed->group + (cols % packed->group != 0);
    if (!check_matrix(c, codes, rows, qk_packed_row_bytes(cols, bits)) ||
        !check_matrix(c, scales, rows, groups))
        return 0;
    if (scales->dtype != QK_UINT8 && !check_float(c, scales))
        return 0;
    linear->packed = packed;
    linear->out_features = rows;
    packed->codes = codes->data;
    packed->scales = scales->data;
    packed->scales_dtype = scales->dtype;
    if (present & HAS_STEPS) {
        if (steps->dtype != QK_FLOAT32 || scales->dtype != QK_UINT8 ||
            !check_vector(c, steps, (int64_t)rows))
            return FAIL(c, "scale_steps must be float32 [out_features], of uint8 scales");
        packed->scale_steps = steps->data;
    }
    if (present & HAS_ZEROS) {
        int is_packed = zeros->dtype == QK_UINT8;
        if (!check_matrix(c, zeros, rows, is_packed ? qk_packed_row_bytes(groups, bits) : groups) ||
            (!is_packed && !check_float(c, zeros)))
            return 0;
        packed->zeros = zeros->data;
        packed->zeros_dtype = zeros->dtype;
    }
    if (present & HAS_CODEBOOK) {
        packed->codebook_rows = codebook->dim == 2 && codebook->sizes[0] == 1 ? 1 : rows;
        if (!check_matrix(c, codebook, packed->codebook_rows, (size_t)1 << bits) ||
            !check_float(c, codebook))
            return 0;
        packed->codebook = codebook->data;
        packed->codebook_dtype = codebook->dtype;
    }
    return 1;
}

/* The last size of `rows`, or -1. */
static int64_t last_size(const tensor *rows)
{
    return rows->dim < 1 || rows->dim > MAX_DIMS ? -1 : rows->sizes[rows->dim - 1];
}

static int run_packed(call *c, uint64_t *stack, int64_t present, qk_packed packed, int32_t dtype)
{
    if (!open_tensors(c))
        return 0;
    const tensor *x = &c->tensors[0], *bias = &c->tensors[BIAS];
    qk_linear linear = {.x_dtype = x->dtype, .y_dtype = dtype_of(dtype)};
    if (last_size(x) < 0)
        return FAIL(c, "x must have 1..%d dimensions, not %lld", MAX_DIMS, (long long)x->dim);
    linear.in_features = (size_t)last_size(x);
    if (!check_float(c, x) || !open_packed(c, &packed, &linear, present))
        return 0;
    if (present & HAS_BIAS) {
        if (!check_vector(c, bias, (int64_t)linear.out_features))
            return 0;
        linear.bias = bias->data;
        linear.bias_dtype = bias->dtype;
    }
    linear.tokens = rows_of(x);
    tensor_handle output;
    void *y;
    if (!make_output(c, x, (int64_t)linear.out_features, dtype, &output, &y))
        return 0;
    return return_output(c, stack, output, qk_linear_forward(y, x->data, &linear));
}

static int run_packed_backward(call *c, uint64_t *stack, int64_t in_features, int64_t present,
                               qk_packed packed, int32_t dtype)
{
    if (!open_tensors(c))
        return 0;
    const tensor *grad = &c->tensors[0];
    qk_linear linear = {.x_dtype = dtype_of(dtype), .y_dtype = grad->dtype};
    linear.in_features = (size_t)in_features;
    if (!check_float(c, grad) || in_features < 0 || !open_packed(c, &packed, &linear, present))
        return in_features < 0 ? FAIL(c, "in_features must be 0 or more") : 0;
    if (last_size(grad) != (int64_t)linear.out_features)
        return FAIL(c, "grad must have %zu columns (out_features)", linear.out_features);
    linear.tokens = rows_of(grad);
    tensor_handle output;
    void *grad_x;
    if (!make_output(c, grad, in_features, dtype, &output, &grad_x))
        return 0;
    return return_output(c, stack, output, qk_linear_backward(grad_x, grad->data, &linear));
}

static const char *const packed_names[] = {"x",           "weights",  "scales", "scale_steps",
                                           "zero_points", "codebook", "bias"};

/* x, the packed weights, bias; bits, group, present, dtype. */
static void packed(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    call c = {0};
    for (int i = 0; i <= BIAS; i++)
        take(&c, packed_names[i], stack[i]);
    qk_packed weights = {.bits = (size_t)stack[7], .group = (size_t)stack[8]};
    run_packed(&c, stack, (int64_t)stack[9], weights, (int32_t)stack[10]);
    finish(&c, "quantization::packed");
}

/* grad, the packed weights; in_features, bits, group, present, dtype. */
static void packed_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    call c = {0};
    take(&c, "grad", stack[0]);
    for (int i = CODES; i <= CODEBOOK; i++)
        take(&c, packed_names[i], stack[i]);
    qk_packed weights = {.bits = (size_t)stack[7], .group = (size_t)stack[8]};
    run_packed_backward(&c, stack, (int64_t)stack[6], (int64_t)stack[9], weights,
                        (int32_t)stack[10]);
    finish(&c, "quantization::packed_backward");
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
    {"packed",
     "packed(Tensor x, Tensor weights, Tensor scales, Tensor scale_steps, Tensor zero_points, "
     "Tensor codebook, Tensor bias, int bits, int group, int present, ScalarType dtype) -> Tensor",
     packed},
    {"packed_backward",
     "packed_backward(Tensor grad, Tensor weights, Tensor scales, Tensor scale_steps, Tensor "
     "zero_points, Tensor codebook, int in_features, int bits, int group, int present, ScalarType "
     "dtype) -> Tensor",
     packed_backward},
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
