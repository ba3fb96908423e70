"""Row statistics: two reads of [rows, vocab], a few numbers a row.

One program a row, or several rows a program for small vocabularies. Where rows are too few to fill the GPU, several
programs share a row and leave partial states, which are merged in a fixed order.
"""

import triton
import triton.language as tl

from ...stats import PUBLIC_FIELDS, RECIPE_STATISTICS, STATISTICS, TEMPERATURE_STATISTICS, statistics_count
from . import launch
from .recipe_rows import finish_row
from .row_result import finish, slopes
from .row_state import HARD_OWN, RowState, fold, hard_sum
from .rows import (
    load_label,
    load_pairs,
    program_rows,
    row_temperatures,
    row_window,
    rows_kept,
    sum_row,
    sum_rows,
)
from .tiles import number

# RowState's fields and the label's logit, which a gradient written in place would destroy.
PARTIAL_FIELDS = tl.constexpr(len(RowState._fields) + 1)
MAX_SPLITS = tl.constexpr(launch.MAX_SPLITS)
# The public fields come first, in the order of RowResult, then what GradientInputs begins with, then slopes.
FIRST_SAVED = tl.constexpr(STATISTICS.index("teacher_max"))
FIRST_SLOPE = tl.constexpr(len(STATISTICS))
STUDENT_ENTROPY = tl.constexpr(STATISTICS.index("student_entropy"))
NUM_PUBLIC = tl.constexpr(len(PUBLIC_FIELDS))
FIRST_OF_TEMPERATURES = tl.constexpr(len(RECIPE_STATISTICS))
NUM_OF_TEMPERATURE = tl.constexpr(len(TEMPERATURE_STATISTICS))


# ---- partial states [rows, PARTIAL_FIELDS, splits] ---------------------------------------------------------------


@triton.jit
def _partial_kernel(pairs, states, tile: tl.constexpr, f: tl.constexpr):
    row, split = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    k = row_temperatures(pairs, row, kept)
    _, label_logit = load_label(pairs, row, kept, f)
    s = sum_row(pairs, row_window(pairs, row, kept, tile), k, split, tile, f)
    n = number(pairs.splits)
    at = states + row * (PARTIAL_FIELDS * n) + split
    for field in tl.static_range(len(s)):
        tl.store(at + field * n, s[field])
    tl.store(at + len(s) * n, label_logit)


@triton.jit
def load_partial(at, n, field: tl.constexpr, default):
    i = tl.arange(0, MAX_SPLITS)
    return tl.load(at + field * n + i, i < n, default)


@triton.jit
def merge_partials(pairs, states, row, k, f: tl.constexpr):
    """(the state of a row, its label's logit)."""
    n = number(pairs.splits)
    at, nothing = states + row * (PARTIAL_FIELDS * n), -float("inf")
    My, Mz = load_partial(at, n, 0, nothing), load_partial(at, n, 1, nothing)
    A0, A1 = load_partial(at, n, 2, 0.0), load_partial(at, n, 3, 0.0)
    E0, E1 = load_partial(at, n, 4, 0.0), load_partial(at, n, 5, 0.0)
    B0, Bd, D0 = load_partial(at, n, 6, 0.0), load_partial(at, n, 7, 0.0), load_partial(at, n, 8, 0.0)
    F0, B1, D1, Bbd = A0, A0, A0, A0  # stand-ins for what fold does not read
    if f.HARD == HARD_OWN:
        F0 = load_partial(at, n, 9, 0.0)
    if f.SLOPES:
        B1, D1, Bbd = load_partial(at, n, 10, 0.0), load_partial(at, n, 11, 0.0), load_partial(at, n, 12, 0.0)
    lanes = RowState(My, Mz, A0, A1, E0, E1, B0, Bd, D0, F0, B1, D1, Bbd)
    return fold(lanes, k, f), tl.load(at + (PARTIAL_FIELDS - 1) * n)


# ---- statistics [fields, rows] -----------------------------------------------------------------------------------


@triton.jit
def store_fields(out, FIRST: tl.constexpr, rows, row, kept, values):
    """The values of rows kept, 0 for others that are there. `row` is past them in a program that is not to store."""
    for i in tl.static_range(len(values)):
        tl.store(out + (FIRST + i) * rows + row, tl.where(kept, values[i], 0.0), row < rows)


@triton.jit
def _statistics_kernel(
    pairs,
    out,  # [fields, rows], fp32
    tile: tl.constexpr,
    f: tl.constexpr,
):
    row, split = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    k = row_temperatures(pairs, row, kept)
    _, label_logit = load_label(pairs, row, kept, f)
    if tile.ROWS > 0:
        y, z = load_pairs(pairs, row, kept, tile)
        s = sum_rows(y, z, k, tile, f)
    else:
        s = sum_row(pairs, row_window(pairs, row, kept, tile), k, split, tile, f)
    store_statistics(out, number(pairs.student.rows), row, kept, s, k, label_logit, f)


@triton.jit
def _merged_statistics_kernel(pairs, states, out, tile: tl.constexpr, f: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    kept = rows_kept(pairs, row)
    k = row_temperatures(pairs, row, kept)
    s, label_logit = merge_partials(pairs, states, row, k, f)
    store_statistics(out, number(pairs.student.rows), row, kept, s, k, label_logit, f)


@triton.jit
def store_statistics(out, rows, row, kept, s, k, label_logit, f: tl.constexpr):
    """In the order of eakd_kernels.stats: STATISTICS, SLOPES."""
    store_fields(out, 0, rows, row, kept, finish(s, k, label_logit, f))
    store_fields(out, FIRST_SAVED, rows, row, kept, (s.My, s.Mz, s.B0, s.D0, s.E0, hard_sum(s, f), s.A0))
    if f.SLOPES:
        store_fields(out, FIRST_SLOPE, rows, row, kept, slopes(s, k))


@triton.jit
def _recipe_statistics_kernel(pairs, recipe, class_bias, out, tile: tl.constexpr, f: tl.constexpr):
    """In the order of eakd_kernels.stats: RECIPE_STATISTICS, TEMPERATURE_STATISTICS of each temperature, SLOPES."""
    row, _ = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    _, _, _, r = finish_row(pairs, recipe, class_bias, row, kept, tile, f)
    rows = number(pairs.student.rows)
    store_fields(out, 0, rows, row, kept, r.row)
    store_fields(out, NUM_PUBLIC, rows, row, kept, r.saved)
    for i in tl.static_range(len(r.tau)):
        store_fields(out, FIRST_OF_TEMPERATURES + i * NUM_OF_TEMPERATURE, rows, row, kept, r.tau[i])
    if f.SLOPES:
        first: tl.constexpr = FIRST_OF_TEMPERATURES + len(r.tau) * NUM_OF_TEMPERATURE
        store_fields(out, first, rows, row, kept, (r.divergence_slope, r.student_lse_slope))


def row_statistics(rows, temperature_slopes):
    plan = launch.Plan(rows, "statistics", hard=rows.labels is not None, slopes=temperature_slopes)
    fields = statistics_count(None if plan.recipe is None else len(plan.recipe.tau), temperature_slopes)
    out = plan.new_empty(fields, *rows.student_logits.shape[:-1])
    if plan.recipe is not None:
        plan.run(_recipe_statistics_kernel, plan.recipe, plan.class_bias, out)
    elif plan.splits == 1:
        plan.run(_statistics_kernel, out)
    else:
        plan.run_a_row(_merged_statistics_kernel, partial_states(plan), out)
    return out


def partial_states(plan):
    states = plan.new_empty(plan.rows, PARTIAL_FIELDS.value, plan.splits)
    plan.run(_partial_kernel, states)
    return states
