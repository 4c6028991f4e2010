/* How a call is cut into pieces. Pure arithmetic on shapes: no data, no threads. */
#ifndef QK_PLAN_H
#define QK_PLAN_H

#include <stddef.h>

/* A linear call is a grid of pieces, `strip` features wide and `chunk` tokens high. Pieces are
 * independent, so neither the cut nor the number of threads changes a bit of the result. */
typedef struct qk_linear_plan {
    size_t strip;  /* features in a piece: whole register tiles and whole cache lines of output */
    size_t chunk;  /* tokens in a piece */
    size_t strips; /* pieces across the features */
    size_t chunks; /* pieces across the tokens */
    size_t grain;  /* pieces that are worth a thread's while */
    size_t first;  /* pieces that a thread does before the program is asked whether to go on */
    int uses_weight_panels; /* the weights of a tile are converted once for all tokens of a piece */
} qk_linear_plan;

/* The plan for `tokens` rows of `features` sums, each over `depth` products; all at least 1
 * but `depth`. From `panel_tokens` tokens on weight panels pay; 0: never. */
qk_linear_plan qk_plan_linear(size_t tokens, size_t features, size_t depth, size_t panel_tokens);

#endif
