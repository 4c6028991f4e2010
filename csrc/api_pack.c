#include "api.h"

size_t qk_packed_length(size_t length, const qk_packing *packing)
{
    (void)length, (void)packing;
    return 0;
}

qk_status qk_pack(void *packed, const uint8_t *codes, const qk_packing *packing)
{
    (void)packed, (void)codes, (void)packing;
    return QK_BAD_BITS;
}

qk_status qk_unpack(uint8_t *codes, const void *packed, const qk_packing *packing, int is_signed)
{
    (void)packed, (void)codes, (void)packing, (void)is_signed;
    return QK_BAD_BITS;
}

qk_status qk_pack_ternary(uint8_t *packed, const uint8_t *codes, size_t rows, size_t cols)
{
    (void)packed, (void)codes, (void)rows, (void)cols;
    return QK_BAD_BITS;
}

qk_status qk_unpack_ternary(uint8_t *codes, const uint8_t *packed, size_t rows, size_t cols)
{
    (void)packed, (void)codes, (void)rows, (void)cols;
    return QK_BAD_BITS;
}
