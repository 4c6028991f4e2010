/* AVX-512 with bfloat16 dot products and byte permutations (Zen 4, Sapphire Rapids and later): the
 * linear kernel of bfloat16 activations, and that of packed weights; all else is AVX-512's. */
#include "kernels/kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/inline.h"
#include "kernels/packed/packed.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2"))),   \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,avx2,fma,f16c,bmi2")
#endif

/* linear: int8 codes */
#include "kernels/linear/avx512.inc"
#include "kernels/linear/common.inc"
#include "kernels/linear/int8_rows.inc"
#include "kernels/linear/bf16_dot.inc"
#include "kernels/linear/bf16_dot_avx512bf16.inc"

/* packed: codes of 1 to 8 bits */
#define HAS_VBMI
#include "kernels/packed/avx512.inc"
#include "kernels/packed/weights.inc"
#include "kernels/packed/rows.inc"
#include "kernels/packed/bf16_dot_avx512bf16.inc"

/* both: y */
#include "kernels/packed/packed.inc"

#define T float
INT8_FORM(bf16_dot)
#define FORM bf16_dot
#include "kernels/linear/tile.inc"
#define X bfloat16
#include "kernels/linear/forward.inc"
#undef FORM

#define FORM packed_bf16_dot
#include "kernels/linear/tile.inc"
#define X bfloat16
#include "kernels/linear/forward.inc"
#undef FORM
#undef T

/* The kernel of the rows below, for activations that the dot product would take for zeros. */
static void (*exact_forward)(void *y, const void *x, const qk_linear_strip *strip);

/* Whether one of the activations is not 0 and below 2^-119. */
static int has_tiny(const char *x, size_t count)
{
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), one = _mm512_set1_epi16(1);
    const __m512i least = _mm512_set1_epi16((127 - 119) << 7);
    __mmask32 tiny = 0;
    for (size_t i = 0; i < count; i += 32) {
        __m512i size = _mm512_and_si512(load_32_halves(x + 2 * i, count - i), magnitude);
        tiny |= _mm512_cmplt_epu16_mask(_mm512_sub_epi16(size, one), _mm512_sub_epi16(least, one));
    }
    return tiny != 0;
}

static void linear_bfloat16(void *y, const void *x, const qk_linear_strip *strip)
{
    if (has_tiny(x, strip->linear->tokens * strip->linear->in_features))
        exact_forward(y, x, strip);
    else
        bf16_dot_forward_bfloat16(y, x, strip);
}

/* Numbers that are not looked up in a table cost more in bfloat16 than the products gain, but where
 * many tokens share them. */
static int uses_bf16_dot(const qk_linear *l)
{
    return packed_bf16_dot_has_tiles(packed_bf16_dot_kind(l)) ||
           l->tokens >= PACKED_BF16_DOT_FROM_TOKENS;
}

static void linear_packed_bfloat16(void *y, const void *x, const qk_linear_strip *strip)
{
    if (uses_bf16_dot(strip->linear))
        packed_bf16_dot_forward_bfloat16(y, x, strip);
    else
        packed_forward_bfloat16(y, x, strip);
}

static int linear_packed_tile_bfloat16(const qk_linear *l, int is_asked, size_t *rows, size_t *cols)
{
    return uses_bf16_dot(l) ? packed_bf16_dot_tile_shape_bfloat16(l, is_asked, rows, cols)
                            : packed_tile_shape_bfloat16(l, is_asked, rows, cols);
}

void qk_use_avx512bf16(qk_kernels *table)
{
    exact_forward = table->linear[QK_BFLOAT16];
    table->linear[QK_BFLOAT16] = linear_bfloat16;
    table->linear_tile[QK_BFLOAT16] = bf16_dot_tile_shape_bfloat16;
    table->linear_panel_tokens[QK_BFLOAT16] = 19;
    qk_use_packed(table);
    table->linear_packed[QK_BFLOAT16] = linear_packed_bfloat16;
    table->linear_packed_tile[QK_BFLOAT16] = linear_packed_tile_bfloat16;
    table->linear_packed_panel_tokens[QK_BFLOAT16] = PACKED_BF16_DOT_PANEL_TOKENS;
}

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
