#include "kernels/packed/packed.h"
#include "kernels/reference.h"

/* y = x W^T + bias; a row of W lies in scratch while all tokens are multiplied with it. */
#define DEFINE_LINEAR(type)                                                                        \
    static void linear_##type(void *y, const void *x, const qk_linear_strip *strip)                \
    {                                                                                              \
        const qk_linear *l = strip->linear;                                                        \
        float *weights = strip->scratch;                                                           \
        for (size_t n = strip->first; n < strip->last; n++) {                                      \
            qk_packed_weights(weights, l, n, 0, l->in_features);                                   \
            for (size_t t = 0; t < l->tokens; t++) {                                               \
                type sum = 0;                                                                      \
                for (size_t k = 0; k < l->in_features; k++)                                        \
                    sum += (type)qk_load_source(x, t * l->in_features + k, l->x_dtype) *           \
                           (type)weights[k];                                                       \
                if (l->bias)                                                                       \
                    sum += (type)qk_load_source(l->bias, n, l->bias_dtype);                        \
                qk_store_source(y, t * l->out_features + n, l->y_dtype, (double)sum);              \
            }                                                                                      \
        }                                                                                          \
    }

/* grad_x = grad_y W, some columns at a time, n ascending. */
#define DEFINE_LINEAR_BACKWARD(type)                                                               \
    static void backward_##type(void *grad_x, const void *grad_y, const qk_linear_strip *strip)    \
    {                                                                                              \
        const qk_linear *l = strip->linear;                                                        \
        type *sums = strip->scratch;                                                               \
        float weights[QK_BACKWARD_COLS];                                                           \
        for (size_t k = strip->first; k < strip->last; k += QK_BACKWARD_COLS) {                    \
            size_t width = strip->last - k;                                                        \
            width = width < QK_BACKWARD_COLS ? width : QK_BACKWARD_COLS;                           \
            for (size_t i = 0; i < l->tokens * width; i++)                                         \
                sums[i] = 0;                                                                       \
            for (size_t n = 0; n < l->out_features; n++) {                                         \
                qk_packed_weights(weights, l, n, k, width);                                        \
                for (size_t t = 0; t < l->tokens; t++) {                                           \
                    type grad = (type)qk_load_source(grad_y, t * l->out_features + n, l->y_dtype); \
                    for (size_t i = 0; i < width; i++)                                             \
                        sums[t * width + i] += grad * (type)weights[i];                            \
                }                                                                                  \
            }                                                                                      \
            for (size_t t = 0; t < l->tokens; t++)                                                 \
                for (size_t i = 0; i < width; i++)                                                 \
                    qk_store_source(grad_x, t * l->in_features + k + i, l->x_dtype,                \
                                    (double)sums[t * width + i]);                                  \
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

void qk_define_packed(qk_kernels *table)
{
    for (int dtype = 0; dtype < QK_FLOATS; dtype++) {
        int is_double = dtype == QK_FLOAT64;
        table->linear_packed[dtype] = is_double ? linear_double : linear_float;
        table->linear_packed_tile[dtype] = one_sum;
        table->linear_packed_backward[dtype] = is_double ? backward_double : backward_float;
    }
}
