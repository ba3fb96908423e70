"""What the sums of a recipe amount to: a row's statistics, and what its gradient needs.

The Triton twin of csrc/recipe_result.h. As in row_result.py, functions work on a row and on a vector of
rows, and divisions are rounded to nearest.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence import degree, times
from .recipe import NO_STANDARDIZE, STANDARDIZE_ALL
from .recipe_sums import sums_at, values_at
from .row_result import RowResult
from .row_state import LN_2, LOG2_E, NO_HARD, centre

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def ln_1p(x):
    """For x in 0..1, by the rounding error of 1 + x."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * tl.div_rn(x, tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def softplus(x):
    """ln(1 + e^x)"""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + ln_1p(tl.exp2(-tl.abs(x) * LOG2_E))


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    return tl.div_rn(tl.where(x < 0, e, 1.0), 1 + e)


# ---- a label's column --------------------------------------------------------------------------------------------


class LabelColumn(NamedTuple):
    """Its number (-1: none), x of both sides and the class bias; x is NaN where the label is no column."""

    column: tl.tensor
    teacher: tl.tensor
    student: tl.tensor
    bias: tl.tensor


class LabelOdds(NamedTuple):
    """q_k - p_k, q_k, log(p_k/(1 - p_k)) of both sides, the label's exponents, and b without the class bias."""

    target: tl.tensor
    student: tl.tensor
    odds_p: tl.tensor
    odds_q: tl.tensor
    b: tl.tensor
    d: tl.tensor
    unbiased: tl.tensor


@triton.jit
def label_odds(label, my, mz, B0, D0, k_b, k_d):
    """my, mz: what the exponents of the rest, whose sums are B0 and D0, are about."""
    unbiased, d = (label.teacher - my) * k_b, (label.student - mz) * k_d
    b = unbiased + label.bias * LOG2_E
    # No global constant can be NaN: it would not equal itself when Triton looks whether it has changed.
    wrong = tl.where((b == INFINITY) | (d == INFINITY), INFINITY, 0.0) * 0.0
    odds_p = tl.where(b == -INFINITY, b, b * LN_2 - tl.log(B0)) + wrong
    odds_q = tl.where(d == -INFINITY, d, d * LN_2 - tl.log(D0)) + wrong
    # The difference of whichever is small, so that nothing cancels at p_k -> 1.
    high = (odds_p > 0) & (odds_q > 0)
    sign = tl.where(high, -1.0, 1.0)
    target = sign * (sigmoid(sign * odds_q) - sigmoid(sign * odds_p))
    return LabelOdds(target, sigmoid(odds_q), odds_p, odds_q, b, d, unbiased)


# ---- statistics --------------------------------------------------------------------------------------------------


class TauResult(NamedTuple):
    divergence: tl.tensor  # without the factor of its temperature
    pull: tl.tensor  # S h
    student_pull: tl.tensor  # these only after a sweep of values
    teacher_pull: tl.tensor
    mean_d: tl.tensor  # E_q[d] in nats, over all columns
    forward: tl.tensor  # of the KL family, 0 where not asked for; only without a sweep of values
    reverse: tl.tensor


@triton.jit
def kl_of_sums(mass, first_moment, other):
    """0 without mass to average over, +inf where only the other side has none; NaN stays."""
    kl = tl.div_rn(first_moment, mass) + tl.log(tl.div_rn(other, mass))
    return tl.where(mass == 0, 0.0 * other, tl.where(other == 0, mass * INFINITY, kl))


@triton.jit
def finish_columns(one, v, recipe, f: tl.constexpr):
    """one, v: TauSums and Values of a temperature."""
    first, second = tl.cast(recipe.first, tl.float32), tl.cast(recipe.second, tl.float32)
    nan_stays = (one.B0 + one.D0) * 0.0  # whatever the other side's mass is
    if f.VALUES:
        student_pull = (v.hd - v.h * v.qd) * LN_2
        teacher_pull = (v.fb - (degree(first, second, f) * v.f - v.h) * v.pb) * LN_2
        zero = tl.zeros_like(one.B0)
        return TauResult(v.f + nan_stays, v.h, student_pull, teacher_pull, v.qd * LN_2, zero, zero)
    else:
        zero = tl.zeros_like(one.B0)
        divergence, pull, forward, reverse = nan_stays, zero, zero, zero
        if f.FIRST:
            forward = kl_of_sums(one.B0, one.Bd, one.D0)
            divergence += first * forward
        if f.SECOND:
            reverse = kl_of_sums(one.D0, one.Dd, one.B0)
            pull = second * reverse
            divergence += pull
        return TauResult(divergence, pull, zero, zero, zero, forward, reverse)


@triton.jit
def with_target(r, v, odds, recipe, f: tl.constexpr):
    """alpha TCKD + beta NCKD from NCKD."""
    alpha, beta = tl.cast(recipe.alpha, tl.float32), tl.cast(recipe.beta, tl.float32)
    p, others = sigmoid(odds.odds_p), sigmoid(-odds.odds_p)
    target = times(p, softplus(-odds.odds_q) - softplus(-odds.odds_p))
    target += times(others, softplus(odds.odds_q) - softplus(odds.odds_p))
    # A part that is not asked for may be infinite, and a label that is no column makes both NaN.
    divergence = times(alpha, target) + times(beta, r.divergence) + (p + odds.student) * 0.0
    if f.PULLS:
        student_step, teacher_step = odds.d * LN_2 - r.mean_d, (odds.unbiased - v.pb) * LN_2
        student_pull = beta * r.student_pull + times(alpha * odds.target, student_step)
        teacher_pull = beta * r.teacher_pull
        teacher_pull += times(alpha * p * others, (odds.odds_p - odds.odds_q) * teacher_step)
        mean_d = r.mean_d + times(odds.student, student_step)
        return TauResult(divergence, r.pull, student_pull, teacher_pull, mean_d, r.forward, r.reverse)
    else:
        return TauResult(divergence, r.pull, r.student_pull, r.teacher_pull, r.mean_d, r.forward, r.reverse)


class Saved(NamedTuple):
    """What the gradient needs of a row, in the order of eakd_kernels.stats.RECIPE_STATISTICS behind the public ones."""

    rest_My: tl.tensor
    rest_Mz: tl.tensor
    Mz: tl.tensor
    E0: tl.tensor
    F0: tl.tensor
    student_count: tl.tensor
    student_mean: tl.tensor
    student_deviation: tl.tensor
    teacher_deviation: tl.tensor
    entropy_pull: tl.tensor
    lse_pull: tl.tensor
    A0: tl.tensor


class TauSaved(NamedTuple):
    """And of each temperature: TEMPERATURE_STATISTICS."""

    B0: tl.tensor
    D0: tl.tensor
    pull: tl.tensor
    student_pull: tl.tensor
    teacher_pull: tl.tensor
    forward: tl.tensor
    reverse: tl.tensor


@triton.jit
def saved_at(tau, i: tl.constexpr):
    one = tau[i]
    return TauSaved(one[0], one[1], one[2], one[3], one[4], one[5], one[6])


class RecipeResult(NamedTuple):
    row: RowResult
    saved: Saved
    tau: tuple
    divergence_slope: tl.tensor
    student_lse_slope: tl.tensor


@triton.jit
def rest_centre(rest_m, m, side, f: tl.constexpr):
    """What the label's exponents are about: as those of the rest, if there is any."""
    if f.STANDARDIZE == NO_STANDARDIZE:
        return centre(rest_m)
    else:
        return tl.where(rest_m == -INFINITY, centre(m) + side.mean, rest_m)


@triton.jit
def centre_in_nats(rest_m, m, side, tau, f: tl.constexpr):
    """The same; of standardised logits, less their mean."""
    if f.STANDARDIZE == NO_STANDARDIZE:
        return tl.div_rn(centre(rest_m), tau)
    else:
        about = tl.where(rest_m == -INFINITY, 0.0, (rest_m - centre(m)) - side.mean)
        return tl.div_rn(about * side.inverse, tau)


@triton.jit
def log_sum(about, S):
    return tl.where(S == 0, -INFINITY, about + tl.log(S))


@triton.jit
def log_sum_with(about, S, exponent, odds):
    """With the label's column, whose exponent and log-odds these are."""
    return tl.where(exponent == -INFINITY, log_sum(about, S), about + exponent * LN_2 + softplus(-odds))


@triton.jit
def zero_if_none(x):
    return tl.where(x == -INFINITY, 0.0, x)


@triton.jit
def entropy(s0, s1):
    value = tl.log(s0) - tl.div_rn(s1, s0) * LN_2
    return tl.where((s0 == 0) | (value < 0), 0.0, value)  # below 0 by rounding


@triton.jit
def finish_recipe(s, values, label, k, recipe, f: tl.constexpr):
    """Everything that a row's statistics tensor gets."""
    tau, divergence, slope = (), tl.zeros_like(s.A0), tl.zeros_like(s.A0)
    for i in tl.static_range(len(k.tau)):
        one, v, factor = sums_at(s.tau, i), values_at(values, i), tl.cast(recipe.factor[i], tl.float32)
        r = finish_columns(one, v, recipe, f)
        about_y = centre_in_nats(s.rest_My, s.My, k.teacher, k.tau[i], f)
        about_z = centre_in_nats(s.rest_Mz, s.Mz, k.student, k.tau[i], f)
        teacher_lse, student_lse = log_sum(about_y, one.B0), log_sum(about_z, one.D0)
        if f.DECOUPLED:
            my, mz = rest_centre(s.rest_My, s.My, k.teacher, f), rest_centre(s.rest_Mz, s.Mz, k.student, f)
            odds = label_odds(label, my, mz, one.B0, one.D0, k.b[i], k.d[i])
            r = with_target(r, v, odds, recipe, f)
            teacher_lse = log_sum_with(about_y, one.B0, odds.b, odds.odds_p)
            student_lse = log_sum_with(about_z, one.D0, odds.d, odds.odds_q)
        divergence += factor * r.divergence
        tau += (TauSaved(one.B0, one.D0, r.pull, r.student_pull, r.teacher_pull, r.forward, r.reverse),)
        if f.SLOPES:
            slope -= tl.div_rn(factor * (r.student_pull + r.teacher_pull), k.tau[i])
        lse_pull = tl.where(one.D0 == 0, 0.0, r.mean_d + about_z)
        lse_slope = -tl.div_rn(lse_pull, k.tau[i])
    cross_entropy, entropy_pull = tl.zeros_like(divergence), tl.zeros_like(divergence)
    if f.HARD != NO_HARD:
        cross_entropy = tl.where(s.F0 == 0, 0.0, (s.Mz - label.student) + tl.log(s.F0))
    if f.STANDARDIZE == STANDARDIZE_ALL:
        mean_e = tl.div_rn(s.E1, s.E0)
        entropy_pull = tl.where(s.E0 == 0, 0.0, (mean_e * mean_e - tl.div_rn(s.E2, s.E0)) * (LN_2 * LN_2))
    row = RowResult(
        divergence,
        entropy(s.A0, s.A1),
        entropy(s.E0, s.E1),
        zero_if_none(teacher_lse),
        zero_if_none(student_lse),
        cross_entropy,
    )
    z = k.student
    saved = Saved(
        s.rest_My,
        s.rest_Mz,
        s.Mz,
        s.E0,
        s.F0,
        z.count,
        z.mean,
        z.deviation,
        k.teacher.deviation,
        entropy_pull,
        lse_pull,
        s.A0,
    )
    return RecipeResult(row, saved, tau, slope, lse_slope)
