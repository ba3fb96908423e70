"""Entropies -> row weights: plain PyTorch on [rows]. `stats` is a RowStats; entropies in nats; H_ub = entropy_bound.

EA-KD (Su et al., arXiv 2311.13621 v3) weights a row by w = (H_T + H_T H_S / H_ub)/2, which lies in [0, H_ub] and is
largest where both distributions are uniform. Its first version, ER-KD, is the teacher's entropy alone.

All return [...] and combine in a callable, whose gradient (detach_weights=False) flows through H_S. A callable with a
parameter entropy_bound gets H_ub:

    weighting=weighting.confidence
    weighting=lambda s, entropy_bound: weighting.ea(s, entropy_bound) * weighting.threshold(s, teacher_entropy=0.8)
    weighting=lambda s, entropy_bound: weighting.sequence_mean(weighting.ea(s, entropy_bound), mask=labels != -100)
"""

import torch
from torch import Tensor
from torch.autograd import Function

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


def confidence(stats: RowStats, entropy_bound: float) -> Tensor:
    """1 - H_T / H_ub: 1 for a one-hot teacher (and where H_ub is 0), 0 for a uniform one, never below."""
    return (1 - _share(stats.teacher_entropy, entropy_bound)).clamp(min=0)


def entropy_gap(stats: RowStats, entropy_bound: float) -> Tensor:
    """|H_T - H_S| / H_ub: 0 where student and teacher are equally certain, 1 where one is one-hot and one uniform.

    The gap of one sign is this times `threshold(stats, teacher_entropy=stats.student_entropy)`.
    """
    return _share((stats.teacher_entropy - stats.student_entropy).abs(), entropy_bound)


def focal(stats: RowStats, entropy_bound: float, *, gamma: float = 2.0) -> Tensor:
    """(H_S / H_ub)^gamma, gamma >= 0: rows of which the student is certain count less.

    The modulating factor of focal loss (Lin et al., arXiv 1708.02002) with H_S / H_ub for 1 - p_label.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be >= 0, got {gamma!r}")
    share = _share(stats.student_entropy, entropy_bound)
    # x^gamma has an infinite slope at 0 where gamma < 1, and H_S has a slope of 0 there.
    zero = share == 0
    return torch.where(zero, 0.0**gamma, torch.where(zero, 1.0, share) ** gamma)


def threshold(stats: RowStats, *, above: float = 1.0, below: float = 0.0, **limits: float | Tensor) -> Tensor:
    """`above` where every statistic named exceeds its limit, `below` elsewhere, also where they are equal.

    limits: fields of RowStats, each with a number, a 0-d tensor or a tensor [...]. No gradient flows through the gate.

    EOPD (arXiv 2603.07079), 1[H_T > 0.8], of entropies at entropy_temperature=1:

        threshold(stats, teacher_entropy=0.8)

    BDKD (as in the ABKD repository), 3 or 1 on the forward and on the reverse divergence:

        threshold(stats, teacher_entropy=stats.student_entropy, above=3, below=1)
        threshold(stats, student_entropy=stats.teacher_entropy, above=3, below=1)
    """
    if not limits:
        raise ValueError("threshold needs a statistic and its limit, as in teacher_entropy=0.8")
    is_open = torch.ones_like(stats.divergence, dtype=torch.bool)
    for name, limit in limits.items():
        if name not in RowStats._fields:
            raise TypeError(f"threshold got an unknown statistic {name!r}; RowStats has {', '.join(RowStats._fields)}")
        if getattr(stats, name) is None:
            raise ValueError(f"threshold on {name} needs statistics that have it, got None (for cross_entropy: labels)")
        if torch.is_tensor(limit) and limit.dim() > 0 and limit.shape != is_open.shape:
            raise ValueError(f"{name} must be a number or a tensor {tuple(is_open.shape)}, got {tuple(limit.shape)}")
        is_open = is_open & (getattr(stats, name) > limit)
    return torch.full_like(stats.divergence, below).masked_fill(is_open, above)


def sequence_mean(weights: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Every row kept gets the mean of `weights` over its sequence's rows kept; the others get 0.

    Args:
        weights: [...], or [..., L] with L rows of one sequence each where there are no cu_seqlens.
        mask: bool, weights' shape, True in rows kept: those that the loss keeps, or rows left out would enter the mean.
        cu_seqlens: [S + 1] int32 or int64, for packed sequences: number s has the rows cu_seqlens[s] up to, and
            without, cu_seqlens[s + 1] of the flattened weights. Rows before the first and from the last offset on are
            in no sequence. Offsets must not decrease; on a GPU nobody checks.
    """
    _check_sequences(weights, mask, cu_seqlens)
    if cu_seqlens is None:
        # A clone, since autograd cannot save a mask that torch.inference_mode() made.
        keep = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask.clone()
        total = torch.where(keep, weights, 0.0).sum(-1, keepdim=True)
        return torch.where(keep, total / keep.sum(-1, keepdim=True).clamp(min=1), 0.0)
    rows = torch.arange(weights.numel(), dtype=cu_seqlens.dtype, device=weights.device)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True)  # from 1 on; 0 is what comes before the first
    keep = (sequence > 0) & (sequence < len(cu_seqlens))
    keep = keep if mask is None else keep & mask.flatten()
    ends = [cu_seqlens.new_zeros(1), cu_seqlens.clamp(0, len(rows)), cu_seqlens.new_full((1,), len(rows))]
    return _MeanOfSequence.apply(weights.flatten(), keep, sequence, torch.cat(ends)).view(weights.shape)


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


def _share(entropy: Tensor, entropy_bound: float) -> Tensor:
    """H / H_ub; 0 where H_ub is 0, which is a vocabulary of one."""
    return torch.zeros_like(entropy) if entropy_bound == 0 else entropy / entropy_bound


class _MeanOfSequence(Function):
    """apply(weights, keep, sequence, offsets) on [rows]: a symmetric map, hence its own gradient.

    PyTorch's gradient of `means[sequence]` would add in the order in which threads come.
    """

    @staticmethod
    def forward(ctx, weights, keep, sequence, offsets):
        ctx.save_for_backward(keep, sequence, offsets)
        # double: a CPU adds one row after the other, and 2^15 rows in fp32 would be off by more than a loss may be.
        kept = torch.where(keep, weights, 0.0).double()
        total, count = (
            torch.segment_reduce(terms, "sum", offsets=offsets, initial=0, unsafe=True)
            for terms in (kept, keep.double())
        )
        return torch.where(keep, (total / count)[sequence], 0.0).to(weights.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return _MeanOfSequence.apply(gradient, *ctx.saved_tensors), None, None, None


def _check_sequences(weights, mask, cu_seqlens) -> None:
    if not torch.is_tensor(weights) or not weights.is_floating_point():
        got = weights.dtype if torch.is_tensor(weights) else type(weights).__name__
        raise TypeError(f"weights must be a floating-point tensor, got {got}")
    for name, tensor, dtypes in (("mask", mask, (torch.bool,)), ("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))):
        if tensor is None:
            continue
        if not torch.is_tensor(tensor) or tensor.dtype not in dtypes:
            got = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, dtypes))}, got {got}")
        if tensor.device != weights.device:
            raise ValueError(f"{name} must be on the weights' device {weights.device}, got {tensor.device}")
    if mask is not None and mask.shape != weights.shape:
        raise ValueError(f"mask must have the weights' shape {tuple(weights.shape)}, got {tuple(mask.shape)}")
    if cu_seqlens is None:
        if weights.dim() == 0:
            raise ValueError("weights must be [..., L], rows of a sequence last, got a 0-d tensor")
        return
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be [S + 1], got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first < 0 or last > weights.numel() or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
            raise ValueError(
                f"cu_seqlens must not decrease, from 0 up to at most {weights.numel()} rows, got "
                f"{cu_seqlens[:8].tolist()}{'...' if len(cu_seqlens) > 8 else ''}"
            )
