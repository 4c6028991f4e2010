/* Other AVX-512 intrinsics that SIMDe 0.7.4 lacks. A masked load reads the lanes of its mask only.
 */
#ifndef EMULATED_MISSING_H
#define EMULATED_MISSING_H

#include <stdint.h>
#include <string.h>

typedef simde__mmask8 __mmask8;

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
#undef DEFINE_MASKED_LOAD

#define _mm512_shuffle_f32x4(a, b, order)                                                          \
    _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), order))

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

#endif
