/* Which instruction set is active. Touches no data. */
#ifndef QK_DISPATCH_H
#define QK_DISPATCH_H

#include "kernels/kernels.h"

/* The table of the active instruction set: the best one this CPU runs until qk_set_isa. */
const qk_kernels *qk_active_kernels(void);

#endif
