#include "plan.h"

#include <stdatomic.h>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

enum {
    STRIP = 48,        /* a multiple of every kernel's tile, and of 16 floats */
    TILE_TOKENS = 4,   /* rows of the widest register tile */
    MAX_CHUNK = 256,   /* more tokens gain nothing: the weights are read once per chunk */
    THREAD_NS = 15000, /* work that pays for waking a thread */
    WEIGHT_PS = 50,    /* picoseconds to read and convert one weight ... */
    PRODUCT_PS = 30,   /* ... and to multiply it with one token */
    CACHE_BYTES = 1 << 19,
};

static size_t ceil_div(size_t n, size_t d)
{
    return n / d + (n % d != 0);
}

size_t qk_cache_bytes(void)
{
    static _Atomic size_t known; /* asked once: in a virtual machine the question is slow */
    size_t bytes = atomic_load_explicit(&known, memory_order_relaxed);
    if (bytes)
        return bytes;
    bytes = CACHE_BYTES;
#ifdef _SC_LEVEL2_CACHE_SIZE
    long answer = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (answer >= CACHE_BYTES / 2)
        bytes = (size_t)answer;
#endif
    atomic_store_explicit(&known, bytes, memory_order_relaxed);
    return bytes;
}

/* Tokens whose activations, as floats, fill half the cache; the last chunk is no stump. */
static size_t choose_chunk(size_t tokens, size_t depth, size_t cache_bytes)
{
    size_t most = cache_bytes / 2 / sizeof(float) / (depth ? depth : 1);
    most = most < TILE_TOKENS ? TILE_TOKENS : most > MAX_CHUNK ? MAX_CHUNK : most;
    size_t even = ceil_div(tokens, ceil_div(tokens, most));
    return ceil_div(even, TILE_TOKENS) * TILE_TOKENS;
}

qk_linear_plan qk_plan_linear(size_t tokens, size_t features, size_t depth, size_t cache_bytes)
{
    qk_linear_plan plan = {.strip = STRIP, .chunk = choose_chunk(tokens, depth, cache_bytes)};
    plan.strips = ceil_div(features, plan.strip);
    plan.chunks = ceil_div(tokens, plan.chunk);
    size_t rows = tokens < plan.chunk ? tokens : plan.chunk;
    double piece_ns = 1e-3 * STRIP * (double)(depth + 1) * (WEIGHT_PS + PRODUCT_PS * (double)rows);
    plan.grain = (size_t)(THREAD_NS / piece_ns) + 1;
    return plan;
}
