#include "api/api.h"

const char *qk_status_text(qk_status status)
{
    switch (status) {
    case QK_OK:
        return "no error";
    case QK_BAD_DTYPE:
        return "a dtype that this call does not take";
    case QK_BAD_BITS:
        return "bits must be 1..8 and no wider than the container of 1, 2, 4 or 8 bytes";
    case QK_BAD_SHAPE:
        return "a shape, block or axis that is out of range, or sizes whose product overflows";
    case QK_BAD_CODES:
        return "a code range that the code type or mode cannot hold (asymmetric codes need zero "
               "points)";
    case QK_BAD_ISA:
        return "an instruction set that this build does not know or this CPU lacks";
    case QK_OVERLAP:
        return "an output shares memory with an input";
    case QK_NON_FINITE:
        return "the source holds a NaN or an infinity";
    case QK_NEGATIVE:
        return "symmetric quantization to a type without a sign cannot hold negative values";
    case QK_SCALE_RANGE:
        return "a scale is beyond the largest number of its type; use a wider type for the scales";
    case QK_OUT_OF_MEMORY:
        return "not enough memory for scratch space";
    case QK_INTERRUPTED:
        return "interrupted by a signal";
    }
    return "unknown status";
}

size_t qk_dtype_bytes(qk_dtype dtype)
{
    static const size_t bytes[QK_DTYPES] = {
        [QK_FLOAT32] = 4,  [QK_FLOAT64] = 8,       [QK_FLOAT16] = 2,
        [QK_BFLOAT16] = 2, [QK_FLOAT8_E4M3FN] = 1, [QK_FLOAT8_E5M2] = 1,
        [QK_INT8] = 1,     [QK_UINT8] = 1,         [QK_INT16] = 2,
    };
    return (unsigned)dtype < QK_DTYPES ? bytes[dtype] : 0;
}
