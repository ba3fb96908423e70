"""The student's gradient under a recipe, of a row and of a tile of columns: csrc/recipe_result.h, recipe_basis."""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence import KL, terms, times
from .recipe import NO_STANDARDIZE, STANDARDIZE_ALL, rest
from .recipe_result import INFINITY, label_odds, saved_at
from .recipe_sums import Normalisers, column_of, exponents, normalisers
from .row_state import LN_2, LOG2_E, NO_HARD, centre, over


class RowUpstream(NamedTuple):
    """Gradients of the loss in the row's statistics."""

    divergence: tl.tensor
    student_entropy: tl.tensor
    student_lse: tl.tensor
    cross_entropy: tl.tensor


class TauBasis(NamedTuple):
    """The gradient in u of one temperature: c (h_j - pull q_j) + q q_j over the columns of the divergence, h as
    divergence.py has it; `label` in a decoupled one."""

    c: tl.tensor
    pull: tl.tensor
    q: tl.tensor
    label: tl.tensor
    normalisers: Normalisers


@triton.jit
def basis_at(tau, i: tl.constexpr):
    one = tau[i]
    n = one[4]
    return TauBasis(one[0], one[1], one[2], one[3], Normalisers(n[0], n[1], n[2], n[3], n[4]))


class RecipeBasis(NamedTuple):
    """g_j = inverse (G_j - constant) - linear (x_j - mean) + entropy 2^e_j (ln2 e_j + shift)
    + hard 2^((x_j - Mz) log2(e)) + label [j = label], before scale and cap."""

    tau: tuple
    rest_My: tl.tensor
    rest_Mz: tl.tensor
    Mz: tl.tensor
    constant: tl.tensor
    linear: tl.tensor
    entropy: tl.tensor
    shift: tl.tensor
    hard: tl.tensor
    label: tl.tensor


@triton.jit
def tau_basis(one, saved, label, k, i: tl.constexpr, upstream, recipe, f: tl.constexpr):
    tau, n = k.tau[i], normalisers(one.B0, one.D0)
    g = tl.div_rn(upstream.divergence * tl.cast(recipe.factor[i], tl.float32), tau)
    g_lse = tl.div_rn(upstream.student_lse, tau)
    # An infinite divergence has no gradient; a weight of 0 silences it, but not a NaN.
    pull = tl.where(tl.abs(one.pull) == INFINITY, float("nan"), one.pull)
    if f.DECOUPLED:
        odds = label_odds(label, centre(saved.rest_My), centre(saved.rest_Mz), one.B0, one.D0, k.b[i], k.d[i])
        target = g * tl.cast(recipe.alpha, tl.float32) * odds.target
        target = tl.where(odds.d == -INFINITY, 0.0, target)  # an infinite divergence does not move with a masked label
        c = tl.where((one.B0 == 0) | (one.D0 == 0), 0.0, g * tl.cast(recipe.beta, tl.float32))
        q = tl.where(one.D0 == 0, 0.0, g_lse * (1 - odds.student) - target)
        return TauBasis(c, pull, q, target + g_lse * odds.student, n)
    else:
        still = one.D0 == 0
        if f.KIND == KL and not f.SECOND:
            still |= one.B0 == 0  # KL(p || q) without p is 0 whatever q is
        return TauBasis(tl.where(still, 0.0, g), pull, tl.where(one.D0 == 0, 0.0, g_lse), g * 0.0, n)


@triton.jit
def recipe_basis(saved, tau, student_entropy, label, k, upstream, recipe, f: tl.constexpr):
    E0, F0 = saved.E0, saved.F0
    out, pull = (), times(upstream.student_lse, saved.lse_pull)
    for i in tl.static_range(len(k.tau)):
        last = k.tau[i]
        one = saved_at(tau, i)
        out += (tau_basis(one, saved, label, k, i, upstream, recipe, f),)
        pull += times(upstream.divergence * tl.cast(recipe.factor[i], tl.float32), one.student_pull)
    entropy_factor = tl.where(E0 == 0, 0.0, -tl.div_rn(upstream.student_entropy, k.t * E0))
    constant, linear = tl.zeros_like(pull), tl.zeros_like(pull)
    if f.STANDARDIZE == STANDARDIZE_ALL:
        entropy_factor *= k.student.inverse
        pull += times(upstream.student_entropy, saved.entropy_pull)
    if f.STANDARDIZE != NO_STANDARDIZE:
        count, deviation = k.student.count, k.student.deviation
        constant = tl.div_rn(upstream.student_lse, last * count)
        # Equal logits have no deviation to differentiate.
        linear = tl.where(deviation == 0, 0.0, tl.div_rn(pull * k.student.inverse, (count - 1) * deviation))
    return RecipeBasis(
        out,
        saved.rest_My,
        saved.rest_Mz,
        saved.Mz,
        constant,
        linear,
        entropy_factor,
        tl.where(E0 == 0, 0.0, student_entropy - tl.log(E0)),
        tl.where(F0 == 0, 0.0, tl.div_rn(upstream.cross_entropy, F0)),
        tl.where(F0 == 0, 0.0, -upstream.cross_entropy),
    )


@triton.jit
def recipe_gradient(c, basis, k, recipe, AXIS: tl.constexpr, f: tl.constexpr):
    """Of a tile of columns c."""
    y, z = rest(c.y, c.is_label, f), rest(c.z, c.is_label, f)
    nothing = (y == -INFINITY) & (z == -INFINITY)
    y, z = y - over(centre(basis.rest_My), AXIS), z - over(centre(basis.rest_Mz), AXIS)
    first, second = tl.cast(recipe.first, tl.float32), tl.cast(recipe.second, tl.float32)
    g, at_label = tl.zeros_like(z), tl.zeros_like(basis.hard)
    for i in tl.static_range(len(k.tau)):
        one = basis_at(basis.tau, i)
        column = column_of(exponents(y, z, c, k, i, AXIS, f), y, z, c, one.normalisers, k, i, AXIS, f)
        h = terms(column, first, second, f).h - over(one.pull, AXIS) * column.q
        part = over(one.q, AXIS) * column.q + times(over(one.c, AXIS), h)
        g += tl.where(nothing, 0.0, part)
        at_label += one.label
    if f.DECOUPLED:
        g = tl.where(c.is_label, over(at_label, AXIS), g)
    from_top = c.z - over(centre(basis.Mz), AXIS)
    if f.STANDARDIZE != NO_STANDARDIZE:
        g = over(k.student.inverse, AXIS) * (g - over(basis.constant, AXIS))
        g = tl.where(c.z == -INFINITY, 0.0, g - over(basis.linear, AXIS) * (from_top - over(k.student.mean, AXIS)))
    if f.ENTROPY:
        e = from_top * over(k.e, AXIS)
        ee = tl.exp2(e)
        g += tl.where(ee > 0, over(basis.entropy, AXIS) * ee * (e * LN_2 + over(basis.shift, AXIS)), 0.0)
    if f.HARD != NO_HARD:
        g += over(basis.hard, AXIS) * tl.exp2(from_top * LOG2_E)
        g += tl.where(c.is_label, over(basis.label, AXIS), 0.0)
    g *= tl.cast(recipe.student_scale, tl.float32)
    if f.STUDENT_CAP:
        share = c.z / tl.cast(recipe.student_cap, tl.float32)
        g = tl.where(c.z == -INFINITY, 0.0, g * (1 - share * share))
    return g
