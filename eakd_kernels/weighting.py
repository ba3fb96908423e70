"""Entropies -> row weights: plain PyTorch on [rows]. `stats` is a RowStats; entropies in nats; H_ub = entropy_bound.

EA-KD (Su et al., arXiv 2311.13621 v3) weights a row by w = (H_T + H_T H_S / H_ub)/2, which lies in [0, H_ub] and is
largest where both distributions are uniform. Its first version, ER-KD, is the teacher's entropy alone.
"""

import torch
from torch import Tensor

from .stats import RowStats


def ea(stats: RowStats, entropy_bound: float) -> Tensor:
    """(H_T + H_T H_S / H_ub)/2 (EA-KD, eq. for w_EA); 0 where H_ub is 0, which is a vocabulary of one."""
    if entropy_bound == 0:
        return torch.zeros_like(stats.teacher_entropy)
    return 0.5 * stats.teacher_entropy * (1 + stats.student_entropy / entropy_bound)


def teacher(stats: RowStats, entropy_bound: float) -> Tensor:
    """H_T (ER-KD, the first version of the paper)."""
    return stats.teacher_entropy


def student(stats: RowStats, entropy_bound: float) -> Tensor:
    """H_S."""
    return stats.student_entropy


def none(stats: RowStats, entropy_bound: float) -> Tensor:
    """1: plain knowledge distillation."""
    return torch.ones_like(stats.divergence)


BUILT_IN = {"ea": ea, "teacher": teacher, "student": student, "none": none}


def normalize(weights: Tensor, weight_norm: str, entropy_bound: float, keep: Tensor | None) -> Tensor:
    """As they are for "none". "mean": scaled to mean 1 over the rows kept, all 0 if their sum is 0. "bound": w / H_ub.

    weights: [...], 0 in rows left out. keep: [...] bool or None.
    """
    if weight_norm == "bound":
        return weights * bound_scale(weight_norm, entropy_bound)
    if weight_norm == "mean":
        count = weights.numel() if keep is None else keep.sum()
        # Relative to the largest, which changes nothing: the square of a tiny total would underflow in the gradient.
        largest = weights.detach().abs().amax() if weights.numel() > 0 else weights.new_ones(())
        relative = weights / torch.where(largest == 0, 1.0, largest)
        total = relative.sum()
        return torch.where(total == 0, 0.0, relative * (count / torch.where(total == 0, 1.0, total)))
    return weights


def bound_scale(weight_norm: str, entropy_bound: float) -> float:
    """The factor that weight_norm puts on every weight where it does not depend on the other rows."""
    if weight_norm != "bound":
        return 1.0
    return 0.0 if entropy_bound == 0 else 1.0 / entropy_bound


def row_loss(
    divergence: Tensor, weight: Tensor, cross_entropy: Tensor | None, tau_squared, kd_weight: float, ce_weight: float
) -> Tensor:
    """kd_weight w tau^2 D + ce_weight CE on [rows]. A weight of 0 silences D = +inf; NaN wins over any weight.

    tau_squared: float or [...] tensor, 1 where the loss is not scaled.
    """
    factor = kd_weight * weight * tau_squared
    # Silenced before the product, so that no gradient of factor * D meets the infinity.
    silent = (factor == 0) & (divergence == float("inf"))
    loss = factor * torch.where(silent, 0.0, divergence)
    return loss if ce_weight == 0 else loss + ce_weight * cross_entropy
