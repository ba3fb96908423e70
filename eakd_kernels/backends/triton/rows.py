"""What every kernel takes, and the sweeps along a row that they share."""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_result import gradient_values
from .row_state import (
    LOG2_E,
    NO_HARD,
    OUTSIDE,
    Temperatures,
    about_maxima,
    add_columns,
    empty_state,
    fold,
    was_too_fast,
)
from .tiles import (
    Matrix,
    columns_left,
    in_tile,
    load_rows,
    load_tile,
    number,
    row_head,
    row_offset,
    row_start,
    store_rows,
    store_tile,
    tile_columns,
)


class PerRow(NamedTuple):
    """A value of each row; one for all where the stride is 0."""

    pointer: tl.tensor  # a multiple of 16 bytes
    head: tl.tensor  # values from there to the first row's
    stride: tl.tensor


class RowPairs(NamedTuple):
    """The arguments of every operator, eakd_kernels.ops.Rows, and how programs share them out."""

    student: Matrix
    teacher: Matrix
    gradient: Matrix | None
    labels: PerRow | None
    keep: PerRow | None
    temperatures: PerRow | None
    temperature: Temperatures  # used where there is no tensor of them
    vocab_size: tl.tensor
    splits: tl.tensor  # programs that share a row; 1 where a tile has whole rows
    tiles_a_split: tl.tensor


@triton.jit
def program_rows(pairs, tile: tl.constexpr):
    """(row or vector of rows, which part of the row) of this program."""
    program = tl.cast(tl.program_id(0), tl.int64)
    if tile.ROWS == 0:
        splits = number(pairs.splits)
        return program // splits, program % splits
    else:
        return program * tile.ROWS + tl.arange(0, tile.ROWS), tl.cast(0, tl.int64)


@triton.jit
def load_per_row(values, row, mask, default):
    return tl.load(values.pointer + number(values.head) + row * number(values.stride), mask, default)


@triton.jit
def rows_kept(pairs, row):
    """Whether the row is there and counts. One that does not is never read: it is a row of no columns."""
    inside = row < number(pairs.student.rows)
    if pairs.keep is None:
        return inside
    else:
        return inside & (load_per_row(pairs.keep, row, inside, 0) != 0)


@triton.jit
def row_temperatures(pairs, row, kept):
    scalar = pairs.temperature
    t, k_t = tl.cast(scalar.t, tl.float32), tl.cast(scalar.k_t, tl.float32)
    if pairs.temperatures is None:
        tau, k_tau = tl.cast(scalar.tau, tl.float32), tl.cast(scalar.k_tau, tl.float32)
        return Temperatures(tau, t, k_tau, k_t, tl.cast(scalar.k_0, tl.float32))
    else:
        tau = load_per_row(pairs.temperatures, row, kept, 1.0).to(tl.float32)
        k_tau = tl.div_rn(tl.full(tau.shape, LOG2_E, tl.float32), tau)
        return Temperatures(tau, t, k_tau, k_t, k_tau)


@triton.jit
def load_label(pairs, row, kept, f: tl.constexpr):
    """(label, its logit); (-1, NaN) where the label is no column."""
    if f.HARD == NO_HARD:
        return tl.full(kept.shape, -1, tl.int64), tl.zeros(kept.shape, tl.float32)
    else:
        label = load_per_row(pairs.labels, row, kept, -1)
        valid = (label >= 0) & (label < number(pairs.vocab_size))
        m = pairs.student
        logit = tl.load(m.pointer + row_offset(m, row) + label * number(m.column_stride), valid, float("nan"))
        return tl.where(valid, label, -1), logit.to(tl.float32)


# ---- whole rows, read once ---------------------------------------------------------------------------------------


@triton.jit
def load_pairs(pairs, row, kept, tile: tl.constexpr):
    vocab_size = number(pairs.vocab_size)
    return load_rows(pairs.teacher, row, kept, vocab_size, tile), load_rows(pairs.student, row, kept, vocab_size, tile)


@triton.jit
def sum_rows(y, z, k, tile: tl.constexpr, f: tl.constexpr):
    return about_maxima(add_columns(empty_state(tile.ROWS), y, z, k, 1, True, f), k, True, f)


@triton.jit
def write_rows(pairs, row, y, z, basis, k, label, tile: tl.constexpr, f: tl.constexpr):
    g = gradient_values(basis, y, z, k, f)
    columns = tl.arange(0, tile.BLOCK)[None, :]
    if f.HARD != NO_HARD:
        g += tl.where(columns == label[:, None], basis.label[:, None], 0.0)
    if tile.WIDER:
        g = tl.where(columns < number(pairs.vocab_size), g, 0.0)
    store_rows(pairs.gradient, row, g, tile)


# ---- a row in tiles ----------------------------------------------------------------------------------------------


class RowWindow(NamedTuple):
    """Where one row pair lies: columns [head, end) from both pointers on."""

    student: tl.tensor
    teacher: tl.tensor
    head: tl.tensor
    end: tl.tensor


@triton.jit
def row_window(pairs, row, kept, tile: tl.constexpr):
    head = row_head(pairs.student, row, tile)
    return RowWindow(
        row_start(pairs.student, row, head, tile.WIDTH, tile.FORM),
        row_start(pairs.teacher, row, head, tile.WIDTH, tile.FORM),
        head,
        tl.where(kept, head + number(pairs.vocab_size), 0),
    )


@triton.jit
def split_tiles(pairs, split, end, tile: tl.constexpr):
    """[first, last) of the row's tiles that this program has."""
    first = split * number(pairs.tiles_a_split)
    return first, tl.minimum(first + number(pairs.tiles_a_split), tl.cdiv(end, tile.BLOCK))


@triton.jit
def sweep(pairs, w, k, split, GUARDED: tl.constexpr, tile: tl.constexpr, f: tl.constexpr):
    """The state of the program's part of a row."""
    outside: tl.constexpr = -float("inf") if GUARDED else OUTSIDE
    columns = tile_columns(tile)
    lanes = empty_state(tile.LANES)
    first, last = split_tiles(pairs, split, w.end, tile)
    for i in range(first, last):
        start = tl.cast(i, tl.int64) * tile.BLOCK
        y = load_tile(pairs.teacher, w.teacher, start, w.head, w.end, columns, outside, tile, False)
        z = load_tile(pairs.student, w.student, start, w.head, w.end, columns, outside, tile, False)
        lanes = add_columns(lanes, y, z, k, tile.AXIS, GUARDED, f)
    return fold(about_maxima(lanes, k, GUARDED, f), k, f)


@triton.jit
def sum_row(pairs, w, k, split, tile: tl.constexpr, f: tl.constexpr):
    """The same, by the fast sweep where nothing speaks against it. Guards cost instructions in every column."""
    if tile.HALF or f.SLOPES:  # fp16 does not reach OUTSIDE; Bbd would square it
        return sweep(pairs, w, k, split, True, tile, f)
    else:
        s = sweep(pairs, w, k, split, False, tile, f)
        if was_too_fast(s):
            s = sweep(pairs, w, k, split, True, tile, f)
        return s


@triton.jit
def write_row(pairs, w, row, basis, k, label, split, tile: tl.constexpr, f: tl.constexpr):
    """The gradient of the program's part, last tile first: what a sweep has just read is still in the L2."""
    columns = tile_columns(tile)
    pointer = row_start(pairs.gradient, row, w.head, tile.WIDTH, tile.GRADIENT_FORM)
    end = w.head + number(pairs.gradient.columns)
    first, last = split_tiles(pairs, split, end, tile)
    for i in range(first, last):
        start = tl.cast(last - 1 - (i - first), tl.int64) * tile.BLOCK
        y = load_tile(pairs.teacher, w.teacher, start, w.head, w.end, columns, -float("inf"), tile, True)
        z = load_tile(pairs.student, w.student, start, w.head, w.end, columns, -float("inf"), tile, True)
        g = gradient_values(basis, y, z, k, f)
        if f.HARD != NO_HARD:
            g += tl.where(columns == in_tile(label + w.head, start, tile), basis.label, 0.0)
        if tile.WIDER:
            g = tl.where(columns < columns_left(w.end, start, tile), g, 0.0)
        store_tile(pairs.gradient, pointer, start, w.head, end, columns, g, tile)
