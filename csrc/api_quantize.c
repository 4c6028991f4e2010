#include "api.h"

qk_status qk_measure(void *scale, int32_t *zero, const void *source, const qk_grid *grid,
                     const qk_spec *spec, size_t *where)
{
    (void)scale, (void)zero, (void)source, (void)grid, (void)spec, (void)where;
    return QK_BAD_DTYPE;
}

qk_status qk_encode(void *codes, const void *source, const void *scale, const int32_t *zero,
                    const qk_grid *grid, const qk_spec *spec)
{
    (void)codes, (void)source, (void)scale, (void)zero, (void)grid, (void)spec;
    return QK_BAD_DTYPE;
}

qk_status qk_quantize(void *codes, void *scale, int32_t *zero, const void *source,
                      const qk_grid *grid, const qk_spec *spec, size_t *where)
{
    (void)codes, (void)scale, (void)zero, (void)source, (void)grid, (void)spec, (void)where;
    return QK_BAD_DTYPE;
}

qk_status qk_decode(void *out, qk_dtype out_dtype, const void *codes, qk_dtype code_dtype,
                    const void *scale, const int32_t *zero, const qk_grid *grid)
{
    (void)out, (void)out_dtype, (void)codes, (void)code_dtype, (void)scale, (void)zero, (void)grid;
    return QK_BAD_DTYPE;
}
