#include "kernels/kernels.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "kernels/inline.h"
#include "kernels/packed/packed.h"

/* quantize: ranges of numbers, numbers to codes and back */
#include "kernels/quantize/neon.inc"
#include "kernels/quantize/quantize.inc"

/* fit: scales of least error */
#include "kernels/fit/fit.inc"

/* pack: codes into containers and back */
#include "kernels/pack/neon.inc"
#include "kernels/pack/pack.inc"

/* linear: int8 codes */
#include "kernels/linear/neon.inc"
#include "kernels/linear/common.inc"
#include "kernels/linear/int8_rows.inc"

/* packed: codes of 1 to 8 bits */
#include "kernels/packed/neon.inc"
#include "kernels/packed/weights.inc"
#include "kernels/packed/rows.inc"
#include "kernels/packed/decode.inc"

/* both: y, and the gradient of x */
#include "kernels/linear/linear.inc"
#include "kernels/packed/packed.inc"

void qk_use_neon(qk_kernels *table)
{
    qk_use_quantize(table);
    qk_use_fit(table);
    qk_use_pack(table);
    qk_use_linear(table);
    qk_use_packed(table);
}

#endif
