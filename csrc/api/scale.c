#include "api/scale.h"

#include <float.h>
#include <math.h>

#include "kernels/scalar.h"

/* A float operation may be done in double and rounded: with 53 >= 2 * 24 + 2 bits, +, - and /
 * of floats round the same either way (Figueroa, When is double rounding innocuous?, 1995). */
static double in_compute(double value, const qk_spec *spec)
{
    return spec->source == QK_FLOAT64 ? value : (double)(float)value;
}

static qk_dtype scale_type(const qk_spec *spec)
{
    int narrowed = spec->source != QK_FLOAT64 && spec->scale == QK_FLOAT64;
    return narrowed ? QK_FLOAT32 : spec->scale;
}

static double smallest_normal(qk_dtype dtype)
{
    switch (dtype) {
    case QK_FLOAT64:
        return DBL_MIN;
    case QK_FLOAT16:
    case QK_FLOAT8_E5M2:
        return 0x1p-14;
    case QK_FLOAT8_E4M3FN:
        return 0x1p-6;
    default:
        return FLT_MIN;
    }
}

/* `value` >= 0 rounded to the type, then moved up by `ulps` numbers of it. */
static double rounded_to(qk_dtype dtype, double value, unsigned ulps)
{
    uint64_t bits;
    switch (dtype) {
    case QK_FLOAT64:
        memcpy(&bits, &value, sizeof bits);
        bits += ulps;
        memcpy(&value, &bits, sizeof bits);
        return value;
    case QK_FLOAT16:
        return (double)qk_from_float16((uint16_t)(qk_to_float16((float)value) + ulps));
    case QK_BFLOAT16:
        return (double)qk_from_bfloat16((uint16_t)(qk_to_bfloat16((float)value) + ulps));
    case QK_FLOAT8_E4M3FN:
        return (double)qk_from_float8_e4m3fn((uint8_t)(qk_to_float8_e4m3fn((float)value) + ulps));
    case QK_FLOAT8_E5M2:
        return (double)qk_from_float8_e5m2((uint8_t)(qk_to_float8_e5m2((float)value) + ulps));
    default:
        return (double)qk_float_of(qk_bits_of((float)value) + ulps);
    }
}

/* The scale `exact` as stored, for a range `reach` that `half` codes are to cover. */
static double stored_scale(double exact, double half, double reach, const qk_spec *spec)
{
    qk_dtype dtype = scale_type(spec);
    double scale = rounded_to(dtype, exact, 0);
    if (scale < smallest_normal(dtype) && fma(scale, 2 * half, -2 * reach) < 0) /* exactly */
        scale = rounded_to(dtype, exact, 1);
    return scale;
}

static double half_of(const qk_spec *spec)
{
    return spec->code_min == 0 ? spec->code_max : (spec->code_max - spec->code_min) / 2;
}

static double binary_scale(double mean, double absmax, const qk_spec *spec)
{
    mean = in_compute(mean < absmax ? mean : absmax, spec); /* the sum may overflow, a mean not */
    double scale = rounded_to(scale_type(spec), mean, 0);
    return scale == 0 && absmax > 0 ? rounded_to(scale_type(spec), 0, 1) : scale;
}

static double symmetric_scale(double absmax, const qk_spec *spec)
{
    double half = half_of(spec);
    if (absmax == 0)
        return 1;
    return stored_scale(in_compute(absmax / half, spec), half, absmax, spec);
}

static double asymmetric_scale(double low, double high, const qk_spec *spec)
{
    double n = spec->code_max - spec->code_min, span = in_compute(high - low, spec);
    if (span == 0)
        return 1;
    if (isinf(span)) {
        double exact = in_compute(in_compute(high / n, spec) - in_compute(low / n, spec), spec);
        return rounded_to(scale_type(spec), exact, 0);
    }
    return stored_scale(in_compute(span / n, spec), n, span, spec);
}

static int32_t zero_point(double low, double scale, const qk_spec *spec)
{
    double zero = rint(in_compute(spec->code_min - in_compute(low / scale, spec), spec));
    zero = zero > spec->code_max ? spec->code_max : zero;
    return (int32_t)(zero >= spec->code_min ? zero : spec->code_min);
}

/* The rules, for one block. Returns flags. */
static int scale_one(double *scale, int32_t *zero, double low, double high, double mean,
                     const qk_spec *spec)
{
    *scale = NAN;
    *zero = 0;
    if (!isfinite(low) || !isfinite(high))
        return QK_SAW_NON_FINITE;
    int saw = spec->mode == QK_SYMMETRIC && spec->code_min == 0 && low < 0 ? QK_SAW_NEGATIVE : 0;
    low = low < 0 ? low : 0;
    high = high > 0 ? high : 0;
    double absmax = -low > high ? -low : high;
    if (spec->mode == QK_BINARY)
        *scale = binary_scale(mean, absmax, spec);
    else if (spec->mode == QK_SYMMETRIC)
        *scale = symmetric_scale(absmax, spec);
    else
        *scale = asymmetric_scale(low, high, spec);
    if (!isfinite(*scale))
        return saw | QK_SAW_SCALE_RANGE;
    if (spec->mode == QK_ASYMMETRIC)
        *zero = zero_point(low, *scale, spec);
    return saw;
}

/* ---- the commonest case, again and quickly ------------------------------ */

enum { SOME = 64 }; /* blocks at once */

/* Float32 scales of signed or asymmetric integers. */
static int is_plain(const qk_spec *spec)
{
    return spec->source != QK_FLOAT64 && scale_type(spec) == QK_FLOAT32 &&
           spec->mode != QK_BINARY && (spec->mode == QK_ASYMMETRIC || spec->code_min != 0);
}

/* To the nearest whole number, |x| < 2^22: neighbours of a float of this size are one apart. */
static inline float nearest(float x)
{
    const float unit = 0x1.8p23f;
    return x + unit - unit;
}

/* Loops without a branch, for the compiler's vectors. 0 where a block is not plain: not finite,
 * subnormal, too wide; the outputs are of no use then. */
static int scale_some(float scale[SOME], int32_t zero[SOME], const float low[SOME],
                      const float high[SOME], const qk_spec *spec)
{
    const float least = (float)spec->code_min, most = (float)spec->code_max;
    const int symmetric = spec->mode == QK_SYMMETRIC;
    const float steps = symmetric ? (float)half_of(spec) : most - least;
    float reach[SOME];
    int plain = 1;
    for (size_t i = 0; i < SOME; i++) {
        float absmax = -low[i] > high[i] ? -low[i] : high[i];
        float span = symmetric ? absmax : high[i] - low[i];
        reach[i] = span == 0 ? steps : span; /* scale 1 */
    }
    for (size_t i = 0; i < SOME; i++) {
        scale[i] = reach[i] / steps;
        plain &= (scale[i] >= FLT_MIN) & (reach[i] <= FLT_MAX) & (high[i] == high[i]);
    }
    for (size_t i = 0; i < SOME; i++)
        zero[i] = 0;
    if (symmetric || !plain)
        return plain;
    for (size_t i = 0; i < SOME; i++) {
        float point = nearest(least - low[i] / scale[i]);
        point = point < least ? least : point > most ? most : point;
        zero[i] = (int32_t)point;
    }
    return 1;
}

/* `count` <= SOME numbers, most often SOME. */
static inline void copy_some(void *to, const void *from, size_t count)
{
    if (count == SOME)
        memcpy(to, from, SOME * sizeof(float));
    else
        memcpy(to, from, count * sizeof(float));
}

/* The same at any address, for 1 to SOME blocks. */
static int scale_plain(char *scale, char *zero, const char *low, const char *high, size_t count,
                       const qk_spec *spec)
{
    float lows[SOME], highs[SOME], scales[SOME];
    int32_t zeros[SOME];
    for (size_t i = count; i < SOME; i++)
        lows[i] = -1, highs[i] = 1;
    copy_some(lows, low, count);
    copy_some(highs, high, count);
    if (!scale_some(scales, zeros, lows, highs, spec))
        return 0;
    copy_some(scale, scales, count);
    if (zero)
        copy_some(zero, zeros, count);
    return 1;
}

/* ---- the call ----------------------------------------------------------- */

int qk_scale_blocks(void *scale, void *zero, const void *low, const void *high, const double *mean,
                    size_t count, const qk_spec *spec)
{
    int saw = 0, wide = spec->source == QK_FLOAT64, plain = is_plain(spec);
    qk_dtype compute = wide ? QK_FLOAT64 : QK_FLOAT32;
    for (size_t i = 0; i < count; i++) {
        size_t some = count - i < SOME ? count - i : SOME, at = i * sizeof(float);
        if (plain && i % SOME == 0 && some > 4 &&
            scale_plain((char *)scale + at, zero ? (char *)zero + at : NULL, (const char *)low + at,
                        (const char *)high + at, some, spec)) {
            i += some - 1;
            continue;
        }
        double value;
        int32_t point;
        saw |= scale_one(&value, &point, qk_load_source(low, i, compute),
                         qk_load_source(high, i, compute), mean ? mean[i] : 0, spec);
        qk_store_source(scale, i, compute, value);
        if (zero)
            qk_store_int32(zero, i, point);
    }
    return saw;
}
