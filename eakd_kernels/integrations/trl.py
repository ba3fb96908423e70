"""The entropy-weighted loss in TRL's trainers, which look theirs up by name: a patch puts ours there.

TRL's conventions stay: the divergence is that of the trainer's beta, without a factor tau^2, and TRL says what to
divide by.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from ..divergences import generalized_jsd
from ..modules import EAKDLoss, FusedLinearEAKDLoss
from .hosts import expect, items, load, loss_module

_DECIDED = ("divergence", "ignore_index", "mask", "num_items", "reduction", "return_stats", "temperature")
_LOGITS_ARE_THE_HOSTS = ("student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap")


def _beta_of(config: str) -> dict[str, str]:
    """Where TRL's trainer has its divergence, which it passes to the loss with every call."""
    return dict.fromkeys(("beta", "divergence"), f"{config}(beta=...): 0 is KL(p || q), 1 is KL(q || p)")


class Patch(AbstractContextManager):
    """owner.name replaced, from now on until `undo()` or the end of a with-block. A second patch takes the first one's
    place, and either's `undo` brings back TRL's own."""

    _originals: ClassVar[dict] = {}

    def __init__(self, owner, name: str, replacement):
        self._owner, self._name = owner, name
        self._originals.setdefault((owner, name), vars(owner)[name])
        setattr(owner, name, replacement)

    def undo(self) -> None:
        setattr(self._owner, self._name, self._originals[self._owner, self._name])

    def __exit__(self, *_) -> None:
        self.undo()


def patch_gkd(**options) -> Patch:
    """Let trl.experimental.gkd.GKDTrainer train with `ea_kd_loss`: call `patch_gkd(ce_weight=0.1)` before it trains.

    options: those of `gkd_loss`; weighting="none" makes TRL's own loss. Returns a Patch: `.undo()` takes it back, and
    so does the end of a with-block.

    Raises RuntimeError where GKDTrainer's loss has another signature than in the TRL that this was written for.
    """
    trainer, loss = load("trl.experimental.gkd", "trl").GKDTrainer, _gkd_loss("patch_gkd()", options)
    expect(trainer, "generalized_jsd_loss", loss, "trl")
    return Patch(trainer, "generalized_jsd_loss", staticmethod(loss))


def gkd_loss(**options) -> Callable[..., Tensor]:
    """A function with the signature of GKDTrainer.generalized_jsd_loss, of `ea_kd_loss` with `options`.

    The divergence is beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, with p the teacher, and
    KL(p || q) at beta = 0, KL(q || p) at beta = 1. Labels are shifted already; rows of -100 are left out. The sum over
    rows is divided by num_items_in_batch if that is given; else by the rows kept (without labels: by the batch) for
    "batchmean", by the rows kept times the vocabulary for "mean", and by nothing for "sum".

    options: those of `ea_kd_loss` but for what the call decides: divergence, temperature, ignore_index, mask,
    num_items, reduction, return_stats. beta is GKDConfig's. Defaults that differ: entropy_temperature=1.0,
    weight_norm="bound" (with weighting="none": "none"), scale_by_temperature_squared=False.

    The function raises ValueError for reduction "none", which TRL has for every column of every row.
    """
    return _gkd_loss("gkd_loss()", options)


def _gkd_loss(caller: str, options: dict) -> Callable[..., Tensor]:
    places = _beta_of("GKDConfig")
    loss = loss_module(EAKDLoss, caller, options, _DECIDED, places, scale_by_temperature_squared=False)

    def generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels=None,
        beta=0.5,
        temperature=1.0,
        reduction="batchmean",
        num_items_in_batch=None,
    ):
        divisor = num_items_in_batch
        if divisor is None:
            divisor = _divisor(reduction, student_logits, labels)
        return loss(
            student_logits,
            teacher_logits,
            labels,
            divergence=generalized_jsd(beta),
            temperature=temperature,
            reduction="sum",
            num_items=items(divisor),
        )

    return generalized_jsd_loss


def _divisor(reduction: str, logits: Tensor, labels: Tensor | None) -> int | Tensor:
    if reduction == "sum":
        return 1
    if reduction not in ("batchmean", "mean"):
        raise ValueError(
            f"reduction={reduction!r} is for every column of every row in TRL, which a fused loss does not have; use "
            '"batchmean", "sum" or "mean", or ea_kd_loss(reduction="none") for a value of every row'
        )
    rows = logits.shape[:-1].numel() if labels is None else (labels != -100).sum()
    if reduction == "mean":
        return rows * logits.shape[-1]
    return len(logits) if labels is None else rows


def patch_distillation(**options) -> Patch:
    """Let trl.DistillationTrainer train with `fused_linear_ea_kd_loss`: call it before the trainer trains.

    options: those of `distillation_loss`; weighting="none" makes TRL's own loss. Returns a Patch, as `patch_gkd`.

    Raises RuntimeError where TRL's function has another signature than in the TRL that this was written for.
    """
    trainer = load("trl.trainer.distillation_trainer", "trl")
    loss = _distillation_loss("patch_distillation()", options)
    expect(trainer, "_chunked_divergence_loss", loss, "trl")
    return Patch(trainer, "_chunked_divergence_loss", loss)


def distillation_loss(**options) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A function with the signature of trl.trainer.distillation_trainer._chunked_divergence_loss.

    It returns (loss, sum of the student's entropies in nats, number of positions in completion_mask): beta, scales and
    caps of the logits, and the division are as TRL has them. The entropies are at entropy_temperature; TRL's own are at
    the loss's temperature. Heads are multiplied in the dtype of the hidden states, or autocast's, into fp32 logits.

    options: those of `fused_linear_ea_kd_loss` but for what the call decides: divergence, temperature, ignore_index,
    mask, num_items, reduction, return_stats, ce_weight (there are no labels), scales and caps of logits. Defaults that
    differ: entropy_temperature=1.0, weight_norm="bound" (with weighting="none": "none"),
    scale_by_temperature_squared=False.
    """
    return _distillation_loss("distillation_loss()", options)


def _distillation_loss(caller: str, options: dict) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    decided, places = (*_DECIDED, *_LOGITS_ARE_THE_HOSTS, "ce_weight"), _beta_of("DistillationConfig")
    loss = loss_module(FusedLinearEAKDLoss, caller, options, decided, places, scale_by_temperature_squared=False)

    def chunked_divergence_loss(
        student_hidden_states,
        teacher_hidden_states,
        student_lm_head_weight,
        teacher_lm_head_weight,
        completion_mask,
        beta,
        num_items_in_batch=None,
        student_lm_head_bias=None,
        teacher_lm_head_bias=None,
        student_logit_scale=1.0,
        teacher_logit_scale=1.0,
        student_final_logit_softcapping=None,
        teacher_final_logit_softcapping=None,
        temperature=1.0,
    ):
        kept = completion_mask != 0
        total, stats = loss(
            *_projected(student_hidden_states, student_lm_head_weight),
            *_projected(teacher_hidden_states, teacher_lm_head_weight.detach()),
            student_bias=_whole(student_lm_head_bias),
            teacher_bias=None if teacher_lm_head_bias is None else _whole(teacher_lm_head_bias.detach()),
            mask=kept,
            divergence=generalized_jsd(beta),
            temperature=temperature,
            num_items=items(num_items_in_batch),
            student_logit_scale=student_logit_scale,
            teacher_logit_scale=teacher_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_softcap=teacher_final_logit_softcapping,
            return_stats=True,
        )
        return total, stats.student_entropy.sum(), kept.sum()

    return chunked_divergence_loss


def _projected(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which TRL multiplies them, autocast's or the hidden states'; FSDP's weight gathered."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return hidden.to(dtype), _whole(weight).to(dtype)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
