#include "harness.h"

enum { STREAM_CASES = 30 * SHORT_LENGTHS, COLUMN_CASES = 10 * SHORT_LENGTHS };

static region codes, packed;
static output result;

/* ---- rows in any layout ------------------------------------------------------ */

/* A random layout for one row of `count` codes, and the bytes that its containers fill. */
static qk_packing random_packing(size_t count, size_t *bytes)
{
    qk_packing packing = {.rows = 1, .cols = count, .axis = 1};
    packing.bits = 1 + random_below(8);
    packing.container_bytes = (size_t)1 << random_below(4);
    packing.straddle = (int)random_below(2);
    size_t width = 8 * packing.container_bytes, per_container = width / packing.bits;
    size_t dense = (count * packing.bits + width - 1) / width;
    size_t aligned = (count + per_container - 1) / per_container;
    *bytes = (packing.straddle ? dense : aligned) * packing.container_bytes;
    return packing;
}

/* Random bytes, or codes of `bits` bits with or without a sign, sometimes with an exception. */
static void fill_codes(size_t count, size_t bits)
{
    unsigned mask = (1u << bits) - 1, sign = random_below(2) ? 1u << (bits - 1) : 0;
    place_random(&codes, count);
    if (random_below(4) == 0)
        return;
    for (size_t i = 0; i < count; i++)
        codes.data[i] = (uint8_t)(((codes.data[i] & mask) ^ sign) - sign);
    if (random_below(2))
        codes.data[random_below(count)] = (uint8_t)random_bits();
}

static void expect_fits(int expected, int actual)
{
    if (expected != actual)
        fail("fits %d, not %d", actual, expected);
}

static void check_pack_stream(void)
{
    if (!begin_slot("pack_stream", 0, -1, (any_fn)tested->pack_stream,
                    (any_fn)reference->pack_stream))
        return;
    for (size_t i = 0; i < STREAM_CASES; i++) {
        size_t count = awkward_length(i % AWKWARD_LENGTHS), bytes;
        qk_packing packing = random_packing(count, &bytes);
        begin_case("count %zu bits %zu container %zu straddle %d", count, packing.bits,
                   packing.container_bytes, packing.straddle);
        fill_codes(count, packing.bits);
        place_output(&result, bytes, 0x5A);
        expect_fits(reference->pack_stream(result.expected.data, codes.data, count, &packing),
                    tested->pack_stream(result.actual.data, codes.data, count, &packing));
        expect_equal(&result, QK_UINT8);
    }
}

static void check_unpack_stream(void)
{
    if (!begin_slot("unpack_stream", 0, -1, (any_fn)tested->unpack_stream,
                    (any_fn)reference->unpack_stream))
        return;
    for (size_t i = 0; i < STREAM_CASES; i++) {
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

/* ---- streams down the columns -------------------------------------------------- */

static void check_pack_columns(size_t container)
{
    if (!begin_slot("pack_columns", (int)container, -1, (any_fn)tested->pack_columns[container],
                    (any_fn)reference->pack_columns[container]))
        return;
    size_t width = (size_t)8 << container;
    for (size_t i = 0; i < COLUMN_CASES; i++) {
        size_t cols = awkward_length(i % AWKWARD_LENGTHS), stride = cols + random_below(3);
        size_t bits = 1 + random_below(8), skip = random_below(2) ? random_below(bits) : 0;
        size_t rows = 1 + random_below((width + skip + bits - 1) / bits);
        begin_case("rows %zu cols %zu stride %zu bits %zu skip %zu", rows, cols, stride, bits,
                   skip);
        fill_codes((rows - 1) * stride + cols, bits);
        place_output(&result, cols * (width / 8), 0x5A);
        expect_fits(reference->pack_columns[container](result.expected.data, codes.data, stride,
                                                       rows, cols, bits, skip),
                    tested->pack_columns[container](result.actual.data, codes.data, stride, rows,
                                                    cols, bits, skip));
        expect_equal(&result, QK_UINT8);
    }
}

static void check_unpack_columns(size_t container)
{
    if (!begin_slot("unpack_columns", (int)container, -1, (any_fn)tested->unpack_columns[container],
                    (any_fn)reference->unpack_columns[container]))
        return;
    size_t width = (size_t)8 << container;
    for (size_t i = 0; i < COLUMN_CASES; i++) {
        size_t cols = awkward_length(i % AWKWARD_LENGTHS), stride = cols + random_below(3);
        size_t bits = 1 + random_below(8), shift = random_below(width);
        int is_signed = (int)random_below(2);
        size_t containers = shift + bits > width ? stride + cols : cols;
        begin_case("cols %zu stride %zu bits %zu shift %zu signed %d", cols, stride, bits, shift,
                   is_signed);
        place_random(&packed, containers * (width / 8));
        place_output(&result, cols, 0x5A);
        reference->unpack_columns[container](result.expected.data, packed.data, stride, cols, bits,
                                             shift, is_signed);
        tested->unpack_columns[container](result.actual.data, packed.data, stride, cols, bits,
                                          shift, is_signed);
        expect_equal(&result, QK_UINT8);
    }
}

/* ---- base 3 ---------------------------------------------------------------------- */

static void check_ternary(void)
{
    if (begin_slot("pack_ternary", 0, -1, (any_fn)tested->pack_ternary,
                   (any_fn)reference->pack_ternary))
        for (size_t i = 0; i < 4 * AWKWARD_LENGTHS; i++) {
            size_t count = awkward_length(i / 4);
            begin_case("count %zu", count);
            place_random(&codes, count);
            for (size_t c = 0; c < count; c++)
                codes.data[c] %= 3;
            place_output(&result, (count + 4) / 5, 0x5A);
            reference->pack_ternary(result.expected.data, codes.data, count);
            tested->pack_ternary(result.actual.data, codes.data, count);
            expect_equal(&result, QK_UINT8);
        }
    if (begin_slot("unpack_ternary", 0, -1, (any_fn)tested->unpack_ternary,
                   (any_fn)reference->unpack_ternary))
        for (size_t i = 0; i < 4 * AWKWARD_LENGTHS; i++) {
            size_t count = awkward_length(i / 4);
            begin_case("count %zu", count);
            place_random(&packed, (count + 4) / 5);
            for (size_t b = 0; b < packed.bytes; b++)
                packed.data[b] %= 243;
            place_output(&result, count, 0x5A);
            reference->unpack_ternary(result.expected.data, packed.data, count);
            tested->unpack_ternary(result.actual.data, packed.data, count);
            expect_equal(&result, QK_UINT8);
        }
}

void check_pack(void)
{
    check_pack_stream();
    check_unpack_stream();
    for (size_t container = 0; container < QK_CONTAINERS; container++) {
        check_pack_columns(container);
        check_unpack_columns(container);
    }
    check_ternary();
}
