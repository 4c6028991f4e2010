/* What the files of the public calls (api_*.c) share: checks, nothing else. */
#ifndef QK_API_H
#define QK_API_H

#include "qk.h"

#define QK_REQUIRE(condition, status)                                                              \
    do {                                                                                           \
        if (!(condition))                                                                          \
            return (status);                                                                       \
    } while (0)

static inline int qk_is_source(qk_dtype dtype) /* float32, float64, float16, bfloat16 */
{
    return (unsigned)dtype <= QK_BFLOAT16;
}

static inline int qk_is_integer(qk_dtype dtype)
{
    return dtype == QK_INT8 || dtype == QK_UINT8 || dtype == QK_INT16;
}

static inline size_t qk_ceil_div(size_t n, size_t d)
{
    return n / d + (n % d != 0);
}

/* *product = a * b; 0 when it does not fit. */
static inline int qk_multiply(size_t a, size_t b, size_t *product)
{
    *product = a * b;
    return a == 0 || *product / a == b;
}

static inline int qk_overlap(const void *a, size_t a_bytes, const void *b, size_t b_bytes)
{
    uintptr_t p = (uintptr_t)a, q = (uintptr_t)b;
    return a && b && p < q + b_bytes && q < p + a_bytes;
}

/* The arrays of a call, to be checked for overlap: the outputs come first. */
typedef struct qk_span {
    const void *data;
    size_t bytes;
} qk_span;

static inline int qk_are_apart(const qk_span *spans, size_t outputs, size_t count)
{
    for (size_t i = 0; i < outputs; i++)
        for (size_t j = i + 1; j < count; j++)
            if (qk_overlap(spans[i].data, spans[i].bytes, spans[j].data, spans[j].bytes))
                return 0;
    return 1;
}

#endif
