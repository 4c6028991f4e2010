/* Codes that make up for each other's errors: rows of qk_descend and qk_round_in_order (qk.h). */
#ifndef QK_DESCENT_H
#define QK_DESCENT_H

#include "kernels/kernels.h"

/* Floats that qk_descend_row needs beside the arrays. */
size_t qk_descent_scratch(const qk_descent *form);

/* Row `row` of qk_descend; each call has scratch of its own. */
void qk_descend_row(const qk_descent *form, size_t row, float *scratch, const qk_kernels *kernels);

/* Row `row` of qk_round_in_order. */
void qk_round_row_in_order(const qk_rounding *form, size_t row, const qk_kernels *kernels);

#endif
