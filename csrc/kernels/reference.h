/* The definition of every kernel: shortest loops, no tiling, no intrinsics.
 * Each function fills the slots of its subject; reference.c calls them all. */
#ifndef QK_REFERENCE_H
#define QK_REFERENCE_H

#include "kernels/kernels.h"

void qk_define_quantize(qk_kernels *table); /* range, magnitude, encode, decode */
void qk_define_fit(qk_kernels *table);      /* fit, add_scaled */
void qk_define_pack(qk_kernels *table);     /* pack_*, unpack_* */
void qk_define_linear(qk_kernels *table);   /* linear, linear_backward */
void qk_define_packed(qk_kernels *table);   /* linear_packed, linear_packed_backward */

#endif
