#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "inline.h"
#include "packed.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

#include "quantize_avx2.inc"
#include "quantize.inc"

#include "pack_avx2.inc"
#include "pack.inc"

#include "linear_avx2.inc"
#include "linear_rows.inc"
#include "linear_int8.inc"
#include "quads_avx2.inc"
#include "linear_quads.inc"
#include "linear_quads_rows.inc"
#include "linear.inc"

void qk_use_avx2(qk_kernels *table)
{
    qk_use_quantize(table);
    qk_use_pack(table);
    qk_use_linear(table);
}

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
