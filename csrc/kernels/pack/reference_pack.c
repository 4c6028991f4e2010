#include "kernels/reference.h"

#include <string.h>

/* Where the bits of a row live: code `index` starts at bit `first_bit` of the stream, and the
 * stream's bit p is bit p % 8 of byte `byte_of(p)`. */
static size_t first_bit(size_t index, const qk_packing *packing)
{
    size_t width = 8 * packing->container_bytes, per_container = width / packing->bits;
    if (packing->straddle)
        return index * packing->bits;
    return index / per_container * width + index % per_container * packing->bits;
}

static size_t byte_of(size_t bit, size_t container_bytes)
{
    const uint16_t probe = 1;
    size_t byte = bit / 8, in_container = byte % container_bytes;
    if (*(const uint8_t *)&probe == 1)
        return byte;
    return byte - in_container + (container_bytes - 1 - in_container); /* a big-endian machine */
}

static int fits_of(uint8_t code, size_t bits)
{
    int half = 1 << (bits - 1), number = (int8_t)code;
    return (code < 2 * half ? QK_FITS_UNSIGNED : 0) |
           (number >= -half && number < half ? QK_FITS_SIGNED : 0);
}

static int pack_stream(void *packed, const uint8_t *codes, size_t count, const qk_packing *packing)
{
    int fits = QK_FITS_UNSIGNED | QK_FITS_SIGNED;
    uint8_t *bytes = packed;
    size_t container = packing->container_bytes;
    if (count == 0)
        return fits;
    size_t containers = (first_bit(count - 1, packing) + packing->bits - 1) / (8 * container) + 1;
    memset(bytes, 0, containers * container);
    for (size_t i = 0; i < count; i++) {
        fits &= fits_of(codes[i], packing->bits);
        for (size_t j = 0; j < packing->bits; j++) {
            size_t bit = first_bit(i, packing) + j;
            bytes[byte_of(bit, container)] |= (uint8_t)((codes[i] >> j & 1) << bit % 8);
        }
    }
    return fits;
}

static uint8_t extend(unsigned code, size_t bits, int is_signed)
{
    unsigned sign = is_signed ? 1u << (bits - 1) : 0;
    return (uint8_t)((code ^ sign) - sign);
}

static void unpack_stream(uint8_t *codes, const void *packed, size_t count,
                          const qk_packing *packing, int is_signed)
{
    const uint8_t *bytes = packed;
    for (size_t i = 0; i < count; i++) {
        unsigned code = 0;
        for (size_t j = 0; j < packing->bits; j++) {
            size_t bit = first_bit(i, packing) + j;
            code |= (bytes[byte_of(bit, packing->container_bytes)] >> bit % 8 & 1u) << j;
        }
        codes[i] = extend(code, packing->bits, is_signed);
    }
}

#define DEFINE_COLUMNS(type)                                                                       \
    static int pack_columns_##type(void *packed, const uint8_t *codes, size_t stride, size_t rows, \
                                   size_t cols, size_t bits, size_t skip)                          \
    {                                                                                              \
        int fits = QK_FITS_UNSIGNED | QK_FITS_SIGNED;                                              \
        for (size_t c = 0; c < cols; c++) {                                                        \
            type value = 0;                                                                        \
            for (size_t i = 0; i < rows; i++) {                                                    \
                type code = (type)(codes[i * stride + c] & ((1u << bits) - 1));                    \
                fits &= fits_of(codes[i * stride + c], bits);                                      \
                value |= (type)(i == 0 ? code >> skip : code << (i * bits - skip));                \
            }                                                                                      \
            memcpy((char *)packed + c * sizeof value, &value, sizeof value);                       \
        }                                                                                          \
        return fits;                                                                               \
    }                                                                                              \
    static void unpack_columns_##type(uint8_t *codes, const void *packed, size_t stride,           \
                                      size_t cols, size_t bits, size_t shift, int is_signed)       \
    {                                                                                              \
        const char *bytes = packed;                                                                \
        for (size_t c = 0; c < cols; c++) {                                                        \
            type value, next = 0;                                                                  \
            memcpy(&value, bytes + c * sizeof value, sizeof value);                                \
            unsigned code = (unsigned)(value >> shift);                                            \
            if (shift + bits > 8 * sizeof value) {                                                 \
                memcpy(&next, bytes + (stride + c) * sizeof value, sizeof value);                  \
                code |= (unsigned)next << (8 * sizeof value - shift);                              \
            }                                                                                      \
            codes[c] = extend(code & ((1u << bits) - 1), bits, is_signed);                         \
        }                                                                                          \
    }
DEFINE_COLUMNS(uint8_t)
DEFINE_COLUMNS(uint16_t)
DEFINE_COLUMNS(uint32_t)
DEFINE_COLUMNS(uint64_t)

static void pack_ternary(uint8_t *packed, const uint8_t *codes, size_t count)
{
    static const unsigned power[5] = {1, 3, 9, 27, 81};
    for (size_t i = 0; i < count; i += 5) {
        unsigned sum = 0;
        for (size_t digit = 0; digit < 5 && i + digit < count; digit++)
            sum += power[digit] * codes[i + digit];
        packed[i / 5] = (uint8_t)sum;
    }
}

static void unpack_ternary(uint8_t *codes, const uint8_t *packed, size_t count)
{
    static const unsigned power[5] = {1, 3, 9, 27, 81};
    for (size_t i = 0; i < count; i++)
        codes[i] = (uint8_t)(packed[i / 5] / power[i % 5] % 3);
}

void qk_define_pack(qk_kernels *table)
{
    table->pack_stream = pack_stream;
    table->unpack_stream = unpack_stream;
#define USE_COLUMNS(log2_bytes, type)                                                              \
    table->pack_columns[log2_bytes] = pack_columns_##type;                                         \
    table->unpack_columns[log2_bytes] = unpack_columns_##type;
    USE_COLUMNS(0, uint8_t)
    USE_COLUMNS(1, uint16_t)
    USE_COLUMNS(2, uint32_t)
    USE_COLUMNS(3, uint64_t)
    table->pack_ternary = pack_ternary;
    table->unpack_ternary = unpack_ternary;
}
