#include "torch_ops.h"

int qk_register_torch(const char *libtorch_cpu)
{
    (void)libtorch_cpu;
    return 0;
}
