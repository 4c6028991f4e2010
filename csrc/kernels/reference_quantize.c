#include "reference.h"

void qk_define_quantize(qk_kernels *table)
{
    (void)table;
}
