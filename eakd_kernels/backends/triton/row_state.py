"""What one sweep over a row pair carries, how it grows and merges, and what the loss and the gradient make of it.

The Triton twin of csrc/row_state.h, which defines the symbols; docs/math.md derives them. With student logits z,
teacher logits y and the running maxima My, Mz, in base 2:

    b = (y - My) log2(e)/tau   d = (z - Mz) log2(e)/tau   a = (y - My) log2(e)/t   e = (z - Mz) log2(e)/t
    A0 = S 2^a   A1 = S a 2^a   E0 = S 2^e   E1 = S e 2^e   B0 = S 2^b   D0 = S 2^d   Bd = S (b - d) 2^b
    F0 = S 2^((z - Mz) log2(e))          B1 = S b 2^b   D1 = S d 2^d   Bbd = S b (b - d) 2^b

Every function works on one row (scalars), on a vector of rows, and on the lanes of a row. tl.exp2 is one instruction
(ex2.approx.ftz); tl.exp would be four more.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# An exponent that underflows to 0, finite, so that a masked column adds 0 * EMPTY = 0 and not 0 * (-inf) = NaN.
EMPTY = tl.constexpr(-200.0)


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
def empty_state(shape: tl.constexpr):
    none, zero = tl.full(shape, -float("inf"), tl.float32), tl.zeros(shape, tl.float32)
    return RowState(none, none, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def centre(m):
    """What to subtract from logits whose maximum is m: (-inf) - (-inf) would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def power(u, n: tl.constexpr):
    result = u
    for _ in tl.static_range(n - 1):
        result *= u
    return result


@triton.jit
def exponents(step, k, floor: tl.constexpr):
    """(exponent kept finite, exponent as it is)."""
    x = step * k
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL), x


@triton.jit
def recentre(s, my, mz, k, P: tl.constexpr, Q: tl.constexpr, f: tl.constexpr):
    """The state about maxima that are at least its own: every exponent grows by a constant <= 0.

    P, Q: as in Features while a sweep runs, when A1, E1 and Bd are in units of the shared exponent; 0 afterwards.
    """
    # An empty side has sums of 0 and takes any centre.
    step_y = tl.where(s.My == -float("inf"), 0.0, s.My - my)
    step_z = tl.where(s.Mz == -float("inf"), 0.0, s.Mz - mz)
    if P > 0:
        b, d = step_y * k.k_0, step_z * k.k_0
        a, e = b, d
        u, v = tl.exp2(b), tl.exp2(d)
        rb, rd, ra, re = power(u, P), power(v, P), power(u, Q), power(v, Q)
    else:
        b, d, a, e = step_y * k.k_tau, step_z * k.k_tau, step_y * k.k_t, step_z * k.k_t
        rb, rd, ra, re = tl.exp2(b), tl.exp2(d), tl.exp2(a), tl.exp2(e)
    A0, E0, F0, B1, D1, Bbd = s.A0, s.E0, s.F0, s.B1, s.D1, s.Bbd
    if P > 0 and P == Q:
        A1, E1 = ra * (s.A1 + a * s.B0), re * (s.E1 + e * s.D0)
    else:
        A1, E1 = ra * (s.A1 + a * s.A0), re * (s.E1 + e * s.E0)
        A0, E0 = ra * s.A0, re * s.E0
    # b - d moves by step_y - step_z, so Bd changes even where only the student's maximum moved. Teacher mass that
    # vanishes (rb == 0) takes an infinite Bd with it; times B0, so that NaN stays.
    if f.SLOPES:
        Bbd = tl.where(rb == 0, rb * s.B0, rb * (s.Bbd + b * s.Bd + (b - d) * (s.B1 + b * s.B0)))
        B1, D1 = rb * (s.B1 + b * s.B0), rd * (s.D1 + d * s.D0)
    if f.HARD == HARD_OWN:
        F0 = s.F0 * tl.exp2(step_z * LOG2_E)
    Bd = tl.where(rb == 0, rb * s.B0, rb * (s.Bd + (b - d) * s.B0))
    return RowState(my, mz, A0, A1, E0, E1, rb * s.B0, Bd, rd * s.D0, F0, B1, D1, Bbd)


@triton.jit
def add_columns(s, y, z, k, AXIS: tl.constexpr, f: tl.constexpr):
    """The state after columns y, z (fp32 tiles, -inf where there is none), reduced along AXIS into its lanes."""
    s = recentre(s, tl.maximum(s.My, tl.max(y, AXIS)), tl.maximum(s.Mz, tl.max(z, AXIS)), k, f.P, f.Q, f)
    y_step, z_step = y - tl.expand_dims(centre(s.My), AXIS), z - tl.expand_dims(centre(s.Mz), AXIS)
    if f.P > 0:
        b, _ = exponents(y_step, over(k.k_0, AXIS), EMPTY)
        d, d_raw = exponents(z_step, over(k.k_0, AXIS), EMPTY)
        a, e = b, d
        u, v = tl.exp2(b), tl.exp2(d)
        eb, ed, ea, ee = power(u, f.P), power(v, f.P), power(u, f.Q), power(v, f.Q)
    else:
        b, _ = exponents(y_step, over(k.k_tau, AXIS), EMPTY)
        d, d_raw = exponents(z_step, over(k.k_tau, AXIS), EMPTY)
        a, _ = exponents(y_step, over(k.k_t, AXIS), EMPTY)
        e, _ = exponents(z_step, over(k.k_t, AXIS), EMPTY)
        eb, ed, ea, ee = tl.exp2(b), tl.exp2(d), tl.exp2(a), tl.exp2(e)
    A0, E0, F0, B1, D1, Bbd = s.A0, s.E0, s.F0, s.B1, s.D1, s.Bbd
    if f.P == 0 or f.P != f.Q:
        A0, E0 = A0 + tl.sum(ea, AXIS), E0 + tl.sum(ee, AXIS)
    if f.SLOPES:
        B1, D1 = B1 + tl.sum(eb * b, AXIS), D1 + tl.sum(ed * d, AXIS)
        Bbd += tl.sum(tl.where(eb > 0, eb * b * (b - d_raw), 0.0), AXIS)
    if f.HARD == HARD_OWN:
        F0 += tl.sum(tl.exp2(z_step * LOG2_E), AXIS)
    return RowState(
        s.My,
        s.Mz,
        A0,
        s.A1 + tl.sum(ea * a, AXIS),
        E0,
        s.E1 + tl.sum(ee * e, AXIS),
        s.B0 + tl.sum(eb, AXIS),
        # The student's exponent as it is: -inf under teacher mass is an infinite divergence. No mass, no term.
        s.Bd + tl.sum(tl.where(eb > 0, eb * (b - d_raw), 0.0), AXIS),
        s.D0 + tl.sum(ed, AXIS),
        F0,
        B1,
        D1,
        Bbd,
    )


@triton.jit
def over(x, AXIS: tl.constexpr):
    """A value of every lane, or of all, as tiles broadcast it."""
    if x.type.is_block():
        return tl.expand_dims(x, AXIS)
    else:
        return x


@triton.jit
def in_units_of_two(s, f: tl.constexpr):
    """The state as csrc/row_state.h has it, once a sweep with shared exponents is over."""
    A0, E0 = s.A0, s.E0
    if f.P == 0:
        return s
    else:
        if f.P == f.Q:
            A0, E0 = s.B0, s.D0
        A1, E1, Bd = s.A1 * f.Q, s.E1 * f.Q, s.Bd * f.P
        return RowState(s.My, s.Mz, A0, A1, E0, E1, s.B0, Bd, s.D0, s.F0, s.B1, s.D1, s.Bbd)


@triton.jit
def fold(s, k, f: tl.constexpr):
    """One state out of those along axis 0. The order is fixed, so the result is the same bit for bit."""
    s = recentre(s, tl.max(s.My, 0), tl.max(s.Mz, 0), k, 0, 0, f)
    A0, A1, E0, E1 = tl.sum(s.A0, 0), tl.sum(s.A1, 0), tl.sum(s.E0, 0), tl.sum(s.E1, 0)
    B0, Bd, D0 = tl.sum(s.B0, 0), tl.sum(s.Bd, 0), tl.sum(s.D0, 0)
    F0, B1, D1, Bbd = 0.0, 0.0, 0.0, 0.0
    if f.HARD == HARD_OWN:
        F0 = tl.sum(s.F0, 0)
    if f.SLOPES:
        B1, D1, Bbd = tl.sum(s.B1, 0), tl.sum(s.D1, 0), tl.sum(s.Bbd, 0)
    return RowState(s.My, s.Mz, A0, A1, E0, E1, B0, Bd, D0, F0, B1, D1, Bbd)


@triton.jit
def hard_sum(s, f: tl.constexpr):
    """F0, wherever it was summed."""
    if f.HARD == HARD_AT_TAU:
        return s.D0
    elif f.HARD == HARD_AT_T:
        return s.E0
    else:
        return s.F0
