/* Words for code that is written once and compiled for many constants. */
#ifndef QK_INLINE_H
#define QK_INLINE_H

#if defined(_MSC_VER)
#define ALWAYS_INLINE static __forceinline
#define NO_INLINE     static __declspec(noinline)
#else
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NO_INLINE     static __attribute__((noinline))
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 64")
#else
#define UNROLL
#endif
enum { NEVER = 1 << 30 }; /* more tokens than a strip has */

#define JOIN_(a, b) a##_##b
#define JOIN(a, b)  JOIN_(a, b)

#endif
