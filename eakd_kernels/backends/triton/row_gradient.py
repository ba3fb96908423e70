"""The student's gradient from upstream gradients of the rows' statistics: two reads and one write of [rows, vocab]."""

from typing import NamedTuple

import triton
import triton.language as tl

from . import launch
from .arithmetic import rounded
from .recipe_gradient import RowUpstream, recipe_basis
from .recipe_result import Saved, TauSaved
from .recipe_rows import load_label_column, row_data, saved_scales, write_recipe
from .row_result import GradientInputs, gradient_basis
from .row_statistics import FIRST_OF_TEMPERATURES, FIRST_SAVED, NUM_OF_TEMPERATURE, NUM_PUBLIC, STUDENT_ENTROPY
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
from .tiles import number, row_offset, unspecialised


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
    at = statistics + FIRST_SAVED * rows + row
    return GradientInputs(
        tl.load(at, kept, 0.0),
        tl.load(at + rows, kept, 0.0),
        tl.load(at + 2 * rows, kept, 0.0),
        tl.load(at + 3 * rows, kept, 0.0),
        tl.load(at + 4 * rows, kept, 0.0),
        tl.load(at + 5 * rows, kept, 0.0),
        tl.load(statistics + STUDENT_ENTROPY * rows + row, kept, 0.0),
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


@triton.jit
def load_saved(statistics, rows, row, kept):
    """Out of what _recipe_statistics_kernel stored."""
    at = statistics + NUM_PUBLIC * rows + row
    return Saved(
        tl.load(at, kept, 0.0),
        tl.load(at + rows, kept, 0.0),
        tl.load(at + 2 * rows, kept, 0.0),
        tl.load(at + 3 * rows, kept, 0.0),
        tl.load(at + 4 * rows, kept, 0.0),
        tl.load(at + 5 * rows, kept, 0.0),
        tl.load(at + 6 * rows, kept, 0.0),
        tl.load(at + 7 * rows, kept, 0.0),
        tl.load(at + 8 * rows, kept, 0.0),
        tl.load(at + 9 * rows, kept, 0.0),
        tl.load(at + 10 * rows, kept, 0.0),
        tl.load(at + 11 * rows, kept, 0.0),
    )


@triton.jit
def load_tau_saved(statistics, i: tl.constexpr, rows, row, kept):
    at = statistics + (FIRST_OF_TEMPERATURES + i * NUM_OF_TEMPERATURE) * rows + row
    return TauSaved(
        tl.load(at, kept, 0.0),
        tl.load(at + rows, kept, 0.0),
        tl.load(at + 2 * rows, kept, 0.0),
        tl.load(at + 3 * rows, kept, 0.0),
        tl.load(at + 4 * rows, kept, 0.0),
        tl.load(at + 5 * rows, kept, 0.0),
        tl.load(at + 6 * rows, kept, 0.0),
    )


@triton.jit
def _recipe_gradient_kernel(pairs, recipe, class_bias, statistics, upstream, tile: tl.constexpr, f: tl.constexpr):
    row, _ = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    label = load_label_column(pairs, recipe, class_bias, row, kept, f)
    if f.DECOUPLED:
        tl.debug_barrier()  # all threads have the label's logit before one writes its gradient there
    rows = number(pairs.student.rows)
    saved = load_saved(statistics, rows, row, kept)
    tau = ()
    for i in tl.static_range(len(recipe.tau)):
        tau += (load_tau_saved(statistics, i, rows, row, kept),)
    k = saved_scales(pairs, recipe, saved, row, kept, f)
    given = RowUpstream(
        load_upstream(upstream.divergence, row, kept),
        load_upstream(upstream.student_entropy, row, kept),
        load_upstream(upstream.student_lse, row, kept),
        load_upstream(upstream.cross_entropy, row, kept),
    )
    student_entropy = tl.load(statistics + STUDENT_ENTROPY * rows + row, kept, 0.0)
    basis = recipe_basis(saved, tau, student_entropy, label, k, given, recipe, f)
    data = row_data(pairs, recipe, class_bias, row, kept, label.column, tile, f)
    write_recipe(pairs, recipe, class_bias, data, row, kept, basis, k, label, tile, f)


def row_gradient(rows, statistics, upstream, gradient):
    given = Upstream(*upstream)
    hard = rows.labels is not None and given.cross_entropy is not None
    plan = launch.Plan(rows, "gradient", gradient, hard=hard, entropy=given.student_entropy is not None)
    arguments = (statistics.contiguous(), Upstream(*map(plan.per_row, given)))
    if plan.recipe is not None:
        plan.run(_recipe_gradient_kernel, plan.recipe, plan.class_bias, *arguments)
    else:
        plan.run(_gradient_kernel, *arguments)


@triton.jit
def _scale_kernel(
    gradient,
    factor,  # one number
    out,  # which may be `gradient`
    programs_a_row,
    IN_PLACE: tl.constexpr,
    FLAT: tl.constexpr,  # one row, from a pointer that is a multiple of 16 bytes on
    BLOCK: tl.constexpr,
):
    by = tl.load(factor).to(tl.float32)
    n, program, i = number(programs_a_row), tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    end = number(gradient.columns)
    if IN_PLACE:
        end = tl.where(by == 1, 0, end)
    source, target, step, out_step = gradient.pointer, out.pointer, 1, 1
    if not FLAT:
        source, target = source + row_offset(gradient, program // n), target + row_offset(out, program // n)
        step, out_step = number(gradient.column_stride), number(out.column_stride)
    for start in range(program % n * BLOCK, end, n * BLOCK):
        if start + BLOCK <= end:  # no mask, so that it goes by vectors
            scaled = tl.load(source + start * step + i * step).to(tl.float32) * by
            tl.store(target + start * out_step + i * out_step, rounded(scaled, target.dtype.element_ty))
        else:
            inside = i < (end - start)
            scaled = tl.load(source + start * step + i * step, inside).to(tl.float32) * by
            tl.store(target + start * out_step + i * out_step, rounded(scaled, target.dtype.element_ty), inside)


def scale_gradient(gradient, factor, out):
    """out = gradient * factor, rounded once; nothing at all in place by exactly 1, which only the GPU knows."""
    block, warps, width = 4096, 8, launch.VECTOR_BYTES // gradient.element_size()
    flat = gradient.is_contiguous() and out.is_contiguous()
    source, target = (launch.Operand.of(x.view(1, -1) if flat else x) for x in (gradient, out))
    flat = flat and source.head(width) == target.head(width) == 0
    rows, columns = source.layout[:2]
    programs_a_row = min(triton.cdiv(columns, block), 8 * launch.processors(gradient.device)) if rows == 1 else 1
    arguments = (source.matrix(width), factor, target.matrix(width), unspecialised(programs_a_row))
    inplace = gradient.data_ptr() == out.data_ptr()
    launch.run(_scale_kernel, rows * programs_a_row, warps, gradient.device, *arguments, inplace, flat, block)
