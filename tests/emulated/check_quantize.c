#include <float.h>
#include <math.h>

#include "harness.h"
#include "kernels/scalar.h"

enum { REPEATS = 2 };

static region source_region, scale_region, zero_region, code_region;
static output result, second_result;

static size_t runs_of(size_t count, size_t run)
{
    return count / run + (count % run != 0);
}

static size_t random_run(size_t count)
{
    static const size_t runs[] = {1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 100};
    switch (random_below(4)) {
    case 0:
        return count;
    case 1:
        return count + random_below(70);
    case 2:
        return 1 + random_below(40);
    default:
        return runs[random_below(sizeof runs / sizeof *runs)];
    }
}

/* Lines of that length, most often one, with or without something between them. */
static qk_lines random_lines(size_t count)
{
    qk_lines lines = {1, count, count, random_run(count)};
    if (random_below(3) == 0)
        lines.run = 1;
    if (random_below(2)) {
        lines.lines += random_below(18);
        lines.stride += random_below(2) ? random_below(40) : 0;
    }
    return lines;
}

/* Elements from the first to the last. */
static size_t span_of(const qk_lines *lines)
{
    return (lines->lines - 1) * lines->stride + lines->count;
}

static qk_dtype compute_type(qk_dtype source)
{
    return source == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32;
}

/* Multiples and half multiples of `scale` (ties), ordinary, tiny and huge numbers, zeros and, one
 * in 32 each, an infinity and a NaN. */
static double random_number(qk_dtype dtype, double scale, int finite)
{
    double sign = random_below(2) ? -1 : 1;
    switch (random_below(finite ? 30 : 32)) {
    case 30:
        return (double)NAN;
    case 31:
        return sign * (double)INFINITY;
    case 0:
        return sign * 0.0;
    case 1:
        return sign * finite_max(dtype) * random_unit();
    case 2:
        return sign * (dtype == QK_FLOAT64 ? DBL_MIN : FLT_MIN) * random_unit();
    case 3:
        return sign * (dtype == QK_FLOAT16 ? 0x1p-24 : 1e-30) * random_unit();
    default:
        break;
    }
    double code = sign * (double)random_below(140);
    switch (random_below(3)) {
    case 0:
        return code * scale;
    case 1:
        return (code + 0.5) * scale;
    default:
        return (code + random_unit()) * scale;
    }
}

static void fill_source(qk_dtype dtype, size_t count, double scale, int finite)
{
    void *source = place(&source_region, count * qk_dtype_bytes(dtype));
    for (size_t i = 0; i < count; i++)
        qk_store_source(source, i, dtype, random_number(dtype, scale, finite));
}

static void store_compute(void *array, size_t index, qk_dtype compute, double value)
{
    qk_store_source(array, index, compute, value);
}

/* ---- range and magnitude --------------------------------------------------- */

/* Earlier ranges to be widened: mostly empty ones, some full, some already NaN. */
static void fill_range(output *out, size_t runs, qk_dtype compute, double empty)
{
    for (size_t i = 0; i < runs; i++) {
        double value = empty;
        if (random_below(4) == 0)
            value = random_unit() - 0.5;
        if (random_below(40) == 0)
            value = (double)NAN;
        store_compute(out->expected.data, i, compute, value);
        store_compute(out->actual.data, i, compute, value);
    }
}

static void check_range(qk_dtype dtype)
{
    qk_dtype compute = compute_type(dtype);
    if (!begin_slot("range", (int)dtype, -1, (any_fn)tested->range[dtype],
                    (any_fn)reference->range[dtype]))
        return;
    for (size_t i = 0; i < REPEATS * AWKWARD_LENGTHS; i++) {
        qk_lines lines = random_lines(awkward_length(i % AWKWARD_LENGTHS));
        size_t runs = runs_of(lines.count, lines.run);
        begin_case("lines %zu stride %zu count %zu run %zu", lines.lines, lines.stride, lines.count,
                   lines.run);
        fill_source(dtype, span_of(&lines), 0.25, random_below(4) != 0);
        place_output(&result, runs * qk_dtype_bytes(compute), 0);
        place_output(&second_result, runs * qk_dtype_bytes(compute), 0);
        fill_range(&result, runs, compute, (double)INFINITY);
        fill_range(&second_result, runs, compute, -(double)INFINITY);
        reference->range[dtype](result.expected.data, second_result.expected.data,
                                source_region.data, &lines);
        tested->range[dtype](result.actual.data, second_result.actual.data, source_region.data,
                             &lines);
        expect_same_values(&second_result, compute);
        /* low of a run with a NaN is not promised: compare it where high is a number. */
        for (size_t r = 0; r < runs; r++)
            if (isnan(qk_load_source(second_result.expected.data, r, compute))) {
                store_compute(result.expected.data, r, compute, 0);
                store_compute(result.actual.data, r, compute, 0);
            }
        expect_same_values(&result, compute);
    }
}

static void check_magnitude(qk_dtype dtype)
{
    if (!begin_slot("magnitude", (int)dtype, -1, (any_fn)tested->magnitude[dtype],
                    (any_fn)reference->magnitude[dtype]))
        return;
    for (size_t i = 0; i < REPEATS * AWKWARD_LENGTHS; i++) {
        size_t count = awkward_length(i % AWKWARD_LENGTHS), run = random_run(count);
        size_t runs = runs_of(count, run);
        begin_case("count %zu run %zu", count, run);
        fill_source(dtype, count, 0.1, random_below(4) != 0);
        place_output(&result, runs * sizeof(double), 0);
        for (size_t r = 0; r < runs; r++) {
            double sum = random_below(2) ? 0 : random_unit();
            qk_store_float64(result.expected.data, r, sum);
            qk_store_float64(result.actual.data, r, sum);
        }
        reference->magnitude[dtype]((double *)(void *)result.expected.data, source_region.data,
                                    count, run);
        tested->magnitude[dtype]((double *)(void *)result.actual.data, source_region.data, count,
                                 run);
        expect_equal(&result, QK_FLOAT64);
    }
}

/* ---- encode and decode ------------------------------------------------------ */

static int is_float(qk_dtype dtype)
{
    return dtype <= QK_FLOAT8_E5M2;
}

/* The code range of a random width that `code` stores. */
static void random_codes(qk_spec *spec)
{
    size_t bits = spec->code == QK_INT16 ? 16 : 2 + random_below(7);
    double half = ldexp(1, (int)bits - 1);
    spec->mode = random_below(2) ? QK_ASYMMETRIC : QK_SYMMETRIC;
    if (is_float(spec->code)) {
        spec->mode = QK_SYMMETRIC;
        spec->code_max = finite_max(spec->code);
        spec->code_min = -spec->code_max;
    } else if (spec->code == QK_UINT8) {
        spec->code_min = 0;
        spec->code_max = 2 * half - 1;
    } else {
        spec->code_min = random_below(2) ? -half : 1 - half;
        spec->code_max = half - 1;
        if (spec->code == QK_INT8 && random_below(8) == 0) {
            spec->mode = QK_BINARY;
            spec->code_min = -1;
            spec->code_max = 1;
        }
    }
}

static void fill_scales(size_t runs, qk_dtype compute, double scale)
{
    void *scales = place(&scale_region, runs * qk_dtype_bytes(compute));
    for (size_t r = 0; r < runs; r++) {
        double value = random_below(2) ? scale : scale * (0.5 + random_unit());
        if (random_below(24) == 0)
            value = random_below(2) ? 0 : (double)NAN;
        else if (random_below(24) == 0)
            value = random_below(2) ? (double)FLT_MIN / 64 : 1e30;
        store_compute(scales, r, compute, value);
    }
}

static const int32_t *fill_zeros(size_t runs, double low, double high)
{
    void *zeros = place(&zero_region, runs * sizeof(int32_t));
    for (size_t r = 0; r < runs; r++)
        qk_store_int32(zeros, r, (int32_t)(low + floor(random_unit() * (high - low + 1))));
    return zeros;
}

static void check_encode(qk_dtype source, qk_dtype code)
{
    if (!begin_slot("encode", (int)source, (int)code, (any_fn)tested->encode[source][code],
                    (any_fn)reference->encode[source][code]))
        return;
    qk_dtype compute = compute_type(source);
    for (size_t i = 0; i < REPEATS * AWKWARD_LENGTHS; i++) {
        qk_lines lines = random_lines(awkward_length(i % AWKWARD_LENGTHS));
        size_t runs = runs_of(lines.count, lines.run);
        qk_spec spec = {.source = source, .code = code, .scale = compute};
        random_codes(&spec);
        begin_case("lines %zu stride %zu count %zu run %zu mode %d codes %g..%g", lines.lines,
                   lines.stride, lines.count, lines.run, (int)spec.mode, spec.code_min,
                   spec.code_max);
        double scale = random_below(2) ? 0x1p-5 : 0.01 + random_unit();
        fill_source(source, span_of(&lines), scale, random_below(4) != 0);
        fill_scales(runs, compute, scale);
        const int32_t *zero = NULL;
        if (spec.mode == QK_ASYMMETRIC)
            zero = fill_zeros(runs, spec.code_min, spec.code_max);
        place_output(&result, span_of(&lines) * qk_dtype_bytes(code), 0x5A);
        reference->encode[source][code](result.expected.data, source_region.data, &lines,
                                        scale_region.data, zero, &spec);
        tested->encode[source][code](result.actual.data, source_region.data, &lines,
                                     scale_region.data, zero, &spec);
        expect_equal(&result, code);
    }
}

static void check_decode(qk_dtype code, qk_dtype out)
{
    if (!begin_slot("decode", (int)code, (int)out, (any_fn)tested->decode[code][out],
                    (any_fn)reference->decode[code][out]))
        return;
    for (size_t i = 0; i < REPEATS * AWKWARD_LENGTHS; i++) {
        qk_lines lines = random_lines(awkward_length(i % AWKWARD_LENGTHS));
        size_t runs = runs_of(lines.count, lines.run);
        int with_zero = !is_float(code) && random_below(2);
        begin_case("lines %zu stride %zu count %zu run %zu zero %d", lines.lines, lines.stride,
                   lines.count, lines.run, with_zero);
        place_random(&code_region, span_of(&lines) * qk_dtype_bytes(code));
        fill_scales(runs, compute_type(out), 0.01 + random_unit());
        const int32_t *zero = with_zero ? fill_zeros(runs, -32768, 32767) : NULL;
        place_output(&result, span_of(&lines) * qk_dtype_bytes(out), 0x5A);
        reference->decode[code][out](result.expected.data, code_region.data, &lines,
                                     scale_region.data, zero);
        tested->decode[code][out](result.actual.data, code_region.data, &lines, scale_region.data,
                                  zero);
        expect_equal(&result, out);
    }
}

void check_quantize(void)
{
    for (int source = 0; source < QK_FLOATS; source++) {
        check_range((qk_dtype)source);
        check_magnitude((qk_dtype)source);
        for (int code = 0; code < QK_DTYPES; code++) {
            check_encode((qk_dtype)source, (qk_dtype)code);
            check_decode((qk_dtype)code, (qk_dtype)source);
        }
    }
}
