"""A criterion for NVIDIA ModelOpt's distillation mode."""

from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..modules import EAKDLoss
from .hosts import expect, load, loss_module

_DECIDED = ("ce_weight", "ignore_index", "mask", "num_items", "return_stats")


class LogitsEAKDLoss(_Loss):
    """`ea_kd_loss` as a criterion of modelopt.torch.distill, in the place of its LogitsDistillationLoss:

        criterion = {("lm_head", "lm_head"): LogitsEAKDLoss(temperature=2.0)}
        mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion})])

    It takes logits [..., V] or a model's output that has some, and returns the loss of every row, [...], to which
    `compute_kd_loss` applies the loss_reduction_fn it is given; with reduction="mean" or "sum" a scalar. "mean" is over
    rows, where LogitsDistillationLoss divides by the vocabulary too. As there, the factor tau^2 is on.

    options: those of `ea_kd_loss` but for what belongs to labels: ce_weight, ignore_index, mask, num_items; and
    return_stats. Defaults that differ: reduction="none", entropy_temperature=1.0, weight_norm="bound" (with
    weighting="none": "none").

    Raises RuntimeError where LogitsDistillationLoss is called otherwise than in the ModelOpt that this was written for.
    """

    def __init__(self, **options):
        super().__init__()
        losses = load("modelopt.torch.distill.losses", "nvidia-modelopt")
        expect(losses.LogitsDistillationLoss, "forward", LogitsEAKDLoss.forward, "nvidia-modelopt")
        self.loss = loss_module(EAKDLoss, "LogitsEAKDLoss()", options, _DECIDED, reduction="none")

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        student, teacher = (getattr(given, "logits", given) for given in (logits_s, logits_t))
        return self.loss(student, teacher)
