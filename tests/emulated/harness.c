#include "harness.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/scalar.h"

enum { PAGE = 1 << 16, FILL = 0xA5, MARGIN = 128, SHOWN = 10 };

tally counts;
const qk_kernels *tested, *reference;

static uint64_t state;
static int guard_pages = 1;
static char slot_text[64], case_text[256];

void seed_random(uint64_t seed)
{
    state = seed;
}

uint64_t random_bits(void) /* splitmix64 (Steele, Lea, Flood, 2014) */
{
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

size_t random_below(size_t limit)
{
    return (size_t)(random_bits() % limit);
}

double random_unit(void)
{
    return (double)(random_bits() >> 11) * 0x1p-53;
}

size_t awkward_length(size_t index)
{
    static const size_t longer[] = {255, 256, 257, 1000, 4099};
    return index < SHORT_LENGTHS ? index + 1 : longer[index - SHORT_LENGTHS];
}

void use_guard_pages(int yes)
{
    guard_pages = yes;
}

static void make_region(region *where)
{
    unsigned char *base =
        mmap(NULL, ROOM + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    if (guard_pages) {
        mprotect(base, PAGE, PROT_NONE);
        mprotect(base + PAGE + ROOM, PAGE, PROT_NONE);
    }
    where->first = base + PAGE;
    where->last = where->first + ROOM;
}

/* The part of the region near its data whose bytes are watched. */
static unsigned char *watched_first(const region *where)
{
    return where->data - where->first > MARGIN ? where->data - MARGIN : where->first;
}

static unsigned char *watched_last(const region *where)
{
    unsigned char *end = where->data + where->bytes;
    return where->last - end > MARGIN ? end + MARGIN : where->last;
}

static void *place_at(region *where, size_t bytes, size_t spot)
{
    if (!where->first)
        make_region(where);
    if (bytes + 64 > ROOM) {
        fprintf(stderr, "harness: %zu bytes do not fit a region\n", bytes);
        exit(2);
    }
    where->bytes = bytes;
    where->data = spot < 64 ? where->first + spot : where->last - bytes;
    unsigned char *first = watched_first(where);
    memset(first, FILL, (size_t)(watched_last(where) - first));
    return where->data;
}

void *place(region *where, size_t bytes)
{
    return place_at(where, bytes, random_below(128));
}

void *place_random(region *where, size_t bytes)
{
    unsigned char *data = place(where, bytes);
    for (size_t i = 0; i < bytes; i++)
        data[i] = (unsigned char)(random_bits() >> 56);
    return data;
}

void place_output(output *out, size_t bytes, int old)
{
    size_t spot = random_below(128);
    memset(place_at(&out->expected, bytes, spot), old, bytes);
    memset(place_at(&out->actual, bytes, spot), old, bytes);
}

void begin_subject(const char *name)
{
    uint64_t seed = 0;
    snprintf(slot_text, sizeof slot_text, "%s", name);
    for (const char *c = slot_text; *c; c++)
        seed = seed * 131 + (unsigned char)*c;
    seed_random(seed);
}

int begin_slot(const char *slot, int first, int second, any_fn kernel, any_fn definition)
{
    char name[sizeof slot_text];
    if (!definition) {
        counts.empty++;
        return 0;
    }
    if (kernel == definition && tested != reference) {
        counts.inherited++;
        return 0;
    }
    counts.own++;
    snprintf(name, sizeof name, second < 0 ? "%s[%d]" : "%s[%d][%d]", slot, first, second);
    begin_subject(name);
    return 1;
}

void begin_case(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(case_text, sizeof case_text, format, args);
    va_end(args);
    counts.cases++;
}

void fail(const char *format, ...)
{
    va_list args;
    if (counts.failures++ >= SHOWN)
        return;
    printf("  FAILED %s %s: ", slot_text, case_text);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
}

void expect_guards(const region *where)
{
    const unsigned char *end = watched_last(where);
    for (const unsigned char *p = watched_first(where); p < end; p++) {
        if (p == where->data)
            p += where->bytes;
        if (p < end && *p != FILL) {
            fail("byte %td from the output's start was overwritten", p - where->data);
            return;
        }
    }
}

static uint64_t element(const unsigned char *data, size_t bytes, size_t index)
{
    uint64_t bits = 0;
    for (size_t b = bytes; b-- > 0;)
        bits = bits << 8 | data[index * bytes + b];
    return bits;
}

/* Exponent all ones and a mantissa: NaN, in every float type but float8_e4m3fn's one NaN. */
static int is_nan(uint64_t bits, qk_dtype dtype)
{
    static const uint64_t infinity[QK_DTYPES] = {
        [QK_FLOAT32] = 0x7f800000, [QK_FLOAT64] = 0x7ff0000000000000, [QK_FLOAT16] = 0x7c00,
        [QK_BFLOAT16] = 0x7f80,    [QK_FLOAT8_E4M3FN] = 0x7e,         [QK_FLOAT8_E5M2] = 0x7c,
    };
    uint64_t sign = (uint64_t)1 << (8 * qk_dtype_bytes(dtype) - 1);
    return infinity[dtype] && (bits & ~sign) > infinity[dtype];
}

static void expect_elements(output *out, qk_dtype dtype, int one_zero)
{
    size_t bytes = qk_dtype_bytes(dtype), count = out->expected.bytes / bytes;
    uint64_t sign = (uint64_t)1 << (8 * bytes - 1);
    expect_guards(&out->expected);
    expect_guards(&out->actual);
    for (size_t i = 0; i < count; i++) {
        uint64_t want = element(out->expected.data, bytes, i);
        uint64_t have = element(out->actual.data, bytes, i);
        int nan = is_nan(want, dtype);
        if (one_zero && want == sign)
            want = 0;
        counts.digest = (counts.digest ^ (nan ? 1 : want)) * 0x100000001b3u;
        if (want == have || (nan && is_nan(have, dtype)) || (one_zero && want == 0 && have == sign))
            continue;
        fail("element %zu of %zu: 0x%llx, the reference gives 0x%llx (%s)", i, count,
             (unsigned long long)have, (unsigned long long)want, dtype_name(dtype));
        return;
    }
}

void expect_equal(output *out, qk_dtype dtype)
{
    expect_elements(out, dtype, 0);
}

void expect_same_values(output *out, qk_dtype dtype)
{
    expect_elements(out, dtype, 1);
}

const char *dtype_name(qk_dtype dtype)
{
    static const char *const names[QK_DTYPES] = {
        [QK_FLOAT32] = "float32",   [QK_FLOAT64] = "float64",      [QK_FLOAT16] = "float16",
        [QK_BFLOAT16] = "bfloat16", [QK_FLOAT8_E4M3FN] = "e4m3fn", [QK_FLOAT8_E5M2] = "e5m2",
        [QK_INT8] = "int8",         [QK_UINT8] = "uint8",          [QK_INT16] = "int16",
    };
    return names[dtype];
}

double finite_max(qk_dtype dtype)
{
    static const double max[QK_DTYPES] = {
        [QK_FLOAT32] = 0x1.fffffep127, [QK_FLOAT64] = 0x1.fffffffffffffp1023,
        [QK_FLOAT16] = 65504,          [QK_BFLOAT16] = 0x1.fep127,
        [QK_FLOAT8_E4M3FN] = 448,      [QK_FLOAT8_E5M2] = 57344,
    };
    return max[dtype];
}

static void on_fault(int signal_number)
{
    static const char text[] = "  FAULT in ";
    ssize_t written = write(1, text, sizeof text - 1);
    written += write(1, slot_text, strlen(slot_text));
    written += write(1, " ", 1);
    written += write(1, case_text, strlen(case_text));
    written += write(1, "\n", 1);
    _exit(written > 0 ? 128 + signal_number : 1);
}

void show_faults(void)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        signal(signals[i], on_fault);
}
