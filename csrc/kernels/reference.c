#include "kernels/reference.h"

void qk_use_reference(qk_kernels *table)
{
    qk_define_quantize(table);
    qk_define_fit(table);
    qk_define_pack(table);
    qk_define_linear(table);
    qk_define_packed(table);
}
