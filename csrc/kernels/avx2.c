#include "kernels/kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/inline.h"
#include "kernels/packed/packed.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

/* quantize: ranges of numbers, numbers to codes and back */
#include "kernels/quantize/avx2.inc"
#include "kernels/quantize/quantize.inc"

/* fit: scales of least error */
#include "kernels/fit/fit.inc"

/* pack: codes into containers and back */
#include "kernels/pack/avx2.inc"
#include "kernels/pack/pack.inc"

/* linear: int8 codes */
#include "kernels/linear/avx2.inc"
#include "kernels/linear/common.inc"
#include "kernels/linear/int8_rows.inc"

/* packed: codes of 1 to 8 bits */
#include "kernels/packed/avx2.inc"
#include "kernels/packed/weights.inc"
#include "kernels/packed/rows.inc"
#include "kernels/packed/decode.inc"

/* both: y, and the gradient of x */
#include "kernels/linear/linear.inc"
#include "kernels/packed/packed.inc"

void qk_use_avx2(qk_kernels *table)
{
    qk_use_quantize(table);
    qk_use_fit(table);
    qk_use_pack(table);
    qk_use_linear(table);
    qk_use_packed(table);
}

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
