"""What one sweep over a row pair gives: names and order of the statistics, shared by every backend."""

from typing import NamedTuple

import torch


class RowStats(NamedTuple):
    """Statistics of every row, tensors of the logits' leading shape [...], fp32 (fp64 if a logits tensor is fp64).

    Rows left out (mask, ignore_index) read 0 in every field. Entropies and log-sum-exps are in nats.

    Attributes:
        loss: kd_weight * weight * (tau^2 if scaled) * divergence + ce_weight * cross_entropy.
        weight: after weight_norm.
        divergence: the bare divergence, without tau^2 and weight; sum of tau_k^2 D_k for a tuple of temperatures.
        teacher_entropy: at the entropy temperature.
        student_entropy: at the entropy temperature.
        teacher_lse: logsumexp(logits / temperature) of the logits that the divergence sees: standardised, if they are,
            and with the log of the class weights added. None for a tuple of temperatures, and a sparse teacher's.
        student_lse: as teacher_lse, without class weights. None for a tuple of temperatures.
        cross_entropy: hard-label, at temperature 1; None without labels.
    """

    loss: torch.Tensor | None
    weight: torch.Tensor | None
    divergence: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor
    teacher_lse: torch.Tensor | None
    student_lse: torch.Tensor | None
    cross_entropy: torch.Tensor | None

    def detach(self) -> "RowStats":
        return RowStats(*(None if field is None else field.detach() for field in self))


# Rows of the statistics tensor, as csrc/row_state.h numbers them.
PUBLIC_FIELDS = RowStats._fields[2:]
# Row statistics keep what the gradient needs: maxima, and sums of exponentials at tau (both), t and 1 (student). The
# teacher's sum at t is for merging shards of a row.
STATISTICS = (
    *PUBLIC_FIELDS,
    "teacher_max",
    "student_max",
    "teacher_sum",
    "student_sum",
    "student_entropy_sum",
    "student_hard_sum",
    "teacher_entropy_sum",
)
# d/dtau, where a temperature requires grad.
SLOPES = ("divergence_slope", "student_lse_slope")
LOSS_STATISTICS = (*PUBLIC_FIELDS, "weight", "loss")

# With a recipe: as csrc/recipe.h numbers them. "rest" is the row without its label's column where the divergence is
# decoupled, and the whole row elsewhere.
RECIPE_STATISTICS = (
    *PUBLIC_FIELDS,
    "rest_teacher_max",
    "rest_student_max",
    "student_max",
    "student_entropy_sum",
    "student_hard_sum",
    "student_count",  # of columns that are not -inf, their mean and deviation: where logits are standardised
    "student_mean",
    "student_deviation",
    "teacher_deviation",
    "entropy_pull",
    "lse_pull",
    "teacher_entropy_sum",
)
# and of every temperature
TEMPERATURE_STATISTICS = (
    "rest_teacher_sum",
    "rest_student_sum",
    "pull",
    "student_pull",
    "teacher_pull",
    "forward_kl",  # of the KL family, 0 where not asked for: shards of a row merge the two one by one
    "reverse_kl",
)


def statistics_count(num_temperatures: int | None, slopes: bool) -> int:
    """How many statistics a row has; num_temperatures: of its recipe, None without one."""
    if num_temperatures is None:
        fields = len(STATISTICS)
    else:
        fields = len(RECIPE_STATISTICS) + num_temperatures * len(TEMPERATURE_STATISTICS)
    return fields + (len(SLOPES) if slopes else 0)


def named(statistics: torch.Tensor, recipe: bool) -> dict[str, torch.Tensor]:
    """The statistics by name, without slopes; of the first temperature, where a recipe has several."""
    names = (*RECIPE_STATISTICS, *TEMPERATURE_STATISTICS) if recipe else STATISTICS
    return dict(zip(names, statistics.unbind(0), strict=False))


def normaliser(statistics: torch.Tensor, recipe: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, sum exp((x - M)/tau)) of the student's logits x; -inf and 0 where there are none."""
    fields = named(statistics, recipe)
    return (
        (fields["rest_student_max"], fields["rest_student_sum"])
        if recipe
        else (fields["student_max"], fields["student_sum"])
    )
