#include "api/plan.h"

enum {
    STRIP = 48,         /* a multiple of every kernel's tile, and of 16 floats */
    GROUP = 12,         /* a multiple of the tokens of every kernel's tile */
    CHUNK = 264,        /* more tokens gain nothing: a chunk reads the weights once from memory */
    THREAD_NS = 30000,  /* work that pays for waking a thread, which may wait for its core */
    FIRST_NS = 2000000, /* work before a call is looked at as a long one */
    WEIGHT_PS = 50,     /* picoseconds to read and convert one weight ... */
    PRODUCT_PS = 30,    /* ... and to multiply it with one token */
};

static size_t ceil_div(size_t n, size_t d)
{
    return n / d + (n % d != 0);
}

/* Chunks of nearly equal size, in whole groups; the last one may be smaller. */
static size_t choose_chunk(size_t tokens)
{
    size_t even = ceil_div(tokens, ceil_div(tokens, CHUNK));
    return ceil_div(even, GROUP) * GROUP;
}

qk_linear_plan qk_plan_linear(size_t tokens, size_t features, size_t depth, size_t panel_tokens)
{
    qk_linear_plan plan = {.strip = STRIP, .chunk = choose_chunk(tokens)};
    plan.strips = ceil_div(features, plan.strip);
    plan.chunks = ceil_div(tokens, plan.chunk);
    size_t rows = tokens < plan.chunk ? tokens : plan.chunk;
    plan.uses_weight_panels = panel_tokens && rows >= panel_tokens;
    double piece_ns = 1e-3 * STRIP * (double)(depth + 1) * (WEIGHT_PS + PRODUCT_PS * (double)rows);
    plan.grain = (size_t)(THREAD_NS / piece_ns) + 1;
    plan.first = (size_t)(FIRST_NS / piece_ns) + plan.grain;
    return plan;
}
