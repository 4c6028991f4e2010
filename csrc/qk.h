/* The whole C API of the quantization kernels, on one page.
 *
 * A matrix of weights is cut into blocks; each block has one scale and, in
 * asymmetric mode, one zero point. Every granularity is a block shape:
 *
 *   per tensor (rows, cols)   per row (1, cols)   per column (rows, 1)
 *   groups along a row (1, g) groups along a column (g, 1)
 *
 * A last block that the matrix does not fill is simply smaller.
 *
 * Every buffer belongs to the caller, is C-contiguous, in native byte order, at
 * any address (no alignment is asked for); outputs must not overlap inputs.
 * Nothing is written unless the arguments pass their checks.
 */
#ifndef QK_H
#define QK_H

#include <stddef.h>
#include <stdint.h>

typedef enum qk_status {
    QK_OK = 0,
    QK_BAD_DTYPE,     /* a dtype that this call does not take */
    QK_BAD_BITS,      /* a width outside 1..8, or wider than its container */
    QK_BAD_SHAPE,     /* a block of no rows or columns, or sizes whose product overflows */
    QK_BAD_CODES,     /* a code range that its type or mode cannot hold, or no zero points for it */
    QK_BAD_ISA,       /* an instruction set this build does not know or this CPU lacks */
    QK_OVERLAP,       /* an output shares memory with an input */
    QK_NON_FINITE,    /* the source holds a NaN or an infinity */
    QK_NEGATIVE,      /* symmetric codes without a sign, source with negative values */
    QK_SCALE_RANGE,   /* a scale beyond the largest number of its type */
    QK_OUT_OF_MEMORY, /* scratch memory could not be had */
    QK_INTERRUPTED,   /* the program asked to stop (api/parallel.h); outputs hold nothing of use */
} qk_status;

/* What a status means, in words; never NULL. */
const char *qk_status_text(qk_status status);

typedef enum qk_dtype {
    QK_FLOAT32 = 0,
    QK_FLOAT64,
    QK_FLOAT16,
    QK_BFLOAT16,
    QK_FLOAT8_E4M3FN,
    QK_FLOAT8_E5M2,
    QK_INT8,
    QK_UINT8,
    QK_INT16,
    QK_DTYPES /* how many there are */
} qk_dtype;

size_t qk_dtype_bytes(qk_dtype dtype);

/* ---- quantize: source -> codes + scales + zero points ------------------- */

typedef struct qk_grid {
    size_t rows, cols;             /* of the matrix; either may be 0 */
    size_t block_rows, block_cols; /* of one block; at least 1 */
} qk_grid;

typedef enum qk_mode {
    QK_SYMMETRIC =
        0,         /* scale = max|x| / code_max (integers: / half the code range), no zero point */
    QK_ASYMMETRIC, /* scale = (max(x,0) - min(x,0)) / (code_max - code_min), integer zero point */
    QK_BINARY,     /* codes -1 and +1, scale = mean|x| (Rastegari et al., XNOR-Net, 2016) */
} qk_mode;

/* How numbers become codes. The arithmetic is done in the "compute type": double
 * for a float64 source, float for the others. Scales are arrays of that type. */
typedef struct qk_spec {
    qk_dtype source; /* float32, float64, float16 or bfloat16 */
    qk_dtype code;   /* int8, uint8, int16, float32, float16, bfloat16 or a float8 */
    qk_dtype scale;  /* a scale is rounded to this float type before any code is made */
    qk_mode mode;
    double code_min; /* smallest and largest code; for float codes -max and +max of the type */
    double code_max;
    int keep_non_finite; /* 0: a NaN or infinity is refused; 1: its block gets scale NaN and codes 0
                          */
} qk_spec;

/* Scales [ceil(rows/block_rows)][ceil(cols/block_cols)], in the compute type, and zero
 * points of the same shape (may be NULL unless asymmetric) of `source`; scale.h has the rules.
 * On QK_NON_FINITE and QK_NEGATIVE, *where is the flat index of the first culprit; on these and
 * on QK_SCALE_RANGE the outputs hold nothing of use. */
qk_status qk_measure(void *scale, int32_t *zero, const void *source, const qk_grid *grid,
                     const qk_spec *spec, size_t *where);

/* Codes of `source` under given scales and zero points (NULL: all 0):
 * integers clamp(round_half_even(x / scale) + zero, code_min, code_max),
 * floats   clamp(x / scale, code_min, code_max) rounded to nearest even,
 * binary   x >= 0 ? +1 : -1;
 * a NaN (x, scale, or 0/0 where a division is made) gives 0. */
qk_status qk_encode(void *codes, const void *source, const void *scale, const int32_t *zero,
                    const qk_grid *grid, const qk_spec *spec);

/* qk_measure, then qk_encode, reading each row once where the grid allows it. */
qk_status qk_quantize(void *codes, void *scale, int32_t *zero, const void *source,
                      const qk_grid *grid, const qk_spec *spec, size_t *where);

/* out = (code - zero) * scale, computed in double for a float64 `out`, in float otherwise
 * (the type of `scale`), then rounded to `out_dtype`: float32, float64, float16, bfloat16. */
qk_status qk_decode(void *out, qk_dtype out_dtype, const void *codes, qk_dtype code_dtype,
                    const void *scale, const int32_t *zero, const qk_grid *grid);

/* ---- pack: codes of 1..8 bits <-> containers of 1, 2, 4 or 8 bytes ------- */

typedef struct qk_packing {
    size_t rows, cols;      /* of the unpacked codes, one byte each */
    size_t bits;            /* 1..8 */
    size_t container_bytes; /* 1, 2, 4 or 8; containers are little-endian streams of bits */
    int axis;               /* 0: a stream runs down each column; 1: along each row */
    int straddle; /* 1: dense, a code may straddle two containers; 0: aligned, it may not */
} qk_packing;

/* Containers that one stream of `length` codes fills. */
size_t qk_packed_length(size_t length, const qk_packing *packing);

/* What `bits` bits hold without loss: all codes are in 0 .. 2^bits - 1, or all, read in two's
 * complement, in -2^(bits-1) .. 2^(bits-1) - 1. */
enum { QK_FITS_UNSIGNED = 1, QK_FITS_SIGNED = 2 };

/* The low `bits` bits of each code, first code in the lowest bits; unused bits are 0.
 * packed is [packed_length(rows)][cols] for axis 0, [rows][packed_length(cols)] for axis 1.
 * *fits (NULL: not wanted) is what these codes are: QK_FITS_*, one or both or none. */
qk_status qk_pack(void *packed, const uint8_t *codes, const qk_packing *packing, int *fits);
/* The reverse; is_signed: codes are two's complement, sign-extended into the byte. */
qk_status qk_unpack(uint8_t *codes, const void *packed, const qk_packing *packing, int is_signed);

/* Ternary codes 0, 1, 2, five to a byte in base 3, first code in the lowest digit.
 * codes [rows][cols], packed [rows][ceil(cols/5)]. */
qk_status qk_pack_ternary(uint8_t *packed, const uint8_t *codes, size_t rows, size_t cols);
qk_status qk_unpack_ternary(uint8_t *codes, const uint8_t *packed, size_t rows, size_t cols);

/* ---- codebooks: any levels in the place of evenly spaced codes ---------- */

/* For each row of `values` (double [rows][count], ascending, finite) the levels, 1..256 and
 * ascending, of least sum of weight * (value - nearest level)^2: k-means in one dimension, exactly.
 * levels: double [rows][level_count]; weights: double [rows][count], not negative, or NULL: all 1.
 * Levels that a row does not need repeat its last value. */
qk_status qk_fit_levels(void *levels, size_t level_count, const void *values, const void *weights,
                        size_t rows, size_t count);

typedef struct qk_leveling {
    size_t rows, cols,
        group;            /* columns that share a scale, at least 1; a last group may be short */
    const void *scales;   /* float [rows][ceil(cols/group)] */
    const void *codebook; /* float [codebooks][levels], in any order, finite */
    size_t codebooks, levels; /* one for all rows, or one a row; 1..256 */
} qk_leveling;

/* codes[r][c]: which level, times the scale, is nearest to x[r][c] (float); the lower code where
 * two are as near. 0 where the scale is not above 0, the lowest level where x is NaN. */
qk_status qk_encode_levels(uint8_t *codes, const void *x, const qk_leveling *form);

/* ---- fit: the scales of least error -------------------------------------- */

/* What qk_fit_groups looks for. */
typedef enum qk_fit_find {
    QK_FIT_NOTHING = 0, /* only measures the errors */
    QK_FIT_SCALE,
    QK_FIT_ZERO, /* under scales that stay as they are */
    QK_FIT_BOTH,
} qk_fit_find;

/* What a weight is under a scale and a zero point: a whole number, or a level of a table. */
typedef struct qk_grid_levels {
    float code_min, code_max; /* of whole numbers, in -2^21..2^21 */
    const void *levels;       /* float [codebooks][level_count], ascending, if there is a count */
    size_t codebooks, level_count; /* one codebook for all rows, or one a row; 0..256 levels: these
                                      have no zeros */
} qk_grid_levels;

/* A weight is (level - zero) * scale, its level the nearest. */
typedef struct qk_fit {
    size_t rows, cols;
    size_t group;           /* columns that share a scale, at least 1; a last group may be short */
    const void *x;          /* float [rows][cols], finite */
    const void *importance; /* float [cols], not negative: how much a squared error counts */
    qk_grid_levels grid;    /* code_min, code_max: also of levels, the least and the largest */
    size_t starts, rounds;  /* beside the scale given: start i is the whole range times */
    float shrink;           /* 1 - i shrink, and each takes so many rounds of least squares */
    float scale_min;        /* above 0; or below 0, where scales may have a sign */
    float zero_min, zero_max, zero_step; /* zeros are multiples of the step; 0: any number */
    qk_fit_find find;
} qk_fit;

/* In the place of the scales and zeros given (float [rows][groups], zeros NULL or for all) those of
 * the least weighted squared error that was found, never of a larger one than given, as float sums
 * have it. errors: NULL, or what these errors are. */
qk_status qk_fit_groups(void *scales, void *zeros, void *errors, const qk_fit *fit);

/* ---- codes that make up for each other's errors -------------------------- */

/* The loss of a row is d H d^T, d = w - (value - zero) * scale. */
typedef struct qk_descent {
    size_t rows, cols, group; /* columns that share a scale, at least 1 */
    const void *hessian;      /* float [cols][cols], symmetric, its diagonal above 0 */
    void *values;             /* float [rows][cols]: levels, in and out */
    void *slopes;             /* float [rows][cols]: d H, in and out */
    void *scales, *zeros;     /* float [rows][groups], in and out; zeros NULL: all 0 */
    qk_grid_levels grid;
    const void *steps;    /* NULL, or float [rows]: scales are 1..255 steps; else they are */
    qk_dtype scale_dtype; /* numbers of this type */
    qk_dtype zero_dtype;  /* zeros are numbers of this type */
    float scale_min;      /* above 0; or below 0, where scales may have a sign */
    float zero_min, zero_max, zero_step; /* and multiples of the step; 0: any number */
    size_t sweeps;                       /* at most so many times over each row */
    int refits;                          /* whether scales and zeros move before each sweep */
} qk_descent;

/* Coordinate descent: in each sweep scales and zeros are set to what loses least for the codes, as
 * stored, then each code in turn to what loses least beside all others. The loss never grows. */
qk_status qk_descend(const qk_descent *form);

/* Columns are in the order in which they are rounded. */
typedef struct qk_rounding {
    size_t rows, cols, groups;
    void *x;            /* float [rows][cols], finite; used up */
    void *values;       /* float [rows][cols]: levels, out */
    const void *factor; /* float [cols][cols]: U of H^-1 = U^T U, upper, its diagonal above 0 */
    const void *places; /* int32 [cols]: the group of each column, 0 .. groups-1 */
    const void *scales, *zeros; /* float [rows][groups]; zeros NULL: all 0 */
    qk_grid_levels grid;
} qk_rounding;

/* Round a column, and let the columns after it make up for its error (E. Frantar et al., GPTQ). */
qk_status qk_round_in_order(const qk_rounding *form);

/* ---- linear: y = x W^T + bias, W of codes and scales --------------------- */

enum { QK_BASE3 = 0 /* in place of a width: ternary codes, five to a byte (qk_pack_ternary) */ };

/* Weights of 1 to 8 bits in groups: w = (value - zero) * scale, computed in float, where the value
 * of a code is its entry of the codebook; without one the code itself, which is unsigned where
 * there are zero points and else in two's complement. Base-3 codes 0, 1, 2 stand for 0, 1, -1.
 *
 * Rows of codes are dense (qk_packing: axis 1, straddle), each starts on a byte. A row has
 * groups = ceil(in_features / group) scales. */
typedef struct qk_packed {
    const uint8_t *codes;    /* [out_features][qk_packed_row_bytes] */
    size_t bits;             /* 1..8, or QK_BASE3 */
    size_t group;            /* codes that share a scale; at least 1 */
    const void *scales;      /* [out_features][groups] */
    const void *zeros;       /* NULL, or [out_features][groups], or packed as rows of codes are */
    const void *codebook;    /* NULL, or [codebook_rows][2^bits] */
    const void *scale_steps; /* NULL, or [out_features]: a uint8 scale u is u * step */
    size_t codebook_rows;    /* 1 or out_features */
    qk_dtype scales_dtype;   /* a float, or uint8: without steps 2^(u - 127), 255 is NaN */
    qk_dtype steps_dtype;    /* a float */
    qk_dtype zeros_dtype;    /* a float; uint8: packed codes of `bits` bits; int8: fixed point, i is
                                (i + 128) * 2^(bits - 8) */
    qk_dtype codebook_dtype;
} qk_packed;

/* Bytes of a row of `count` codes. */
size_t qk_packed_row_bytes(size_t count, size_t bits);

typedef struct qk_linear {
    size_t tokens, out_features, in_features;
    const qk_packed *packed; /* NULL: W = weights * scales, */
    const int8_t *weights;   /* [out_features][in_features] */
    const void *scales;      /* [out_features] */
    const void *bias;        /* [out_features], or NULL */
    qk_dtype scales_dtype;   /* float32, float64, float16 or bfloat16, each on its own */
    qk_dtype bias_dtype;
    qk_dtype x_dtype; /* float64: accumulated in double, float otherwise */
    qk_dtype y_dtype;
} qk_linear;

/* y [tokens][out_features], x [tokens][in_features]. A scale of a row and the bias are applied in
 * the accumulator's type, then y is rounded once. Weights in groups may be rounded to bfloat16
 * where x has that type. */
qk_status qk_linear_forward(void *y, const void *x, const qk_linear *linear);

/* How a forward call would run now: only sizes and x_dtype of `linear` are read, and of its packed
 * weights bits, group and whether there are zeros and a codebook. */
typedef struct qk_linear_choice {
    const char *isa;
    size_t tile_tokens, tile_features; /* sums that are kept in registers at a time */
    int uses_weight_panels; /* weights are converted once for all tokens of a chunk, else in tiles
                             */
    size_t chunk;           /* tokens that read the weights together */
    size_t threads;         /* at most */
} qk_linear_choice;
qk_status qk_choose_linear(qk_linear_choice *choice, const qk_linear *linear);

/* grad_x [tokens][in_features] = grad_y W, from grad_y [tokens][out_features].
 * grad_y has y_dtype, grad_x has x_dtype; bias is not read. */
qk_status qk_linear_backward(void *grad_x, const void *grad_y, const qk_linear *linear);

/* ---- instruction sets and threads --------------------------------------- */

/* Name of the index-th instruction set that this build has and this CPU runs, best first;
 * NULL past the end. */
const char *qk_isa_name(size_t index);
const char *qk_active_isa(void);
/* Make `name` the active one, or leave everything as it is and return QK_BAD_ISA. */
qk_status qk_set_isa(const char *name);

/* Threads for the calls above. 0: follow torch when it is loaded, else 1.
 * n > 0: at most n threads of our own, made for each call that is large enough. */
void qk_set_threads(size_t threads);
size_t qk_get_threads(void);

#endif
