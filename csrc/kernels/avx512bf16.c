/* AVX-512 with bfloat16 dot products and byte permutations (Zen 4, Sapphire Rapids and later): the
 * linear kernel of bfloat16 activations; all else is AVX-512's. */
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

#include "kernels/linear/avx512.inc"
#include "kernels/linear/common.inc"
#include "kernels/linear/int8_rows.inc"
#define QUADS_VBMI
#include "kernels/packed/avx512.inc"
#include "kernels/packed/weights.inc"
#include "kernels/packed/rows.inc"
#include "kernels/linear/bf16_dot.inc"
#include "kernels/linear/bf16_dot_avx512bf16.inc"
#include "kernels/packed/bf16_dot_avx512bf16.inc"

#define T float

INT8_FORM(pairs)
#define FORM pairs
#include "kernels/linear/tile.inc"
#define FORM    pairs
#define X       bfloat16
#define X_BYTES 2
#include "kernels/linear/forward.inc"

#define FORM quads
#include "kernels/linear/tile.inc"
#define FORM    quads
#define X       float32
#define X_BYTES 4
#include "kernels/linear/forward.inc"
#define FORM    quads
#define X       float16
#define X_BYTES 2
#include "kernels/linear/forward.inc"
#define FORM    quads
#define X       bfloat16
#define X_BYTES 2
#include "kernels/linear/forward.inc"

#define FORM twins
#include "kernels/linear/tile.inc"
#define FORM    twins
#define X       bfloat16
#define X_BYTES 2
#include "kernels/linear/forward.inc"

/* The kernel of the rows below, for activations that this one would take for zeros. */
static void (*linear_exact)(void *y, const void *x, const qk_linear_strip *strip);

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

static void linear_dot_products(void *y, const void *x, const qk_linear_strip *strip)
{
    if (has_tiny(x, strip->linear->tokens * strip->linear->in_features))
        linear_exact(y, x, strip);
    else
        pairs_linear_bfloat16(y, x, strip);
}

/* Numbers that are not looked up in a table cost more in bfloat16 than the products gain, but where
 * many tokens share them. */
static int uses_twins(const qk_linear *l)
{
    return twins_has(twins_kind(l)) || l->tokens >= TWINS_FROM;
}

static void linear_packed(void *y, const void *x, const qk_linear_strip *strip)
{
    if (uses_twins(strip->linear))
        twins_linear_bfloat16(y, x, strip);
    else
        quads_linear_bfloat16(y, x, strip);
}

static int packed_tile(const qk_linear *l, int is_packed, size_t *rows, size_t *cols)
{
    return uses_twins(l) ? twins_tile_shape_bfloat16(l, is_packed, rows, cols)
                         : quads_tile_shape_bfloat16(l, is_packed, rows, cols);
}

void qk_use_avx512bf16(qk_kernels *table)
{
    linear_exact = table->linear[QK_BFLOAT16];
    table->linear[QK_BFLOAT16] = linear_dot_products;
    table->linear_tile[QK_BFLOAT16] = pairs_tile_shape_bfloat16;
    table->linear_pack_tokens[QK_BFLOAT16] = 19;
    table->linear_packed[QK_FLOAT32] = quads_linear_float32;
    table->linear_packed[QK_FLOAT16] = quads_linear_float16;
    table->linear_packed_tile[QK_FLOAT32] = quads_tile_shape_float32;
    table->linear_packed_tile[QK_FLOAT16] = quads_tile_shape_float16;
    table->linear_packed[QK_BFLOAT16] = linear_packed;
    table->linear_packed_tile[QK_BFLOAT16] = packed_tile;
    table->linear_packed_tokens[QK_BFLOAT16] = TWINS_PACK_TOKENS;
}

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
