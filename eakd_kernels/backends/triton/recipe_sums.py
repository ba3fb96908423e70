"""What the sweeps of a recipe sum over columns, besides moments.

Sums are about running maxima of x, the scaled and capped logits. Only the guarded kind of exponent (row_state.py) is
here: a column costs so much more than its guards.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence import KL, Column, degree, tangent, terms, times
from .recipe import NO_STANDARDIZE, STANDARDIZE_ALL, rest
from .row_state import EMPTY, LOG2_E, NO_HARD, centre, is_empty, over, step, where_mass

# ---- sums --------------------------------------------------------------------------------------------------------


class TauSums(NamedTuple):
    """Of one temperature, over the columns of the divergence; Bd and Dd in nats."""

    B0: tl.tensor
    D0: tl.tensor
    Bd: tl.tensor
    Dd: tl.tensor


@triton.jit
def sums_at(tau, i: tl.constexpr):
    """With names: where tuples are added Triton 3.6 forgets those of their elements, as it does of others below."""
    one = tau[i]
    return TauSums(one[0], one[1], one[2], one[3])


class Sums(NamedTuple):
    My: tl.tensor
    Mz: tl.tensor
    rest_My: tl.tensor
    rest_Mz: tl.tensor
    A0: tl.tensor
    A1: tl.tensor
    E0: tl.tensor
    E1: tl.tensor
    E2: tl.tensor
    F0: tl.tensor
    tau: tuple


@triton.jit
def no_sums(LANES: tl.constexpr, k):
    none, zero = tl.full([LANES], -float("inf"), tl.float32), tl.zeros([LANES], tl.float32)
    tau = ()
    for _ in tl.static_range(len(k.tau)):
        tau += (TauSums(zero, zero, zero, zero),)
    return Sums(none, none, none, none, zero, zero, zero, zero, zero, zero, tau)


@triton.jit
def scaled_moment(factor, of, plain):
    """of 2^step, but that of no mass where mass has vanished: `of` may be infinite. NaN stays in `plain`."""
    return tl.where(factor == 0, factor * plain, factor * of)


@triton.jit
def raise_sums(s, my, mz, rest_my, rest_mz, k, f: tl.constexpr):
    """The sums about maxima that are at least their own."""
    no_y, no_z = is_empty(s.My, True), is_empty(s.Mz, True)
    a, e = step(s.My, my, k.a, no_y, True), step(s.Mz, mz, k.e, no_z, True)
    ra, re = tl.exp2(a), tl.exp2(e)
    E2, F0 = s.E2, s.F0
    if f.STANDARDIZE == STANDARDIZE_ALL:
        E2 = scaled_moment(re, E2 + e * (2 * s.E1 + e * s.E0), s.E0)
    if f.HARD != NO_HARD:
        F0 *= tl.exp2(step(s.Mz, mz, LOG2_E, no_z, True))
    A1, E1 = ra * (s.A1 + a * s.A0), re * (s.E1 + e * s.E0)
    no_y, no_z = is_empty(s.rest_My, True), is_empty(s.rest_Mz, True)
    y, z = s.rest_My - rest_my, s.rest_Mz - rest_mz
    tau = ()
    for i in tl.static_range(len(s.tau)):
        one = sums_at(s.tau, i)
        rb, rd = tl.exp2(step(y, 0.0, k.b[i], no_y, True)), tl.exp2(step(z, 0.0, k.d[i], no_z, True))
        Bd, Dd = one.Bd, one.Dd
        if f.KIND == KL and not f.VALUES:
            # b - d moves with either
            steps = step(y, 0.0, k.nats_b[i], no_y, True) - step(z, 0.0, k.nats_d[i], no_z, True)
            if f.FIRST:
                Bd = scaled_moment(rb, Bd + steps * one.B0, one.B0)
            if f.SECOND:
                Dd = scaled_moment(rd, Dd - steps * one.D0, one.D0)
        tau += (TauSums(rb * one.B0, rd * one.D0, Bd, Dd),)
    return Sums(my, mz, rest_my, rest_mz, ra * s.A0, A1, re * s.E0, E1, E2, F0, tau)


class Exponents(NamedTuple):
    """In base 2. They are not kept finite: where only one side is -inf, a divergence may be infinite."""

    b: tl.tensor
    d: tl.tensor
    unbiased: tl.tensor  # b without the class bias


@triton.jit
def exponents(y, z, c, k, i: tl.constexpr, AXIS: tl.constexpr, f: tl.constexpr):
    """Of temperature i; y, z: columns less their maxima."""
    unbiased, d = y * over(k.b[i], AXIS), z * over(k.d[i], AXIS)
    b = unbiased
    if f.BIAS:
        b += c.bias * LOG2_E
    return Exponents(b, d, unbiased)


@triton.jit
def apart(y, z, c, k, i: tl.constexpr, AXIS: tl.constexpr, f: tl.constexpr):
    """ln(2^b/2^d), from the columns themselves: exponents in base 2 have been rounded once more."""
    if f.STANDARDIZE == NO_STANDARDIZE:
        delta = (y - z) * over(k.nats_b[i], AXIS)
    else:
        delta = y * over(k.nats_b[i], AXIS) - z * over(k.nats_d[i], AXIS)
    if f.BIAS:
        delta += c.bias
    return delta


@triton.jit
def add_entropy(s0, s1, x, m, k, AXIS: tl.constexpr):
    """(S 2^a, S a 2^a, and the tile's a and 2^a)."""
    a = tl.maximum((x - over(centre(m), AXIS)) * over(k, AXIS), EMPTY, propagate_nan=tl.PropagateNan.ALL)
    ea = tl.exp2(a)
    return s0 + tl.sum(ea, AXIS), s1 + tl.sum(ea * a, AXIS), a, ea


@triton.jit
def add_sums(s, c, k, AXIS: tl.constexpr, f: tl.constexpr):
    my, mz = tl.maximum(s.My, tl.max(c.y, AXIS)), tl.maximum(s.Mz, tl.max(c.z, AXIS))
    y, z, rest_my, rest_mz = rest(c.y, c.is_label, f), rest(c.z, c.is_label, f), my, mz
    if f.DECOUPLED:
        rest_my, rest_mz = tl.maximum(s.rest_My, tl.max(y, AXIS)), tl.maximum(s.rest_Mz, tl.max(z, AXIS))
    s = raise_sums(s, my, mz, rest_my, rest_mz, k, f)
    y, z = y - over(centre(rest_my), AXIS), z - over(centre(rest_mz), AXIS)
    A0, A1, _, _ = add_entropy(s.A0, s.A1, c.y, my, k.a, AXIS)
    E0, E1, e, ee = add_entropy(s.E0, s.E1, c.z, mz, k.e, AXIS)
    E2, F0 = s.E2, s.F0
    if f.STANDARDIZE == STANDARDIZE_ALL:
        E2 += tl.sum(ee * e * e, AXIS)
    if f.HARD != NO_HARD:
        F0 += tl.sum(tl.exp2((c.z - over(centre(mz), AXIS)) * LOG2_E), AXIS)
    tau = ()
    for i in tl.static_range(len(s.tau)):
        one, at = sums_at(s.tau, i), exponents(y, z, c, k, i, AXIS, f)
        eb, ed = tl.exp2(at.b), tl.exp2(at.d)
        Bd, Dd = one.Bd, one.Dd
        if f.KIND == KL and not f.VALUES:
            delta = apart(y, z, c, k, i, AXIS, f)
            if f.FIRST:
                Bd += tl.sum(where_mass(eb, delta, True), AXIS)
            if f.SECOND:
                Dd += tl.sum(where_mass(ed, -delta, True), AXIS)
        tau += (TauSums(one.B0 + tl.sum(eb, AXIS), one.D0 + tl.sum(ed, AXIS), Bd, Dd),)
    return Sums(my, mz, rest_my, rest_mz, A0, A1, E0, E1, E2, F0, tau)


@triton.jit
def fold_sums(s, k, f: tl.constexpr):
    """One out of those along axis 0, in a fixed order."""
    my, mz = tl.max(s.My, 0), tl.max(s.Mz, 0)
    rest_my, rest_mz = tl.max(s.rest_My, 0), tl.max(s.rest_Mz, 0)
    s = raise_sums(s, my, mz, rest_my, rest_mz, k, f)
    tau = ()
    for i in tl.static_range(len(s.tau)):
        one = sums_at(s.tau, i)
        tau += (TauSums(tl.sum(one.B0, 0), tl.sum(one.D0, 0), tl.sum(one.Bd, 0), tl.sum(one.Dd, 0)),)
    A0, A1, E0, E1 = tl.sum(s.A0, 0), tl.sum(s.A1, 0), tl.sum(s.E0, 0), tl.sum(s.E1, 0)
    return Sums(my, mz, rest_my, rest_mz, A0, A1, E0, E1, tl.sum(s.E2, 0), tl.sum(s.F0, 0), tau)


# ---- values ------------------------------------------------------------------------------------------------------


class Normalisers(NamedTuple):
    """What makes exponentials of one temperature probabilities. A side without mass has none."""

    B0: tl.tensor  # 1/B0, 1/D0
    D0: tl.tensor
    log_B0: tl.tensor
    log_D0: tl.tensor
    log_ratio: tl.tensor  # log(D0/B0)


@triton.jit
def normalisers(B0, D0):
    # What is divided by where there is no mass does not matter: all exponentials are 0.
    B0, D0 = tl.where(B0 == 0, 1.0, B0), tl.where(D0 == 0, 1.0, D0)
    one = tl.zeros_like(B0) + 1
    return Normalisers(tl.div_rn(one, B0), tl.div_rn(one, D0), tl.log(B0), tl.log(D0), tl.log(tl.div_rn(D0, B0)))


@triton.jit
def normalisers_at(n, i: tl.constexpr):
    one = n[i]
    return Normalisers(one[0], one[1], one[2], one[3], one[4])


@triton.jit
def column_of(at, y, z, c, n, k, i: tl.constexpr, AXIS: tl.constexpr, f: tl.constexpr):
    log_p, log_q = y * over(k.nats_b[i], AXIS), z * over(k.nats_d[i], AXIS)
    if f.BIAS:
        log_p += c.bias
    return Column(
        tl.exp2(at.b) * over(n.B0, AXIS),
        tl.exp2(at.d) * over(n.D0, AXIS),
        log_p - over(n.log_B0, AXIS),
        log_q - over(n.log_D0, AXIS),
        apart(y, z, c, k, i, AXIS, f) + over(n.log_ratio, AXIS),
    )


class Values(NamedTuple):
    """Sums over columns; see csrc/recipe.h, TauSums, but h as divergence.py has it."""

    f: tl.tensor
    h: tl.tensor
    hd: tl.tensor
    fb: tl.tensor
    pb: tl.tensor
    qd: tl.tensor


@triton.jit
def values_at(values, i: tl.constexpr):
    v = values[i]
    return Values(v[0], v[1], v[2], v[3], v[4], v[5])


@triton.jit
def no_values(LANES: tl.constexpr, k):
    zero, out = tl.zeros([LANES], tl.float32), ()
    for _ in tl.static_range(len(k.tau)):
        out += (Values(zero, zero, zero, zero, zero, zero),)
    return out


@triton.jit
def add_values(values, c, rest_my, rest_mz, n, k, recipe, AXIS: tl.constexpr, f: tl.constexpr):
    y, z = rest(c.y, c.is_label, f), rest(c.z, c.is_label, f)
    no_y, no_z = y == -float("inf"), z == -float("inf")
    y, z = y - over(centre(rest_my), AXIS), z - over(centre(rest_mz), AXIS)
    first, second = tl.cast(recipe.first, tl.float32), tl.cast(recipe.second, tl.float32)
    out = ()
    for i in tl.static_range(len(values)):
        v, at = values_at(values, i), exponents(y, z, c, k, i, AXIS, f)
        column = column_of(at, y, z, c, normalisers_at(n, i), k, i, AXIS, f)
        each = terms(column, first, second, f)
        value, h = tl.where(no_y & no_z, 0.0, each.f), tl.where(no_y & no_z, 0.0, each.h)
        hd, fb, pb, qd = v.hd, v.fb, v.pb, v.qd
        if f.PULLS:
            # -inf is no logit: nothing pulls on it.
            of_p = degree(first, second, f) * value - h - tangent(first, second, f) * (column.q - column.p)
            hd += tl.sum(tl.where(no_z, 0.0, times(h, at.d)), AXIS)
            fb += tl.sum(tl.where(no_y, 0.0, times(of_p, at.unbiased)), AXIS)
            pb += tl.sum(times(column.p, at.unbiased), AXIS)
            qd += tl.sum(times(column.q, at.d), AXIS)
        out += (Values(v.f + tl.sum(value, AXIS), v.h + tl.sum(h, AXIS), hd, fb, pb, qd),)
    return out


@triton.jit
def fold_values(values):
    out = ()
    for i in tl.static_range(len(values)):
        v = values_at(values, i)
        hd, fb, pb, qd = tl.sum(v.hd, 0), tl.sum(v.fb, 0), tl.sum(v.pb, 0), tl.sum(v.qd, 0)
        out += (Values(tl.sum(v.f, 0), tl.sum(v.h, 0), hd, fb, pb, qd),)
    return out
