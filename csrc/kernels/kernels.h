/* The table of kernels: one slot each, its contract above the slot.
 *
 * Kernels are total over their contract, allocate nothing, know no threads and take any
 * address. They run on the caller's rows; api.c cuts the work into rows and columns.
 * "Compute type": double where the source (or output) is float64, float otherwise. */
#ifndef QK_KERNELS_H
#define QK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "../qk.h"

enum {
    QK_FLOATS = 4, /* float32, float64, float16, bfloat16: sources, activations, outputs */
    QK_WIDTHS = 9, /* indices 1..8 are used */
};

/* One strip of a linear call: all tokens, output features [first, last). */
typedef struct qk_linear_strip {
    const qk_linear *linear;
    size_t first, last;
} qk_linear_strip;

typedef struct qk_kernels {
    /* Range of each run of `run` elements (the last may be shorter) of source[count]:
     * low[i] = min(low[i], smallest of run i), high[i] = max(high[i], largest of run i),
     * i < ceil(count / run). A run with a NaN makes high[i] NaN, and a NaN there stays; low
     * passes NaNs over. The sign of a zero is not specified.
     * low and high are in the compute type. run == 1 folds element by element. */
    void (*range[QK_FLOATS])(void *low, void *high, const void *source, size_t count, size_t run);

    /* sum[i] += sum of |x| over run i, in double, in index order. */
    void (*magnitude[QK_FLOATS])(double *sum, const void *source, size_t count, size_t run);

    /* codes[count] of source[count]; scale[i], zero[i] (NULL: 0) serve run i. qk_encode in qk.h
     * has the formula. Indexed by source and code dtype. */
    void (*encode[QK_FLOATS][QK_DTYPES])(void *codes, const void *source, size_t count, size_t run,
                                         const void *scale, const int32_t *zero,
                                         const qk_spec *spec);

    /* out[count] = (codes - zero) * scale; indexed by code and output dtype. */
    void (*decode[QK_DTYPES][QK_FLOATS])(void *out, const void *codes, size_t count, size_t run,
                                         const void *scale, const int32_t *zero);

    /* One dense stream of `count` codes, `code_step` bytes apart, from/to consecutive bytes:
     * ceil(count * bits / 8) bytes, unused high bits 0. Indexed by width. */
    void (*pack_dense[QK_WIDTHS])(uint8_t *packed, const uint8_t *codes, size_t count);
    void (*unpack_dense[QK_WIDTHS])(uint8_t *codes, const uint8_t *packed, size_t count,
                                    int is_signed);

    /* Aligned packing down the columns into bytes: packed[c] holds codes[i * stride + c],
     * i < rows <= 8 / bits, the first in the low bits. */
    void (*pack_columns[QK_WIDTHS])(uint8_t *packed, const uint8_t *codes, size_t stride,
                                    size_t rows, size_t cols);
    void (*unpack_columns[QK_WIDTHS])(uint8_t *codes, const uint8_t *packed, size_t stride,
                                      size_t rows, size_t cols, int is_signed);

    /* Any layout: one stream of `count` codes, code_step bytes apart, into containers
     * container_step containers apart (qk_packing in qk.h). The definition of all packing. */
    void (*pack_stream)(void *packed, size_t container_step, const uint8_t *codes, size_t code_step,
                        size_t count, const qk_packing *packing);
    void (*unpack_stream)(uint8_t *codes, size_t code_step, const void *packed,
                          size_t container_step, size_t count, const qk_packing *packing,
                          int is_signed);

    /* y[tokens][first..last) of qk_linear_forward. y has out_features columns and is written only
     * in the strip. Indexed by x dtype. Any number of tokens gives a row the same bits. */
    void (*linear[QK_FLOATS])(void *y, const void *x, const qk_linear_strip *strip);

    /* grad_x[tokens][first..last) of qk_linear_backward: a strip of *input* features here,
     * summed over all output features in index order. Indexed by grad_y dtype. */
    void (*linear_backward[QK_FLOATS])(void *grad_x, const void *grad_y,
                                       const qk_linear_strip *strip);
} qk_kernels;

#define QK_ISA(name, runs) void qk_use_##name(qk_kernels *table);
#include "isa_list.def"
#undef QK_ISA

#endif
