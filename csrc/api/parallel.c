/* Three back ends: torch's pool (the default when torch is loaded), our own threads, made for one
 * call and joined (on request), or the caller alone. Nothing waits between calls, so there is
 * nothing to shut down and no second pool that would fight torch's for the cores. */
#define _POSIX_C_SOURCE 200809L /* -std=c11 hides pthread_sigmask otherwise */
#include "api/parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "qk.h"

enum {
    MAX_THREADS = 1024,
    FIRST_GRAINS = 16,  /* that a thread does before the first look at the clock, */
    FIRST_ITEMS = 2,    /* or so many items, where one is a grain or any number of them */
    SLICE_NS = 20000000 /* between two questions whether to go on */
};

static _Atomic size_t own_threads; /* 0: torch's */
static _Atomic(qk_torch_for) torch_loop;
static _Atomic(qk_torch_threads) torch_count;
static _Atomic(qk_pause) pause_hook;
static _Atomic int forked; /* this process is a child whose torch pool stayed with the parent */
static _Thread_local int inside; /* this thread is running a range */

/* ---- the state of the floating-point unit (rounding, flushing of denormals) ---- */

#if defined(__x86_64__)
#include <xmmintrin.h>
typedef unsigned fp_state;
static fp_state get_fp_state(void)
{
    return _mm_getcsr();
}
static void set_fp_state(fp_state state)
{
    _mm_setcsr(state);
}
#elif defined(__aarch64__)
typedef uint64_t fp_state;
static fp_state get_fp_state(void)
{
    fp_state state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    return state;
}
static void set_fp_state(fp_state state)
{
    __asm__ volatile("msr fpcr, %0" ::"r"(state));
}
#else
typedef int fp_state;
static fp_state get_fp_state(void)
{
    return 0;
}
static void set_fp_state(fp_state state)
{
    (void)state;
}
#endif

/* ---- one call ----------------------------------------------------------- */

typedef struct job {
    qk_range_fn fn;
    void *context;
    fp_state state; /* the caller's */
    size_t begin;   /* of the items */
    size_t items, pieces;
} job;

static void run_range(const job *work, size_t first, size_t last)
{
    fp_state own = get_fp_state();
    int outer = inside;
    inside = 1;
    set_fp_state(work->state);
    work->fn(work->begin + first, work->begin + last, work->context);
    set_fp_state(own);
    inside = outer;
}

/* ---- torch's threads ---------------------------------------------------- */

static void run_torch_range(int64_t first, int64_t last, void *work)
{
    run_range(work, (size_t)first, (size_t)last);
}

static int run_on_torch(job *work, size_t grain)
{
    qk_torch_for loop = atomic_load(&torch_loop);
    return loop && !atomic_load(&forked) && work->items <= INT64_MAX && grain <= INT64_MAX &&
           loop(0, (int64_t)work->items, (int64_t)grain, run_torch_range, work) == 0;
}

static void note_fork(void)
{
    atomic_store(&forked, 1);
}

void qk_use_torch_threads(qk_torch_for loop, qk_torch_threads count)
{
    if (pthread_atfork(NULL, NULL, note_fork) != 0)
        return; /* out of memory: without the guard a forked child would hang, so stay serial */
    atomic_store(&torch_count, count);
    atomic_store(&torch_loop, loop);
}

/* ---- our own threads ---------------------------------------------------- */

typedef struct worker {
    const job *work;
    size_t index;
    pthread_t thread;
    int started;
} worker;

/* The first items % pieces pieces have one item more. */
static void run_piece(const job *work, size_t index)
{
    size_t size = work->items / work->pieces, longer = work->items % work->pieces;
    size_t first = index * size + (index < longer ? index : longer);
    run_range(work, first, first + size + (index < longer));
}

static void *run_worker(void *argument)
{
    const worker *self = argument;
    run_piece(self->work, self->index);
    return NULL;
}

/* A piece whose thread cannot be had is run by the caller. */
static void run_on_own(const job *work)
{
    worker workers[MAX_THREADS];
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the program's own threads */
    for (size_t i = 1; i < work->pieces; i++) {
        workers[i].work = work;
        workers[i].index = i;
        workers[i].started = pthread_create(&workers[i].thread, NULL, run_worker, &workers[i]) == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    run_piece(work, 0);
    for (size_t i = 1; i < work->pieces; i++) {
        if (workers[i].started)
            pthread_join(workers[i].thread, NULL);
        else
            run_piece(work, i);
    }
}

/* ---- the public calls --------------------------------------------------- */

static void run_items(job *work, size_t grain)
{
    size_t own = atomic_load(&own_threads), shares = work->items / grain;
    shares += work->items % grain != 0;
    work->pieces = own < shares ? own : shares;
    if (!inside && shares > 1) {
        if (own > 1) {
            run_on_own(work);
            return;
        }
        if (own == 0 && run_on_torch(work, grain))
            return;
    }
    work->fn(work->begin, work->begin + work->items, work->context);
}

static double now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e9 * (double)now.tv_sec + (double)now.tv_nsec;
}

int qk_parallel_for(size_t items, size_t grain, qk_range_fn fn, void *context)
{
    size_t first = grain > SIZE_MAX / FIRST_GRAINS ? grain : FIRST_GRAINS * grain;
    return qk_parallel_slices(items, grain, grain > 1 ? first : FIRST_ITEMS, fn, context);
}

int qk_parallel_slices(size_t items, size_t grain, size_t first, qk_range_fn fn, void *context)
{
    qk_pause pause = inside ? NULL : atomic_load(&pause_hook);
    grain = grain ? grain : 1;
    size_t threads = qk_get_threads(), least = 1, slice = items;
    if (pause && first >= grain && first < items / threads) {
        least = threads * grain;
        slice = threads * first;
    }
    job work = {fn, context, get_fp_state(), 0, 0, 0};
    for (; work.begin < items; work.begin += work.items) {
        size_t left = items - work.begin;
        work.items = slice < left ? slice : left;
        if (work.items == left) {
            run_items(&work, grain);
            continue;
        }
        double start = now_ns();
        run_items(&work, grain);
        double spent = now_ns() - start, share = (double)work.items * SLICE_NS / (spent + 1);
        if (spent > SLICE_NS / 4 && pause())
            return 0;
        slice = share < (double)left ? (size_t)share : left;
        slice = slice < least ? least : slice / least * least;
    }
    return 1;
}

void qk_use_pause(qk_pause pause)
{
    atomic_store(&pause_hook, pause);
}

void qk_set_threads(size_t threads)
{
    atomic_store(&own_threads, threads < MAX_THREADS ? threads : MAX_THREADS);
}

size_t qk_get_threads(void)
{
    size_t own = atomic_load(&own_threads);
    qk_torch_threads count = atomic_load(&torch_count);
    uint32_t threads;
    if (own)
        return own;
    return count && !atomic_load(&forked) && count(&threads) == 0 ? threads : 1;
}
