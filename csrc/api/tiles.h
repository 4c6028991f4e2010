/* A grid cut into work. Pure arithmetic: no data is touched.
 *
 * A tile is a few whole blocks side by side: small enough to stay in a near cache where its blocks
 * are, and to keep its ranges on the stack. It is read line by line; a line is contiguous memory.
 */
#ifndef QK_TILES_H
#define QK_TILES_H

#include "qk.h"

enum {
    QK_TILE_BLOCKS = 2048,   /* at most, in a tile */
    QK_TILE_WIDTH = 4096,    /* elements across, unless one block is wider */
    QK_LINE = 16384,         /* elements of a line cut out of one long block */
    QK_TILES_ENOUGH = 64,    /* with fewer tiles, each is measured in slabs of lines, */
    QK_SLAB_LINES = 32,      /* of so many lines at least where a tile has many blocks to merge */
    QK_TASK_ELEMENTS = 32768 /* fewer are not worth a thread */
};

typedef struct qk_tiles {
    size_t rows, cols, block_rows, block_cols; /* the grid, made flat where blocks are contiguous */
    size_t blocks_across;                      /* blocks in a row of blocks */
    size_t tile_blocks, tiles_across;
    size_t count; /* of tiles */
    size_t slabs; /* parts of each tile; given by the grid alone, never by the threads */
} qk_tiles;

typedef struct qk_tile {
    size_t offset;       /* of its first element in the matrix */
    size_t block;        /* flat index of its first block */
    size_t blocks;       /* 1 .. QK_TILE_BLOCKS */
    size_t run;          /* elements of a block in a line */
    size_t lines;        /* line i starts stride * i elements behind the first element, */
    size_t stride, span; /* and has min(width, span - stride * i) elements */
    size_t width;
} qk_tile;

/* A matrix without elements gives no tiles. */
qk_tiles qk_cut_grid(const qk_grid *grid);
qk_tile qk_tile_at(const qk_tiles *tiles, size_t index);

/* Lines [*first, *last) make slab `slab` of the tile. */
void qk_slab_lines(const qk_tiles *tiles, const qk_tile *tile, size_t slab, size_t *first,
                   size_t *last);
size_t qk_line_length(const qk_tile *tile, size_t line);

/* Elements of block `block` (0 .. tile->blocks) of the tile. */
size_t qk_block_elements(const qk_tile *tile, size_t block);

/* How many of `parts` equal parts of the matrix are worth a thread. */
size_t qk_task_grain(const qk_tiles *tiles, size_t parts);

#endif
