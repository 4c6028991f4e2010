/* Work over threads. Knows no kernel. */
#ifndef QK_PARALLEL_H
#define QK_PARALLEL_H

#include <stddef.h>
#include <stdint.h>

/* Handles items [first, last) of a job. */
typedef void (*qk_range_fn)(size_t first, size_t last, void *context);

/* Call fn over [0, items) in disjoint ranges of at least `grain` items each (the last may be
 * smaller), on up to the current number of threads; return when all are done. Each worker runs
 * under the caller's floating-point control state. A call from inside a worker is serial, and so is
 * one in a forked child when the threads are torch's, which did not survive the fork. fn must not
 * care how the items are cut.
 * 0: the program was asked after some of the items, and stopped; 1: all are done. Who does not look
 * takes half a result for a whole one. */
__attribute__((warn_unused_result)) int qk_parallel_for(size_t items, size_t grain, qk_range_fn fn,
                                                        void *context);

/* The same where the caller knows how long an item takes: each thread does `first` of them (at
 * least a grain) before the program is asked, so a call of fewer is not cut. */
__attribute__((warn_unused_result)) int qk_parallel_slices(size_t items, size_t grain, size_t first,
                                                           qk_range_fn fn, void *context);

/* Asked by the thread that called, some fifty times a second in a long call; not 0: stop. */
typedef int (*qk_pause)(void);
void qk_use_pause(qk_pause pause);

/* torch's own loop and thread count (the stable shim's torch_parallel_for and
 * torch_get_num_threads); set once by torch_ops.c. Both return 0 for success. */
typedef int32_t (*qk_torch_for)(int64_t begin, int64_t end, int64_t grain,
                                void (*fn)(int64_t, int64_t, void *), void *context);
typedef int32_t (*qk_torch_threads)(uint32_t *threads);
void qk_use_torch_threads(qk_torch_for loop, qk_torch_threads count);

#endif
