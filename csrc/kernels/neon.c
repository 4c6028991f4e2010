#include "kernels/kernels.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "kernels/inline.h"
#include "kernels/packed/packed.h"

#include "kernels/quantize/neon.inc"
#include "kernels/quantize/quantize.inc"

#include "kernels/pack/neon.inc"
#include "kernels/pack/pack.inc"

#include "kernels/linear/neon.inc"
#include "kernels/linear/common.inc"
#include "kernels/linear/int8_rows.inc"
#include "kernels/packed/neon.inc"
#include "kernels/packed/weights.inc"
#include "kernels/packed/rows.inc"
#include "kernels/packed/decode.inc"
#include "kernels/linear/linear.inc"

void qk_use_neon(qk_kernels *table)
{
    qk_use_quantize(table);
    qk_use_pack(table);
    qk_use_linear(table);
}

#endif
