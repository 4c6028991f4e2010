#include "api/tiles.h"

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t ceil_div(size_t n, size_t d)
{
    return n / d + (n % d != 0);
}

/* Blocks that follow each other in memory are runs of one long row. */
static void flatten(qk_tiles *tiles)
{
    tiles->block_rows = smaller(tiles->block_rows, tiles->rows);
    tiles->block_cols = smaller(tiles->block_cols, tiles->cols);
    int whole_rows = tiles->block_cols == tiles->cols;
    int whole_blocks = tiles->block_rows == 1 && tiles->cols % tiles->block_cols == 0;
    if (whole_rows || whole_blocks) {
        tiles->block_cols *= tiles->block_rows;
        tiles->cols *= tiles->rows;
        tiles->rows = tiles->block_rows = 1;
    }
}

static size_t lines_of_long_block(const qk_tiles *tiles)
{
    return ceil_div(tiles->block_cols, QK_LINE);
}

qk_tiles qk_cut_grid(const qk_grid *grid)
{
    qk_tiles tiles = {grid->rows, grid->cols, grid->block_rows, grid->block_cols, 0, 0, 0, 0, 1};
    if (tiles.rows == 0 || tiles.cols == 0)
        return tiles;
    flatten(&tiles);
    tiles.blocks_across = ceil_div(tiles.cols, tiles.block_cols);
    tiles.tile_blocks = smaller(QK_TILE_BLOCKS, QK_TILE_WIDTH / tiles.block_cols);
    tiles.tile_blocks += tiles.tile_blocks == 0;
    tiles.tiles_across = ceil_div(tiles.blocks_across, tiles.tile_blocks);
    tiles.count = tiles.tiles_across * ceil_div(tiles.rows, tiles.block_rows);
    if (tiles.count < QK_TILES_ENOUGH && tiles.rows * tiles.cols >= 2 * QK_TASK_ELEMENTS) {
        size_t lines = tiles.block_rows > 1 ? tiles.block_rows : lines_of_long_block(&tiles);
        size_t most = tiles.tile_blocks > 1 ? ceil_div(lines, QK_SLAB_LINES) : lines;
        tiles.slabs = smaller(most, ceil_div(QK_TILES_ENOUGH, tiles.count));
    }
    return tiles;
}

qk_tile qk_tile_at(const qk_tiles *tiles, size_t index)
{
    size_t row = index / tiles->tiles_across * tiles->block_rows;
    size_t block = index % tiles->tiles_across * tiles->tile_blocks;
    size_t col = block * tiles->block_cols;
    qk_tile tile = {.run = tiles->block_cols};
    tile.offset = row * tiles->cols + col;
    tile.block = row / tiles->block_rows * tiles->blocks_across + block;
    tile.blocks = smaller(tiles->tile_blocks, tiles->blocks_across - block);
    tile.width = smaller(tile.blocks * tiles->block_cols, tiles->cols - col);
    tile.lines = smaller(tiles->block_rows, tiles->rows - row);
    tile.stride = tiles->cols;
    tile.span = (tile.lines - 1) * tile.stride + tile.width;
    if (tiles->block_rows == 1 && tile.width > QK_LINE) {
        tile.lines = ceil_div(tile.width, QK_LINE);
        tile.stride = tile.width = QK_LINE;
    }
    return tile;
}

void qk_slab_lines(const qk_tiles *tiles, const qk_tile *tile, size_t slab, size_t *first,
                   size_t *last)
{
    size_t whole = tile->lines / tiles->slabs, rest = tile->lines % tiles->slabs;
    *first = slab * whole + smaller(slab, rest);
    *last = *first + whole + (slab < rest);
}

size_t qk_line_length(const qk_tile *tile, size_t line)
{
    return smaller(tile->width, tile->span - line * tile->stride);
}

size_t qk_block_elements(const qk_tile *tile, size_t block)
{
    if (tile->blocks == 1 && tile->stride == tile->width) /* contiguous */
        return tile->span;
    return tile->lines * smaller(tile->run, tile->width - block * tile->run);
}

size_t qk_task_grain(const qk_tiles *tiles, size_t parts)
{
    size_t elements = tiles->rows * tiles->cols / (parts + (parts == 0));
    return ceil_div(QK_TASK_ELEMENTS, elements + (elements == 0));
}
