/* What the machine can do at best: the speed of memory and of arithmetic, by themselves.
 *
 * Compiled by benchmarks/limits.py with the system's C compiler, one plain command for every CPU:
 * each instruction set is opened by a function attribute. Threads start together, warm up, and
 * are timed from the first start to the last end.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MAX_THREADS 256

/* One thread's part of a job. Buffers belong to the caller. */
struct share {
    const char *src;
    size_t src_bytes;
    char *dst;
    size_t dst_bytes;
    size_t passes;         /* over the buffers, or rounds of all chains */
    size_t ahead;          /* bytes between a load and its prefetch; 0: none */
    size_t streams;        /* read: 1, or 4 quarters side by side */
    size_t read, write;    /* mix: bytes of a step, multiples of 64 */
    int non_temporal;      /* mix: stores go past the caches */
    volatile float sink_f; /* keep results alive */
    volatile int64_t sink_i;
    double start, end;
};

typedef void work(struct share *);

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- threads -------------------------------------------------------------- */

struct runner {
    work *fn;
    struct share *share;
    atomic_int *waiting;
};

static void *run_one(void *context)
{
    struct runner *r = context;
    size_t passes = r->share->passes;
    r->share->passes = 1; /* the warm-up: caches, pages, clock */
    r->fn(r->share);
    r->share->passes = passes;
    atomic_fetch_sub(r->waiting, 1);
    while (atomic_load(r->waiting) > 0)
        sched_yield();
    r->share->start = now();
    r->fn(r->share);
    r->share->end = now();
    return NULL;
}

/* Seconds that all shares take side by side; negative if threads cannot be had. */
static double run(work *fn, struct share *shares, int threads)
{
    pthread_t ids[MAX_THREADS];
    struct runner runners[MAX_THREADS];
    atomic_int waiting = threads;
    int started = 1;
    for (int t = 0; t < threads; t++)
        runners[t] = (struct runner){fn, &shares[t], &waiting};
    for (; started < threads; started++)
        if (pthread_create(&ids[started], NULL, run_one, &runners[started]) != 0)
            break;
    if (started < threads)
        atomic_store(&waiting, 0); /* let those go that did start */
    run_one(&runners[0]);
    double first = shares[0].start, last = shares[0].end;
    for (int t = 1; t < started; t++) {
        pthread_join(ids[t], NULL);
        first = shares[t].start < first ? shares[t].start : first;
        last = shares[t].end > last ? shares[t].end : last;
    }
    return started < threads ? -1.0 : last - first;
}

/* ---- memory: one body, compiled for each vector width --------------------- */

typedef int64_t vec16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef int64_t vec32 __attribute__((vector_size(32), aligned(1), may_alias));
typedef int64_t vec64 __attribute__((vector_size(64), aligned(1), may_alias));

#define STORE_PLAIN(V, to, value) (*(V *)(to) = (value))
#if defined(__x86_64__)
#define STREAM16(V, to, value) _mm_stream_si128((__m128i *)(to), (__m128i)(value))
#define STREAM32(V, to, value) _mm256_stream_si256((__m256i *)(to), (__m256i)(value))
#define STREAM64(V, to, value) _mm512_stream_si512((__m512i *)(to), (__m512i)(value))
#else
#define STREAM16 STORE_PLAIN
#endif

/* Sum of 256 bytes at p. */
#define SUM256(V, sums, p)                                                                         \
    for (size_t j = 0; j < 256; j += 4 * sizeof(V)) {                                              \
        sums[0] += *(const V *)((p) + j);                                                          \
        sums[1] ^= *(const V *)((p) + j + sizeof(V));                                              \
        sums[2] += *(const V *)((p) + j + 2 * sizeof(V));                                          \
        sums[3] ^= *(const V *)((p) + j + 3 * sizeof(V));                                          \
    }

#define FETCH256(p, ahead)                                                                         \
    if (ahead)                                                                                     \
        for (size_t j = 0; j < 256; j += 64)                                                       \
            __builtin_prefetch((p) + (ahead) + j, 0, 3);

#define DEFINE_MEMORY(isa, V, STREAM, attribute)                                                   \
    attribute static void read_##isa(struct share *s)                                              \
    {                                                                                              \
        V sums[4] = {{0}, {0}, {0}, {0}};                                                          \
        const size_t streams = s->streams, part = s->src_bytes / streams / 256 * 256;              \
        const size_t ahead = s->ahead;                                                             \
        for (size_t pass = 0; pass < s->passes; pass++) {                                          \
            __asm__ volatile("" ::: "memory");                                                     \
            for (size_t i = 0; i < part; i += 256)                                                 \
                for (size_t k = 0; k < streams; k++) {                                             \
                    const char *p = s->src + k * part + i;                                         \
                    FETCH256(p, ahead)                                                             \
                    SUM256(V, sums, p)                                                             \
                }                                                                                  \
        }                                                                                          \
        V sum = sums[0] + sums[1] + sums[2] + sums[3];                                             \
        s->sink_i = sum[0] + sum[1];                                                               \
    }                                                                                              \
    attribute static void mix_##isa(struct share *s)                                               \
    {                                                                                              \
        V sums[4] = {{0}, {0}, {0}, {0}};                                                          \
        const size_t steps = s->src_bytes / s->read, ahead = s->ahead;                             \
        for (size_t pass = 0; pass < s->passes; pass++)                                            \
            for (size_t step = 0; step < steps; step++) {                                          \
                const char *p = s->src + step * s->read;                                           \
                char *q = s->dst + step * s->write;                                                \
                for (size_t i = 0; i < s->read; i += 256) {                                        \
                    FETCH256(p + i, ahead)                                                         \
                    SUM256(V, sums, p + i)                                                         \
                }                                                                                  \
                if (s->non_temporal)                                                               \
                    for (size_t i = 0; i < s->write; i += sizeof(V))                               \
                        STREAM(V, q + i, sums[0]);                                                 \
                else                                                                               \
                    for (size_t i = 0; i < s->write; i += sizeof(V))                               \
                        STORE_PLAIN(V, q + i, sums[0]);                                            \
            }                                                                                      \
        V sum = sums[0] + sums[1] + sums[2] + sums[3];                                             \
        s->sink_i = sum[0] + sum[1];                                                               \
    }

/* One byte of each page, but not in the warm-up: the first touch is what costs. */
static void touch_pages(struct share *s)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (s->streams++ > 0)
        for (size_t i = 0; i < s->dst_bytes; i += page)
            s->dst[i] = 1;
}

/* ---- arithmetic: independent chains, so that latency hides ---------------- */

#define DEFINE_FMA(isa, bytes, chains, attribute)                                                  \
    attribute static void fma_##isa(struct share *s)                                               \
    {                                                                                              \
        typedef float V __attribute__((vector_size(bytes)));                                       \
        V c[chains], x = {0}, y = {0};                                                             \
        x += 0.9999f; /* the sums settle at 1e-5: no overflow, no subnormal */                     \
        y += 1e-9f;                                                                                \
        for (int i = 0; i < chains; i++)                                                           \
            c[i] = x * (float)i;                                                                   \
        for (size_t pass = 0; pass < s->passes; pass++)                                            \
            for (int round = 0; round < 1000; round++)                                             \
                _Pragma("GCC unroll 16") for (int i = 0; i < chains; i++) c[i] = c[i] * x + y;     \
        V sum = c[0];                                                                              \
        for (int i = 1; i < chains; i++)                                                           \
            sum += c[i];                                                                           \
        s->sink_f = sum[0] + sum[1];                                                               \
    }                                                                                              \
    enum { fma_flops_##isa = 1000 * (chains) * ((bytes) / 4) * 2 };

#define NO_ATTRIBUTE
DEFINE_MEMORY(generic, vec16, STREAM16, NO_ATTRIBUTE)
DEFINE_FMA(generic, 16, 12, NO_ATTRIBUTE)

#if defined(__x86_64__)
#define AVX2   __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,fma,prefer-vector-width=512")))
DEFINE_MEMORY(avx2, vec32, STREAM32, AVX2)
DEFINE_MEMORY(avx512, vec64, STREAM64, AVX512)
DEFINE_FMA(avx2, 32, 12, AVX2)
DEFINE_FMA(avx512, 64, 16, AVX512)

__attribute__((target("avx512f,avx512bf16"))) static void dot_bf16(struct share *s)
{
    __m512 c[16];
    __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = (__m512bh)_mm512_set1_epi16(0x2f80);
    for (int i = 0; i < 16; i++)
        c[i] = _mm512_set1_ps((float)i);
    for (size_t pass = 0; pass < s->passes; pass++)
        for (int round = 0; round < 1000; round++)
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) c[i] =
                _mm512_dpbf16_ps(c[i], x, y);
    for (int i = 1; i < 16; i++)
        c[0] = _mm512_add_ps(c[0], c[i]);
    s->sink_f = _mm512_reduce_add_ps(c[0]);
}
#endif

/* ---- what limits.py calls -------------------------------------------------- */

enum { KERNELS = 4 };
static const struct kernel {
    const char *name;
    work *read, *mix, *fma;
    double flops; /* of one pass of fma */
} kernels[KERNELS] = {
#if defined(__x86_64__)
    {"dpbf16", NULL, NULL, dot_bf16, 1000.0 * 16 * 32 * 2},
    {"avx512", read_avx512, mix_avx512, fma_avx512, fma_flops_avx512},
    {"avx2", read_avx2, mix_avx2, fma_avx2, fma_flops_avx2},
#elif defined(__aarch64__)
    {"neon", read_generic, mix_generic, fma_generic, fma_flops_generic},
#endif
    {"generic", read_generic, mix_generic, fma_generic, fma_flops_generic},
};

static int supported(const char *name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (strcmp(name, "dpbf16") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16");
    if (strcmp(name, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (strcmp(name, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return name != NULL;
}

/* Name of the index-th set of loops that this CPU runs, best first; NULL past the end. */
const char *limit_name(int index)
{
    for (int k = 0; k < KERNELS; k++)
        if (kernels[k].name && supported(kernels[k].name) && index-- == 0)
            return kernels[k].name;
    return NULL;
}

static const struct kernel *find(const char *name)
{
    for (int k = 0; k < KERNELS; k++)
        if (kernels[k].name && strcmp(kernels[k].name, name) == 0 && supported(name))
            return &kernels[k];
    return NULL;
}

/* Seconds of `passes` reads of a buffer, cut among the threads; negative on a wrong argument. */
double limit_read(const char *name, const char *src, size_t bytes, int threads, size_t passes,
                  size_t ahead, size_t streams)
{
    struct share shares[MAX_THREADS];
    const struct kernel *kernel = find(name);
    size_t part = bytes / (size_t)threads / 1024 * 1024;
    if (!kernel || !kernel->read || threads < 1 || threads > MAX_THREADS)
        return -1.0;
    for (int t = 0; t < threads; t++)
        shares[t] = (struct share){.src = src + (size_t)t * part,
                                   .src_bytes = part,
                                   .passes = passes,
                                   .ahead = ahead,
                                   .streams = streams};
    double seconds = run(kernel->read, shares, threads);
    return seconds * (double)bytes / (double)(part * (size_t)threads);
}

/* Seconds of one pass that reads `steps` times `read` bytes and writes `steps` times `write`. */
double limit_mix(const char *name, const char *src, char *dst, size_t steps, size_t read,
                 size_t write, int threads, size_t ahead, int non_temporal)
{
    struct share shares[MAX_THREADS];
    const struct kernel *kernel = find(name);
    size_t part = steps / (size_t)threads;
    if (!kernel || !kernel->mix || threads < 1 || threads > MAX_THREADS || part == 0)
        return -1.0;
    for (int t = 0; t < threads; t++)
        shares[t] = (struct share){.src = src + (size_t)t * part * read,
                                   .src_bytes = part * read,
                                   .dst = dst + (size_t)t * part * write,
                                   .dst_bytes = part * write,
                                   .passes = 1,
                                   .ahead = ahead,
                                   .read = read,
                                   .write = write,
                                   .non_temporal = non_temporal};
    double seconds = run(kernel->mix, shares, threads);
    return seconds * (double)steps / (double)(part * (size_t)threads);
}

/* Seconds to touch memory that is new to the process, in huge pages if asked for and granted;
 * negative if it cannot be had. */
double limit_touch(size_t bytes, int threads, int is_huge)
{
    struct share shares[MAX_THREADS];
    if (threads < 1 || threads > MAX_THREADS)
        return -1.0;
    char *fresh = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED)
        return -1.0;
#ifdef MADV_HUGEPAGE
    if (is_huge)
        madvise(fresh, bytes, MADV_HUGEPAGE);
#else
    (void)is_huge;
#endif
    size_t part = bytes / (size_t)threads / 65536 * 65536;
    for (int t = 0; t < threads; t++)
        shares[t] = (struct share){.dst = fresh + (size_t)t * part,
                                   .dst_bytes = t + 1 < threads ? part : bytes - (size_t)t * part};
    double seconds = run(touch_pages, shares, threads);
    munmap(fresh, bytes);
    return seconds;
}

/* Floating point operations a second that the threads reach together; negative on an error. */
double limit_flops(const char *name, int threads, size_t passes)
{
    struct share shares[MAX_THREADS];
    const struct kernel *kernel = find(name);
    if (!kernel || threads < 1 || threads > MAX_THREADS)
        return -1.0;
    for (int t = 0; t < threads; t++)
        shares[t] = (struct share){.passes = passes};
    double seconds = run(kernel->fma, shares, threads);
    return seconds > 0 ? kernel->flops * (double)passes * threads / seconds : -1.0;
}
