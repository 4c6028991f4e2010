#include "harness.h"

static region codes, packed;
static output result;

/* A random layout for one row of `count` codes; *bytes that its containers take. */
static qk_packing random_packing(size_t count, size_t *bytes)
{
    qk_packing packing = {.rows = 1, .cols = count, .axis = 1};
    packing.bits = 1 + random_below(8);
    packing.container_bytes = (size_t)1 << random_below(4);
    packing.straddle = (int)random_below(2);
    size_t width = 8 * packing.container_bytes, per_container = width / packing.bits;
    size_t containers = packing.straddle ? (count * packing.bits + width - 1) / width
                                         : (count + per_container - 1) / per_container;
    *bytes = containers * packing.container_bytes;
    return packing;
}

static void check_streams(void)
{
    int packs = begin_slot("pack_stream", 0, -1, (any_fn)tested->pack_stream,
                           (any_fn)reference->pack_stream);
    for (size_t i = 0; packs && i < 60 * AWKWARD_LENGTHS; i++) {
        size_t count = awkward_length(i % AWKWARD_LENGTHS), bytes;
        qk_packing packing = random_packing(count, &bytes);
        begin_case("count %zu bits %zu container %zu straddle %d", count, packing.bits,
                   packing.container_bytes, packing.straddle);
        place_random(&codes, count);
        place_output(&result, bytes, 0x5A);
        reference->pack_stream(result.expected.data, codes.data, count, &packing);
        tested->pack_stream(result.actual.data, codes.data, count, &packing);
        expect_equal(&result, QK_UINT8);
    }
    int unpacks = begin_slot("unpack_stream", 0, -1, (any_fn)tested->unpack_stream,
                             (any_fn)reference->unpack_stream);
    for (size_t i = 0; unpacks && i < 60 * AWKWARD_LENGTHS; i++) {
        size_t count = awkward_length(i % AWKWARD_LENGTHS), bytes;
        qk_packing packing = random_packing(count, &bytes);
        int is_signed = (int)random_below(2);
        begin_case("count %zu bits %zu container %zu straddle %d signed %d", count, packing.bits,
                   packing.container_bytes, packing.straddle, is_signed);
        place_random(&packed, bytes);
        place_output(&result, count, 0x5A);
        reference->unpack_stream(result.expected.data, packed.data, count, &packing, is_signed);
        tested->unpack_stream(result.actual.data, packed.data, count, &packing, is_signed);
        expect_equal(&result, QK_UINT8);
    }
}

static size_t matrix_items(size_t rows, size_t cols, size_t stride)
{
    return rows ? (rows - 1) * stride + cols : 0;
}

static void check_columns(int log2_bytes)
{
    size_t bytes = (size_t)1 << log2_bytes, width = 8 * bytes;
    int packs = begin_slot("pack_columns", log2_bytes, -1, (any_fn)tested->pack_columns[log2_bytes],
                           (any_fn)reference->pack_columns[log2_bytes]);
    for (size_t i = 0; packs && i < 10 * SHORT_LENGTHS; i++) {
        size_t cols = 1 + i / 10, gap = random_below(3), bits = 1 + random_below(8);
        size_t skip = random_below(bits), rows = 1 + random_below((width + skip + bits - 1) / bits);
        begin_case("rows %zu cols %zu gap %zu bits %zu skip %zu", rows, cols, gap, bits, skip);
        place_random(&codes, matrix_items(rows, cols, cols + gap));
        place_output(&result, cols * bytes, 0x5A);
        reference->pack_columns[log2_bytes](result.expected.data, codes.data, cols + gap, rows,
                                            cols, bits, skip);
        tested->pack_columns[log2_bytes](result.actual.data, codes.data, cols + gap, rows, cols,
                                         bits, skip);
        expect_equal(&result, QK_UINT8);
    }
    int unpacks =
        begin_slot("unpack_columns", log2_bytes, -1, (any_fn)tested->unpack_columns[log2_bytes],
                   (any_fn)reference->unpack_columns[log2_bytes]);
    for (size_t i = 0; unpacks && i < 20 * SHORT_LENGTHS; i++) {
        size_t cols = 1 + i / 20, gap = random_below(3), bits = 1 + random_below(8);
        size_t shift = random_below(width), rows = shift + bits > width ? 2 : 1;
        int is_signed = i & 1;
        begin_case("cols %zu gap %zu bits %zu shift %zu signed %d", cols, gap, bits, shift,
                   is_signed);
        place_random(&packed, matrix_items(rows, cols, cols + gap) * bytes);
        place_output(&result, cols, 0x5A);
        reference->unpack_columns[log2_bytes](result.expected.data, packed.data, cols + gap, cols,
                                              bits, shift, is_signed);
        tested->unpack_columns[log2_bytes](result.actual.data, packed.data, cols + gap, cols, bits,
                                           shift, is_signed);
        expect_equal(&result, QK_UINT8);
    }
}

/* Bytes that are random below `limit`. */
static void place_below(region *where, size_t bytes, size_t limit)
{
    place(where, bytes);
    for (size_t i = 0; i < bytes; i++)
        where->data[i] = (unsigned char)random_below(limit);
}

static void check_ternary(void)
{
    int packs = begin_slot("pack_ternary", 0, -1, (any_fn)tested->pack_ternary,
                           (any_fn)reference->pack_ternary);
    for (size_t i = 0; packs && i < 4 * AWKWARD_LENGTHS; i++) {
        size_t count = awkward_length(i / 4);
        begin_case("count %zu", count);
        place_below(&codes, count, 3);
        place_output(&result, (count + 4) / 5, 0x5A);
        reference->pack_ternary(result.expected.data, codes.data, count);
        tested->pack_ternary(result.actual.data, codes.data, count);
        expect_equal(&result, QK_UINT8);
    }
    int unpacks = begin_slot("unpack_ternary", 0, -1, (any_fn)tested->unpack_ternary,
                             (any_fn)reference->unpack_ternary);
    for (size_t i = 0; unpacks && i < 4 * AWKWARD_LENGTHS; i++) {
        size_t count = awkward_length(i / 4);
        begin_case("count %zu", count);
        place_below(&packed, (count + 4) / 5, 243);
        place_output(&result, count, 0x5A);
        reference->unpack_ternary(result.expected.data, packed.data, count);
        tested->unpack_ternary(result.actual.data, packed.data, count);
        expect_equal(&result, QK_UINT8);
    }
}

void check_pack(void)
{
    check_streams();
    for (int log2_bytes = 0; log2_bytes < QK_CONTAINERS; log2_bytes++)
        check_columns(log2_bytes);
    check_ternary();
}
