#include "harness.h"

static region codes, packed;
static output result;

static void check_dense(size_t bits)
{
    if (begin_slot("pack_dense", (int)bits, -1, (any_fn)tested->pack_dense[bits],
                   (any_fn)reference->pack_dense[bits]))
        for (size_t i = 0; i < 2 * AWKWARD_LENGTHS; i++) {
            size_t count = awkward_length(i / 2);
            begin_case("count %zu", count);
            place_random(&codes, count);
            place_output(&result, (count * bits + 7) / 8, 0x5A);
            reference->pack_dense[bits](result.expected.data, codes.data, count);
            tested->pack_dense[bits](result.actual.data, codes.data, count);
            expect_equal(&result, QK_UINT8);
        }
    if (begin_slot("unpack_dense", (int)bits, -1, (any_fn)tested->unpack_dense[bits],
                   (any_fn)reference->unpack_dense[bits]))
        for (size_t i = 0; i < 4 * AWKWARD_LENGTHS; i++) {
            size_t count = awkward_length(i / 4);
            int is_signed = i & 1;
            begin_case("count %zu signed %d", count, is_signed);
            place_random(&packed, (count * bits + 7) / 8);
            place_output(&result, count, 0x5A);
            reference->unpack_dense[bits](result.expected.data, packed.data, count, is_signed);
            tested->unpack_dense[bits](result.actual.data, packed.data, count, is_signed);
            expect_equal(&result, QK_UINT8);
        }
}

static size_t matrix_bytes(size_t rows, size_t cols, size_t stride)
{
    return rows ? (rows - 1) * stride + cols : 0;
}

static void check_columns(size_t bits)
{
    int packs = begin_slot("pack_columns", (int)bits, -1, (any_fn)tested->pack_columns[bits],
                           (any_fn)reference->pack_columns[bits]);
    for (size_t i = 0; packs && i < 2 * SHORT_LENGTHS; i++) {
        size_t rows = 1 + random_below(8 / bits), cols = 1 + i / 2, gap = random_below(3);
        begin_case("rows %zu cols %zu gap %zu", rows, cols, gap);
        place_random(&codes, matrix_bytes(rows, cols, cols + gap));
        place_output(&result, cols, 0x5A);
        reference->pack_columns[bits](result.expected.data, codes.data, cols + gap, rows, cols);
        tested->pack_columns[bits](result.actual.data, codes.data, cols + gap, rows, cols);
        expect_equal(&result, QK_UINT8);
    }
    int unpacks = begin_slot("unpack_columns", (int)bits, -1, (any_fn)tested->unpack_columns[bits],
                             (any_fn)reference->unpack_columns[bits]);
    for (size_t i = 0; unpacks && i < 4 * SHORT_LENGTHS; i++) {
        size_t rows = 1 + random_below(8 / bits), cols = 1 + i / 4, gap = random_below(3);
        int is_signed = i & 1;
        begin_case("rows %zu cols %zu gap %zu signed %d", rows, cols, gap, is_signed);
        place_random(&packed, cols);
        place_output(&result, matrix_bytes(rows, cols, cols + gap), 0x5A);
        reference->unpack_columns[bits](result.expected.data, packed.data, cols + gap, rows, cols,
                                        is_signed);
        tested->unpack_columns[bits](result.actual.data, packed.data, cols + gap, rows, cols,
                                     is_signed);
        expect_equal(&result, QK_UINT8);
    }
}

/* A random layout for one stream of `count` codes; *bytes that the containers span. */
static qk_packing random_packing(size_t count, size_t container_step, size_t *bytes)
{
    qk_packing packing = {.rows = 1, .cols = count, .axis = 1};
    packing.bits = 1 + random_below(8);
    packing.container_bytes = (size_t)1 << random_below(4);
    packing.straddle = (int)random_below(2);
    size_t container_bits = 8 * packing.container_bytes, per_container;
    per_container = container_bits / packing.bits;
    size_t containers = packing.straddle
                            ? (count * packing.bits + container_bits - 1) / container_bits
                            : (count + per_container - 1) / per_container;
    *bytes = containers ? ((containers - 1) * container_step + 1) * packing.container_bytes : 0;
    return packing;
}

static void check_streams(void)
{
    int packs = begin_slot("pack_stream", 0, -1, (any_fn)tested->pack_stream,
                           (any_fn)reference->pack_stream);
    for (size_t i = 0; packs && i < 30 * SHORT_LENGTHS; i++) {
        size_t count = 1 + i % SHORT_LENGTHS, code_step = 1 + random_below(3), bytes;
        size_t step = 1 + random_below(3);
        qk_packing packing = random_packing(count, step, &bytes);
        begin_case("count %zu bits %zu container %zu straddle %d steps %zu %zu", count,
                   packing.bits, packing.container_bytes, packing.straddle, step, code_step);
        place_random(&codes, (count - 1) * code_step + 1);
        place_output(&result, bytes, 0x5A);
        reference->pack_stream(result.expected.data, step, codes.data, code_step, count, &packing);
        tested->pack_stream(result.actual.data, step, codes.data, code_step, count, &packing);
        expect_equal(&result, QK_UINT8);
    }
    int unpacks = begin_slot("unpack_stream", 0, -1, (any_fn)tested->unpack_stream,
                             (any_fn)reference->unpack_stream);
    for (size_t i = 0; unpacks && i < 30 * SHORT_LENGTHS; i++) {
        size_t count = 1 + i % SHORT_LENGTHS, code_step = 1 + random_below(3), bytes;
        size_t step = 1 + random_below(3);
        qk_packing packing = random_packing(count, step, &bytes);
        int is_signed = (int)random_below(2);
        begin_case("count %zu bits %zu container %zu straddle %d steps %zu %zu signed %d", count,
                   packing.bits, packing.container_bytes, packing.straddle, step, code_step,
                   is_signed);
        place_random(&packed, bytes);
        place_output(&result, (count - 1) * code_step + 1, 0x5A);
        reference->unpack_stream(result.expected.data, code_step, packed.data, step, count,
                                 &packing, is_signed);
        tested->unpack_stream(result.actual.data, code_step, packed.data, step, count, &packing,
                              is_signed);
        expect_equal(&result, QK_UINT8);
    }
}

void check_pack(void)
{
    for (size_t bits = 1; bits < QK_WIDTHS; bits++) {
        check_dense(bits);
        check_columns(bits);
    }
    check_streams();
}
