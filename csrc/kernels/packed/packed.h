/* Packed weights, one number at a time: what qk_packed of qk.h says, in code. */
#ifndef QK_PACKED_H
#define QK_PACKED_H

#include "kernels/kernels.h"
#include "kernels/scalar.h"

/* Code `index` of a dense row. */
static inline unsigned qk_dense_code(const uint8_t *row, size_t index, size_t bits)
{
    size_t bit = index * bits, shift = bit % 8;
    unsigned code = row[bit / 8] >> shift;
    if (shift + bits > 8)
        code |= (unsigned)row[bit / 8 + 1] << (8 - shift);
    return code & ((1u << bits) - 1);
}

/* Digit `index` of a row in base 3. */
static inline unsigned qk_base3_code(const uint8_t *row, size_t index)
{
    static const unsigned power[5] = {1, 3, 9, 27, 81};
    return row[index / 5] / power[index % 5] % 3;
}

static inline float qk_code_value(const qk_packed *packed, size_t row, unsigned code)
{
    size_t bits = packed->bits;
    if (packed->codebook) {
        size_t first = packed->codebook_rows == 1 ? 0 : row << bits;
        return (float)qk_load_source(packed->codebook, first + code, packed->codebook_dtype);
    }
    if (bits == QK_BASE3)
        return code == 2 ? -1.0f : (float)code;
    int is_negative = !packed->zeros && code >> (bits - 1);
    return (float)((int)code - (is_negative ? 1 << bits : 0));
}

/* 2^(exponent - 127); 255 is NaN. */
static inline float qk_from_exponent(uint8_t exponent)
{
    uint32_t bits = exponent ? (uint32_t)exponent << 23 : 0x00400000u;
    return qk_float_of(exponent == 255 ? 0x7fc00000u : bits);
}

static inline float qk_packed_scale(const qk_packed *packed, size_t row, size_t group,
                                    size_t groups)
{
    size_t index = row * groups + group;
    if (packed->scales_dtype != QK_UINT8)
        return (float)qk_load_source(packed->scales, index, packed->scales_dtype);
    uint8_t code = ((const uint8_t *)packed->scales)[index];
    return packed->scale_steps
               ? (float)code * (float)qk_load_source(packed->scale_steps, row, packed->steps_dtype)
               : qk_from_exponent(code);
}

/* A zero point in fixed point, among the codes 0 .. 2^bits - 1. */
static inline float qk_fixed_zero(int8_t zero, size_t bits)
{
    return (float)((zero + 128) << bits) * 0x1p-8f;
}

static inline float qk_packed_zero(const qk_packed *packed, size_t row, size_t group, size_t groups)
{
    if (!packed->zeros)
        return 0;
    if (packed->zeros_dtype == QK_INT8)
        return qk_fixed_zero(((const int8_t *)packed->zeros)[row * groups + group], packed->bits);
    if (packed->zeros_dtype != QK_UINT8)
        return (float)qk_load_source(packed->zeros, row * groups + group, packed->zeros_dtype);
    const uint8_t *zeros = packed->zeros;
    return (float)qk_dense_code(zeros + row * qk_row_bytes(groups, packed->bits), group,
                                packed->bits);
}

/* Weights [first, first + count) of a row. */
static inline void qk_packed_weights(float *weights, const qk_linear *linear, size_t row,
                                     size_t first, size_t count)
{
    const qk_packed *packed = linear->packed;
    size_t groups = qk_groups(packed, linear->in_features), bits = packed->bits;
    const uint8_t *codes = packed->codes + row * qk_row_bytes(linear->in_features, bits);
    for (size_t i = 0; i < count; i++) {
        size_t k = first + i, group = k / packed->group;
        unsigned code = bits == QK_BASE3 ? qk_base3_code(codes, k) : qk_dense_code(codes, k, bits);
        float zero = qk_packed_zero(packed, row, group, groups);
        weights[i] =
            (qk_code_value(packed, row, code) - zero) * qk_packed_scale(packed, row, group, groups);
    }
}

#endif
