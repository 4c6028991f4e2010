/* torch, through its stable C shim (torch_shim.h): the operators of int8 weights, and the
 * registration of all. Only torch_*.c know torch.
 *
 * A kernel gets its arguments as 64-bit cells. A Tensor is a handle that the kernel owns and must
 * delete; a ScalarType is torch's number of the dtype. The result goes into cell 0. */
#include "torch/torch_ops.h"

#include <string.h>

#include "api/parallel.h"
#include "qk.h"
#include "torch/torch_call.h"

#if defined(_WIN32)

int qk_register_torch(const char *libtorch_cpu)
{
    (void)libtorch_cpu;
    return 0;
}

#else

#include <dlfcn.h>

/* input is [..., columns], where columns is weights' size in dimension `side`. */
static int check_input(qk_call *c, const qk_tensor *input, const qk_tensor *weights, int side)
{
    if (weights->dtype != QK_INT8)
        return QK_FAIL(c, "weights must be int8 codes, as quantize makes them");
    if (weights->dim != 2)
        return QK_FAIL(c, "weights must have 2 dimensions [out_features, in_features], not %lld",
                       (long long)weights->dim);
    if (input->dim < 1 || input->dim > QK_MAX_DIMS)
        return QK_FAIL(c, "%s must have 1..%d dimensions, not %lld", input->name, QK_MAX_DIMS,
                       (long long)input->dim);
    if (input->sizes[input->dim - 1] != weights->sizes[side])
        return QK_FAIL(c, "%s has %lld columns, but weights [%lld, %lld] ask for %lld", input->name,
                       (long long)input->sizes[input->dim - 1], (long long)weights->sizes[0],
                       (long long)weights->sizes[1], (long long)weights->sizes[side]);
    return qk_check_float(c, input);
}

/* ---- the operators ------------------------------------------------------ */

/* Tensors x, weights, scales[, bias]. */
static int run_forward(qk_call *c, uint64_t *stack, int64_t torch_dtype)
{
    if (!qk_open_tensors(c))
        return 0;
    const qk_tensor *x = &c->tensors[0], *weights = &c->tensors[1], *scales = &c->tensors[2];
    const qk_tensor *bias = c->count > 3 ? &c->tensors[3] : NULL;
    if (!check_input(c, x, weights, 1) || !qk_check_vector(c, scales, weights->sizes[0]) ||
        (bias && !qk_check_vector(c, bias, weights->sizes[0])))
        return 0;
    tensor_handle output;
    void *y;
    if (!qk_make_output(c, x, weights->sizes[0], torch_dtype, &output, &y))
        return 0;
    qk_linear linear = {
        .tokens = qk_rows_of(x),
        .out_features = (size_t)weights->sizes[0],
        .in_features = (size_t)weights->sizes[1],
        .weights = weights->data,
        .scales = scales->data,
        .bias = bias ? bias->data : NULL,
        .scales_dtype = scales->dtype,
        .bias_dtype = bias ? bias->dtype : QK_FLOAT32,
        .x_dtype = x->dtype,
        .y_dtype = qk_dtype_of_torch(torch_dtype),
    };
    return qk_return_output(c, stack, output, qk_linear_forward(y, x->data, &linear));
}

/* Tensors grad, weights, scales. */
static int run_backward(qk_call *c, uint64_t *stack, int64_t torch_dtype)
{
    if (!qk_open_tensors(c))
        return 0;
    const qk_tensor *grad = &c->tensors[0], *weights = &c->tensors[1], *scales = &c->tensors[2];
    if (!check_input(c, grad, weights, 0) || !qk_check_vector(c, scales, weights->sizes[0]))
        return 0;
    tensor_handle output;
    void *grad_x;
    if (!qk_make_output(c, grad, weights->sizes[1], torch_dtype, &output, &grad_x))
        return 0;
    qk_linear linear = {
        .tokens = qk_rows_of(grad),
        .out_features = (size_t)weights->sizes[0],
        .in_features = (size_t)weights->sizes[1],
        .weights = weights->data,
        .scales = scales->data,
        .scales_dtype = scales->dtype,
        .x_dtype = qk_dtype_of_torch(torch_dtype),
        .y_dtype = grad->dtype,
    };
    return qk_return_output(c, stack, output, qk_linear_backward(grad_x, grad->data, &linear));
}

static void linear(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    qk_call c = {0};
    qk_take(&c, "x", stack[0]);
    qk_take(&c, "weights", stack[1]);
    qk_take(&c, "scales", stack[2]);
    run_forward(&c, stack, (int32_t)stack[3]);
    qk_finish(&c, "quantization::linear");
}

static void linear_bias(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    qk_call c = {0};
    qk_take(&c, "x", stack[0]);
    qk_take(&c, "weights", stack[1]);
    qk_take(&c, "scales", stack[2]);
    qk_take(&c, "bias", stack[3]);
    run_forward(&c, stack, (int32_t)stack[4]);
    qk_finish(&c, "quantization::linear_bias");
}

static void linear_backward(uint64_t *stack, uint64_t arguments, uint64_t results)
{
    (void)arguments, (void)results;
    qk_call c = {0};
    qk_take(&c, "grad", stack[0]);
    qk_take(&c, "weights", stack[1]);
    qk_take(&c, "scales", stack[2]);
    run_backward(&c, stack, (int32_t)stack[3]);
    qk_finish(&c, "quantization::linear_backward");
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
     qk_torch_packed},
    {"packed_backward",
     "packed_backward(Tensor grad, Tensor weights, Tensor scales, Tensor scale_steps, Tensor "
     "zero_points, Tensor codebook, int in_features, int bits, int group, int present, ScalarType "
     "dtype) -> Tensor",
     qk_torch_packed_backward},
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
    memcpy(&qk_shim.name, &symbol, sizeof symbol);
    SHIM(FIND)
#undef FIND
    return 1;
}

/* The two library objects stay: deleting them would unregister the operators. */
static int register_operators(void)
{
    library_handle schemas, kernels;
    if (qk_shim.aoti_torch_library_init_fragment("quantization", __FILE__, __LINE__, &schemas) !=
            0 ||
        qk_shim.aoti_torch_library_init_impl("quantization", "CPU", __FILE__, __LINE__, &kernels) !=
            0)
        return 0;
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
        if (qk_shim.aoti_torch_library_def(schemas, operators[i].schema) != 0 ||
            qk_shim.torch_library_impl(kernels, operators[i].name, operators[i].kernel,
                                       qk_abi_version) != 0)
            return 0;
    return 1;
}

int qk_register_torch(const char *libtorch_cpu)
{
    static int done; /* under the GIL */
    if (!done && load_shim(libtorch_cpu) && register_operators()) {
        qk_use_torch_threads(qk_shim.torch_parallel_for, qk_shim.torch_get_num_threads);
        done = 1;
    }
    return done;
}

#endif
