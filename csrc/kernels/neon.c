#include "kernels.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#include "inline.h"
#include "packed.h"

#include "quantize_neon.inc"
#include "quantize.inc"

#include "pack_neon.inc"
#include "pack.inc"

#include "linear_neon.inc"
#include "linear_rows.inc"
#include "linear_int8.inc"
#include "quads_neon.inc"
#include "linear_quads.inc"
#include "linear_quads_rows.inc"
#include "linear.inc"

void qk_use_neon(qk_kernels *table)
{
    qk_use_quantize(table);
    qk_use_pack(table);
    qk_use_linear(table);
}

#endif
