/* The table of kernels: one slot each, its contract above the slot.
 *
 * Kernels are total over their contract, allocate nothing, know no threads and take any
 * address. They run on the caller's rows; api/ cuts the work into rows and columns.
 * "Compute type": double where the source (or output) is float64, float otherwise. */
#ifndef QK_KERNELS_H
#define QK_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "qk.h"

enum {
    QK_FLOATS = 4,     /* float32, float64, float16, bfloat16: sources, activations, outputs */
    QK_CONTAINERS = 4, /* log2 of 1, 2, 4, 8 bytes */
};

/* One strip of a linear call: all tokens, output features [first, last). */
typedef struct qk_linear_strip {
    const qk_linear *linear;
    size_t first, last;
    void *scratch; /* qk_linear_scratch_bytes or that of backward, aligned to QK_SCRATCH_ALIGN */
    int uses_weight_panels; /* forward only: whether to make panels of weights, where the kernel can
                             */
} qk_linear_strip;

enum {
    QK_SCRATCH_ALIGN = 64,
    QK_LINEAR_STEP = 64, /* a row of a panel is padded to a multiple of so many numbers, */
    QK_LINEAR_TILE = 8,  /* so many rows of weights lie in a panel beside those of all tokens, */
    QK_LINEAR_SUMS = 56, /* and so many sums are kept for each token, at most */
};

/* Bytes of a dense row of `count` codes of so many bits, or in base 3. */
static inline size_t qk_row_bytes(size_t count, size_t bits)
{
    if (bits == QK_BASE3)
        return count / 5 + (count % 5 != 0);
    return count / 8 * bits + (count % 8 * bits + 7) / 8;
}

static inline size_t qk_groups(const qk_packed *packed, size_t in_features)
{
    return in_features / packed->group + (in_features % packed->group != 0);
}

/* Numbers for the scales of one row of packed weights: one a group, 4 codes or code. */
static inline size_t qk_scale_row_length(const qk_linear *linear)
{
    size_t depth = (linear->in_features / QK_LINEAR_STEP + 1) * QK_LINEAR_STEP;
    return (linear->packed->group % 4 ? depth : depth / 4) + QK_LINEAR_STEP;
}

/* Memory for what belongs to the packed weights of a tile: scales, zeros, values of codes, and rows
 * of base-3 codes in 2 bits. */
static inline size_t qk_packed_scratch_bytes(const qk_linear *linear)
{
    if (!linear->packed)
        return 0;
    size_t floats = (2 * QK_LINEAR_TILE + 2) * qk_scale_row_length(linear) + QK_LINEAR_TILE * 256;
    return floats * sizeof(float) + QK_LINEAR_TILE * (linear->in_features / 4 + 16);
}

/* Memory for a strip of that call: panels of activations and weights, and sums. */
static inline size_t qk_linear_scratch_bytes(const qk_linear *linear)
{
    size_t number = linear->x_dtype == QK_FLOAT64 ? sizeof(double) : sizeof(float);
    size_t depth = (linear->in_features / QK_LINEAR_STEP + 1) * QK_LINEAR_STEP;
    size_t numbers = (linear->tokens + QK_LINEAR_TILE) * depth + linear->tokens * QK_LINEAR_SUMS;
    return numbers * number + qk_packed_scratch_bytes(linear);
}

enum {
    QK_BACKWARD_COLS = 192, /* input features that are summed at once, */
    QK_DECODED_ROWS = 64,   /* and rows of packed weights that are converted at once */
};

/* The same for a backward strip: factors of all tokens, sums, and converted weights. */
static inline size_t qk_backward_scratch_bytes(const qk_linear *linear)
{
    size_t number = linear->y_dtype == QK_FLOAT64 ? sizeof(double) : sizeof(float);
    size_t bytes = linear->tokens * (linear->out_features + QK_BACKWARD_COLS) * number;
    if (linear->packed)
        bytes += QK_DECODED_ROWS * (QK_BACKWARD_COLS + QK_LINEAR_STEP) * sizeof(float);
    return bytes + qk_packed_scratch_bytes(linear);
}

/* Rows [first, last) of a fit, and qk_fit_scratch_bytes_of memory. */
typedef struct qk_fit_strip {
    const qk_fit *fit; /* its group is not longer than a row */
    size_t first, last;
    void *scales, *zeros, *errors; /* of all rows; the last two may be NULL */
    void *scratch;
} qk_fit_strip;

enum {
    QK_FIT_LANES = 16,               /* rows that a kernel may fit together */
    QK_FIT_LEVELS = QK_FIT_BOTH + 1, /* beside what qk_fit_find says: the scale, with levels */
};

static inline size_t qk_fit_scratch_bytes_of(const qk_fit *fit)
{
    return (fit->group + 2 * fit->grid.level_count) * QK_FIT_LANES * sizeof(float);
}

/* Lines of a matrix: `lines` of them, `count` elements each, the first elements `stride` >= count
 * elements apart. Each is cut into runs of `run` elements (the last may be shorter); number i of
 * an array of ranges, scales or zero points serves run i of every line. */
typedef struct qk_lines {
    size_t lines, stride, count, run;
} qk_lines;

typedef struct qk_kernels {
    /* Range of run i of the lines of `source`, i < ceil(count / run):
     * low[i] = min(low[i], smallest number), high[i] = max(high[i], largest number).
     * A NaN in a run makes high[i] NaN, and a NaN there stays; low passes NaNs over. The sign of a
     * zero is not specified. low and high are in the compute type. */
    void (*range[QK_FLOATS])(void *low, void *high, const void *source, const qk_lines *lines);

    /* sum[i] += sum of |x| over run i of source[count], in double, in index order. */
    void (*magnitude[QK_FLOATS])(double *sum, const void *source, size_t count, size_t run);

    /* Codes of the lines of `source`, in lines of the same stride; scale[i], zero[i] (NULL: 0)
     * serve run i. qk_encode in qk.h has the formula. Indexed by source and code dtype. */
    void (*encode[QK_FLOATS][QK_DTYPES])(void *codes, const void *source, const qk_lines *lines,
                                         const void *scale, const int32_t *zero,
                                         const qk_spec *spec);

    /* out = (codes - zero) * scale, both in lines of the same stride; indexed by code and output
     * dtype. */
    void (*decode[QK_DTYPES][QK_FLOATS])(void *out, const void *codes, const qk_lines *lines,
                                         const void *scale, const int32_t *zero);

    /* qk_fit_groups of qk.h for some rows. Every instruction set gives the same bits. */
    void (*fit)(const qk_fit_strip *strip);

    /* y[i] += a * x[i], floats, each rounded once. */
    void (*add_scaled)(void *y, const void *x, float a, size_t count);

    /* One row in any layout: `count` codes, one byte each, into containers (qk_packing in qk.h;
     * rows, cols and axis are not read); unused bits of the containers are written as 0. Returns
     * what the codes fit: QK_FITS_* of qk.h, one or both or none. */
    int (*pack_stream)(void *packed, const uint8_t *codes, size_t count, const qk_packing *packing);
    void (*unpack_stream)(uint8_t *codes, const void *packed, size_t count,
                          const qk_packing *packing, int is_signed);

    /* One row of containers of streams that run down the columns. Bit 0 of packed[c] is bit `skip`
     * (< bits) of codes[c]; codes[i * stride + c], i < rows, follow it. Each code starts inside the
     * container; what does not fit there is dropped (it begins the next container). Returns
     * what the codes fit. Indexed by log2(container_bytes). */
    int (*pack_columns[QK_CONTAINERS])(void *packed, const uint8_t *codes, size_t stride,
                                       size_t rows, size_t cols, size_t bits, size_t skip);
    /* One row of codes of such streams: codes[c] starts at bit `shift` of packed[c] and goes on in
     * packed[stride + c], which is read only if shift + bits exceeds the container. */
    void (*unpack_columns[QK_CONTAINERS])(uint8_t *codes, const void *packed, size_t stride,
                                          size_t cols, size_t bits, size_t shift, int is_signed);

    /* One row of codes 0, 1, 2, five to a byte (qk_pack_ternary in qk.h). The byte of a code above
     * 2, and the codes of a byte above 242, are some number. */
    void (*pack_ternary)(uint8_t *packed, const uint8_t *codes, size_t count);
    void (*unpack_ternary)(uint8_t *codes, const uint8_t *packed, size_t count);

    /* y[tokens][first..last) of qk_linear_forward. y has out_features columns and is written only
     * in the strip. Indexed by x dtype. Any number of tokens gives a row the same bits. */
    void (*linear[QK_FLOATS])(void *y, const void *x, const qk_linear_strip *strip);

    /* The register tile of a call that is asked to use weight panels or not; whether it does. */
    int (*linear_tile[QK_FLOATS])(const qk_linear *linear, int uses_weight_panels, size_t *rows,
                                  size_t *cols);

    /* From how many tokens on weight panels pay; 0: never. */
    size_t linear_panel_tokens[QK_FLOATS];

    /* grad_x[tokens][first..last) of qk_linear_backward: a strip of *input* features here,
     * summed over all output features in index order. Indexed by grad_y dtype. */
    void (*linear_backward[QK_FLOATS])(void *grad_x, const void *grad_y,
                                       const qk_linear_strip *strip);

    /* The same four for packed weights (linear->packed of qk.h). */
    void (*linear_packed[QK_FLOATS])(void *y, const void *x, const qk_linear_strip *strip);
    int (*linear_packed_tile[QK_FLOATS])(const qk_linear *linear, int uses_weight_panels,
                                         size_t *rows, size_t *cols);
    size_t linear_packed_panel_tokens[QK_FLOATS];
    void (*linear_packed_backward[QK_FLOATS])(void *grad_x, const void *grad_y,
                                              const qk_linear_strip *strip);
} qk_kernels;

#define QK_ISA(name, runs) void qk_use_##name(qk_kernels *table);
#include "kernels/isa_list.def"
#undef QK_ISA

#endif
