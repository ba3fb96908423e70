"""What one sweep over a row pair gives: names and order of the statistics, shared by every backend."""

from typing import NamedTuple

import torch


class RowStats(NamedTuple):
    """Statistics of every row, tensors of the logits' leading shape [...], fp32 (fp64 if a logits tensor is fp64).

    Rows left out (mask, ignore_index) read 0 in every field. Entropies and log-sum-exps are in nats.

    loss: kd_weight * weight * (tau^2 if scaled) * divergence + ce_weight * cross_entropy.
    weight: after weight_norm.
    divergence: the bare divergence, without tau^2 and weight.
    teacher_entropy, student_entropy: at the entropy temperature.
    teacher_lse, student_lse: logsumexp(logits / temperature).
    cross_entropy: hard-label, at temperature 1; None without labels.
    """

    loss: torch.Tensor | None
    weight: torch.Tensor | None
    divergence: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor
    teacher_lse: torch.Tensor
    student_lse: torch.Tensor
    cross_entropy: torch.Tensor | None

    def detach(self) -> "RowStats":
        return RowStats(*(None if field is None else field.detach() for field in self))


# Rows of the statistics tensor, as csrc/row_state.h numbers them.
PUBLIC_FIELDS = RowStats._fields[2:]
# Row statistics keep what the gradient needs: maxima, and sums of exponentials at tau (both), t and 1 (student).
STATISTICS = (
    *PUBLIC_FIELDS,
    "teacher_max",
    "student_max",
    "teacher_sum",
    "student_sum",
    "student_entropy_sum",
    "student_hard_sum",
)
# d/dtau, where a temperature requires grad.
STATISTICS_WITH_SLOPES = (*STATISTICS, "divergence_slope", "student_lse_slope")
LOSS_STATISTICS = (*PUBLIC_FIELDS, "weight", "loss")
