/* The definition of add_scaled, and of fit: one group after the other, in the order of operations
 * that all share. */
#include "kernels/reference.h"

#include <math.h>

#include "kernels/scalar.h"

typedef struct group {
    const qk_fit *fit;
    size_t row, first, count;
    int kind; /* what is looked for; QK_FIT_LEVELS with levels */
} group;

typedef struct fitted {
    float scale, zero, error;
} fitted;

typedef struct sums {
    float h, hv, hvv, hw, hwv, error;
} sums;

static float weight(const group *g, size_t i)
{
    return qk_load_float32(g->fit->x, g->row * g->fit->cols + g->first + i);
}

static float least(float a, float b)
{
    return a < b ? a : b;
}

static float most(float a, float b)
{
    return a > b ? a : b;
}

/* The level nearest to a place; of two that are as near, the upper one. */
static float level(const group *g, float place)
{
    const qk_fit *fit = g->fit;
    if (g->kind != QK_FIT_LEVELS)
        return most(least(rintf(place), fit->grid.code_max), fit->grid.code_min);
    size_t row = fit->grid.codebooks > 1 ? g->row * fit->grid.level_count : 0;
    float nearest = qk_load_float32(fit->grid.levels, row);
    for (size_t i = 1; i < fit->grid.level_count; i++) {
        float next = qk_load_float32(fit->grid.levels, row + i);
        float before = qk_load_float32(fit->grid.levels, row + i - 1);
        nearest = place < (before + next) * 0.5f ? nearest : next;
    }
    return nearest;
}

static sums sum_up(const group *g, fitted at)
{
    sums s = {0, 0, 0, 0, 0, 0};
    float inverse = 1 / at.scale;
    for (size_t i = 0; i < g->count; i++) {
        float w = weight(g, i), h = qk_load_float32(g->fit->importance, g->first + i);
        float v = level(g, fmaf(w, inverse, at.zero));
        float off = fmaf(at.zero - v, at.scale, w), hv = h * v;
        s.error = fmaf(h * off, off, s.error);
        s.hv += hv;
        s.hvv = fmaf(hv, v, s.hvv);
        s.hwv = fmaf(hv, w, s.hwv);
        s.h += h;
        s.hw = fmaf(h, w, s.hw);
    }
    return s;
}

static float allowed_zero(const qk_fit *fit, float zero)
{
    if (fit->zero_step > 0)
        zero = rintf(zero / fit->zero_step) * fit->zero_step;
    return most(least(zero, fit->zero_max), fit->zero_min);
}

/* Least squares in scale and offset = -zero * scale; then in the scale, for the zero allowed. */
static void solve(fitted *at, const sums *s, const group *g)
{
    const qk_fit *fit = g->fit;
    if (g->kind == QK_FIT_ZERO) {
        at->zero = allowed_zero(fit, (s->hv - s->hw / at->scale) / s->h);
        return;
    }
    float over = s->hwv, under = s->hvv;
    if (g->kind == QK_FIT_BOTH) {
        float mixed = s->hv * -1;
        over = fmaf(s->h, s->hwv, s->hw * mixed);
        under = fmaf(s->h, s->hvv, s->hv * mixed);
        float scale = most(over / under, fit->scale_min);
        at->zero = allowed_zero(fit, (s->hv - s->hw / scale) / s->h);
        float minus = at->zero * -1;
        over = fmaf(minus, s->hw, s->hwv);
        under = fmaf(minus, fmaf(minus, s->h, s->hv + s->hv), s->hvv);
    }
    at->scale = most(over / under, fit->scale_min);
}

static void descend(fitted *best, fitted at, const group *g, size_t rounds)
{
    for (size_t round = 0;; round++) {
        sums s = sum_up(g, at);
        if (s.error < best->error)
            *best = (fitted){at.scale, at.zero, s.error};
        if (round == rounds)
            return;
        solve(&at, &s, g);
    }
}

static fitted whole_range(const group *g)
{
    const qk_fit *fit = g->fit;
    float low = weight(g, 0), high = low;
    for (size_t i = 1; i < g->count; i++) {
        low = least(low, weight(g, i));
        high = most(high, weight(g, i));
    }
    fitted at = {(high - low) / (fit->grid.code_max - fit->grid.code_min), 0, 0};
    if (g->kind == QK_FIT_BOTH)
        at.zero = allowed_zero(fit, fit->grid.code_min - low / at.scale);
    else if (fit->scale_min < 0) /* the end of more codes meets the larger magnitude */
        at.scale = (low * -1 < high ? high : low) / fit->grid.code_min;
    else
        at.scale = most(low / fit->grid.code_min, high / fit->grid.code_max);
    return at;
}

static fitted fit_group(const group *g, fitted given)
{
    const qk_fit *fit = g->fit;
    fitted best = {given.scale, given.zero, INFINITY};
    descend(&best, given, g, fit->find == QK_FIT_NOTHING ? 0 : fit->rounds);
    if (fit->find == QK_FIT_NOTHING || fit->find == QK_FIT_ZERO)
        return best;
    const fitted whole = whole_range(g);
    for (size_t start = 0; start < fit->starts; start++) {
        fitted at = whole;
        at.scale = whole.scale * (1 - (float)start * fit->shrink);
        descend(&best, at, g, fit->rounds);
    }
    return best;
}

static void fit_rows(const qk_fit_strip *strip)
{
    const qk_fit *fit = strip->fit;
    size_t groups = fit->cols / fit->group + (fit->cols % fit->group != 0);
    for (size_t row = strip->first; row < strip->last; row++)
        for (size_t i = 0; i < groups; i++) {
            size_t first = i * fit->group, left = fit->cols - first, at = row * groups + i;
            group g = {fit, row, first, left < fit->group ? left : fit->group, fit->find};
            if (fit->grid.level_count)
                g.kind = QK_FIT_LEVELS;
            fitted given = {qk_load_float32(strip->scales, at),
                            strip->zeros ? qk_load_float32(strip->zeros, at) : 0, 0};
            fitted best = fit_group(&g, given);
            qk_store_float32(strip->scales, at, best.scale);
            if (strip->zeros)
                qk_store_float32(strip->zeros, at, best.zero);
            if (strip->errors)
                qk_store_float32(strip->errors, at, best.error);
        }
}

static void add_scaled(void *y, const void *x, float a, size_t count)
{
    for (size_t i = 0; i < count; i++)
        qk_store_float32(y, i, fmaf(a, qk_load_float32(x, i), qk_load_float32(y, i)));
}

void qk_define_fit(qk_kernels *table)
{
    table->add_scaled = add_scaled;
    table->fit = fit_rows;
}
