"""What every column adds to a divergence, and its derivative: the one place to add a divergence for Triton.

The twin of csrc/divergence.h: D = sum_j f(p_j, q_j), and h_j = df/d(log q_j). The gradient in the student's exponents,
h_j - q_j sum_k h_k, stays the same if a multiple of q_j is taken from h_j, which `terms` does for KL; `tangent` is how
much.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ... import divergences
from .row_state import LOG2_E

KL, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TOTAL_VARIATION, ALPHA_BETA, SQUARED_HELLINGER = (
    tl.constexpr(code) for code in sorted(divergences.BY_CODE)
)


class Column(NamedTuple):
    p: tl.tensor
    q: tl.tensor
    log_p: tl.tensor
    log_q: tl.tensor
    delta: tl.tensor  # log p - log q


class Terms(NamedTuple):
    f: tl.tensor
    h: tl.tensor


class Mixture(NamedTuple):
    """Of m = of_p p + of_q q, neither of them 0: log p - log m, log q - log m, p/m and q/m."""

    p_over_m: tl.tensor
    q_over_m: tl.tensor
    p_share: tl.tensor
    q_share: tl.tensor


@triton.jit
def times(mass, x):
    """mass x, and 0 where there is no mass, whatever x is."""
    return tl.where(mass == 0, 0.0, mass * x)


@triton.jit
def exp2m1(x):
    """2^x - 1 for x <= 0, exact where that is small."""
    series = 1.52527338e-5 * x + 1.54035304e-4
    series = (series * x + 1.33335581e-3) * x + 9.61812911e-3
    series = ((series * x + 5.55041087e-2) * x + 2.40226507e-1) * x + 6.93147181e-1
    return tl.where(x > -0.5, x * series, tl.exp2(x) - 1)


@triton.jit
def mixture(c, of_p, of_q):
    """In log space, from the smaller of p/q and q/p."""
    larger_p, magnitude = c.delta > 0, tl.abs(c.delta)
    ratio = tl.exp2(magnitude * -LOG2_E)
    of_larger, of_smaller = tl.where(larger_p, of_p, of_q), tl.where(larger_p, of_q, of_p)
    x = of_larger + of_smaller * ratio  # m over the larger
    log_x, share = tl.log(x), 1 / x
    return Mixture(
        tl.where(larger_p, -log_x, c.delta - log_x),
        tl.where(larger_p, -c.delta - log_x, -log_x),
        tl.where(larger_p, share, ratio * share),
        tl.where(larger_p, ratio * share, share),
    )


@triton.jit
def power_difference(c, x, log_factor, NONZERO: tl.constexpr):
    """e^log_factor (p^x - q^x)/x, which is delta at x = 0: by the larger of the two and 1 - 2^(a negative power), so
    that nothing cancels where p and q are close or x is small, and one exponential, so that nothing overflows between.

    log_factor: (with p^x, with q^x), the factor's logarithm plus x log p and plus x log q.
    """
    if NONZERO:
        size = tl.abs(x)
        larger_p = c.delta * x > 0
        value = tl.exp2(tl.where(larger_p, log_factor[0], log_factor[1]) * LOG2_E)
        value = tl.div_rn(value * -exp2m1(tl.abs(c.delta) * (size * -LOG2_E)), tl.zeros_like(value) + size)
        return tl.where(c.delta == 0, 0.0, tl.where(c.delta > 0, value, -value))
    else:
        return c.delta


@triton.jit
def terms(c, first, second, f: tl.constexpr):
    """first, second: the divergence's parameters, or the weights of a mixture; f.FIRST, f.SECOND and f.SUM say whether
    they and their sum are not 0."""
    if f.KIND == KL:
        value, h = tl.zeros_like(c.p), tl.zeros_like(c.p)
        if f.FIRST:
            value, h = first * times(c.p, c.delta), first * (c.q - c.p)
        if f.SECOND:
            reverse = second * times(c.q, -c.delta)
            value, h = value + reverse, h + reverse
        return Terms(value, h)
    elif f.KIND == JSD:
        m = mixture(c, first, second)
        h = second * times(c.q, m.q_over_m)
        return Terms(first * times(c.p, m.p_over_m) + h, h)
    elif f.KIND == SKEW_FORWARD_KL:
        m = mixture(c, first, second)
        return Terms(times(c.p, m.p_over_m), -second * times(c.q, m.p_share))
    elif f.KIND == SKEW_REVERSE_KL:
        m = mixture(c, second, first)
        value = times(c.q, m.q_over_m)
        return Terms(value, value + second * times(c.q, m.p_share))  # q (1 - first q/m), which would cancel
    elif f.KIND == TOTAL_VARIATION:
        half = 0.5 * c.q
        h = tl.where(c.delta > 0, -half, tl.where(c.delta < 0, half, 0.0))
        return Terms(tl.abs(0.5 * (c.p - c.q)), h)
    elif f.KIND == SQUARED_HELLINGER:
        # sqrt p - sqrt q is +- the larger's root times E = 1 - e^(-|delta|/2)
        E = -exp2m1(tl.abs(c.delta) * (-0.5 * LOG2_E))
        half = 0.5 * E * tl.where(c.delta > 0, c.p, c.q)
        return Terms(half * E, tl.where(c.delta > 0, (E - 1) * half, half))
    else:
        tl.static_assert(f.KIND == ALPHA_BETA, "a divergence without a formula")
        return alpha_beta(c, first, second, f)


@triton.jit
def alpha_beta(c, first, second, f: tl.constexpr):
    """f = ((p^s - q^s)/s - q^b (p^a - q^a)/a)/b with s = a + b, and its limits; h = -q^b (p^a - q^a)/a."""
    with_p, with_q = first * c.log_p, first * c.log_q
    if f.SECOND:
        total, with_b = first + second, second * c.log_q
        of_q = tl.zeros_like(c.log_q)
        if f.SUM:
            of_q = total * c.log_q
        if f.FIRST:
            h = -power_difference(c, first, (with_p + with_b, of_q), True)
        else:
            h = -times(tl.exp2(with_b * LOG2_E), c.delta)
        return Terms((power_difference(c, total, (total * c.log_p, of_q), f.SUM) + h) / second, h)
    elif f.FIRST:
        from_a = power_difference(c, first, (with_p, with_q), True)
        return Terms((times(tl.exp2(with_p * LOG2_E), c.delta) - from_a) / first, -from_a)
    else:
        return Terms(0.5 * c.delta * c.delta, -c.delta)


@triton.jit
def tangent(first, second, f: tl.constexpr):
    """What of q_j is taken from h_j: for KL, h_j/q_j where p = q."""
    if f.KIND == KL:
        return second - first
    else:
        return first * 0


@triton.jit
def degree(first, second, f: tl.constexpr):
    """In which f is homogeneous in (p, q): df/d(log p) = degree f - df/d(log q)."""
    if f.KIND == ALPHA_BETA:
        return first + second
    else:
        return first * 0 + 1
