#include "check_linear.h"

#include <math.h>
#include <string.h>

/* A sum of k products in a type of unit roundoff u errs by at most (k + 2) u sum|x w|, whatever
 * its order and with or without FMA (Higham, Accuracy and Stability of Numerical Algorithms, 3.1);
 * scale and bias add a few roundings of the result, the store one in y's type. */

static region x_region, weights_region, scales_region, bias_region, scratch_region;
static output result, again;

const double unit[QK_FLOATS] = {
    [QK_FLOAT32] = 0x1p-24, [QK_FLOAT64] = 0x1p-53, [QK_FLOAT16] = 0x1p-11, [QK_BFLOAT16] = 0x1p-8};
/* Half the distance of subnormals. */
static const double tiny[QK_FLOATS] = {[QK_FLOAT32] = 0x1p-150,
                                       [QK_FLOAT64] = 0x1p-1074,
                                       [QK_FLOAT16] = 0x1p-25,
                                       [QK_BFLOAT16] = 0x1p-134};

void *fill_floats(region *where, qk_dtype dtype, size_t count, double size)
{
    void *data = place(where, count * qk_dtype_bytes(dtype));
    for (size_t i = 0; i < count; i++)
        qk_store_source(data, i, dtype, size * (random_unit() - 0.5));
    return data;
}

double load(const region *where, size_t index, qk_dtype dtype)
{
    return qk_load_source(where->data, index, dtype);
}

/* Is `have` within the bound of the exact y = sum * scale + bias, its terms summing to `total` in
 * magnitude over `terms` products? Unit roundoff u is the accumulator's. */
int is_near(double have, long double sum, long double total, size_t terms, double scale,
            double bias, qk_dtype dtype, double u)
{
    long double exact = sum * scale + bias;
    long double spread = fabsl((long double)scale) * total;
    long double bound = ((long double)terms + 2) * u * spread;
    bound += 4 * u * (spread + fabsl((long double)bias)) + unit[dtype] * fabsl(exact);
    bound += tiny[dtype] + (long double)0x1p-149 * ((long double)terms + 2) * (fabs(scale) + 1);
    bound *= 1 + (long double)unit[dtype];
    if (fabsl(exact) + bound > finite_max(dtype))
        return 1; /* may overflow */
    return fabsl(have - exact) <= bound;
}

/* ---- forward ----------------------------------------------------------------- */

static qk_linear random_linear(qk_dtype x, const sizes *size)
{
    qk_linear linear = {.tokens = size->tokens,
                        .out_features = size->out_features,
                        .in_features = size->in_features,
                        .x_dtype = x};
    linear.y_dtype = random_below(2) ? x : (qk_dtype)random_below(QK_FLOATS);
    linear.scales_dtype = (qk_dtype)random_below(QK_FLOATS);
    linear.bias_dtype = (qk_dtype)random_below(QK_FLOATS);
    linear.weights = place_random(&weights_region, size->out_features * size->in_features);
    linear.scales = fill_floats(&scales_region, linear.scales_dtype, size->out_features, 0.1);
    int with_bias = random_below(3) != 0;
    fill_floats(&bias_region, linear.bias_dtype, with_bias ? size->out_features : 0, 4);
    if (with_bias)
        linear.bias = bias_region.data;
    return linear;
}

static void check_forward_value(const qk_linear *linear, size_t token, size_t row, double have)
{
    long double sum = 0, total = 0;
    size_t k = linear->in_features;
    for (size_t i = 0; i < k; i++) {
        long double term = (long double)load(&x_region, token * k + i, linear->x_dtype) *
                           linear->weights[row * k + i];
        sum += term;
        total += fabsl(term);
    }
    double scale = load(&scales_region, row, linear->scales_dtype);
    double bias = linear->bias ? load(&bias_region, row, linear->bias_dtype) : 0;
    double u = unit[linear->x_dtype == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32];
    if (!is_near(have, sum, total, k, scale, bias, linear->y_dtype, u))
        fail("y[%zu][%zu] = %.9g, exact %.9g", token, row, have, (double)(sum * scale + bias));
}

/* A strip holds the exact values within the bound, and nothing outside it is written. */
static void check_strip(const region *y, const qk_linear *linear, size_t first, size_t last)
{
    size_t bytes = qk_dtype_bytes(linear->y_dtype);
    expect_guards(y);
    for (size_t token = 0; token < linear->tokens; token++)
        for (size_t row = 0; row < linear->out_features; row++) {
            size_t index = token * linear->out_features + row;
            if (row >= first && row < last) {
                check_forward_value(linear, token, row, load(y, index, linear->y_dtype));
                continue;
            }
            for (size_t b = 0; b < bytes; b++)
                if (y->data[index * bytes + b] != 0x5A)
                    fail("y[%zu][%zu] lies outside the strip and was written", token, row);
        }
}

/* Just the memory that a strip asks for, of NaNs, in whole cache lines, before a page that faults
 * or after one, where that is aligned. */
void place_scratch(qk_linear_strip *strip, size_t bytes)
{
    do
        strip->scratch = place(&scratch_region, (bytes + QK_SCRATCH_ALIGN - 1) / QK_SCRATCH_ALIGN *
                                                    QK_SCRATCH_ALIGN);
    while ((uintptr_t)strip->scratch % QK_SCRATCH_ALIGN != 0);
    memset(strip->scratch, 0xFF, bytes); /* NaNs */
}

void expect_scratch(void)
{
    expect_guards(&scratch_region);
}

static void run_forward(const qk_kernels *kernels, void *y, const void *x, qk_linear_strip *strip)
{
    place_scratch(strip, qk_linear_scratch_bytes(strip->linear));
    strip->uses_weight_panels = (int)random_below(2);
    kernels->linear[strip->linear->x_dtype](y, x, strip);
    expect_guards(&scratch_region);
}

/* The same bits when the tokens come one by one and the strip in two parts. */
static void check_split(const qk_linear *linear, size_t first, size_t last)
{
    qk_linear one = *linear;
    one.tokens = 1;
    size_t x_row = linear->in_features * qk_dtype_bytes(linear->x_dtype);
    size_t y_row = linear->out_features * qk_dtype_bytes(linear->y_dtype);
    size_t middle = first + random_below(last - first + 1);
    qk_linear_strip left = {&one, first, middle, NULL, 0}, right = {&one, middle, last, NULL, 0};
    place_output(&again, result.actual.bytes, 0x5A);
    memcpy(again.expected.data, result.actual.data, result.actual.bytes);
    for (size_t token = 0; token < linear->tokens; token++) {
        void *y = again.actual.data + token * y_row;
        const void *x = x_region.data + token * x_row;
        run_forward(tested, y, x, &left);
        run_forward(tested, y, x, &right);
    }
    uint64_t digest = counts.digest; /* the bits of sums are an ISA's own */
    expect_equal(&again, linear->y_dtype);
    counts.digest = digest;
}

static void check_forward_case(qk_dtype x, const sizes *size)
{
    qk_linear linear = random_linear(x, size);
    size_t first = random_below(3) ? 0 : random_below(size->out_features + 1);
    size_t last =
        random_below(3) ? size->out_features : first + random_below(size->out_features - first + 1);
    qk_linear_strip strip = {&linear, first, last, NULL, 0};
    begin_case("tokens %zu out %zu in %zu strip %zu..%zu y %s scales %s bias %s", size->tokens,
               size->out_features, size->in_features, first, last, dtype_name(linear.y_dtype),
               dtype_name(linear.scales_dtype),
               linear.bias ? dtype_name(linear.bias_dtype) : "none");
    fill_floats(&x_region, x, size->tokens * size->in_features, 2);
    size_t items = size->tokens * size->out_features;
    place_output(&result, items * qk_dtype_bytes(linear.y_dtype), 0x5A);
    run_forward(reference, result.expected.data, x_region.data, &strip);
    run_forward(tested, result.actual.data, x_region.data, &strip);
    if (tested == reference)
        check_strip(&result.expected, &linear, first, last);
    check_strip(&result.actual, &linear, first, last);
    check_split(&linear, first, last);
}

/* ---- backward ----------------------------------------------------------------- */

static void check_backward_value(const qk_linear *linear, size_t token, size_t col, double have)
{
    long double sum = 0, total = 0;
    for (size_t row = 0; row < linear->out_features; row++) {
        long double grad = load(&x_region, token * linear->out_features + row, linear->y_dtype);
        long double term = grad * load(&scales_region, row, linear->scales_dtype) *
                           linear->weights[row * linear->in_features + col];
        sum += term;
        total += fabsl(term);
    }
    double u = unit[linear->y_dtype == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32];
    /* grad_y * scale is rounded once more in each term: the 4 u of is_near cover it. */
    if (!is_near(have, sum, total, linear->out_features, 1, 0, linear->x_dtype, u))
        fail("grad_x[%zu][%zu] = %.9g, exact %.9g", token, col, have, (double)sum);
}

static void check_backward_case(qk_dtype grad_y, const sizes *size)
{
    qk_linear linear = random_linear(grad_y, size);
    linear.x_dtype = linear.y_dtype;
    linear.y_dtype = grad_y;
    linear.bias = NULL;
    size_t first = random_below(3) ? 0 : random_below(size->in_features + 1);
    size_t last =
        random_below(3) ? size->in_features : first + random_below(size->in_features - first + 1);
    qk_linear_strip strip = {&linear, first, last, NULL, 0};
    begin_case("tokens %zu out %zu in %zu strip %zu..%zu grad_x %s scales %s", size->tokens,
               size->out_features, size->in_features, first, last, dtype_name(linear.x_dtype),
               dtype_name(linear.scales_dtype));
    fill_floats(&x_region, grad_y, size->tokens * size->out_features, 2);
    size_t bytes = qk_dtype_bytes(linear.x_dtype);
    place_output(&result, size->tokens * size->in_features * bytes, 0x5A);
    place_scratch(&strip, qk_backward_scratch_bytes(&linear));
    tested->linear_backward[grad_y](result.actual.data, x_region.data, &strip);
    expect_guards(&result.actual);
    expect_guards(&scratch_region);
    for (size_t token = 0; token < size->tokens; token++)
        for (size_t col = 0; col < size->in_features; col++) {
            size_t index = token * size->in_features + col;
            if (col >= first && col < last)
                check_backward_value(&linear, token, col,
                                     load(&result.actual, index, linear.x_dtype));
            else if (result.actual.data[index * bytes] != 0x5A)
                fail("grad_x[%zu][%zu] lies outside the strip and was written", token, col);
        }
}

/* Each length in turn as the inner size, the others small and random, 0 included. */
void check_sizes(qk_dtype dtype, void (*check)(qk_dtype, const sizes *), int inner_is_out)
{
    for (size_t i = 0; i < AWKWARD_LENGTHS + 4; i++) {
        size_t inner = i < 4 ? 0 : awkward_length(i - 4), outer = random_below(20);
        sizes size = {.tokens = random_below(8), .in_features = inner, .out_features = outer};
        if (inner < SHORT_LENGTHS && random_below(16) == 0)
            size.out_features = 20 + random_below(60);
        if (random_below(16) == 0)
            size.tokens = 8 + random_below(25);
        if (inner_is_out) {
            outer = size.out_features;
            size.out_features = inner;
            size.in_features = outer;
        }
        check(dtype, &size);
    }
}

void check_linear(void)
{
    for (int dtype = 0; dtype < QK_FLOATS; dtype++) {
        if (begin_slot("linear", dtype, -1, (any_fn)tested->linear[dtype],
                       (any_fn)reference->linear[dtype]))
            check_sizes((qk_dtype)dtype, check_forward_case, 0);
        if (begin_slot("linear_backward", dtype, -1, (any_fn)tested->linear_backward[dtype],
                       (any_fn)reference->linear_backward[dtype])) {
            check_sizes((qk_dtype)dtype, check_backward_case, 0);
            check_sizes((qk_dtype)dtype, check_backward_case, 1);
        }
    }
}
