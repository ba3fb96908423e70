"""What a recipe is to kernels, and what of it precedes the sums: scaled and capped logits, moments, temperatures.

The Triton twin of csrc/recipe.h, whose head explains the sweeps and the symbols. Several temperatures are tuples,
unrolled at compile time.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .divergence import exp2m1
from .row_state import LOG2_E, centre, over

NO_STANDARDIZE, STANDARDIZE_DIVERGENCE, STANDARDIZE_ALL = (tl.constexpr(i) for i in range(3))
STANDARDIZE_EPSILON = tl.constexpr(1e-7)


class RecipeFeatures(NamedTuple):
    """What a kernel is compiled for. KIND, FIRST, SECOND, SUM: divergence.terms, for the columns."""

    KIND: int
    FIRST: bool
    SECOND: bool
    SUM: bool
    DECOUPLED: bool
    STANDARDIZE: int
    STUDENT_CAP: bool
    TEACHER_CAP: bool
    BIAS: bool  # classes are weighted
    GIVEN: bool  # temperatures come in a tensor
    VALUES: bool  # the sweep of values runs
    PULLS: bool  # and sums what pulls are made of
    SLOPES: bool
    HARD: int  # NO_HARD or not
    ENTROPY: bool  # as in row_state.Features, as are the next ones
    WEIGHTING: int
    TAU_SQUARED: bool


class Recipe(NamedTuple):
    """Numbers that are not compiled in. first, second: divergence.terms, for the columns."""

    first: tl.tensor
    second: tl.tensor
    alpha: tl.tensor  # of a decoupled one
    beta: tl.tensor
    student_scale: tl.tensor
    teacher_scale: tl.tensor
    student_cap: tl.tensor
    teacher_cap: tl.tensor
    tau: tuple  # used where there is no tensor of temperatures
    k_tau: tuple  # log2(e)/tau
    inverse_tau: tuple
    factor: tuple


class Columns(NamedTuple):
    """A tile: x of both sides, the class bias in nats, and where the label is."""

    y: tl.tensor
    z: tl.tensor
    bias: tl.tensor
    is_label: tl.tensor


@triton.jit
def shaped(x, scale, cap, CAPPED: tl.constexpr):
    """cap tanh(scale x/cap), from the side of tanh where nothing cancels; -inf is no logit and stays."""
    x = x * tl.cast(scale, tl.float32)
    if CAPPED:
        cap = tl.cast(cap, tl.float32)
        share = tl.div_rn(x, tl.zeros_like(x) + cap)
        less = exp2m1(tl.abs(share) * (-2 * LOG2_E))
        tanh = tl.div_rn(-less, less + 2)
        return tl.where(x == -float("inf"), x, cap * tl.where(x < 0, -tanh, tanh))
    else:
        return x


@triton.jit
def rest(x, is_label, f: tl.constexpr):
    """The columns of the divergence."""
    if f.DECOUPLED:
        return tl.where(is_label, -float("inf"), x)
    else:
        return x


# ---- moments -----------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of the columns that are not -inf: their number, maximum, mean less maximum, and sum of squared deviations. Equal
    columns deviate by exactly 0, and an offset that all share costs no digits."""

    count: tl.tensor
    top: tl.tensor
    mean: tl.tensor
    squares: tl.tensor


@triton.jit
def no_moments(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return Moments(zero, zero - float("inf"), zero, zero)


@triton.jit
def add_moments(s, x, AXIS: tl.constexpr):
    counts = x != -float("inf")
    count, highest = tl.sum(counts.to(tl.float32), AXIS), tl.max(x, AXIS)
    below = tl.where(counts, x - over(centre(highest), AXIS), 0.0)
    mean = tl.div_rn(tl.sum(below, AXIS), tl.maximum(count, 1.0))
    away = tl.where(counts, below - over(mean, AXIS), 0.0)
    # Merged with those of the columns before.
    top, total = tl.maximum(s.top, highest), s.count + count
    old = tl.where(s.count > 0, (s.top - top) + s.mean, 0.0)
    new = tl.where(count > 0, (highest - top) + mean, 0.0)
    share, apart = tl.div_rn(count, tl.maximum(total, 1.0)), tl.where(s.count > 0, new - old, 0.0)
    squares = s.squares + tl.sum(away * away, AXIS) + apart * apart * (s.count * share)
    return Moments(total, top, tl.where(s.count > 0, old + apart * share, new), squares)


@triton.jit
def fold_moments(s):
    count, top = tl.sum(s.count, 0), tl.max(s.top, 0)
    each = tl.where(s.count > 0, (s.top - top) + s.mean, 0.0)
    mean = tl.div_rn(tl.sum(s.count * each, 0), tl.maximum(count, 1.0))
    apart = tl.where(s.count > 0, each - mean, 0.0)
    return Moments(count, top, mean, tl.sum(s.squares + s.count * apart * apart, 0))


class Side(NamedTuple):
    """Of a row's columns that are not -inf; 0, 0, 0 and 1 where logits are not standardised."""

    count: tl.tensor
    mean: tl.tensor  # less the maximum
    deviation: tl.tensor
    inverse: tl.tensor  # 1/(deviation + epsilon)


@triton.jit
def standardized(count, mean, deviation):
    one = tl.zeros_like(deviation) + 1
    return Side(count, mean, deviation, tl.div_rn(one, deviation + STANDARDIZE_EPSILON))


@triton.jit
def side_of(m):
    # Unbiased, as torch.std.
    deviation = tl.where(m.count > 1, tl.sqrt_rn(tl.div_rn(m.squares, tl.maximum(m.count - 1, 1.0))), 0.0)
    return standardized(m.count, m.mean, deviation)


@triton.jit
def any_side():
    zero = tl.cast(0.0, tl.float32)
    return Side(zero, zero, zero, zero + 1)


class Scales(NamedTuple):
    """A row's temperatures, what logits are multiplied by to be exponents, and whence."""

    tau: tuple
    t: tl.tensor
    b: tuple  # base 2
    d: tuple
    nats_b: tuple
    nats_d: tuple
    a: tl.tensor  # base 2
    e: tl.tensor
    teacher: Side
    student: Side


@triton.jit
def scales(recipe, temperatures, given, teacher, student, f: tl.constexpr):
    """given: the row's entry of a tensor of temperatures, where there is one."""
    tau, b, d, nats_b, nats_d = (), (), (), (), ()
    for i in tl.static_range(len(recipe.tau)):
        if not f.GIVEN:
            at, k = tl.cast(recipe.tau[i], tl.float32), tl.cast(recipe.k_tau[i], tl.float32)
            nats = tl.cast(recipe.inverse_tau[i], tl.float32)
        else:
            one = tl.zeros_like(given) + 1
            at, k, nats = given, tl.div_rn(one * LOG2_E, given), tl.div_rn(one, given)
        tau += (at,)
        b += (k * teacher.inverse,)
        d += (k * student.inverse,)
        nats_b += (nats * teacher.inverse,)
        nats_d += (nats * student.inverse,)
    t, k_t = tl.cast(temperatures.t, tl.float32), tl.cast(temperatures.k_t, tl.float32)
    a, e = k_t, k_t
    if f.STANDARDIZE == STANDARDIZE_ALL:
        a, e = k_t * teacher.inverse, k_t * student.inverse
    return Scales(tau, t, b, d, nats_b, nats_d, a, e, teacher, student)
