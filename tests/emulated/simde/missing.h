/* Other AVX-512 intrinsics that SIMDe 0.7.4 lacks. A masked load reads the lanes of its mask only.
 */
#ifndef EMULATED_MISSING_H
#define EMULATED_MISSING_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Where the CPU it is built for has no FMA, SIMDe's is a product and a sum, each rounded. */
#undef _mm512_fmadd_ps
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c)
{
    float x[16], y[16], z[16];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    for (int i = 0; i < 16; i++)
        z[i] = fmaf(x[i], y[i], z[i]);
    memcpy(&c, z, sizeof c);
    return c;
}

typedef simde__mmask8 __mmask8;
typedef simde__mmask32 __mmask32;
typedef simde__mmask64 __mmask64;

#define DEFINE_MASKED_LOAD(name, vector, mask_type, type)                                          \
    static inline vector name(mask_type mask, const void *memory)                                  \
    {                                                                                              \
        type lanes[sizeof(vector) / sizeof(type)] = {0};                                           \
        vector made;                                                                               \
        for (size_t i = 0; i < sizeof(vector) / sizeof(type); i++)                                 \
            if (mask >> i & 1)                                                                     \
                memcpy(&lanes[i], (const type *)memory + i, sizeof(type));                         \
        memcpy(&made, lanes, sizeof made);                                                         \
        return made;                                                                               \
    }

DEFINE_MASKED_LOAD(_mm_maskz_loadu_epi8, __m128i, __mmask16, int8_t)
DEFINE_MASKED_LOAD(_mm256_maskz_loadu_epi16, __m256i, __mmask16, int16_t)
DEFINE_MASKED_LOAD(_mm512_maskz_loadu_ps, __m512, __mmask16, float)
DEFINE_MASKED_LOAD(_mm512_maskz_loadu_pd, __m512d, __mmask8, double)
DEFINE_MASKED_LOAD(_mm512_maskz_loadu_epi8, __m512i, __mmask64, int8_t)
DEFINE_MASKED_LOAD(_mm512_maskz_loadu_epi16, __m512i, __mmask32, int16_t)
#undef DEFINE_MASKED_LOAD

/* Quarters of a and b: two of a, then two of b, each chosen by two bits of `order`. */
static inline __m512i emulated_shuffle_quarters(__m512i a, __m512i b, int order)
{
    __m128i from[2][4], to[4];
    __m512i made;
    memcpy(from[0], &a, sizeof a);
    memcpy(from[1], &b, sizeof b);
    for (int i = 0; i < 4; i++)
        to[i] = from[i / 2][order >> 2 * i & 3];
    memcpy(&made, to, sizeof made);
    return made;
}

#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4(a, b, order) emulated_shuffle_quarters(a, b, order)
#define _mm512_shuffle_f32x4(a, b, order)                                                          \
    _mm512_castsi512_ps(                                                                           \
        emulated_shuffle_quarters(_mm512_castps_si512(a), _mm512_castps_si512(b), order))

/* In each quarter: two of a, then two of b. */
static inline __m512 emulated_shuffle_ps(__m512 a, __m512 b, int order)
{
    float from[2][16], to[16];
    __m512 made;
    memcpy(from[0], &a, sizeof a);
    memcpy(from[1], &b, sizeof b);
    for (int i = 0; i < 16; i++)
        to[i] = from[i % 4 / 2][i / 4 * 4 + (order >> 2 * (i % 4) & 3)];
    memcpy(&made, to, sizeof made);
    return made;
}

#undef _mm512_shuffle_ps
#define _mm512_shuffle_ps(a, b, order) emulated_shuffle_ps(a, b, order)

static inline __m512i emulated_srai(__m512i given, int places)
{
    int32_t lanes[16];
    memcpy(lanes, &given, sizeof lanes);
    for (int i = 0; i < 16; i++)
        lanes[i] >>= places;
    memcpy(&given, lanes, sizeof lanes);
    return given;
}

#undef _mm512_srai_epi32
#define _mm512_srai_epi32(a, places) emulated_srai(a, places)

static inline __mmask32 emulated_cmplt_epu16(__m512i a, __m512i b)
{
    uint16_t left[32], right[32];
    __mmask32 mask = 0;
    memcpy(left, &a, sizeof left);
    memcpy(right, &b, sizeof right);
    for (int i = 0; i < 32; i++)
        mask |= (__mmask32)(left[i] < right[i]) << i;
    return mask;
}

#undef _mm512_cmplt_epu16_mask
#define _mm512_cmplt_epu16_mask(a, b) emulated_cmplt_epu16(a, b)

/* sums + x w for pairs of bfloat16 numbers: the odd one's product first, each step rounded once.
 * Subnormal numbers count as zeros, coming and going. */
static inline float emulated_normal(float number)
{
    return fabsf(number) < 0x1p-126f ? copysignf(0, number) : number;
}

static inline __m512 emulated_dpbf16(__m512 sums, __m512bh w, __m512bh x)
{
    uint32_t left[16], right[16];
    float sum[16];
    memcpy(left, &w, sizeof left);
    memcpy(right, &x, sizeof right);
    memcpy(sum, &sums, sizeof sum);
    for (int i = 0; i < 16; i++) {
        for (int odd = 1; odd >= 0; odd--) {
            uint32_t a = odd ? left[i] & 0xffff0000u : left[i] << 16;
            uint32_t b = odd ? right[i] & 0xffff0000u : right[i] << 16;
            float f, g;
            memcpy(&f, &a, sizeof f);
            memcpy(&g, &b, sizeof g);
            sum[i] = emulated_normal(
                fmaf(emulated_normal(f), emulated_normal(g), emulated_normal(sum[i])));
        }
    }
    memcpy(&sums, sum, sizeof sums);
    return sums;
}

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sums, w, x) emulated_dpbf16(sums, w, x)

static inline __m512d _mm512_cvtepi32_pd(__m256i given)
{
    int32_t in[8];
    double out[8];
    __m512d made;
    memcpy(in, &given, sizeof in);
    for (int i = 0; i < 8; i++)
        out[i] = in[i];
    memcpy(&made, out, sizeof made);
    return made;
}

static inline __m256 _mm512_extractf32x8_ps(__m512 given, int half)
{
    __m256 halves[2];
    memcpy(halves, &given, sizeof given);
    return halves[half];
}

/* To the nearest bfloat16, half to even; subnormal numbers become zeros. */
static inline uint16_t emulated_bfloat16(float number)
{
    uint32_t bits;
    number = isnan(number) ? NAN : emulated_normal(number);
    memcpy(&bits, &number, sizeof bits);
    return isnan(number) ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline __m256i emulated_to_bfloat16(__m512 given)
{
    float in[16];
    uint16_t out[16];
    __m256i made;
    memcpy(in, &given, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = emulated_bfloat16(in[i]);
    memcpy(&made, out, sizeof made);
    return made;
}

static inline __m512i emulated_two_to_bfloat16(__m512 high, __m512 low)
{
    __m256i halves[2] = {emulated_to_bfloat16(low), emulated_to_bfloat16(high)};
    __m512i made;
    memcpy(&made, halves, sizeof made);
    return made;
}

#define _mm512_cvtneps_pbh(numbers)    emulated_to_bfloat16(numbers)
#define _mm512_cvtne2ps_pbh(high, low) emulated_two_to_bfloat16(high, low)

#endif
