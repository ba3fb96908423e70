"""The student's gradient from upstream gradients of the rows' statistics: two reads and one write of [rows, vocab]."""

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .arithmetic import rounded
from .row_result import GradientInputs, gradient_basis
from .rows import (
    PerRow,
    load_label,
    load_pairs,
    load_per_row,
    program_rows,
    row_temperatures,
    row_window,
    rows_kept,
    write_row,
    write_rows,
)
from .tiles import number, unspecialised


class Upstream(NamedTuple):
    """d loss/d statistic of each row; None where nothing flows back."""

    divergence: PerRow | None
    student_entropy: PerRow | None
    student_lse: PerRow | None
    cross_entropy: PerRow | None


@triton.jit
def load_upstream(values, row, kept):
    if values is None:
        return tl.zeros(kept.shape, tl.float32)
    else:
        return load_per_row(values, row, kept, 0.0).to(tl.float32)


@triton.jit
def load_inputs(statistics, rows, row, kept):
    """Out of what _statistics_kernel saved."""
    at = statistics + row
    return GradientInputs(
        tl.load(at + 6 * rows, kept, 0.0),
        tl.load(at + 7 * rows, kept, 0.0),
        tl.load(at + 8 * rows, kept, 0.0),
        tl.load(at + 9 * rows, kept, 0.0),
        tl.load(at + 10 * rows, kept, 0.0),
        tl.load(at + 11 * rows, kept, 0.0),
        tl.load(at + 2 * rows, kept, 0.0),
    )


@triton.jit
def _gradient_kernel(
    pairs,
    statistics,  # [fields, rows], fp32
    upstream,
    tile: tl.constexpr,
    f: tl.constexpr,
):
    row, split = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    k = row_temperatures(pairs, row, kept)
    label, _ = load_label(pairs, row, kept, f)
    basis = gradient_basis(
        load_inputs(statistics, number(pairs.student.rows), row, kept),
        k,
        load_upstream(upstream.divergence, row, kept),
        load_upstream(upstream.student_entropy, row, kept),
        load_upstream(upstream.student_lse, row, kept),
        load_upstream(upstream.cross_entropy, row, kept),
        f,
    )
    if tile.ROWS > 0:
        y, z = load_pairs(pairs, row, kept, tile)
        write_rows(pairs, row, y, z, basis, k, label, tile, f)
    else:
        write_row(pairs, row_window(pairs, row, kept, tile), row, basis, k, label, split, tile, f)


def row_gradient(rows, statistics, upstream, gradient):
    given = Upstream(*upstream)
    hard = rows.labels is not None and given.cross_entropy is not None
    plan = launch.Plan(rows, "gradient", gradient, hard=hard, entropy=given.student_entropy is not None)
    plan.run(_gradient_kernel, statistics.contiguous(), Upstream(*map(plan.per_row, given)))


@triton.jit
def _scale_kernel(
    gradient,  # [numel]
    factor,  # one number
    out,  # [numel], which may be `gradient`
    numel,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.load(factor).to(tl.float32)
    size, step = number(numel), tl.num_programs(0).to(tl.int64) * BLOCK
    if IN_PLACE:
        size = tl.where(by == 1, 0, size)
    i = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        left = size - start
        if left >= BLOCK:  # no mask, so that it goes by vectors
            scaled = tl.load(gradient + start + i).to(tl.float32) * by
            tl.store(out + start + i, rounded(scaled, out.dtype.element_ty))
        else:
            scaled = tl.load(gradient + start + i, i < left).to(tl.float32) * by
            tl.store(out + start + i, rounded(scaled, out.dtype.element_ty), i < left)


def scale_gradient(gradient, factor, out):
    """out = gradient * factor, rounded once; nothing at all in place by exactly 1, which only the GPU knows."""
    if not (gradient.is_contiguous() and out.is_contiguous()):
        out.copy_(gradient.float() * factor)
        return
    numel, block, warps = gradient.numel(), 4096, 8
    programs = min(triton.cdiv(numel, block), 8 * launch.processors(gradient.device))
    arguments = (gradient, factor, out, unspecialised(numel), gradient.data_ptr() == out.data_ptr(), block)
    launch.run(_scale_kernel, programs, warps, gradient.device, *arguments)
