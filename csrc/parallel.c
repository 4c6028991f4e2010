#include "parallel.h"
#include "qk.h"

void qk_parallel_for(size_t items, size_t grain, qk_range_fn fn, void *context)
{
    (void)grain;
    if (items)
        fn(0, items, context);
}

void qk_use_torch_threads(qk_torch_for loop, qk_torch_threads count)
{
    (void)loop, (void)count;
}

void qk_set_threads(size_t threads)
{
    (void)threads;
}

size_t qk_get_threads(void)
{
    return 1;
}
