/* Stands in for the compiler's <immintrin.h> when kernels/avx512.c is built for CPUs without
 * AVX-512: SIMDe's plain C definitions of the intrinsics, under their own names. */
#ifndef EMULATED_IMMINTRIN_H
#define EMULATED_IMMINTRIN_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

/* SIMDe 0.7.4 gives this alias two arguments too many. */
#undef _mm512_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)

#include "conversions.h"
#include "missing.h"

#endif
