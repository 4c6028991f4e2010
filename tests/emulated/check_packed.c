#include "check_linear.h"

#include <math.h>
#include <string.h>

/* Packed weights against numbers that are read bit by bit, in long double. Bounds are those of
 * check_linear.c, and the rounding of a weight to bfloat16 where the activations have that type. */

static region x_region, codes_region, scales_region, steps_region, zeros_region, book_region,
    bias_region;
static output result;

/* ---- weights ------------------------------------------------------------------ */

static size_t row_bytes(size_t count, size_t bits)
{
    return bits ? (count * bits + 7) / 8 : (count + 4) / 5;
}

static size_t groups_of(const qk_linear *l)
{
    return (l->in_features + l->packed->group - 1) / l->packed->group;
}

static unsigned code_at(const uint8_t *row, size_t index, size_t bits)
{
    static const unsigned power[5] = {1, 3, 9, 27, 81};
    unsigned code = 0;
    if (bits == QK_BASE3)
        return row[index / 5] / power[index % 5] % 3;
    for (size_t bit = 0; bit < bits; bit++) {
        size_t at = index * bits + bit;
        code |= (unsigned)(row[at / 8] >> at % 8 & 1) << bit;
    }
    return code;
}

static long double value_of(const qk_packed *p, size_t row, unsigned code)
{
    if (p->codebook)
        return load(&book_region, (p->codebook_rows > 1 ? row << p->bits : 0) + code,
                    p->codebook_dtype);
    if (p->bits == QK_BASE3)
        return code == 2 ? -1.0L : code;
    return code - (!p->zeros && code >> (p->bits - 1) ? ldexp(1, (int)p->bits) : 0);
}

static long double weight_at(const qk_linear *l, size_t row, size_t k)
{
    const qk_packed *p = l->packed;
    size_t groups = groups_of(l), group = k / p->group, index = row * groups + group;
    long double scale, zero = 0;
    if (p->scales_dtype != QK_UINT8)
        scale = load(&scales_region, index, p->scales_dtype);
    else if (p->scale_steps)
        scale = (long double)scales_region.data[index] * load(&steps_region, row, p->steps_dtype);
    else
        scale = ldexp(1, scales_region.data[index] - 127);
    if (p->zeros && p->zeros_dtype == QK_INT8)
        zero = ldexpl(((int8_t *)zeros_region.data)[index] + 128, (int)p->bits - 8);
    else if (p->zeros && p->zeros_dtype != QK_UINT8)
        zero = (float)load(&zeros_region, index, p->zeros_dtype); /* kernels read floats */
    else if (p->zeros)
        zero = code_at(zeros_region.data + row * row_bytes(groups, p->bits), group, p->bits);
    const uint8_t *codes = codes_region.data + row * row_bytes(l->in_features, p->bits);
    return (value_of(p, row, code_at(codes, k, p->bits)) - zero) * scale;
}

static size_t random_group(size_t in_features)
{
    static const size_t groups[] = {64, 128, 32, 16, 8, 4, 1, 2, 3, 5, 12, 33, 48, 96, 100, 256};
    size_t choice = random_below(sizeof groups / sizeof *groups + 2);
    return choice < sizeof groups / sizeof *groups ? groups[choice] : in_features + choice % 2;
}

/* Random weights of `l` in `p`: any width, group, kind of scales, zeros and values. */
static void random_packed(qk_linear *l, qk_packed *p)
{
    *p = (qk_packed){.bits = random_below(9), .group = random_group(l->in_features)};
    p->group += p->group == 0;
    l->packed = p;
    size_t rows = l->out_features, groups = groups_of(l), kind = random_below(4);
    size_t bytes = rows * row_bytes(l->in_features, p->bits);
    p->codes = place_random(&codes_region, bytes);
    for (size_t i = 0; p->bits == QK_BASE3 && i < bytes; i++)
        codes_region.data[i] %= 243;
    p->scales_dtype = kind < 2 ? QK_UINT8 : (qk_dtype)random_below(QK_FLOATS);
    if (kind >= 2)
        p->scales = fill_floats(&scales_region, p->scales_dtype, rows * groups, 0.1);
    else
        p->scales = place_random(&scales_region, rows * groups);
    for (size_t i = 0; kind == 1 && i < rows * groups; i++)
        scales_region.data[i] = (unsigned char)(118 + scales_region.data[i] % 12);
    p->steps_dtype = (qk_dtype)random_below(QK_FLOATS);
    if (kind == 0)
        p->scale_steps = fill_floats(&steps_region, p->steps_dtype, rows, 0.01);
    kind = p->bits == QK_BASE3 ? 0 : random_below(5);
    p->zeros_dtype = kind == 1 ? QK_UINT8 : (qk_dtype)random_below(QK_FLOATS);
    if (kind == 1)
        p->zeros = place_random(&zeros_region, rows * row_bytes(groups, p->bits));
    if (kind == 2)
        p->zeros = fill_floats(&zeros_region, p->zeros_dtype, rows * groups, 4);
    if (kind == 3) {
        p->zeros_dtype = QK_INT8;
        p->zeros = place_random(&zeros_region, rows * groups);
    }
    p->codebook_rows = random_below(2) ? 1 : rows;
    p->codebook_dtype = (qk_dtype)random_below(QK_FLOATS);
    if (p->bits != QK_BASE3 && random_below(3) == 0)
        p->codebook = fill_floats(&book_region, p->codebook_dtype, p->codebook_rows << p->bits, 2);
}

/* ---- forward ------------------------------------------------------------------ */

static void check_value(const qk_linear *l, size_t token, size_t row, double have)
{
    long double sum = 0, total = 0;
    for (size_t k = 0; k < l->in_features; k++) {
        long double term =
            load(&x_region, token * l->in_features + k, l->x_dtype) * weight_at(l, row, k);
        sum += term;
        total += fabsl(term);
    }
    double bias = l->bias ? load(&bias_region, row, l->bias_dtype) : 0;
    double u = unit[l->x_dtype == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32];
    /* A weight is rounded in float, twice, whatever its sum is rounded to. */
    double weight = 3 * unit[QK_FLOAT32] + (l->x_dtype == QK_BFLOAT16 ? unit[QK_BFLOAT16] : 0);
    u += weight / (double)(l->in_features + 2);
    if (!is_near(have, sum, total, l->in_features, 1, bias, l->y_dtype, u))
        fail("y[%zu][%zu] = %.9g, exact %.9g", token, row, have, (double)(sum + bias));
}

static void check_forward_case(qk_dtype x, const sizes *size)
{
    qk_packed packed;
    qk_linear l = {.tokens = size->tokens,
                   .out_features = size->out_features,
                   .in_features = size->in_features,
                   .x_dtype = x};
    l.y_dtype = random_below(2) ? x : (qk_dtype)random_below(QK_FLOATS);
    random_packed(&l, &packed);
    l.bias_dtype = (qk_dtype)random_below(QK_FLOATS);
    if (random_below(2))
        l.bias = fill_floats(&bias_region, l.bias_dtype, size->out_features, 4);
    size_t first = random_below(3) ? 0 : random_below(size->out_features + 1);
    qk_linear_strip strip = {&l, first, size->out_features, NULL, (int)random_below(2)};
    begin_case("tokens %zu out %zu in %zu from %zu, %zu bits, groups of %zu, scales %d, zeros %d, "
               "codebooks %zu",
               size->tokens, size->out_features, size->in_features, first, packed.bits,
               packed.group, (int)packed.scales_dtype, packed.zeros ? (int)packed.zeros_dtype : -1,
               packed.codebook ? packed.codebook_rows : 0);
    fill_floats(&x_region, x, size->tokens * size->in_features, 2);
    size_t bytes = qk_dtype_bytes(l.y_dtype);
    place_output(&result, size->tokens * size->out_features * bytes, 0x5A);
    place_scratch(&strip, qk_linear_scratch_bytes(&l));
    tested->linear_packed[x](result.actual.data, x_region.data, &strip);
    expect_guards(&result.actual);
    expect_scratch();
    for (size_t token = 0; token < size->tokens; token++)
        for (size_t row = 0; row < size->out_features; row++) {
            size_t index = token * size->out_features + row;
            if (row >= first)
                check_value(&l, token, row, load(&result.actual, index, l.y_dtype));
            else if (result.actual.data[index * bytes] != 0x5A)
                fail("y[%zu][%zu] lies outside the strip and was written", token, row);
        }
}

/* ---- backward ----------------------------------------------------------------- */

static void check_backward_case(qk_dtype grad_y, const sizes *size)
{
    qk_packed packed;
    qk_linear l = {.tokens = size->tokens,
                   .out_features = size->out_features,
                   .in_features = size->in_features,
                   .y_dtype = grad_y};
    l.x_dtype = random_below(2) ? grad_y : (qk_dtype)random_below(QK_FLOATS);
    random_packed(&l, &packed);
    size_t first = random_below(3) ? 0 : random_below(size->in_features / 48 + 1) * 48;
    qk_linear_strip strip = {&l, first, size->in_features, NULL, 0};
    begin_case("tokens %zu out %zu in %zu from %zu, %zu bits, groups of %zu", size->tokens,
               size->out_features, size->in_features, first, packed.bits, packed.group);
    fill_floats(&x_region, grad_y, size->tokens * size->out_features, 2);
    size_t bytes = qk_dtype_bytes(l.x_dtype);
    place_output(&result, size->tokens * size->in_features * bytes, 0x5A);
    place_scratch(&strip, qk_backward_scratch_bytes(&l));
    tested->linear_packed_backward[grad_y](result.actual.data, x_region.data, &strip);
    expect_guards(&result.actual);
    expect_scratch();
    double u = unit[grad_y == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32];
    u += 3 * unit[QK_FLOAT32] / (double)(size->out_features + 2);
    for (size_t token = 0; token < size->tokens; token++)
        for (size_t col = 0; col < size->in_features; col++) {
            size_t index = token * size->in_features + col;
            long double sum = 0, total = 0;
            for (size_t row = 0; col >= first && row < size->out_features; row++) {
                long double term = load(&x_region, token * size->out_features + row, grad_y) *
                                   weight_at(&l, row, col);
                sum += term;
                total += fabsl(term);
            }
            double have = load(&result.actual, index, l.x_dtype);
            if (col >= first && !is_near(have, sum, total, size->out_features, 1, 0, l.x_dtype, u))
                fail("grad_x[%zu][%zu] = %.9g, exact %.9g", token, col, have, (double)sum);
            if (col < first && result.actual.data[index * bytes] != 0x5A)
                fail("grad_x[%zu][%zu] lies outside the strip and was written", token, col);
        }
}

void check_packed(void)
{
    for (int dtype = 0; dtype < QK_FLOATS; dtype++) {
        if (begin_slot("linear_packed", dtype, -1, (any_fn)tested->linear_packed[dtype],
                       (any_fn)reference->linear_packed[dtype]))
            for (int round = 0; round < 3; round++)
                check_sizes((qk_dtype)dtype, check_forward_case, 0);
        if (begin_slot("linear_packed_backward", dtype, -1,
                       (any_fn)tested->linear_packed_backward[dtype],
                       (any_fn)reference->linear_packed_backward[dtype]))
            check_sizes((qk_dtype)dtype, check_backward_case, 0);
    }
}
