"""Loss, statistics and finished gradient in one kernel: two reads and one write of [rows, vocab] where a row stays on
chip or in the L2, and two reads more where it does not.

The gradient sweep runs backwards, so that it begins with the columns that the statistics sweep has read last. A row
that several programs share takes two kernels: every program of the second merges the partial states for itself.
"""

import triton
import triton.language as tl

from ...stats import LOSS_STATISTICS
from . import launch
from .recipe_gradient import RowUpstream, recipe_basis
from .recipe_rows import finish_row, write_recipe
from .row_result import GradientInputs, LossRule, finish, gradient_basis, row_loss
from .row_state import hard_sum
from .row_statistics import merge_partials, partial_states, store_fields
from .rows import (
    load_label,
    load_pairs,
    load_per_row,
    program_rows,
    row_temperatures,
    row_window,
    rows_kept,
    sum_row,
    sum_rows,
    write_row,
    write_rows,
)
from .tiles import number, unspecialised


@triton.jit
def store_loss(pairs, rule, weights, denominator, out, row, storing, kept, r, tau, f: tl.constexpr):
    """Statistics r, weight and loss of the rows into `out`, in the order of eakd_kernels.stats.LOSS_STATISTICS; returns
    the total loss's gradients in their divergence and in their cross-entropy."""
    given = tl.zeros(kept.shape, tl.float32)
    if weights is not None:
        given = load_per_row(weights, row, kept, 0.0).to(tl.float32)
    loss = row_loss(r, tau, rule, given, f)
    rows = number(pairs.student.rows)
    store_fields(out, 0, rows, storing, kept, r)
    store_fields(out, len(r), rows, storing, kept, (loss.weight, loss.loss))
    scale = tl.cast(rule.scale, tl.float32)
    if denominator is not None:
        scale = tl.div_rn(scale, tl.load(denominator).to(tl.float32))
    return loss.divergence_factor * scale, rule.ce_weight * scale


@triton.jit
def finish_rows(pairs, rule, weights, denominator, out, row, storing, kept, s, k, label_logit, f: tl.constexpr):
    """Stores what store_loss does; returns the basis of the rows' gradient."""
    r = finish(s, k, label_logit, f)
    g_divergence, g_hard = store_loss(pairs, rule, weights, denominator, out, row, storing, kept, r, k.tau, f)
    inputs = GradientInputs(s.My, s.Mz, s.B0, s.D0, s.E0, hard_sum(s, f), r.student_entropy)
    return gradient_basis(inputs, k, g_divergence, 0.0, 0.0, g_hard, f)


@triton.jit
def _one_pass_kernel(
    pairs,
    rule,
    weights,
    denominator,
    out,  # [fields, rows], fp32
    tile: tl.constexpr,
    f: tl.constexpr,
):
    row, split = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    k = row_temperatures(pairs, row, kept)
    label, label_logit = load_label(pairs, row, kept, f)
    if tile.ROWS > 0:
        y, z = load_pairs(pairs, row, kept, tile)
        s = sum_rows(y, z, k, tile, f)
        basis = finish_rows(pairs, rule, weights, denominator, out, row, row, kept, s, k, label_logit, f)
        write_rows(pairs, row, y, z, basis, k, label, tile, f)
    else:
        w = row_window(pairs, row, kept, tile)
        s = sum_row(pairs, w, k, split, tile, f)
        basis = finish_rows(pairs, rule, weights, denominator, out, row, row, kept, s, k, label_logit, f)
        write_row(pairs, w, row, basis, k, label, split, tile, f)


@triton.jit
def _merged_one_pass_kernel(pairs, states, rule, weights, denominator, out, tile: tl.constexpr, f: tl.constexpr):
    row, split = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    k = row_temperatures(pairs, row, kept)
    label, _ = load_label(pairs, row, kept, f)
    s, label_logit = merge_partials(pairs, states, row, k, f)
    # All programs of a row come to the same result; the first one stores it.
    storing = tl.where(split == 0, row, number(pairs.student.rows))
    basis = finish_rows(pairs, rule, weights, denominator, out, row, storing, kept, s, k, label_logit, f)
    write_row(pairs, row_window(pairs, row, kept, tile), row, basis, k, label, split, tile, f)


@triton.jit
def _recipe_one_pass_kernel(
    pairs, recipe, class_bias, rule, weights, denominator, out, tile: tl.constexpr, f: tl.constexpr
):
    row, _ = program_rows(pairs, tile)
    kept = rows_kept(pairs, row)
    data, label, k, r = finish_row(pairs, recipe, class_bias, row, kept, tile, f)
    g_divergence, g_hard = store_loss(pairs, rule, weights, denominator, out, row, row, kept, r.row, k.tau[0], f)
    zero = tl.zeros_like(g_divergence)
    upstream = RowUpstream(g_divergence, zero, zero, zero + g_hard)
    basis = recipe_basis(r.saved, r.tau, r.row.student_entropy, label, k, upstream, recipe, f)
    write_recipe(pairs, recipe, class_bias, data, row, kept, basis, k, label, tile, f)


@triton.jit
def _total_kernel(
    statistics,  # [fields, rows]
    FIELD: tl.constexpr,
    denominator,
    total,  # one number
    num_rows,
    scale,
    BLOCK: tl.constexpr,
):
    """scale / denominator * sum of a field over the rows, in a fixed order."""
    lanes = tl.zeros([BLOCK], tl.float32)
    i, rows = tl.arange(0, BLOCK), number(num_rows)
    for start in range(0, rows, BLOCK):
        lanes += tl.load(statistics + FIELD * rows + start + i, start + i < rows, 0.0)
    factor = tl.cast(scale, tl.float32)
    if denominator is not None:
        factor = tl.div_rn(factor, tl.load(denominator).to(tl.float32))
    tl.store(total, tl.sum(lanes, 0) * factor)


def one_pass(rows, rule, gradient):
    plan = launch.Plan(rows, "one pass", gradient, hard=rows.labels is not None, rule=rule)
    numbers = LossRule(
        0.0 if rule.entropy_bound == 0 else 0.5,
        0.0 if rule.entropy_bound == 0 else 0.5 / rule.entropy_bound,
        rule.weight_scale,
        rule.kd_weight,
        rule.ce_weight,
        rule.scale,
    )
    out = plan.new_empty(len(LOSS_STATISTICS), *rows.student_logits.shape[:-1])
    arguments = (numbers, plan.per_row(rule.weights), rule.denominator, out)
    if plan.recipe is not None:
        plan.run(_recipe_one_pass_kernel, plan.recipe, plan.class_bias, *arguments)
    elif plan.splits == 1:
        plan.run(_one_pass_kernel, *arguments)
    else:
        plan.run(_merged_one_pass_kernel, partial_states(plan), *arguments)
    total, warps, block = plan.new_empty(), 16, 16384
    loss = LOSS_STATISTICS.index("loss")
    arguments = (out, loss, rule.denominator, total, unspecialised(plan.rows), float(rule.scale), block)
    launch.run(_total_kernel, 1, warps, plan.device, *arguments)
    return total, out
