/* Range -> scale and zero point: the one place of these rules.
 *
 *   symmetric integers  scale = max|x| / half, half = (code_max - code_min) / 2: 127 for
 *                       -127..127, 127.5 for -128..127 (so no code is off by more than half a
 *                       step); without a sign (code_min = 0): half = code_max, no x < 0 allowed
 *   floats              scale = max|x| / code_max
 *   asymmetric          low = min(min x, 0), high = max(max x, 0), n = code_max - code_min,
 *                       scale = (high - low) / n, or high / n - low / n where that overflows,
 *                       zero = clamp(round_half_even(code_min - low / scale), code_min, code_max)
 *   binary              scale = mean|x|, 0 for a block of zeros
 *
 * Each operation is rounded to the compute type, the scale then to spec->scale. A scale that
 * comes out subnormal there and would let codes clip (scale * half < max|x|) goes up to the next
 * number, so a block that is not all zero never gets scale 0; a block of zeros gets scale 1.
 * A zero point is 0 unless asymmetric. */
#ifndef QK_SCALE_H
#define QK_SCALE_H

#include "qk.h"

/* What is wrong with ranges; flags. */
enum { QK_SAW_NON_FINITE = 1, QK_SAW_NEGATIVE = 2, QK_SAW_SCALE_RANGE = 4 };

/* Scales and zero points (NULL: not wanted) of `count` blocks, from low and high as kernels.h's
 * range makes them (starting from 0 and 0) and, in binary mode, the mean of |x|. Arrays but `mean`
 * at any address, scale, low and high in the compute type. Returns flags; a block with a NaN or an
 * infinity gets scale NaN and zero point 0. */
int qk_scale_blocks(void *scale, void *zero, const void *low, const void *high, const double *mean,
                    size_t count, const qk_spec *spec);

#endif
