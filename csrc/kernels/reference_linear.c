#include "reference.h"

void qk_define_linear(qk_kernels *table)
{
    (void)table;
}
