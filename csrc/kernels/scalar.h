/* Conversions between float and the narrow float types, one number at a time.
 * To a narrow type: round half to even; NaN stays NaN; overflow goes to infinity,
 * or to NaN where the type has none (float8_e4m3fn), as torch does. */
#ifndef QK_SCALAR_H
#define QK_SCALAR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "qk.h"

static inline uint32_t qk_bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float qk_float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float qk_from_bfloat16(uint16_t bits)
{
    return qk_float_of((uint32_t)bits << 16);
}

static inline uint16_t qk_to_bfloat16(float value)
{
    uint32_t bits = qk_bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

/* Any type of `exponent_bits` and `mantissa_bits`, IEEE-like with subnormals. */
static inline float qk_from_small(uint32_t code, int exponent_bits, int mantissa_bits)
{
    uint32_t mantissa = code & ((1u << mantissa_bits) - 1);
    uint32_t exponent = (code >> mantissa_bits) & ((1u << exponent_bits) - 1);
    uint32_t sign = (code >> (mantissa_bits + exponent_bits)) << 31;
    uint32_t bias = (1u << (exponent_bits - 1)) - 1;
    if (exponent == 0) /* mantissa * 2^(1 - bias - mantissa_bits), exact in float */
        return qk_float_of(sign |
                           qk_bits_of((float)mantissa *
                                      qk_float_of((128u - bias - (uint32_t)mantissa_bits) << 23)));
    return qk_float_of(sign | (exponent + 127u - bias) << 23 | mantissa << (23 - mantissa_bits));
}

/* Magnitude of `value` rounded to such a type, as bits; may run over into the code that follows
 * the largest one: the caller says what that means. `value` is finite. */
static inline uint32_t qk_to_small(float value, int exponent_bits, int mantissa_bits)
{
    uint32_t bits = qk_bits_of(value) & 0x7fffffffu;
    uint32_t bias = (1u << (exponent_bits - 1)) - 1;
    uint32_t smallest = (128u - bias) << 23; /* the least normal number */
    if (bits < smallest) {
        /* Adding 2^k makes the float unit round at the subnormal's last place. */
        float magic = qk_float_of((128u - bias + 23u - (uint32_t)mantissa_bits) << 23);
        return qk_bits_of(qk_float_of(bits) + magic) - qk_bits_of(magic);
    }
    int drop = 23 - mantissa_bits;
    bits += (1u << (drop - 1)) - 1 + ((bits >> drop) & 1);
    return (bits >> drop) - ((127u - bias) << mantissa_bits);
}

static inline float qk_from_float16(uint16_t bits)
{
    if ((bits & 0x7c00) == 0x7c00)
        return qk_float_of((uint32_t)(bits & 0x8000) << 16 | 0x7f800000u |
                           (uint32_t)(bits & 0x3ff) << 13);
    return qk_from_small(bits, 5, 10);
}

static inline uint16_t qk_to_float16(float value)
{
    uint32_t bits = qk_bits_of(value), sign = bits >> 31 << 15;
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00);
    if ((bits & 0x7fffffffu) >= 0x477ff000u) /* 65520 and more */
        return (uint16_t)(sign | 0x7c00);
    return (uint16_t)(sign | qk_to_small(value, 5, 10));
}

static inline float qk_from_float8_e5m2(uint8_t bits)
{
    return qk_from_float16((uint16_t)(bits << 8));
}

static inline uint8_t qk_to_float8_e5m2(float value)
{
    uint32_t bits = qk_bits_of(value), sign = bits >> 31 << 7;
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint8_t)(sign | 0x7f);
    if ((bits & 0x7fffffffu) >= 0x47700000u) /* 61440 and more */
        return (uint8_t)(sign | 0x7c);
    return (uint8_t)(sign | qk_to_small(value, 5, 2));
}

static inline float qk_from_float8_e4m3fn(uint8_t bits)
{
    if ((bits & 0x7f) == 0x7f)
        return qk_float_of((uint32_t)(bits & 0x80) << 24 | 0x7fc00000u);
    return qk_from_small(bits, 4, 3);
}

static inline uint8_t qk_to_float8_e4m3fn(float value)
{
    uint32_t bits = qk_bits_of(value), sign = bits >> 31 << 7;
    if ((bits & 0x7fffffffu) > 0x43e80000u) /* more than 464, or NaN */
        return (uint8_t)(sign | 0x7f);
    return (uint8_t)(sign | qk_to_small(value, 4, 3));
}

/* Element `index` of an array at any address. */
#define QK_DEFINE_ACCESS(name, type)                                                               \
    static inline type qk_load_##name(const void *array, size_t index)                             \
    {                                                                                              \
        type value;                                                                                \
        memcpy(&value, (const char *)array + index * sizeof value, sizeof value);                  \
        return value;                                                                              \
    }                                                                                              \
    static inline void qk_store_##name(void *array, size_t index, type value)                      \
    {                                                                                              \
        memcpy((char *)array + index * sizeof value, &value, sizeof value);                        \
    }

QK_DEFINE_ACCESS(float32, float)
QK_DEFINE_ACCESS(float64, double)
QK_DEFINE_ACCESS(int16, int16_t)
QK_DEFINE_ACCESS(int32, int32_t)
QK_DEFINE_ACCESS(uint16, uint16_t)

/* Element `index` of an array of a source type (float32, float64, float16, bfloat16). */
static inline double qk_load_source(const void *array, size_t index, qk_dtype dtype)
{
    switch (dtype) {
    case QK_FLOAT32:
        return (double)qk_load_float32(array, index);
    case QK_FLOAT64:
        return qk_load_float64(array, index);
    case QK_FLOAT16:
        return (double)qk_from_float16(qk_load_uint16(array, index));
    default:
        return (double)qk_from_bfloat16(qk_load_uint16(array, index));
    }
}

/* The reverse, rounding once from float (a float64 array takes the value as it is). */
static inline void qk_store_source(void *array, size_t index, qk_dtype dtype, double value)
{
    switch (dtype) {
    case QK_FLOAT32:
        qk_store_float32(array, index, (float)value);
        break;
    case QK_FLOAT64:
        qk_store_float64(array, index, value);
        break;
    case QK_FLOAT16:
        qk_store_uint16(array, index, qk_to_float16((float)value));
        break;
    default:
        qk_store_uint16(array, index, qk_to_bfloat16((float)value));
        break;
    }
}

#endif
