#include <math.h>

#include "harness.h"
#include "kernels/scalar.h"

/* The public calls of qk.h: an ISA on any number of threads answers as the reference does on one
 * (linear: as the same ISA does on one). */

static region source, weights, row_scales;
static output codes, scales, zeros, decoded;

static const char *tested_isa;

/* The left side of each output is made by the reference (or the same ISA) on one thread. */
static void use_left(const char *isa)
{
    qk_set_isa(isa);
    qk_set_threads(1);
}

static size_t use_right(void)
{
    static const size_t threads[] = {1, 2, 7};
    size_t chosen = threads[random_below(3)];
    qk_set_isa(tested_isa);
    qk_set_threads(chosen);
    return chosen;
}

static size_t ceil_div(size_t n, size_t d)
{
    return n / d + (n % d != 0);
}

/* Every granularity, on small matrices and some that are worth a thread. */
static qk_grid random_grid(int large)
{
    size_t limit = large ? 200 : 24;
    qk_grid grid = {.rows = 1 + random_below(limit), .cols = 1 + random_below(2 * limit)};
    if (large)
        grid.cols += 250;
    grid.block_rows = grid.block_cols = 1;
    switch (random_below(5)) {
    case 0:
        grid.block_rows = grid.rows;
        grid.block_cols = grid.cols;
        break;
    case 1:
        grid.block_cols = grid.cols;
        break;
    case 2:
        grid.block_rows = grid.rows;
        break;
    case 3:
        grid.block_cols = 1 + random_below(grid.cols + 3);
        break;
    default:
        grid.block_rows = 1 + random_below(grid.rows + 3);
        break;
    }
    return grid;
}

static qk_spec random_spec(void)
{
    static const qk_dtype targets[] = {QK_INT8,          QK_INT8,        QK_UINT8,   QK_INT16,
                                       QK_FLOAT8_E4M3FN, QK_FLOAT8_E5M2, QK_FLOAT16, QK_BFLOAT16};
    qk_spec spec = {.source = (qk_dtype)random_below(QK_FLOATS), .mode = QK_SYMMETRIC};
    spec.code = targets[random_below(8)];
    spec.scale = random_below(2) ? QK_FLOAT16 : QK_FLOAT32;
    size_t half = (size_t)1 << random_below(8);
    if (spec.code == QK_UINT8) {
        spec.mode = QK_ASYMMETRIC;
        spec.code_max = (double)(2 * half - 1);
    } else if (spec.code == QK_INT8 && half == 1) {
        spec.mode = QK_BINARY;
        spec.code_min = -1;
        spec.code_max = 1;
    } else if (spec.code <= QK_FLOAT8_E5M2) {
        spec.code_max = finite_max(spec.code);
        spec.code_min = -spec.code_max;
    } else {
        spec.mode = random_below(2) ? QK_SYMMETRIC : QK_ASYMMETRIC;
        spec.code_max = (double)(spec.code == QK_INT16 ? 32767 : half - 1);
        spec.code_min = -spec.code_max - (double)random_below(2);
    }
    spec.keep_non_finite = random_below(4) == 0;
    return spec;
}

static void fill_source(const qk_grid *grid, const qk_spec *spec)
{
    size_t items = grid->rows * grid->cols;
    void *data = place(&source, items * qk_dtype_bytes(spec->source));
    double size = random_below(8) ? 1 : 1e-7;
    size_t bad = random_below(6) == 0 ? random_below(items) : items;
    for (size_t i = 0; i < items; i++)
        qk_store_source(data, i, spec->source, size * (random_unit() - 0.4));
    if (bad < items)
        qk_store_source(data, bad, spec->source, (double)INFINITY);
}

static void check_quantize_call(int large)
{
    qk_grid grid = random_grid(large);
    qk_spec spec = random_spec();
    qk_dtype compute = spec.source == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32;
    size_t items = grid.rows * grid.cols, where[2] = {0, 0};
    size_t blocks = ceil_div(grid.rows, grid.block_rows) * ceil_div(grid.cols, grid.block_cols);
    int asymmetric = spec.mode == QK_ASYMMETRIC;
    begin_case("%zux%zu blocks %zux%zu source %s codes %s %g..%g mode %d", grid.rows, grid.cols,
               grid.block_rows, grid.block_cols, dtype_name(spec.source), dtype_name(spec.code),
               spec.code_min, spec.code_max, (int)spec.mode);
    fill_source(&grid, &spec);
    place_output(&codes, items * qk_dtype_bytes(spec.code), 0x5A);
    place_output(&scales, blocks * qk_dtype_bytes(compute), 0x5A);
    place_output(&zeros, blocks * sizeof(int32_t), 0x5A);
    place_output(&decoded, items * qk_dtype_bytes(spec.source), 0x5A);
    qk_status status[2];
    for (int side = 0; side < 2; side++) {
        region *c = side ? &codes.actual : &codes.expected;
        region *s = side ? &scales.actual : &scales.expected;
        region *z = side ? &zeros.actual : &zeros.expected;
        region *d = side ? &decoded.actual : &decoded.expected;
        int32_t *zero = asymmetric ? (int32_t *)(void *)z->data : NULL;
        if (side)
            use_right();
        else
            use_left("reference");
        status[side] = qk_quantize(c->data, s->data, zero, source.data, &grid, &spec, &where[side]);
        if (status[side] == QK_OK)
            qk_decode(d->data, spec.source, c->data, spec.code, s->data, zero, &grid);
    }
    if (status[0] != status[1] || where[0] != where[1])
        fail("status %d at %zu, the reference gives %d at %zu", (int)status[1], where[1],
             (int)status[0], where[0]);
    if (status[0] != QK_OK && status[0] != QK_NON_FINITE)
        fail("status %d: %s", (int)status[0], qk_status_text(status[0]));
    if (status[0] != QK_OK)
        return;
    expect_equal(&codes, spec.code);
    expect_equal(&scales, compute);
    expect_equal(&zeros, QK_INT8);
    expect_equal(&decoded, spec.source);
}

static void check_linear_call(void)
{
    qk_linear linear = {.tokens = 1 + random_below(6),
                        .y_dtype = QK_FLOAT32,
                        .scales_dtype = QK_FLOAT32,
                        .bias_dtype = QK_FLOAT32};
    linear.x_dtype = (qk_dtype)random_below(QK_FLOATS);
    linear.out_features = 1 + random_below(500);
    linear.in_features = 1 + random_below(600);
    begin_case("linear tokens %zu out %zu in %zu x %s", linear.tokens, linear.out_features,
               linear.in_features, dtype_name(linear.x_dtype));
    linear.weights = place_random(&weights, linear.out_features * linear.in_features);
    linear.scales = place(&row_scales, linear.out_features * 4);
    for (size_t i = 0; i < linear.out_features; i++)
        qk_store_float32(row_scales.data, i, (float)random_unit());
    size_t inputs = linear.tokens * linear.in_features;
    place(&source, inputs * qk_dtype_bytes(linear.x_dtype));
    for (size_t i = 0; i < inputs; i++)
        qk_store_source(source.data, i, linear.x_dtype, random_unit() - 0.5);
    place_output(&decoded, linear.tokens * linear.out_features * 4, 0x5A);
    use_left(tested_isa);
    qk_status left = qk_linear_forward(decoded.expected.data, source.data, &linear);
    size_t threads = use_right();
    qk_status right = qk_linear_forward(decoded.actual.data, source.data, &linear);
    if (left != QK_OK || right != QK_OK)
        fail("status %d and %d", (int)left, (int)right);
    uint64_t digest = counts.digest; /* the bits of sums are an ISA's own */
    size_t before = counts.failures;
    expect_equal(&decoded, QK_FLOAT32);
    counts.digest = digest;
    if (counts.failures > before)
        fail("on %zu threads", threads);
}

void check_calls(void)
{
    tested_isa = qk_active_isa();
    begin_subject("qk_quantize, qk_decode");
    for (int i = 0; i < 300; i++)
        check_quantize_call(i % 10 == 0);
    begin_subject("qk_linear_forward");
    for (int i = 0; i < 20; i++)
        check_linear_call();
    qk_set_isa(tested_isa);
    qk_set_threads(0);
}
