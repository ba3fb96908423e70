"""What one sweep over a row pair carries, how it grows and merges, and what the loss and the gradient make of it.

The Triton twin of csrc/row_state.h, which defines the symbols; docs/math.md derives them. With student logits z,
teacher logits y and the running maxima My, Mz, in base 2:

    b = (y - My) log2(e)/tau   d = (z - Mz) log2(e)/tau   a = (y - My) log2(e)/t   e = (z - Mz) log2(e)/t
    A0 = S 2^a   A1 = S a 2^a   E0 = S 2^e   E1 = S e 2^e   B0 = S 2^b   D0 = S 2^d   Bd = S (b - d) 2^b
    F0 = S 2^((z - Mz) log2(e))          B1 = S b 2^b   D1 = S d 2^d   Bbd = S b (b - d) 2^b

Every function works on one row (scalars), on a vector of rows, and on the lanes of a row. tl.exp2 is one instruction
(ex2.approx.ftz); tl.exp would be four more.

A sweep comes in two kinds. The fast one has exponents fma(y, k, c) with k = log2(e)/temperature and c = -My k rounded,
one instruction; all terms of a lane share the error of c, which is taken out at the end (`about_maxima`). The guarded
one has (y - My) k and takes everything: -inf, NaN, logits so large that c is off by whole exponents.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .arithmetic import fma

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# An exponent that underflows to 0, finite, so that a masked column adds 0 * EMPTY = 0 and not 0 * (-inf) = NaN.
EMPTY = tl.constexpr(-200.0)
# What the fast sweep reads outside of a row: finite for the same reason, and below every logit that it can take.
OUTSIDE = tl.constexpr(-(2.0**100))  # the same number in bf16
NEGLIGIBLE = tl.constexpr(-(2.0**99))
LARGEST = tl.constexpr(1e6)


class Features(NamedTuple):
    """What a kernel is compiled for."""

    P: int  # P tau = Q t for small integers: 2^b = u^P and 2^a = u^Q for one exponential u; 0: no such ratio
    Q: int
    HARD: int  # the sum at temperature 1: NO_HARD, HARD_AT_TAU, HARD_AT_T, or HARD_OWN
    SLOPES: bool  # B1, D1, Bbd are wanted; only with P == 0
    ENTROPY: bool = False  # the gradient has a part through the student's entropy
    WEIGHTING: int = 0  # eakd_kernels.ops.WEIGHTINGS
    TAU_SQUARED: bool = False


NO_HARD, HARD_AT_TAU, HARD_AT_T, HARD_OWN = (tl.constexpr(i) for i in range(4))


class Temperatures(NamedTuple):
    tau: tl.tensor
    t: tl.tensor
    k_tau: tl.tensor  # log2(e)/tau
    k_t: tl.tensor  # log2(e)/t
    k_0: tl.tensor  # k_tau/P = k_t/Q


class RowState(NamedTuple):
    My: tl.tensor
    Mz: tl.tensor
    A0: tl.tensor
    A1: tl.tensor
    E0: tl.tensor
    E1: tl.tensor
    B0: tl.tensor
    Bd: tl.tensor
    D0: tl.tensor
    F0: tl.tensor
    B1: tl.tensor
    D1: tl.tensor
    Bbd: tl.tensor


@triton.jit
def empty_state(LANES: tl.constexpr):
    none, zero = tl.full([LANES], -float("inf"), tl.float32), tl.zeros([LANES], tl.float32)
    return RowState(none, none, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def is_empty(m, GUARDED: tl.constexpr):
    """Whether columns of maximum m are none at all."""
    if GUARDED:
        return m == -float("inf")
    else:
        return m <= NEGLIGIBLE


@triton.jit
def centre(m, GUARDED: tl.constexpr = True):
    """What to subtract from logits whose maximum is m: (-inf) - (-inf) would be NaN."""
    return tl.where(is_empty(m, GUARDED), 0.0, m)


@triton.jit
def power(u, n: tl.constexpr):
    result = u
    for _ in tl.static_range(n - 1):
        result *= u
    return result


class PerExponent(NamedTuple):
    """Of each exponent its own; a and e are not looked at where they are shared with b and d."""

    b: tl.tensor
    d: tl.tensor
    a: tl.tensor
    e: tl.tensor
    hard: tl.tensor


@triton.jit
def shift(s, by, P: tl.constexpr, Q: tl.constexpr, f: tl.constexpr):
    """The state after a step of every exponent.

    P, Q: as in Features while a sweep runs, when A1, E1 and Bd are in units of the shared exponent; 0 afterwards.
    """
    b, d, a, e = by.b, by.d, by.a, by.e
    if P > 0:
        a, e = b, d
        u, v = tl.exp2(b), tl.exp2(d)
        rb, rd, ra, re = power(u, P), power(v, P), power(u, Q), power(v, Q)
    else:
        rb, rd, ra, re = tl.exp2(b), tl.exp2(d), tl.exp2(a), tl.exp2(e)
    A0, E0, F0, B1, D1, Bbd = s.A0, s.E0, s.F0, s.B1, s.D1, s.Bbd
    if P > 0 and P == Q:
        A1, E1 = ra * (s.A1 + a * s.B0), re * (s.E1 + e * s.D0)
    else:
        A1, E1 = ra * (s.A1 + a * s.A0), re * (s.E1 + e * s.E0)
        A0, E0 = ra * s.A0, re * s.E0
    # b - d moves with either, so Bd changes even where only the student's maximum moved. Teacher mass that vanishes
    # (rb == 0) takes an infinite Bd with it; times B0, so that NaN stays.
    if f.SLOPES:
        Bbd = tl.where(rb == 0, rb * s.B0, rb * (s.Bbd + b * s.Bd + (b - d) * (s.B1 + b * s.B0)))
        B1, D1 = rb * (s.B1 + b * s.B0), rd * (s.D1 + d * s.D0)
    if f.HARD == HARD_OWN:
        F0 = s.F0 * tl.exp2(by.hard)
    Bd = tl.where(rb == 0, rb * s.B0, rb * (s.Bd + (b - d) * s.B0))
    return RowState(s.My, s.Mz, A0, A1, E0, E1, rb * s.B0, Bd, rd * s.D0, F0, B1, D1, Bbd)


@triton.jit
def centres(my, mz, k, GUARDED: tl.constexpr, f: tl.constexpr):
    """What makes logits exponents (see `exponent`): M if guarded, else -M k, for the shared temperature or for each."""
    y, z = centre(my, GUARDED), centre(mz, GUARDED)
    if GUARDED:
        return PerExponent(y, z, y, z, z)
    elif f.P > 0:
        return PerExponent(-y * k.k_0, -z * k.k_0, -y * k.k_0, -z * k.k_0, -z * LOG2_E)
    else:
        return PerExponent(-y * k.k_tau, -z * k.k_tau, -y * k.k_t, -z * k.k_t, -z * LOG2_E)


@triton.jit
def step(old, new, k, empty, GUARDED: tl.constexpr):
    """What exponents grow by, <= 0, as the centre moves. An empty side has sums of 0 and takes any."""
    if GUARDED:
        # A step enters Bd as it is, but times a sum it must stay finite: 0 * (-inf) would be NaN.
        return tl.where(empty, 0.0, tl.maximum((old - new) * k, OUTSIDE))
    else:
        return tl.where(empty, 0.0, new - old)


@triton.jit
def raise_maxima(s, my, mz, k, GUARDED: tl.constexpr, f: tl.constexpr):
    """(the state about maxima that are at least its own, their centres)."""
    old, new = centres(s.My, s.Mz, k, GUARDED, f), centres(my, mz, k, GUARDED, f)
    y, z = is_empty(s.My, GUARDED), is_empty(s.Mz, GUARDED)
    k_b, k_a = k.k_tau, k.k_t
    if f.P > 0:
        k_b, k_a = k.k_0, k.k_0
    by = PerExponent(
        step(old.b, new.b, k_b, y, GUARDED),
        step(old.d, new.d, k_b, z, GUARDED),
        step(old.a, new.a, k_a, y, GUARDED),
        step(old.e, new.e, k_a, z, GUARDED),
        step(old.hard, new.hard, LOG2_E, z, GUARDED),
    )
    s = shift(s, by, f.P, f.Q, f)
    return RowState(my, mz, s.A0, s.A1, s.E0, s.E1, s.B0, s.Bd, s.D0, s.F0, s.B1, s.D1, s.Bbd), new


@triton.jit
def exponent(x, k, c, AXIS: tl.constexpr, GUARDED: tl.constexpr):
    """(the exponent kept finite where it is guarded, as it is)."""
    if GUARDED:
        raw = (x - over(c, AXIS)) * over(k, AXIS)
        return tl.maximum(raw, EMPTY, propagate_nan=tl.PropagateNan.ALL), raw
    else:
        raw = fma(x, over(k, AXIS), over(c, AXIS))
        return raw, raw


@triton.jit
def where_mass(e, x, GUARDED: tl.constexpr):
    """e x, and no term where there is no mass."""
    if GUARDED:
        return tl.where(e > 0, e * x, 0.0)
    else:
        return e * x


@triton.jit
def add_columns(s, y, z, k, AXIS: tl.constexpr, GUARDED: tl.constexpr, f: tl.constexpr):
    """The state after columns y, z (fp32 tiles), reduced along AXIS into its lanes.

    Without guards -inf among them makes A1 or E1 NaN, and logits that are too large make sums inf or NaN.
    """
    s, c = raise_maxima(s, tl.maximum(s.My, tl.max(y, AXIS)), tl.maximum(s.Mz, tl.max(z, AXIS)), k, GUARDED, f)
    if f.P > 0:
        b, _ = exponent(y, k.k_0, c.b, AXIS, GUARDED)
        d, d_raw = exponent(z, k.k_0, c.d, AXIS, GUARDED)
        a, e = b, d
        u, v = tl.exp2(b), tl.exp2(d)
        eb, ed, ea, ee = power(u, f.P), power(v, f.P), power(u, f.Q), power(v, f.Q)
    else:
        b, _ = exponent(y, k.k_tau, c.b, AXIS, GUARDED)
        d, d_raw = exponent(z, k.k_tau, c.d, AXIS, GUARDED)
        a, _ = exponent(y, k.k_t, c.a, AXIS, GUARDED)
        e, _ = exponent(z, k.k_t, c.e, AXIS, GUARDED)
        eb, ed, ea, ee = tl.exp2(b), tl.exp2(d), tl.exp2(a), tl.exp2(e)
    A0, E0, F0, B1, D1, Bbd = s.A0, s.E0, s.F0, s.B1, s.D1, s.Bbd
    if f.P == 0 or f.P != f.Q:
        A0, E0 = A0 + tl.sum(ea, AXIS), E0 + tl.sum(ee, AXIS)
    if f.SLOPES:
        B1, D1 = B1 + tl.sum(eb * b, AXIS), D1 + tl.sum(ed * d, AXIS)
        Bbd += tl.sum(where_mass(eb, b * (b - d_raw), GUARDED), AXIS)
    if f.HARD == HARD_OWN:
        _, hard = exponent(z, tl.cast(LOG2_E, tl.float32), c.hard, AXIS, GUARDED)
        F0 += tl.sum(tl.exp2(hard), AXIS)
    A1, E1 = s.A1 + tl.sum(ea * a, AXIS), s.E1 + tl.sum(ee * e, AXIS)
    # The student's exponent as it is: -inf under teacher mass is an infinite divergence.
    B0, D0 = s.B0 + tl.sum(eb, AXIS), s.D0 + tl.sum(ed, AXIS)
    Bd = s.Bd + tl.sum(where_mass(eb, b - d_raw, GUARDED), AXIS)
    return RowState(s.My, s.Mz, A0, A1, E0, E1, B0, Bd, D0, F0, B1, D1, Bbd)


@triton.jit
def over(x, AXIS: tl.constexpr):
    """A value of every lane, or of all, as tiles broadcast it."""
    if x.type.is_block():
        return tl.expand_dims(x, AXIS)
    else:
        return x


@triton.jit
def about_maxima(s, k, GUARDED: tl.constexpr, f: tl.constexpr):
    """The state as csrc/row_state.h has it, once a sweep is over."""
    if not GUARDED:
        c, y, z = centres(s.My, s.Mz, k, False, f), centre(s.My, False), centre(s.Mz, False)
        k_b, k_a = k.k_tau, k.k_t
        if f.P > 0:
            k_b, k_a = k.k_0, k.k_0
        hard = -fma(z, tl.cast(LOG2_E, tl.float32), c.hard)
        by = PerExponent(-fma(y, k_b, c.b), -fma(z, k_b, c.d), -fma(y, k_a, c.a), -fma(z, k_a, c.e), hard)
        s = shift(s, by, f.P, f.Q, f)
    A0, A1, E0, E1, Bd = s.A0, s.A1, s.E0, s.E1, s.Bd
    if f.P > 0:
        A1, E1, Bd = A1 * f.Q, E1 * f.Q, Bd * f.P
        if f.P == f.Q:
            A0, E0 = s.B0, s.D0
    # Lanes that counted as empty, and were summed about 0, are so from here on too.
    My = tl.where(is_empty(s.My, GUARDED), -float("inf"), s.My)
    Mz = tl.where(is_empty(s.Mz, GUARDED), -float("inf"), s.Mz)
    return RowState(My, Mz, A0, A1, E0, E1, s.B0, Bd, s.D0, s.F0, s.B1, s.D1, s.Bbd)


@triton.jit
def fold(s, k, f: tl.constexpr):
    """One state out of those along axis 0. The order is fixed, so the result is the same bit for bit."""
    My, Mz = tl.max(s.My, 0), tl.max(s.Mz, 0)
    y, z = is_empty(s.My, True), is_empty(s.Mz, True)
    by = PerExponent(
        step(s.My, My, k.k_tau, y, True),
        step(s.Mz, Mz, k.k_tau, z, True),
        step(s.My, My, k.k_t, y, True),
        step(s.Mz, Mz, k.k_t, z, True),
        step(s.Mz, Mz, LOG2_E, z, True),
    )
    s = shift(s, by, 0, 0, f)
    A0, A1, E0, E1 = tl.sum(s.A0, 0), tl.sum(s.A1, 0), tl.sum(s.E0, 0), tl.sum(s.E1, 0)
    B0, Bd, D0 = tl.sum(s.B0, 0), tl.sum(s.Bd, 0), tl.sum(s.D0, 0)
    F0, B1, D1, Bbd = 0.0, 0.0, 0.0, 0.0
    if f.HARD == HARD_OWN:
        F0 = tl.sum(s.F0, 0)
    if f.SLOPES:
        B1, D1, Bbd = tl.sum(s.B1, 0), tl.sum(s.D1, 0), tl.sum(s.Bbd, 0)
    return RowState(My, Mz, A0, A1, E0, E1, B0, Bd, D0, F0, B1, D1, Bbd)


@triton.jit
def was_too_fast(s):
    """Whether the fast sweep met what it cannot take."""
    found = s.A1 + s.E1 + s.Bd + s.D0 + s.F0
    return (found - found != 0) | (tl.abs(s.My) > LARGEST) | (tl.abs(s.Mz) > LARGEST)  # -inf too: nothing was left


@triton.jit
def hard_sum(s, f: tl.constexpr):
    """F0, wherever it was summed."""
    if f.HARD == HARD_AT_TAU:
        return s.D0
    elif f.HARD == HARD_AT_T:
        return s.E0
    else:
        return s.F0
