/* Packing: checks, the choice of a path, lines over threads. A line is a row of codes (axis 1) or a
 * row of containers (axis 0); two threads never write the same container or the same code. */
#include "api/api.h"

#include "api/dispatch.h"
#include "api/parallel.h"

#include <stdatomic.h>

enum {
    PIECE =
        16384, /* columns that a thread takes at once: as many as come in one stream of memory */
    MIN_WORK = 1 << 16 /* codes below which another thread costs more than it saves */
};

enum { ALL_FIT = QK_FITS_UNSIGNED | QK_FITS_SIGNED };

typedef struct pack_job {
    const qk_kernels *kernels;
    const qk_packing *packing;
    const uint8_t *in;
    uint8_t *out;
    int is_signed;
    atomic_int fits;    /* QK_FITS_* that no code has broken yet */
    size_t width;       /* bits a container */
    size_t length;      /* codes (axis 1) or columns (axis 0) of a line */
    size_t piece;       /* of them in one item of work; a whole number of containers */
    size_t pieces;      /* in a line */
    size_t packed_line; /* containers of a line */
} pack_job;

/* The part of a line that one item of work covers. */
typedef struct pack_part {
    size_t line, first, count;
} pack_part;

static size_t per_container(const qk_packing *packing)
{
    return 8 * packing->container_bytes / packing->bits;
}

size_t qk_packed_length(size_t length, const qk_packing *packing)
{
    size_t width = 8 * packing->container_bytes, bits = packing->bits;
    if (!packing->straddle)
        return qk_ceil_div(length, per_container(packing));
    return length / width * bits + qk_ceil_div(length % width * bits, width);
}

static pack_part part_of(const pack_job *job, size_t item)
{
    size_t first = item % job->pieces * job->piece, left = job->length - first;
    return (pack_part){item / job->pieces, first, left < job->piece ? left : job->piece};
}

/* ---- along rows --------------------------------------------------------- */

static size_t code_offset(const pack_job *job, pack_part part)
{
    return part.line * job->length + part.first;
}

static size_t packed_offset(const pack_job *job, pack_part part)
{
    size_t containers = part.line * job->packed_line + qk_packed_length(part.first, job->packing);
    return containers * job->packing->container_bytes;
}

static void pack_rows(size_t first, size_t last, void *context)
{
    pack_job *job = context;
    int fits = ALL_FIT;
    for (size_t item = first; item < last; item++) {
        pack_part part = part_of(job, item);
        fits &=
            job->kernels->pack_stream(job->out + packed_offset(job, part),
                                      job->in + code_offset(job, part), part.count, job->packing);
    }
    atomic_fetch_and(&job->fits, fits);
}

static void unpack_rows(size_t first, size_t last, void *context)
{
    const pack_job *job = context;
    for (size_t item = first; item < last; item++) {
        pack_part part = part_of(job, item);
        job->kernels->unpack_stream(job->out + code_offset(job, part),
                                    job->in + packed_offset(job, part), part.count, job->packing,
                                    job->is_signed);
    }
}

/* ---- down columns ------------------------------------------------------- */

static int log2_of(size_t container_bytes)
{
    return container_bytes == 1 ? 0 : container_bytes == 2 ? 1 : container_bytes == 4 ? 2 : 3;
}

/* First row of codes that starts in container `line` or after it. */
static size_t first_row(const pack_job *job, size_t line)
{
    const qk_packing *packing = job->packing;
    size_t row = packing->straddle ? qk_ceil_div(line * job->width, packing->bits)
                                   : line * per_container(packing);
    return row < packing->rows ? row : packing->rows;
}

static void pack_columns(size_t first, size_t last, void *context)
{
    pack_job *job = context;
    const qk_packing *packing = job->packing;
    size_t cols = packing->cols, bits = packing->bits;
    int fits = ALL_FIT;
    for (size_t item = first; item < last; item++) {
        pack_part part = part_of(job, item);
        size_t row = first_row(job, part.line), end = first_row(job, part.line + 1), skip = 0;
        if (packing->straddle && part.line * job->width % bits) {
            row = part.line * job->width / bits;
            skip = part.line * job->width % bits;
        }
        fits &= job->kernels->pack_columns[log2_of(packing->container_bytes)](
            job->out + (part.line * cols + part.first) * packing->container_bytes,
            job->in + row * cols + part.first, cols, end - row, part.count, bits, skip);
    }
    atomic_fetch_and(&job->fits, fits);
}

static void unpack_columns(size_t first, size_t last, void *context)
{
    const pack_job *job = context;
    const qk_packing *packing = job->packing;
    size_t cols = packing->cols, bits = packing->bits;
    for (size_t item = first; item < last; item++) {
        pack_part part = part_of(job, item);
        const uint8_t *packed =
            job->in + (part.line * cols + part.first) * packing->container_bytes;
        size_t row = first_row(job, part.line), end = first_row(job, part.line + 1);
        size_t shift = packing->straddle ? row * bits - part.line * job->width : 0;
        for (; row < end; row++, shift += bits)
            job->kernels->unpack_columns[log2_of(packing->container_bytes)](
                job->out + row * cols + part.first, packed, cols, part.count, bits, shift,
                job->is_signed);
    }
}

/* ---- the calls ---------------------------------------------------------- */

static qk_status check(const qk_packing *packing, const void *codes, const void *packed)
{
    size_t container = packing->container_bytes, packed_rows = packing->rows;
    size_t packed_cols = packing->cols, code_bytes, packed_bytes;
    QK_REQUIRE(packing->bits >= 1 && packing->bits <= 8, QK_BAD_BITS);
    QK_REQUIRE(container == 1 || container == 2 || container == 4 || container == 8, QK_BAD_BITS);
    QK_REQUIRE(packing->axis == 0 || packing->axis == 1, QK_BAD_SHAPE);
    *(packing->axis == 0 ? &packed_rows : &packed_cols) =
        qk_packed_length(packing->axis == 0 ? packed_rows : packed_cols, packing);
    QK_REQUIRE(qk_multiply(packing->rows, packing->cols, &code_bytes), QK_BAD_SHAPE);
    QK_REQUIRE(qk_multiply(packed_rows, packed_cols, &packed_bytes), QK_BAD_SHAPE);
    QK_REQUIRE(qk_multiply(packed_bytes, container, &packed_bytes), QK_BAD_SHAPE);
    QK_REQUIRE(!qk_overlap(codes, code_bytes, packed, packed_bytes), QK_OVERLAP);
    return QK_OK;
}

/* *fits (NULL: not wanted): the widths that fit, where codes were packed. */
static qk_status run(const qk_packing *packing, const void *in, void *out, int is_signed, int *fits,
                     qk_range_fn rows, qk_range_fn columns)
{
    pack_job job = {.kernels = qk_active_kernels(), .packing = packing, .in = in, .out = out};
    job.is_signed = is_signed;
    atomic_init(&job.fits, ALL_FIT);
    job.width = 8 * packing->container_bytes;
    job.length = packing->cols;
    /* Streams may be cut where a container ends: after `width` codes, or a container's worth. */
    size_t step = packing->straddle ? job.width : per_container(packing);
    job.piece = packing->axis == 0 ? PIECE / packing->container_bytes : MIN_WORK / step * step;
    job.pieces = qk_ceil_div(job.length, job.piece);
    job.packed_line = qk_packed_length(packing->cols, packing);
    size_t lines = packing->axis == 0 ? qk_packed_length(packing->rows, packing) : packing->rows;
    size_t work = job.length < job.piece ? job.length : job.piece; /* codes of an item */
    if (packing->axis == 0)
        work *= qk_ceil_div(job.width, packing->bits);
    if (lines && job.pieces)
        QK_REQUIRE(qk_parallel_for(lines * job.pieces, MIN_WORK / (work + 1) + 1,
                                   packing->axis == 0 ? columns : rows, &job),
                   QK_INTERRUPTED);
    if (fits)
        *fits = atomic_load(&job.fits);
    return QK_OK;
}

qk_status qk_pack(void *packed, const uint8_t *codes, const qk_packing *packing, int *fits)
{
    qk_status status = check(packing, codes, packed);
    QK_REQUIRE(status == QK_OK, status);
    return run(packing, codes, packed, 0, fits, pack_rows, pack_columns);
}

qk_status qk_unpack(uint8_t *codes, const void *packed, const qk_packing *packing, int is_signed)
{
    qk_status status = check(packing, codes, packed);
    QK_REQUIRE(status == QK_OK, status);
    return run(packing, packed, codes, is_signed, NULL, unpack_rows, unpack_columns);
}

/* ---- ternary ------------------------------------------------------------ */

typedef struct ternary_job {
    const qk_kernels *kernels;
    const uint8_t *in;
    uint8_t *out;
    size_t cols, packed_cols;
} ternary_job;

static void pack_ternary_rows(size_t first, size_t last, void *context)
{
    const ternary_job *job = context;
    for (size_t row = first; row < last; row++)
        job->kernels->pack_ternary(job->out + row * job->packed_cols, job->in + row * job->cols,
                                   job->cols);
}

static void unpack_ternary_rows(size_t first, size_t last, void *context)
{
    const ternary_job *job = context;
    for (size_t row = first; row < last; row++)
        job->kernels->unpack_ternary(job->out + row * job->cols, job->in + row * job->packed_cols,
                                     job->cols);
}

static qk_status run_ternary(uint8_t *out, const uint8_t *in, size_t rows, size_t cols, int packs)
{
    ternary_job job = {qk_active_kernels(), in, out, cols, qk_ceil_div(cols, 5)};
    size_t code_bytes, packed_bytes;
    QK_REQUIRE(qk_multiply(rows, cols, &code_bytes), QK_BAD_SHAPE);
    packed_bytes = rows * job.packed_cols;
    QK_REQUIRE(
        !qk_overlap(out, packs ? packed_bytes : code_bytes, in, packs ? code_bytes : packed_bytes),
        QK_OVERLAP);
    QK_REQUIRE(!cols || qk_parallel_for(rows, MIN_WORK / (cols + 1) + 1,
                                        packs ? pack_ternary_rows : unpack_ternary_rows, &job),
               QK_INTERRUPTED);
    return QK_OK;
}

qk_status qk_pack_ternary(uint8_t *packed, const uint8_t *codes, size_t rows, size_t cols)
{
    return run_ternary(packed, codes, rows, cols, 1);
}

qk_status qk_unpack_ternary(uint8_t *codes, const uint8_t *packed, size_t rows, size_t cols)
{
    return run_ternary(codes, packed, rows, cols, 0);
}
