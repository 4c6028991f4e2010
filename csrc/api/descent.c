#include "api/descent.h"

#include <math.h>

#include "kernels/scalar.h"

/* A row: its place in each array, and its steps. */
typedef struct row_view {
    const qk_descent *form;
    const qk_kernels *kernels;
    const char *levels;
    char *values, *slopes, *scales, *zeros;
    float step;
} row_view;

static char *at_row(const void *array, size_t row, size_t length)
{
    return array ? (char *)array + row * length * sizeof(float) : NULL;
}

/* Round half to even, for numbers that are far from 2^22. */
static float whole(float number)
{
    return (number + 0x1.8p23f) - 0x1.8p23f;
}

/* The level nearest to a place; of two that are as near, the upper one of a table. */
static float nearest(const qk_grid_levels *grid, const char *levels, float place)
{
    if (!grid->level_count) {
        place = place < grid->code_max ? place : grid->code_max;
        return place > grid->code_min ? whole(place) : grid->code_min;
    }
    float best = qk_load_float32(levels, 0);
    for (size_t i = 1; i < grid->level_count; i++) {
        float before = qk_load_float32(levels, i - 1), next = qk_load_float32(levels, i);
        if (place < (before + next) * 0.5f)
            break;
        best = next;
    }
    return best;
}

/* ---- one code after the other ---------------------------------------------- */

/* The slopes after the weight of column k has grown by `more`. */
static void move_weight(const row_view *v, size_t k, float more)
{
    size_t cols = v->form->cols;
    v->kernels->add_scaled(v->slopes, at_row(v->form->hessian, k, cols), -more, cols);
}

/* Give each weight in turn the level of least loss, all others being as they are. */
static size_t choose_codes(const row_view *v)
{
    const qk_descent *form = v->form;
    size_t changed = 0;
    for (size_t k = 0; k < form->cols; k++) {
        size_t group = k / form->group;
        float scale = qk_load_float32(v->scales, group), value = qk_load_float32(v->values, k);
        float bend = qk_load_float32(form->hessian, k * form->cols + k);
        /* the zero point moves all levels alike: from one to the next it takes no part */
        float wanted = value + qk_load_float32(v->slopes, k) / (bend * scale);
        float next = nearest(&form->grid, v->levels, wanted);
        if (next == value || !(wanted == wanted))
            continue;
        qk_store_float32(v->values, k, next);
        move_weight(v, k, scale * (next - value));
        changed++;
    }
    return changed;
}

/* ---- scales and zero points ------------------------------------------------ */

static float allowed_scale(const row_view *v, float scale)
{
    const qk_descent *form = v->form;
    if (form->steps) {
        float code = v->step > 0 ? rintf(scale / v->step) : 0;
        code = code < 1 ? 1 : code > 255 ? 255 : code;
        return code * v->step;
    }
    char stored[sizeof(double)];
    qk_store_source(stored, 0, form->scale_dtype, (double)scale);
    return (float)qk_load_source(stored, 0, form->scale_dtype);
}

static float allowed_zero(const qk_descent *form, float zero)
{
    if (form->zero_step > 0)
        zero = rintf(zero / form->zero_step) * form->zero_step;
    zero = zero < form->zero_max ? zero : form->zero_max;
    zero = zero > form->zero_min ? zero : form->zero_min;
    char stored[sizeof(double)];
    qk_store_source(stored, 0, form->zero_dtype, (double)zero);
    return (float)qk_load_source(stored, 0, form->zero_dtype);
}

/* What the loss of a group is made of, for w = scale * value + offset. */
typedef struct quadratic {
    double vv, v1, ones, v_slope, slope;
} quadratic;

/* By how much the loss falls if scale and offset grow by so much. */
static double gain(const quadratic *q, double scale, double offset)
{
    return 2 * (scale * q->v_slope + offset * q->slope) - scale * scale * q->vv -
           2 * scale * offset * q->v1 - offset * offset * q->ones;
}

/* hv = H v and h1 = H 1 within the group; the sums over it. */
static quadratic measure(const row_view *v, size_t first, size_t count, float *hv, float *h1)
{
    const qk_descent *form = v->form;
    quadratic q = {0, 0, 0, 0, 0};
    for (size_t i = 0; i < count; i++)
        hv[i] = h1[i] = 0;
    for (size_t i = 0; i < count; i++) {
        const char *line =
            (const char *)form->hessian + ((first + i) * form->cols + first) * sizeof(float);
        v->kernels->add_scaled(hv, line, qk_load_float32(v->values, first + i), count);
        v->kernels->add_scaled(h1, line, 1, count);
    }
    for (size_t i = 0; i < count; i++) {
        double value = qk_load_float32(v->values, first + i);
        double slope = qk_load_float32(v->slopes, first + i);
        q.vv += value * hv[i];
        q.v1 += value * h1[i];
        q.ones += h1[i];
        q.v_slope += value * slope;
        q.slope += slope;
    }
    return q;
}

/* The scale and zero point of least loss for the codes of a group, as they would be stored. */
static void solve(const row_view *v, const quadratic *q, float *scale, float *zero)
{
    const qk_descent *form = v->form;
    double old_scale = *scale, old_offset = v->zeros ? -(double)*scale * *zero : 0;
    double more = q->vv > 0 ? q->v_slope / q->vv : 0;
    if (v->zeros) {
        double determinant = q->vv * q->ones - q->v1 * q->v1;
        more = (q->v_slope * q->ones - q->slope * q->v1) / determinant;
    }
    *scale = allowed_scale(v, (float)(old_scale + more));
    if (!v->zeros)
        return;
    more = *scale - old_scale; /* the offset that suits the scale as it is stored */
    double offset = old_offset + (q->slope - more * q->v1) / q->ones;
    *zero = allowed_zero(form, (float)(-offset / *scale));
}

static void refit_group(const row_view *v, size_t group, float *scratch)
{
    const qk_descent *form = v->form;
    size_t first = group * form->group, left = form->cols - first;
    size_t count = left < form->group ? left : form->group;
    float scale = qk_load_float32(v->scales, group), new_scale = scale;
    float zero = v->zeros ? qk_load_float32(v->zeros, group) : 0, new_zero = zero;
    quadratic q = measure(v, first, count, scratch, scratch + count);
    solve(v, &q, &new_scale, &new_zero);
    double offset = (double)scale * zero - (double)new_scale * new_zero;
    int is_usable =
        isfinite(new_scale) && isfinite(new_zero) && new_scale != 0 && new_scale >= form->scale_min;
    if (!is_usable || !(gain(&q, (double)new_scale - scale, offset) > 0))
        return;
    for (size_t i = first; i < first + count; i++) {
        float value = qk_load_float32(v->values, i);
        float more = (value - new_zero) * new_scale - (value - zero) * scale;
        move_weight(v, i, more);
    }
    qk_store_float32(v->scales, group, new_scale);
    if (v->zeros)
        qk_store_float32(v->zeros, group, new_zero);
}

size_t qk_descent_scratch(const qk_descent *form)
{
    return 2 * form->group;
}

void qk_descend_row(const qk_descent *form, size_t row, float *scratch, const qk_kernels *kernels)
{
    size_t groups = form->cols / form->group + (form->cols % form->group != 0);
    const qk_grid_levels *grid = &form->grid;
    row_view v = {.form = form,
                  .kernels = kernels,
                  .levels = at_row(grid->levels, grid->codebooks > 1 ? row : 0, grid->level_count),
                  .values = at_row(form->values, row, form->cols),
                  .slopes = at_row(form->slopes, row, form->cols),
                  .scales = at_row(form->scales, row, groups),
                  .zeros = at_row(form->zeros, row, groups),
                  .step = form->steps ? qk_load_float32(form->steps, row) : 0};
    for (size_t sweep = 0; sweep < form->sweeps; sweep++) {
        for (size_t group = 0; form->refits && group < groups; group++)
            refit_group(&v, group, scratch);
        if (!choose_codes(&v) && sweep)
            return;
    }
}

/* ---- rounding in order ------------------------------------------------------ */

void qk_round_row_in_order(const qk_rounding *form, size_t row, const qk_kernels *kernels)
{
    const qk_grid_levels *grid = &form->grid;
    size_t cols = form->cols, groups = form->groups;
    char *x = at_row(form->x, row, cols), *values = at_row(form->values, row, cols);
    const char *scales = at_row(form->scales, row, groups);
    const char *zeros = at_row(form->zeros, row, groups);
    const char *levels = at_row(grid->levels, grid->codebooks > 1 ? row : 0, grid->level_count);
    for (size_t k = 0; k < cols; k++) {
        size_t group = (size_t)qk_load_int32(form->places, k);
        float scale = qk_load_float32(scales, group), w = qk_load_float32(x, k);
        float zero = zeros ? qk_load_float32(zeros, group) : 0;
        float value = nearest(grid, levels, w / scale + zero);
        qk_store_float32(values, k, value);
        const char *line = at_row(form->factor, k, cols);
        float off = (w - (value - zero) * scale) / qk_load_float32(line, k);
        if (isfinite(off))
            kernels->add_scaled(x + (k + 1) * sizeof(float), line + (k + 1) * sizeof(float), -off,
                                cols - k - 1);
    }
}
