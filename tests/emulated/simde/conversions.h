/* Conversions between number types that SIMDe 0.7.4 lacks at 512 bits, one lane after another. */
#ifndef EMULATED_CONVERSIONS_H
#define EMULATED_CONVERSIONS_H

#include <stdint.h>
#include <string.h>

typedef simde__mmask16 __mmask16;

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

#define DEFINE_CONVERSION(name, to_vector, to, from_vector, from)                                  \
    static inline to_vector name(from_vector given)                                                \
    {                                                                                              \
        from in[16];                                                                               \
        to out[16];                                                                                \
        to_vector made;                                                                            \
        memcpy(in, &given, sizeof in);                                                             \
        for (int i = 0; i < 16; i++)                                                               \
            out[i] = (to)in[i];                                                                    \
        memcpy(&made, out, sizeof made);                                                           \
        return made;                                                                               \
    }

DEFINE_CONVERSION(_mm512_cvtepi32_ps, __m512, float, __m512i, int32_t)
DEFINE_CONVERSION(_mm512_cvtepi8_epi32, __m512i, int32_t, __m128i, int8_t)
DEFINE_CONVERSION(_mm512_cvtepu8_epi32, __m512i, int32_t, __m128i, uint8_t)
DEFINE_CONVERSION(_mm512_cvtepu16_epi32, __m512i, int32_t, __m256i, uint16_t)
DEFINE_CONVERSION(_mm512_cvtepi32_epi8, __m128i, int8_t, __m512i, int32_t)
DEFINE_CONVERSION(_mm512_cvtepi32_epi16, __m256i, int16_t, __m512i, int32_t)
DEFINE_CONVERSION(_mm512_cvtph_ps, __m512, float, __m256i, _Float16)
DEFINE_CONVERSION(emulated_to_half, __m256i, _Float16, __m512, float)
#undef DEFINE_CONVERSION

/* Rounding to nearest even is all that the kernels ask for. */
#define _mm512_cvtps_ph(a, rounding) emulated_to_half(a)

/* What does not fit is the most negative number. */
static inline __m512i _mm512_cvttps_epi32(__m512 given)
{
    float in[16];
    int32_t out[16];
    __m512i made;
    memcpy(in, &given, sizeof in);
    for (int i = 0; i < 16; i++)
        out[i] = in[i] >= -0x1p31f && in[i] < 0x1p31f ? (int32_t)in[i] : INT32_MIN;
    memcpy(&made, out, sizeof made);
    return made;
}

#endif
