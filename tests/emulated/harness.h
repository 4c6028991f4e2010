/* Runs every kernel of every instruction set this CPU has against the reference table
 * (in the manner of dav1d's checkasm), without Python: one static program, for emulators.
 *
 * Each output is made twice, by the reference and by the kernel under test, at the same place
 * between bytes that must survive; inputs and outputs end or begin at a page that faults. */
#ifndef QK_HARNESS_H
#define QK_HARNESS_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

/* ---- numbers that are the same on every machine -------------------------- */

void seed_random(uint64_t seed);
uint64_t random_bits(void);
size_t random_below(size_t limit); /* 0 .. limit-1 */
double random_unit(void);          /* [0, 1) */

/* Lengths 1..130, then a few longer ones. */
enum { SHORT_LENGTHS = 130, AWKWARD_LENGTHS = 135 };
size_t awkward_length(size_t index);

/* ---- memory between guards ------------------------------------------------ */

typedef struct region {
    unsigned char *first, *last; /* usable memory [first, last); faults just outside of it */
    unsigned char *data;         /* what place() returned */
    size_t bytes;
} region;

enum { ROOM = 1 << 21 }; /* bytes of a region, and the most that place() can give */

void show_faults(void);        /* a fatal signal names the slot and the case */
void use_guard_pages(int yes); /* before the first region is made */

/* `bytes` of memory surrounded by 0xA5: either the last ones before a faulting page, or 0..63
 * bytes behind one, so every alignment occurs. */
void *place(region *where, size_t bytes);
void *place_random(region *where, size_t bytes); /* filled with random bytes */

typedef struct output {
    region expected, actual; /* of the reference, of the kernel under test */
} output;

/* Both sides at the same offset, filled with the same `old` byte. */
void place_output(output *out, size_t bytes, int old);

/* ---- slots, cases, failures ----------------------------------------------- */

typedef void (*any_fn)(void);

typedef struct tally {
    size_t cases, failures, own, inherited, empty;
    uint64_t digest; /* of all that the reference made, linear's floats excepted */
} tally;

extern tally counts;
extern const qk_kernels *tested, *reference; /* the same table when `reference` is tested */

/* Name what is checked next, and seed the random numbers from the name. */
void begin_subject(const char *name);
/* The same for a slot: 1 when the tested table has a kernel of its own there. */
int begin_slot(const char *slot, int first, int second, any_fn kernel, any_fn definition);
/* Announce a case; the text is shown if the case fails or faults. */
void begin_case(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Bytes around both sides of `out` untouched, and the sides equal: bit for bit, except that one
 * NaN is as good as another. */
void expect_equal(output *out, qk_dtype dtype);
/* The same by value (-0 equals +0). */
void expect_same_values(output *out, qk_dtype dtype);
void expect_guards(const region *where);

const char *dtype_name(qk_dtype dtype);
double finite_max(qk_dtype dtype); /* of a float type */

/* Put a kernel with the named flaw (value, overrun, overread) into a table; 0: no such flaw. */
int apply_flaw(qk_kernels *table, const char *name);

void check_quantize(void); /* range, magnitude, encode, decode */
void check_fit(void);      /* fit */
void check_pack(void);     /* pack_*, unpack_* */
void check_linear(void);   /* linear, linear_backward */
void check_packed(void);   /* linear_packed, linear_packed_backward */
void check_calls(void);    /* qk.h: the same bits for every thread count */

#endif
