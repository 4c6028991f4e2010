/* quantize, measure, encode, decode: check the arguments, cut the grid into tiles, run the kernels.
 *
 * Tiles go over threads. Where they are few, each is measured in slabs whose number the grid alone
 * decides and whose partial ranges are merged in order: the thread count never changes a bit. */
#include "api/api.h"
#include "api/dispatch.h"
#include "api/parallel.h"
#include "api/scale.h"
#include "api/tiles.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/scalar.h"

/* ---- checks ------------------------------------------------------------- */

static int has_code_range(const qk_spec *spec, double least, double largest, int integer)
{
    double low = spec->code_min, high = spec->code_max;
    if (!(least <= low && low < high && high <= largest))
        return 0;
    if (!integer)
        return low == -high;
    if (low != rint(low) || high != rint(high))
        return 0;
    if (spec->mode == QK_BINARY)
        return low == -1 && high == 1;
    return spec->mode == QK_ASYMMETRIC || low == 0 || low + high == 0 || low + high == -1;
}

static int is_code_range(const qk_spec *spec)
{
    switch (spec->code) {
    case QK_INT8:
        return has_code_range(spec, -128, 127, 1);
    case QK_UINT8:
        return has_code_range(spec, 0, 255, 1);
    case QK_INT16:
        return has_code_range(spec, -32768, 32767, 1);
    case QK_FLOAT16:
        return has_code_range(spec, -65504, 65504, 0);
    case QK_BFLOAT16:
        return has_code_range(spec, -0x1.fep127, 0x1.fep127, 0);
    case QK_FLOAT8_E4M3FN:
        return has_code_range(spec, -448, 448, 0);
    case QK_FLOAT8_E5M2:
        return has_code_range(spec, -57344, 57344, 0);
    default:
        return has_code_range(spec, -0x1.fffffep127, 0x1.fffffep127, 0);
    }
}

static int is_code(qk_dtype dtype)
{
    return (unsigned)dtype < QK_DTYPES && dtype != QK_FLOAT64;
}

static qk_status check_spec(const qk_spec *spec)
{
    int integer = qk_is_integer(spec->code), scale = (int)spec->scale;
    QK_REQUIRE(qk_is_source(spec->source) && is_code(spec->code), QK_BAD_DTYPE);
    QK_REQUIRE(scale >= QK_FLOAT32 && scale <= QK_FLOAT8_E5M2, QK_BAD_DTYPE);
    QK_REQUIRE((unsigned)spec->mode <= QK_BINARY, QK_BAD_CODES);
    QK_REQUIRE(integer || spec->mode == QK_SYMMETRIC, QK_BAD_DTYPE);
    QK_REQUIRE(is_code_range(spec), QK_BAD_CODES);
    return QK_OK;
}

static qk_status check_grid(const qk_grid *grid)
{
    size_t items, bytes;
    QK_REQUIRE(grid->block_rows - 1 < PTRDIFF_MAX && grid->block_cols - 1 < PTRDIFF_MAX,
               QK_BAD_SHAPE);
    QK_REQUIRE(qk_multiply(grid->rows, grid->cols, &items), QK_BAD_SHAPE);
    QK_REQUIRE(qk_multiply(items, sizeof(double), &bytes) && bytes <= PTRDIFF_MAX, QK_BAD_SHAPE);
    return QK_OK;
}

static qk_span span_of(const void *data, size_t items, size_t item_bytes)
{
    return (qk_span){data, items * item_bytes};
}

static size_t count_blocks(const qk_grid *grid)
{
    return qk_ceil_div(grid->rows, grid->block_rows) * qk_ceil_div(grid->cols, grid->block_cols);
}

/* ---- the job ------------------------------------------------------------ */

/* Ranges of the blocks of one tile; floats lie at the front of the arrays of doubles. */
typedef struct tile_ranges {
    double low[QK_TILE_BLOCKS], high[QK_TILE_BLOCKS], sum[QK_TILE_BLOCKS];
} tile_ranges;

typedef struct quantize_job {
    const qk_kernels *kernels;
    const qk_spec *spec;
    qk_tiles tiles;
    size_t source_bytes, code_bytes, scale_bytes; /* of one element */
    const char *source;
    char *codes; /* NULL: only measure */
    char *scale, *zero;
    tile_ranges *partial; /* one for each slab, or NULL */
    atomic_int saw;       /* flags of scale.h */
} quantize_job;

static quantize_job job_of(const qk_grid *grid, const qk_spec *spec)
{
    quantize_job job = {.kernels = qk_active_kernels(), .spec = spec, .tiles = qk_cut_grid(grid)};
    job.source_bytes = qk_dtype_bytes(spec->source);
    job.code_bytes = qk_dtype_bytes(spec->code);
    job.scale_bytes = spec->source == QK_FLOAT64 ? sizeof(double) : sizeof(float);
    return job;
}

/* The lines from `line` on, before `last`, that are of one length: all but the last of a tile. */
static qk_lines lines_from(const qk_tile *tile, size_t line, size_t last)
{
    qk_lines some = {last - line, tile->stride, qk_line_length(tile, line), tile->run};
    some.lines -= qk_line_length(tile, last - 1) != some.count;
    return some;
}

static void measure_lines(const quantize_job *job, const qk_tile *tile, size_t first, size_t last,
                          tile_ranges *into)
{
    const qk_kernels *kernels = job->kernels;
    qk_dtype from = job->spec->source;
    memset(into->low, 0, tile->blocks * sizeof *into->low);
    memset(into->high, 0, tile->blocks * sizeof *into->high);
    memset(into->sum, 0, tile->blocks * sizeof *into->sum);
    while (first < last) {
        const char *source =
            job->source + (tile->offset + first * tile->stride) * job->source_bytes;
        qk_lines lines = lines_from(tile, first, last);
        kernels->range[from](into->low, into->high, source, &lines);
        for (size_t i = 0; job->spec->mode == QK_BINARY && i < lines.lines; i++)
            kernels->magnitude[from](into->sum, source + i * lines.stride * job->source_bytes,
                                     lines.count, lines.run);
        first += lines.lines;
    }
}

static void scale_tile(quantize_job *job, const qk_tile *tile, tile_ranges *ranges)
{
    for (size_t i = 0; job->spec->mode == QK_BINARY && i < tile->blocks; i++)
        ranges->sum[i] /= (double)qk_block_elements(tile, i);
    char *zero = job->zero ? job->zero + tile->block * sizeof(int32_t) : NULL;
    int saw = qk_scale_blocks(job->scale + tile->block * job->scale_bytes, zero, ranges->low,
                              ranges->high, ranges->sum, tile->blocks, job->spec);
    if (saw)
        atomic_fetch_or(&job->saw, saw);
}

static void encode_lines(const quantize_job *job, const qk_tile *tile, size_t first, size_t last)
{
    const char *scale = job->scale + tile->block * job->scale_bytes;
    const void *zero = job->zero ? job->zero + tile->block * sizeof(int32_t) : NULL;
    while (first < last) {
        size_t start = tile->offset + first * tile->stride;
        qk_lines lines = lines_from(tile, first, last);
        job->kernels->encode[job->spec->source][job->spec->code](
            job->codes + start * job->code_bytes, job->source + start * job->source_bytes, &lines,
            scale, zero, job->spec);
        first += lines.lines;
    }
}

/* Whole tiles [first, last): the blocks are still in the cache when they are encoded. */
static void run_tiles(size_t first, size_t last, void *context)
{
    quantize_job *job = context;
    for (size_t i = first; i < last; i++) {
        qk_tile tile = qk_tile_at(&job->tiles, i);
        tile_ranges ranges;
        measure_lines(job, &tile, 0, tile.lines, &ranges);
        scale_tile(job, &tile, &ranges);
        if (job->codes)
            encode_lines(job, &tile, 0, tile.lines);
    }
}

static void measure_slabs(size_t first, size_t last, void *context)
{
    quantize_job *job = context;
    for (size_t i = first; i < last; i++) {
        qk_tile tile = qk_tile_at(&job->tiles, i / job->tiles.slabs);
        size_t from, to;
        qk_slab_lines(&job->tiles, &tile, i % job->tiles.slabs, &from, &to);
        measure_lines(job, &tile, from, to, &job->partial[i]);
    }
}

static void encode_slabs(size_t first, size_t last, void *context)
{
    quantize_job *job = context;
    for (size_t i = first; i < last; i++) {
        qk_tile tile = qk_tile_at(&job->tiles, i / job->tiles.slabs);
        size_t from, to;
        qk_slab_lines(&job->tiles, &tile, i % job->tiles.slabs, &from, &to);
        encode_lines(job, &tile, from, to);
    }
}

/* Fold the ranges of `more` into `into`. As all ranges hold 0, the lows change no high and the
 * highs no low. */
static void merge(const quantize_job *job, tile_ranges *into, const tile_ranges *more,
                  size_t blocks)
{
    qk_dtype compute = job->spec->source == QK_FLOAT64 ? QK_FLOAT64 : QK_FLOAT32;
    qk_lines each = {1, blocks, blocks, 1};
    job->kernels->range[compute](into->low, into->high, more->low, &each);
    job->kernels->range[compute](into->low, into->high, more->high, &each);
    for (size_t i = 0; i < blocks; i++)
        into->sum[i] += more->sum[i];
}

static void merge_slabs(quantize_job *job)
{
    for (size_t i = 0; i < job->tiles.count; i++) {
        qk_tile tile = qk_tile_at(&job->tiles, i);
        tile_ranges *slabs = job->partial + i * job->tiles.slabs;
        for (size_t slab = 1; slab < job->tiles.slabs; slab++)
            merge(job, slabs, slabs + slab, tile.blocks);
        scale_tile(job, &tile, slabs);
    }
}

static qk_status run_job(quantize_job *job)
{
    size_t slabs = job->tiles.count * job->tiles.slabs;
    size_t grain = qk_task_grain(&job->tiles, slabs);
    if (job->tiles.slabs == 1) {
        QK_REQUIRE(qk_parallel_for(slabs, grain, run_tiles, job), QK_INTERRUPTED);
        return QK_OK;
    }
    job->partial = malloc(slabs * sizeof *job->partial);
    QK_REQUIRE(job->partial, QK_OUT_OF_MEMORY);
    int done = qk_parallel_for(slabs, grain, measure_slabs, job);
    if (done)
        merge_slabs(job);
    free(job->partial);
    if (done && job->codes)
        done = qk_parallel_for(slabs, grain, encode_slabs, job);
    return done ? QK_OK : QK_INTERRUPTED;
}

/* What was seen, as a status with the first culprit: found only now that there is one. */
static qk_status judge(const quantize_job *job, size_t items, size_t *where)
{
    int saw = atomic_load(&job->saw);
    if (job->spec->keep_non_finite)
        saw &= ~QK_SAW_NON_FINITE;
    if (saw & (QK_SAW_NON_FINITE | QK_SAW_NEGATIVE)) {
        size_t i = 0;
        for (; i < items; i++) {
            double x = qk_load_source(job->source, i, job->spec->source);
            if (saw & QK_SAW_NON_FINITE ? !isfinite(x) : x < 0 && isfinite(x))
                break;
        }
        if (where)
            *where = i;
        return saw & QK_SAW_NON_FINITE ? QK_NON_FINITE : QK_NEGATIVE;
    }
    return saw & QK_SAW_SCALE_RANGE ? QK_SCALE_RANGE : QK_OK;
}

/* ---- the calls ---------------------------------------------------------- */

qk_status qk_quantize(void *codes, void *scale, int32_t *zero, const void *source,
                      const qk_grid *grid, const qk_spec *spec, size_t *where)
{
    qk_status status = check_spec(spec);
    status = status == QK_OK ? check_grid(grid) : status;
    QK_REQUIRE(status == QK_OK, status);
    QK_REQUIRE(zero || spec->mode != QK_ASYMMETRIC, QK_BAD_CODES);
    quantize_job job = job_of(grid, spec);
    size_t items = grid->rows * grid->cols, blocks = count_blocks(grid);
    qk_span spans[] = {span_of(scale, blocks, job.scale_bytes), span_of(zero, blocks, sizeof *zero),
                       span_of(codes, items, job.code_bytes),
                       span_of(source, items, job.source_bytes)};
    QK_REQUIRE(qk_are_apart(spans, 3, 4), QK_OVERLAP);
    job.source = source;
    job.codes = codes;
    job.scale = scale;
    job.zero = (char *)zero;
    status = run_job(&job);
    return status == QK_OK ? judge(&job, items, where) : status;
}

qk_status qk_measure(void *scale, int32_t *zero, const void *source, const qk_grid *grid,
                     const qk_spec *spec, size_t *where)
{
    return qk_quantize(NULL, scale, zero, source, grid, spec, where);
}

qk_status qk_encode(void *codes, const void *source, const void *scale, const int32_t *zero,
                    const qk_grid *grid, const qk_spec *spec)
{
    qk_status status = check_spec(spec);
    status = status == QK_OK ? check_grid(grid) : status;
    QK_REQUIRE(status == QK_OK, status);
    quantize_job job = job_of(grid, spec);
    size_t items = grid->rows * grid->cols, blocks = count_blocks(grid);
    qk_span spans[] = {
        span_of(codes, items, job.code_bytes), span_of(source, items, job.source_bytes),
        span_of(scale, blocks, job.scale_bytes), span_of(zero, blocks, sizeof *zero)};
    QK_REQUIRE(qk_are_apart(spans, 1, 4), QK_OVERLAP);
    job.source = source;
    job.codes = codes;
    job.scale = (char *)scale; /* only read */
    job.zero = (char *)zero;
    size_t slabs = job.tiles.count * job.tiles.slabs;
    int done = qk_parallel_for(slabs, qk_task_grain(&job.tiles, slabs), encode_slabs, &job);
    return done ? QK_OK : QK_INTERRUPTED;
}

typedef struct decode_job {
    void (*decode)(void *out, const void *codes, const qk_lines *lines, const void *scale,
                   const int32_t *zero);
    qk_tiles tiles;
    size_t out_bytes, code_bytes, scale_bytes; /* of one element */
    char *out;
    const char *codes, *scale;
    const int32_t *zero;
} decode_job;

static void decode_slabs(size_t first, size_t last, void *context)
{
    const decode_job *job = context;
    for (size_t i = first; i < last; i++) {
        qk_tile tile = qk_tile_at(&job->tiles, i / job->tiles.slabs);
        const char *scale = job->scale + tile.block * job->scale_bytes;
        const void *zero =
            job->zero ? (const char *)job->zero + tile.block * sizeof(int32_t) : NULL;
        size_t line, end;
        qk_slab_lines(&job->tiles, &tile, i % job->tiles.slabs, &line, &end);
        while (line < end) {
            size_t start = tile.offset + line * tile.stride;
            qk_lines lines = lines_from(&tile, line, end);
            job->decode(job->out + start * job->out_bytes, job->codes + start * job->code_bytes,
                        &lines, scale, zero);
            line += lines.lines;
        }
    }
}

qk_status qk_decode(void *out, qk_dtype out_dtype, const void *codes, qk_dtype code_dtype,
                    const void *scale, const int32_t *zero, const qk_grid *grid)
{
    QK_REQUIRE(qk_is_source(out_dtype) && is_code(code_dtype), QK_BAD_DTYPE);
    qk_status status = check_grid(grid);
    QK_REQUIRE(status == QK_OK, status);
    decode_job job = {.decode = qk_active_kernels()->decode[code_dtype][out_dtype],
                      .tiles = qk_cut_grid(grid),
                      .out_bytes = qk_dtype_bytes(out_dtype),
                      .code_bytes = qk_dtype_bytes(code_dtype),
                      .scale_bytes = out_dtype == QK_FLOAT64 ? sizeof(double) : sizeof(float),
                      .out = out,
                      .codes = codes,
                      .scale = scale,
                      .zero = zero};
    size_t items = grid->rows * grid->cols, blocks = count_blocks(grid);
    qk_span spans[] = {span_of(out, items, job.out_bytes), span_of(codes, items, job.code_bytes),
                       span_of(scale, blocks, job.scale_bytes),
                       span_of(zero, blocks, sizeof *zero)};
    QK_REQUIRE(qk_are_apart(spans, 1, 4), QK_OVERLAP);
    size_t slabs = job.tiles.count * job.tiles.slabs;
    int done = qk_parallel_for(slabs, qk_task_grain(&job.tiles, slabs), decode_slabs, &job);
    return done ? QK_OK : QK_INTERRUPTED;
}
