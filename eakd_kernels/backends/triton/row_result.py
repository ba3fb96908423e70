"""What the state of a row amounts to: its statistics, its share of the loss, its gradient.

The Triton twin of the second half of csrc/row_state.h. Every function works on one row (scalars) and on a vector of
rows. Divisions are rounded to nearest: there are few, and a log-sum-exp near 1000 shows the difference.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ...ops import WEIGHTINGS
from .row_state import HARD_AT_TAU, LN_2, LOG2_E, NO_HARD, centre, hard_sum, over

WEIGHT_NONE, WEIGHT_TEACHER, WEIGHT_STUDENT, WEIGHT_EA = (
    tl.constexpr(WEIGHTINGS[name]) for name in ("none", "teacher", "student", "ea")
)


class RowResult(NamedTuple):
    divergence: tl.tensor
    teacher_entropy: tl.tensor
    student_entropy: tl.tensor
    teacher_lse: tl.tensor
    student_lse: tl.tensor
    cross_entropy: tl.tensor


@triton.jit
def finish(s, k, label_logit, f: tl.constexpr):
    """The statistics of a row. A side that is -inf throughout has no distribution and its own statistics read 0.

    NaN != 0, so NaN takes the ordinary formulas and stays; products with the other side's sum keep a NaN that is there.
    """
    divergence = LN_2 * tl.div_rn(s.Bd, s.B0) + tl.log(tl.div_rn(s.D0, s.B0))
    divergence = tl.where(s.D0 == 0, float("inf") * s.B0, divergence)
    cross_entropy = tl.zeros_like(divergence)
    if f.HARD != NO_HARD:
        F0 = hard_sum(s, f)
        cross_entropy = tl.where(F0 == 0, 0.0, (s.Mz - label_logit) + tl.log(F0))
    teacher_entropy = tl.log(s.A0) - LN_2 * tl.div_rn(s.A1, s.A0)
    student_entropy = tl.log(s.E0) - LN_2 * tl.div_rn(s.E1, s.E0)
    return RowResult(
        tl.where(s.B0 == 0, 0.0 * s.D0, divergence),
        tl.where((s.A0 == 0) | (teacher_entropy < 0), 0.0, teacher_entropy),  # below 0 by rounding
        tl.where((s.E0 == 0) | (student_entropy < 0), 0.0, student_entropy),
        tl.where(s.B0 == 0, 0.0, tl.div_rn(s.My, k.tau) + tl.log(s.B0)),
        tl.where(s.D0 == 0, 0.0, tl.div_rn(s.Mz, k.tau) + tl.log(s.D0)),
        cross_entropy,
    )


@triton.jit
def slopes(s, k):
    """(dD/dtau, d lse_S/dtau).

    dD/dtau = -(E_q[z] - E_p[z] + Cov_p(y, y - z)/tau)/tau^2    d lse_S/dtau = -E_q[z]/tau^2
    """
    mean_d, mean_bd, mean_b = tl.div_rn(s.D1, s.D0), tl.div_rn(s.Bd, s.B0), tl.div_rn(s.B1, s.B0)
    covariance = tl.div_rn(s.Bbd, s.B0) - mean_b * mean_bd
    # Constants come last: before Triton 3.8 the interpreter takes a constant times a tensor for a constant.
    divergence = -tl.div_rn((mean_d - (mean_b - mean_bd)) * LN_2 + covariance * (LN_2 * LN_2), k.tau)
    lse = -tl.div_rn(mean_d * LN_2 + tl.div_rn(s.Mz, k.tau), k.tau)
    return tl.where(s.B0 == 0, 0.0, divergence), tl.where(s.D0 == 0, 0.0, lse)


class LossRule(NamedTuple):
    """How one_pass weights and scales a row: the numbers in eakd_kernels.ops.LossRule."""

    half: tl.tensor  # 1/2 and 1/(2 H_ub); both 0 where H_ub is 0
    half_over_bound: tl.tensor
    weight_scale: tl.tensor
    kd_weight: tl.tensor
    ce_weight: tl.tensor
    scale: tl.tensor


class RowLoss(NamedTuple):
    weight: tl.tensor
    loss: tl.tensor
    divergence_factor: tl.tensor  # d loss/d D


@triton.jit
def row_loss(r, tau, rule, given, f: tl.constexpr):
    """`given` is the row's entry of a weight tensor, where there is one."""
    if f.WEIGHTING == WEIGHT_NONE:
        w = tl.full(r.divergence.shape, 1.0, tl.float32)
    elif f.WEIGHTING == WEIGHT_TEACHER:
        w = r.teacher_entropy
    elif f.WEIGHTING == WEIGHT_STUDENT:
        w = r.student_entropy
    elif f.WEIGHTING == WEIGHT_EA:
        w = r.teacher_entropy * (rule.half + r.student_entropy * rule.half_over_bound)
    else:
        w = given
    w *= rule.weight_scale
    factor = rule.kd_weight * w
    if f.TAU_SQUARED:
        factor *= tau * tau
    # A weight of 0 silences an infinite divergence, not a NaN.
    loss = tl.where((factor == 0) & (r.divergence == float("inf")), 0.0, factor * r.divergence)
    if f.HARD != NO_HARD:
        loss += tl.where(rule.ce_weight == 0, 0.0, rule.ce_weight * r.cross_entropy)  # which may be infinite
    return RowLoss(w, loss, factor)


class GradientInputs(NamedTuple):
    """What the gradient needs of a row's state: maxima, sums at tau (both), at t and at 1 (student), H_S."""

    My: tl.tensor
    Mz: tl.tensor
    B0: tl.tensor
    D0: tl.tensor
    E0: tl.tensor
    F0: tl.tensor
    student_entropy: tl.tensor


class GradientBasis(NamedTuple):
    """g_j = q 2^d_j + p 2^b_j + hard 2^((z_j - Mz) log2(e)) + entropy 2^e_j (ln2 e_j + shift) + label [j = label]."""

    My: tl.tensor
    Mz: tl.tensor
    q: tl.tensor
    p: tl.tensor
    hard: tl.tensor
    entropy: tl.tensor
    shift: tl.tensor
    label: tl.tensor


@triton.jit
def gradient_basis(s, k, g_divergence, g_entropy, g_lse, g_hard, f: tl.constexpr):
    """From the upstream gradients of a row's divergence, student entropy, student lse and cross-entropy.

    dD/dz = (q - p)/tau    dlse/dz = q/tau    dH_S/dz = -q' (log q' + H_S)/t    dCE/dz = softmax(z) - onehot
    """
    # A fully masked side has a sum of 0, and a divergence that does not move.
    g_divergence = tl.where((s.B0 == 0) | (s.D0 == 0), 0.0, g_divergence)
    q = tl.where(s.D0 == 0, 0.0, tl.div_rn(g_divergence + g_lse, k.tau * s.D0))
    p = tl.where(s.B0 == 0, 0.0, -tl.div_rn(g_divergence, k.tau * s.B0))
    entropy = tl.where(s.E0 == 0, 0.0, -tl.div_rn(g_entropy, k.t * s.E0))
    shift = tl.where(s.E0 == 0, 0.0, s.student_entropy - tl.log(s.E0))
    hard = tl.where(s.F0 == 0, 0.0, tl.div_rn(g_hard, s.F0))
    label = tl.where(s.F0 == 0, 0.0, -g_hard)
    if f.HARD == HARD_AT_TAU:
        q += hard  # the same exponential
    return GradientBasis(centre(s.My), centre(s.Mz), q, p, hard, entropy, shift, label)


@triton.jit
def gradient_values(c, y, z, k, f: tl.constexpr):
    """The gradient of a tile of columns, but for the label's. Factors come after the exponentials: folded into the
    exponents they would cost its last bits."""
    z_step = z - over(c.Mz, 1)
    g = over(c.q, 1) * tl.exp2(z_step * over(k.k_tau, 1))
    g += over(c.p, 1) * tl.exp2((y - over(c.My, 1)) * over(k.k_tau, 1))
    if f.HARD != NO_HARD and f.HARD != HARD_AT_TAU:
        g += over(c.hard, 1) * tl.exp2(z_step * LOG2_E)
    if f.ENTROPY:
        e = z_step * over(k.k_t, 1)
        ee = tl.exp2(e)
        g += tl.where(ee > 0, over(c.entropy, 1) * ee * (LN_2 * e + over(c.shift, 1)), 0.0)
    return g
