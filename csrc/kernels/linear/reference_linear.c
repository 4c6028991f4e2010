#include "kernels/reference.h"
#include "kernels/scalar.h"

/* y = (sum of x * weight) * scale + bias, in `type` from the first product to the last sum. */
#define DEFINE_LINEAR(type)                                                                        \
    static void linear_##type(void *y, const void *x, const qk_linear_strip *strip)                \
    {                                                                                              \
        const qk_linear *l = strip->linear;                                                        \
        size_t depth = l->in_features;                                                             \
        for (size_t t = 0; t < l->tokens; t++) {                                                   \
            for (size_t n = strip->first; n < strip->last; n++) {                                  \
                type sum = 0;                                                                      \
                for (size_t k = 0; k < depth; k++)                                                 \
                    sum += (type)qk_load_source(x, t * depth + k, l->x_dtype) *                    \
                           (type)l->weights[n * depth + k];                                        \
                sum *= (type)qk_load_source(l->scales, n, l->scales_dtype);                        \
                if (l->bias)                                                                       \
                    sum += (type)qk_load_source(l->bias, n, l->bias_dtype);                        \
                qk_store_source(y, t * l->out_features + n, l->y_dtype, (double)sum);              \
            }                                                                                      \
        }                                                                                          \
    }

/* grad_x = sum over n of (grad_y * scale) * weight, n ascending. */
#define DEFINE_LINEAR_BACKWARD(type)                                                               \
    static void linear_backward_##type(void *grad_x, const void *grad_y,                           \
                                       const qk_linear_strip *strip)                               \
    {                                                                                              \
        const qk_linear *l = strip->linear;                                                        \
        size_t depth = l->out_features;                                                            \
        for (size_t t = 0; t < l->tokens; t++) {                                                   \
            for (size_t k = strip->first; k < strip->last; k++) {                                  \
                type sum = 0;                                                                      \
                for (size_t n = 0; n < depth; n++)                                                 \
                    sum += (type)qk_load_source(grad_y, t * depth + n, l->y_dtype) *               \
                           (type)qk_load_source(l->scales, n, l->scales_dtype) *                   \
                           (type)l->weights[n * l->in_features + k];                               \
                qk_store_source(grad_x, t * l->in_features + k, l->x_dtype, (double)sum);          \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE_LINEAR(float)
DEFINE_LINEAR(double)
DEFINE_LINEAR_BACKWARD(float)
DEFINE_LINEAR_BACKWARD(double)

static int one_sum(const qk_linear *linear, int uses_weight_panels, size_t *rows, size_t *cols)
{
    (void)linear, (void)uses_weight_panels;
    *rows = *cols = 1;
    return 0;
}

void qk_define_linear(qk_kernels *table)
{
    for (int dtype = 0; dtype < QK_FLOATS; dtype++) {
        table->linear[dtype] = dtype == QK_FLOAT64 ? linear_double : linear_float;
        table->linear_tile[dtype] = one_sum;
        table->linear_backward[dtype] =
            dtype == QK_FLOAT64 ? linear_backward_double : linear_backward_float;
    }
}
