/* What the checks of int8 rows and of packed weights share; check_linear.c has the contracts. */
#ifndef QK_CHECK_LINEAR_H
#define QK_CHECK_LINEAR_H

#include "harness.h"
#include "kernels/scalar.h"

typedef struct sizes {
    size_t tokens, out_features, in_features;
} sizes;

extern const double unit[QK_FLOATS]; /* half the distance from 1 to the next number */

void *fill_floats(region *where, qk_dtype dtype, size_t count, double size);
double load(const region *where, size_t index, qk_dtype dtype);
int is_near(double have, long double sum, long double total, size_t terms, double scale,
            double bias, qk_dtype dtype, double u);
void place_scratch(qk_linear_strip *strip, size_t bytes);
void expect_scratch(void); /* that its guards survived */
void check_sizes(qk_dtype dtype, void (*check)(qk_dtype, const sizes *), int inner_is_out);

#endif
