"""Where the columns of a row lie, and how a program reads and writes them a tile at a time.

Two shapes of program. Small vocabularies: a tile holds ROWS whole rows, is read once and written once. Others: a
program walks along one row in tiles of BLOCK columns, and a tile has BLOCK/WIDTH lanes of WIDTH columns each. A lane
lives in one thread, so the sums over its columns cost neither shuffles nor barriers.

How the lanes lie is decided by how rows are aligned (FORM, below). tests/backends/test_cubins.py holds what it compiles
to: 128-bit loads, no spills.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import rounded

# VECTORS: rows begin and end at multiples of WIDTH columns (16 bytes of the wider dtype). A lane is one vector.
# WINDOW:  rows begin anywhere in a vector, the pair at the same place. Tiles begin at the vector's start; what is read
#          before and after the row shares its 16 bytes (so it never faults) and is replaced.
# COLUMNS: otherwise. Neighbouring threads read neighbouring columns, one at a time.
# STRIDED: the columns of a row are not neighbours in memory.
STRIDED, COLUMNS, WINDOW, VECTORS = (tl.constexpr(i) for i in range(4))


class Matrix(NamedTuple):
    """Logits or a gradient as [rows, columns]; all numbers as `unspecialised` makes them, in elements.

    Row r is at pointer + head + (r / inner) * outer_stride + (r % inner) * inner_stride.
    """

    pointer: tl.tensor
    inner: tl.tensor
    outer_stride: tl.tensor
    inner_stride: tl.tensor
    column_stride: tl.tensor
    head: tl.tensor  # columns from the pointer, which is at the beginning of a vector, to row 0
    rows: tl.tensor
    columns: tl.tensor


class Tile(NamedTuple):
    """Compiled in."""

    ROWS: int  # whole rows a tile; 0: a tile is a part of one row
    BLOCK: int  # columns
    WIDTH: int  # columns a lane
    FORM: int  # of the logits
    GRADIENT_FORM: int
    WIDER: bool  # the gradient has columns past the vocabulary
    HALF: bool  # either is fp16
    AXIS: int  # along which columns are summed into lanes
    LANES: int


_ALWAYS_INT64 = 1 << 62


def unspecialised(number: int) -> int:
    """Triton compiles anew for a number that is 1, a multiple of 16 or needs 64 bits, and inside tuples
    do_not_specialize does not reach it. This one is none of them; `number` below undoes it."""
    return _ALWAYS_INT64 | number << 5 | 3


@triton.jit
def number(packed):
    return (tl.cast(packed, tl.int64) & 0x3FFFFFFFFFFFFFFF) >> 5


@triton.jit
def multiple(x, n: tl.constexpr):
    """x, which is a multiple of n, so that the compiler sees it: tl.multiple_of is lost when functions are inlined."""
    return x // n * n


@triton.jit
def row_offset(m, row):
    inner = number(m.inner)
    return number(m.head) + (row // inner) * number(m.outer_stride) + (row % inner) * number(m.inner_stride)


@triton.jit
def row_head(m, row, tile: tl.constexpr):
    if tile.FORM == WINDOW:
        return row_offset(m, row) % tile.WIDTH
    else:
        return tl.cast(0, tl.int64)


@triton.jit
def row_start(m, row, head, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """A pointer to the first column of the row's window, which is `head` columns before the row."""
    if FORM >= WINDOW:
        return m.pointer + multiple(row_offset(m, row) - head, WIDTH)
    elif FORM == COLUMNS:
        return m.pointer + (row_offset(m, row) - head)
    else:
        return m.pointer + (row_offset(m, row) - head * number(m.column_stride))


@triton.jit
def in_tile(column, start, tile: tl.constexpr):
    """A column of the window, counted from the tile's start: 32 bits, -1 before and BLOCK behind it."""
    return tl.minimum(tl.maximum(column - start, -1), tile.BLOCK).to(tl.int32)


@triton.jit
def tile_columns(tile: tl.constexpr):
    """[LANES, WIDTH], or [WIDTH, LANES] where neighbouring threads take neighbouring columns."""
    if tile.AXIS == 1:
        return tl.arange(0, tile.LANES)[:, None] * tile.WIDTH + tl.arange(0, tile.WIDTH)[None, :]
    else:
        return tl.arange(0, tile.WIDTH)[:, None] * tile.LANES + tl.arange(0, tile.LANES)[None, :]


@triton.jit
def columns_left(end, start, tile: tl.constexpr):
    """How many of a tile's columns, from `start` on, lie before `end`. 32 bits, which is what masks are made of."""
    return tl.minimum(tl.maximum(end - start, 0), tile.BLOCK).to(tl.int32)


@triton.jit
def load_tile(m, row_pointer, start, head, end, columns, OUTSIDE: tl.constexpr, tile: tl.constexpr, LAST: tl.constexpr):
    """fp32, OUTSIDE where not in [head, end).

    LAST: nobody reads these columns again, so they may leave the caches, and what lies in a row's first and last vector
    beside it may be anything: it will not be stored.
    """
    policy: tl.constexpr = "evict_first" if LAST else ""
    left = columns_left(end, start, tile)
    if tile.FORM >= WINDOW:
        vectors = multiple(left + tile.WIDTH - 1, tile.WIDTH)
        x = tl.load(row_pointer + start + columns, columns < vectors, OUTSIDE, eviction_policy=policy)
    elif tile.FORM == COLUMNS:
        x = tl.load(row_pointer + start + columns, columns < left, OUTSIDE, eviction_policy=policy)
    else:
        at = (start + columns) * number(m.column_stride)
        x = tl.load(row_pointer + at, columns < left, OUTSIDE, eviction_policy=policy)
    x = x.to(tl.float32)
    if tile.FORM == WINDOW and not LAST:
        x = tl.where((columns >= in_tile(head, start, tile)) & (columns < left), x, OUTSIDE)
    return x


@triton.jit
def store_tile(m, row_pointer, start, head, end, columns, g, tile: tl.constexpr):
    """The columns of [head, end), in the gradient's dtype."""
    g = rounded(g, m.pointer.dtype.element_ty)
    left = columns_left(end, start, tile)
    if tile.GRADIENT_FORM == VECTORS:
        tl.store(row_pointer + start + columns, g, columns < multiple(left, tile.WIDTH))
    elif tile.GRADIENT_FORM == WINDOW:
        # Only the first and the last tile need a mask, which would cost the vector stores.
        if (start >= head) & (left == tile.BLOCK):
            tl.store(row_pointer + start + columns, g)
        else:
            tl.store(row_pointer + start + columns, g, (columns >= in_tile(head, start, tile)) & (columns < left))
    else:
        at = (start + columns) * number(m.column_stride)
        tl.store(row_pointer + at, g, (columns >= in_tile(head, start, tile)) & (columns < left))


@triton.jit
def load_rows(m, row, kept, vocab_size, tile: tl.constexpr):
    """[ROWS, BLOCK] in fp32, -inf past the vocabulary and in rows left out."""
    columns = tl.arange(0, tile.BLOCK)
    offset = row_offset(m, row)
    if tile.FORM == VECTORS:
        offset, vocab_size = multiple(offset, tile.WIDTH), multiple(vocab_size, tile.WIDTH)
    at = offset[:, None] + (columns * number(m.column_stride) if tile.FORM == STRIDED else columns)[None, :]
    x = tl.load(m.pointer + at, kept[:, None] & (columns < vocab_size)[None, :], -float("inf"))
    return x.to(tl.float32)


@triton.jit
def store_rows(m, row, g, tile: tl.constexpr):
    """Every row that is there: those left out have a gradient of 0."""
    columns, num_columns = tl.arange(0, tile.BLOCK), number(m.columns)
    offset = row_offset(m, row)
    if tile.GRADIENT_FORM == VECTORS:
        offset, num_columns = multiple(offset, tile.WIDTH), multiple(num_columns, tile.WIDTH)
    at = offset[:, None] + (columns * number(m.column_stride) if tile.GRADIENT_FORM == STRIDED else columns)[None, :]
    mask = (row < number(m.rows))[:, None] & (columns < num_columns)[None, :]
    tl.store(m.pointer + at, rounded(g, m.pointer.dtype.element_ty), mask)
