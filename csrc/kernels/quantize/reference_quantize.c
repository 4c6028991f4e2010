/* The definition of range, magnitude, encode and decode. */
#include "kernels/reference.h"

#include <math.h>

#include "kernels/scalar.h"

/* For each element i of `count`, in its run `block`. */
#define FOR_EACH_IN_RUNS(i, block, count, run)                                                     \
    for (size_t block = 0, start_ = 0; start_ < (count); block++, start_ += (run))                 \
        for (size_t i = start_; i < (count) && i - start_ < (run); i++)

/* For each element i of the lines, in its run `block`. */
#define FOR_EACH_IN_LINES(i, block, form)                                                          \
    for (size_t line_ = 0; line_ < (form)->lines; line_++)                                         \
        FOR_EACH_IN_RUNS(at_, block, (form)->count, (form)->run)                                   \
    for (size_t i = line_ * (form)->stride + at_, once_ = 1; once_; once_ = 0)

/* ---- range and magnitude ------------------------------------------------ */

static inline void range_any(void *low, void *high, const void *source, const qk_lines *lines,
                             qk_dtype from)
{
    qk_dtype compute = from == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32;
    FOR_EACH_IN_LINES(i, block, lines)
    {
        double x = qk_load_source(source, i, from);
        if (x < qk_load_source(low, block, compute))
            qk_store_source(low, block, compute, x);
        if (x > qk_load_source(high, block, compute) || isnan(x))
            qk_store_source(high, block, compute, x);
    }
}

static inline void magnitude_any(double *sum, const void *source, size_t count, size_t run,
                                 qk_dtype from)
{
    FOR_EACH_IN_RUNS(i, block, count, run)
    {
        double more = fabs(qk_load_source(source, i, from));
        qk_store_float64(sum, block, qk_load_float64(sum, block) + more);
    }
}

/* ---- encode ------------------------------------------------------------- */

static inline void store_code(void *codes, size_t index, qk_dtype to, double code)
{
    switch (to) {
    case QK_INT8:
        ((int8_t *)codes)[index] = (int8_t)code;
        break;
    case QK_UINT8:
        ((uint8_t *)codes)[index] = (uint8_t)code;
        break;
    case QK_INT16:
        qk_store_int16(codes, index, (int16_t)code);
        break;
    case QK_FLOAT8_E4M3FN:
        ((uint8_t *)codes)[index] = qk_to_float8_e4m3fn((float)code);
        break;
    case QK_FLOAT8_E5M2:
        ((uint8_t *)codes)[index] = qk_to_float8_e5m2((float)code);
        break;
    default:
        qk_store_source(codes, index, to, code);
    }
}

/* The code of x, before it is stored: the formula of qk_encode in one compute type. */
#define DEFINE_CODE_OF(type, rounded)                                                              \
    static inline type code_of_##type(type x, type scale, type zero, const qk_spec *spec,          \
                                      int is_integer)                                              \
    {                                                                                              \
        if (spec->mode == QK_BINARY)                                                               \
            return isnan(x) || isnan(scale) ? 0 : x >= 0 ? 1 : -1;                                 \
        type code = x / scale, least = (type)spec->code_min, most = (type)spec->code_max;          \
        if (is_integer)                                                                            \
            code = rounded(code) + zero;                                                           \
        if (isnan(code))                                                                           \
            return 0;                                                                              \
        return code < least ? least : code > most ? most : code;                                   \
    }
DEFINE_CODE_OF(float, rintf)
DEFINE_CODE_OF(double, rint)

static inline void encode_any(void *codes, const void *source, const qk_lines *lines,
                              const void *scale, const int32_t *zero, const qk_spec *spec,
                              qk_dtype from, qk_dtype to)
{
    int is_integer = to == QK_INT8 || to == QK_UINT8 || to == QK_INT16;
    FOR_EACH_IN_LINES(i, block, lines)
    {
        double x = qk_load_source(source, i, from), z = zero ? qk_load_int32(zero, block) : 0;
        double code;
        if (from == QK_FLOAT64)
            code = code_of_double(x, qk_load_float64(scale, block), z, spec, is_integer);
        else
            code = (double)code_of_float((float)x, qk_load_float32(scale, block), (float)z, spec,
                                         is_integer);
        store_code(codes, i, to, code);
    }
}

/* ---- decode ------------------------------------------------------------- */

static inline double load_code(const void *codes, size_t index, qk_dtype from)
{
    switch (from) {
    case QK_INT8:
        return ((const int8_t *)codes)[index];
    case QK_UINT8:
        return ((const uint8_t *)codes)[index];
    case QK_INT16:
        return qk_load_int16(codes, index);
    case QK_FLOAT8_E4M3FN:
        return (double)qk_from_float8_e4m3fn(((const uint8_t *)codes)[index]);
    case QK_FLOAT8_E5M2:
        return (double)qk_from_float8_e5m2(((const uint8_t *)codes)[index]);
    default:
        return qk_load_source(codes, index, from);
    }
}

static inline void decode_any(void *out, const void *codes, const qk_lines *lines,
                              const void *scale, const int32_t *zero, qk_dtype from, qk_dtype to)
{
    FOR_EACH_IN_LINES(i, block, lines)
    {
        double code = load_code(codes, i, from), z = zero ? qk_load_int32(zero, block) : 0;
        double x;
        if (to == QK_FLOAT64)
            x = (code - z) * qk_load_float64(scale, block);
        else
            x = (double)(((float)code - (float)z) * qk_load_float32(scale, block));
        qk_store_source(out, i, to, x);
    }
}

/* ---- the slots ---------------------------------------------------------- */

#define DEFINE_PAIR(source, code)                                                                  \
    static void encode_##source##_##code(void *codes, const void *from, const qk_lines *lines,     \
                                         const void *scale, const int32_t *zero,                   \
                                         const qk_spec *spec)                                      \
    {                                                                                              \
        encode_any(codes, from, lines, scale, zero, spec, QK_##source, QK_##code);                 \
    }                                                                                              \
    static void decode_##code##_##source(void *out, const void *codes, const qk_lines *lines,      \
                                         const void *scale, const int32_t *zero)                   \
    {                                                                                              \
        decode_any(out, codes, lines, scale, zero, QK_##code, QK_##source);                        \
    }
#define FILL_PAIR(source, code)                                                                    \
    table->encode[QK_##source][QK_##code] = encode_##source##_##code;                              \
    table->decode[QK_##code][QK_##source] = decode_##code##_##source;

#define FOR_EACH_CODE(DO, source)                                                                  \
    DO(source, INT8)                                                                               \
    DO(source, UINT8)                                                                              \
    DO(source, INT16)                                                                              \
    DO(source, FLOAT32)                                                                            \
    DO(source, FLOAT16)                                                                            \
    DO(source, BFLOAT16)                                                                           \
    DO(source, FLOAT8_E4M3FN)                                                                      \
    DO(source, FLOAT8_E5M2)
#define FOR_EACH_SOURCE(DO)                                                                        \
    DO(FLOAT32)                                                                                    \
    DO(FLOAT64)                                                                                    \
    DO(FLOAT16)                                                                                    \
    DO(BFLOAT16)

#define DEFINE_SOURCE(source)                                                                      \
    static void range_##source(void *low, void *high, const void *from, const qk_lines *lines)     \
    {                                                                                              \
        range_any(low, high, from, lines, QK_##source);                                            \
    }                                                                                              \
    static void magnitude_##source(double *sum, const void *from, size_t count, size_t run)        \
    {                                                                                              \
        magnitude_any(sum, from, count, run, QK_##source);                                         \
    }                                                                                              \
    FOR_EACH_CODE(DEFINE_PAIR, source)
#define FILL_SOURCE(source)                                                                        \
    table->range[QK_##source] = range_##source;                                                    \
    table->magnitude[QK_##source] = magnitude_##source;                                            \
    FOR_EACH_CODE(FILL_PAIR, source)

FOR_EACH_SOURCE(DEFINE_SOURCE)

void qk_define_quantize(qk_kernels *table)
{
    FOR_EACH_SOURCE(FILL_SOURCE)
}
