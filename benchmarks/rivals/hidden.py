"""Losses from hidden states and output heads: this package's, the plain one, and other packages', as published.

Every loss is a function of a HiddenInputs' tensors and gives the mean over rows. `check` holds it, and its gradients of
hidden states and head, to the formula in fp64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from eakd_kernels import fused_linear_ea_kd_loss
from eakd_kernels.projection import Head

from .. import methods
from ..check import CHECKED_BYTES, Check, Loss, Provider, run
from .cases import HiddenInputs
from .packages import NEEDS_TRITON, Rival

# Logits of as many rows at a time give the teacher's entropies, where a rival does not.
ENTROPY_ROWS = 256


class Loaded(NamedTuple):
    mean: Callable[..., Tensor]
    weighted: Callable[..., Tensor] | None = None  # None: the package returns one number


def ours(hidden, weight, teacher_hidden, teacher_weight, *, weights: str, backend: str) -> Tensor:
    return fused_linear_ea_kd_loss(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        entropy_temperature=1.0,
        weighting=weights,
        backend=backend,
    )


def dense(formula: Loss, hidden, weight, teacher_hidden, teacher_weight) -> Tensor:
    """All logits at once, of the tensors' dtype."""
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.T
    return formula(hidden @ weight.T, teacher)


def trl_chunked() -> Loaded:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def mean(hidden, weight, teacher_hidden, teacher_weight):
        every = hidden.new_ones(1, len(hidden), dtype=torch.long)
        return _chunked_divergence_loss(hidden[None], teacher_hidden[None], weight, teacher_weight, every, 0.0)[0]

    def weighted(hidden, weight, teacher_hidden, teacher_weight):
        """It tells the student's entropies; the teacher's are made beside it."""
        teacher_entropy = teacher_entropies(teacher_hidden, teacher_weight)
        of_rows, student_entropy = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, 0.0
        )
        return (methods.ea_weight(teacher_entropy, student_entropy, len(weight)) * of_rows).mean()

    return Loaded(mean, weighted)


def liger_chunked() -> Loaded:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    criterion = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def mean(hidden, weight, teacher_hidden, teacher_weight):
        labels = hidden.new_zeros(len(hidden), dtype=torch.long)
        return criterion(hidden, weight, teacher_hidden, teacher_weight, labels)

    return Loaded(mean)


def liger_fused_jsd() -> Loaded:
    from liger_kernel.transformers import LigerFusedLinearJSD

    criterion = LigerFusedLinearJSD(jsd_beta=0.0)
    return Loaded(lambda *heads: criterion(*heads, None))


def liger_fused_kl() -> Loaded:
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    criterion = LigerFusedLinearKLDivLoss(reduction="batchmean")

    def mean(hidden, weight, teacher_hidden, teacher_weight):
        """It asks for the teacher's probabilities."""
        with torch.no_grad():
            teacher = (teacher_hidden @ teacher_weight.T).softmax(-1, dtype=torch.float32)
        return criterion(hidden, weight, teacher)

    return Loaded(mean)


RIVALS = {
    "trl chunked": Rival("trl", "`_chunked_divergence_loss(beta=0)` of `DistillationTrainer`", trl_chunked, casts=True),
    "liger chunked": Rival("liger-kernel", "`chunked_loss.LigerFusedLinearJSDLoss(beta=0)`", liger_chunked),
    "liger fused jsd": Rival(
        "liger-kernel", "`LigerFusedLinearJSD(jsd_beta=0)`", liger_fused_jsd, on_gpus_only=NEEDS_TRITON
    ),
    "liger fused kl": Rival(
        "liger-kernel",
        "`LigerFusedLinearKLDivLoss`, given the teacher's probabilities",
        liger_fused_kl,
        on_gpus_only=NEEDS_TRITON,
    ),
}


@torch.no_grad()
def teacher_entropies(hidden: Tensor, weight: Tensor) -> Tensor:
    """[rows], of logits in fp32, as TRL's own, of a few rows at a time."""
    head, logits = Head(hidden, weight, None), hidden.new_empty(ENTROPY_ROWS, len(weight), dtype=torch.float32)
    chunks = (slice(begin, begin + ENTROPY_ROWS) for begin in range(0, len(hidden), ENTROPY_ROWS))
    return torch.cat([methods.entropy(head.logits(rows, logits).log_softmax(-1)) for rows in chunks])


def in_fp64(formula: Loss, inputs: HiddenInputs) -> tuple[float, Tensor, Tensor]:
    """The loss and both gradients, logits of a few rows at a time."""
    hidden, weight, teacher_hidden, teacher_weight = (tensor.detach().double() for tensor in inputs)
    loss, gradients = 0.0, (torch.empty_like(hidden), torch.zeros_like(weight))
    height = max(1, CHECKED_BYTES // (8 * len(weight)))
    for begin in range(0, len(hidden), height):
        rows = slice(begin, begin + height)
        leaves = hidden[rows].requires_grad_(), weight.requires_grad_()
        part = dense(formula, *leaves, teacher_hidden[rows], teacher_weight) * (len(leaves[0]) / len(hidden))
        gradients[0][rows], of_weight = torch.autograd.grad(part, leaves)
        gradients[1].add_(of_weight)
        loss += part.item()
    return loss, *gradients


def check(provider: Provider, inputs: HiddenInputs, in_fp64: Callable = in_fp64) -> Check:
    """As check.check: errors of the loss, and of a row of a gradient in units of its largest element."""
    loss = run(provider.loss, inputs).item()
    exact_loss, *exact = in_fp64(provider.formula, inputs)
    loss_error = abs(loss - exact_loss) / abs(exact_loss)
    error, wrong = 0.0, None
    for name, leaf, gradient in zip(("hidden states", "weight"), inputs[:2], exact, strict=True):
        largest = gradient.abs().amax(-1, keepdim=True)
        if name == "weight":  # tokens that hardly occur have gradients of rounding's size
            largest = largest.max()
        off = (leaf.grad - gradient).abs() / largest
        error = max(error, off.max().item())
        if not off.max() <= provider.tolerance + torch.finfo(leaf.dtype).eps / 2:  # NaN is wrong too
            wrong = f"gradient of {name} off by {off.max():.2g} of its largest element"
    if not loss_error <= provider.tolerance:
        wrong = f"loss {loss:.9g}, in fp64 {exact_loss:.9g}"
    return Check(loss_error, error, wrong)
