#include "kernels.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>
#include <string.h>

#include "scalar.h"

void qk_use_neon(qk_kernels *table)
{
    (void)table;
}

#endif
