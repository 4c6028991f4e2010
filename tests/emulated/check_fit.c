#include <float.h>
#include <math.h>
#include <string.h>

#include "harness.h"
#include "kernels/scalar.h"

enum { CASES = 600 };

static region x_region, importance_region, levels_region, scratch_region;
static output scales, zeros, errors;

static void *fill(region *where, size_t count, double least, double most)
{
    char *data = place(where, count * sizeof(float));
    for (size_t i = 0; i < count; i++)
        qk_store_float32(data, i, (float)(least + random_unit() * (most - least)));
    return data;
}

static size_t rise(region *where, size_t tables, size_t count)
{
    char *data = place(where, tables * count * sizeof(float));
    for (size_t i = 0; i < tables * count; i++) {
        float before = i % count ? qk_load_float32(data, i - 1) : -1;
        qk_store_float32(data, i, before + (float)random_unit() * 0.5f);
    }
    return count;
}

static qk_fit random_fit(void)
{
    static const size_t groups[] = {1, 2, 5, 8, 16, 32, 33, 64, 100};
    size_t bits = 1 + random_below(8);
    qk_fit fit = {.rows = 1 + random_below(40),
                  .cols = 1 + random_below(130),
                  .group = groups[random_below(sizeof groups / sizeof *groups)],
                  .starts = random_below(4),
                  .rounds = random_below(4),
                  .shrink = 0.1f,
                  .grid.code_max = (float)((1u << bits) - 1),
                  .scale_min = FLT_MIN,
                  .zero_min = -INFINITY,
                  .zero_max = INFINITY,
                  .grid.codebooks = 1,
                  .find = (qk_fit_find)random_below(4)};
    if (fit.group > fit.cols)
        fit.group = fit.cols;
    if (fit.find <= QK_FIT_SCALE && random_below(2)) {
        fit.grid.code_max = fit.grid.code_max > 1 ? (fit.grid.code_max - 1) / 2 : 1;
        fit.grid.code_min = -fit.grid.code_max - 1;
        fit.scale_min = random_below(2) ? -INFINITY : FLT_MIN;
    }
    if (random_below(2)) {
        fit.zero_min = 0;
        fit.zero_max = fit.grid.code_max;
        fit.zero_step = random_below(2) ? 1 : 0.0625f;
    }
    if (fit.find <= QK_FIT_SCALE && random_below(3) == 0) {
        fit.grid.codebooks = random_below(2) ? 1 : fit.rows;
        fit.grid.level_count = rise(&levels_region, fit.grid.codebooks, 1 + random_below(20));
        fit.grid.levels = levels_region.data;
        fit.grid.code_min = -1;
        fit.grid.code_max = 1;
    }
    return fit;
}

/* The same numbers on both sides of an output. */
static void begin_output(output *out, size_t count, double least, double most)
{
    place_output(out, count * sizeof(float), 0);
    for (size_t i = 0; i < count; i++) {
        float value = (float)(least + random_unit() * (most - least));
        qk_store_float32(out->expected.data, i, value);
        qk_store_float32(out->actual.data, i, value);
    }
}

void check_fit(void)
{
    if (!begin_slot("fit", 0, -1, (any_fn)tested->fit, (any_fn)reference->fit))
        return;
    for (size_t i = 0; i < CASES; i++) {
        qk_fit fit = random_fit();
        size_t blocks = fit.rows * (fit.cols / fit.group + (fit.cols % fit.group != 0));
        begin_case("%zu x %zu, groups of %zu, find %d, %zu levels, %zu starts, %zu rounds",
                   fit.rows, fit.cols, fit.group, (int)fit.find, fit.grid.level_count, fit.starts,
                   fit.rounds);
        fit.x = fill(&x_region, fit.rows * fit.cols, -3, 2);
        for (size_t k = 0; k < fit.rows * fit.cols && random_below(4) == 0; k++)
            qk_store_float32(x_region.data, k, 0);
        fit.importance = fill(&importance_region, fit.cols, 0, 2);
        begin_output(&scales, blocks, 0.01, 0.5);
        begin_output(&zeros, blocks, 0, fit.grid.code_max > 0 ? fit.grid.code_max : 1);
        begin_output(&errors, blocks, 0, 0);
        int has_zeros =
            fit.find >= QK_FIT_ZERO || (!fit.grid.level_count && fit.grid.code_min == 0);
        qk_fit_strip strip = {.fit = &fit, .last = fit.rows};
        char *memory = place(&scratch_region, qk_fit_scratch_bytes_of(&fit) + sizeof(float));
        strip.scratch = memory + (-(uintptr_t)memory & (sizeof(float) - 1));
        strip.scales = scales.expected.data;
        strip.zeros = has_zeros ? zeros.expected.data : NULL;
        strip.errors = errors.expected.data;
        reference->fit(&strip);
        strip.scales = scales.actual.data;
        strip.zeros = has_zeros ? zeros.actual.data : NULL;
        strip.errors = errors.actual.data;
        tested->fit(&strip);
        expect_equal(&scales, QK_FLOAT32);
        expect_equal(&zeros, QK_FLOAT32);
        expect_equal(&errors, QK_FLOAT32);
    }
}
