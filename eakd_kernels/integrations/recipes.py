"""Losses with the call signatures of NeMo Automodel and torchtune, for recipes that name a loss in a YAML file."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..modules import EAKDLoss
from .hosts import items, loss_module

_DECIDED = ("mask", "num_items", "reduction", "return_stats")


class KDLoss(nn.Module):
    """`ea_kd_loss` as NeMo Automodel's KDLoss is called, and torchtune's losses are:

        kd_loss_fn:
          _target_: eakd_kernels.integrations.recipes.KDLoss
          temperature: 2.0

    The loss is the sum over rows whose label is not `ignore_index`, divided by num_batch_labels, or without that by the
    number of such rows; 0, with a graph, where there is none. tau^2 is on, as in Automodel. Recipes mix it themselves,
    (1 - kd_ratio) * CE + kd_ratio * this, so that ce_weight stays 0.

    Args:
        ignore_index, temperature: as for `ea_kd_loss`.
        fp32_upcast, chunk_size: nothing to set here. Arithmetic is in fp32, without a copy of the logits.
        tp_group: as process_group of `ea_kd_loss`. DTensors need none.
        options: those of `ea_kd_loss` but for mask, num_items, reduction and return_stats. Defaults that differ:
            entropy_temperature=1.0, weight_norm="bound" (with weighting="none": "none").
    """

    def __init__(self, ignore_index=-100, temperature=1.0, fp32_upcast=True, tp_group=None, chunk_size=0, **options):
        super().__init__()
        own = {"ignore_index": ignore_index, "temperature": temperature, "process_group": tp_group}
        self.ignore_index = ignore_index
        self.loss = loss_module(EAKDLoss, f"{type(self).__name__}()", options, _DECIDED, **own)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
    ) -> Tensor:
        """student_logits, teacher_logits: [..., V]; labels: as many, shifted."""
        labels = labels.reshape(student_logits.shape[:-1])
        return self.loss(student_logits, teacher_logits, labels, num_items=items(num_batch_labels))


class ChunkedKDLoss(KDLoss):
    """`KDLoss` of logits that come as a list of chunks along the sequence, as torchtune's models give them:

        kd_loss:
          _component_: eakd_kernels.integrations.recipes.ChunkedKDLoss
          num_output_chunks: 8

    The chunks may be of any lengths that add up to the labels'; num_output_chunks is there for the recipe to read.
    """

    def __init__(self, num_output_chunks=8, ignore_index=-100, temperature=1.0, **options):
        super().__init__(ignore_index, temperature, **options)
        self.num_output_chunks = num_output_chunks

    def forward(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        labels: Tensor,
        num_batch_labels: int | Tensor | None = None,
    ) -> Tensor:
        """student_logits, teacher_logits: chunks [B, S_i, V]; labels: [B, sum of S_i], shifted."""
        count = (labels != self.ignore_index).sum() if num_batch_labels is None else num_batch_labels
        parts = labels.split([chunk.shape[1] for chunk in student_logits], dim=1)
        loss_of = super().forward
        return sum(loss_of(*chunk, count) for chunk in zip(student_logits, teacher_logits, parts, strict=True))
