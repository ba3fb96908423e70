"""Statistics of rows whose columns are sharded over a process group; docs/parallel.md derives them.

The KL family goes through the kernels: every rank sweeps its own columns, one all-gather brings the ranks' statistics
together, and every rank merges them in the order of ranks, so that all have the same bits. The merged statistics take
the place of the shard's in backward, whose kernel then writes the exact gradient of the shard's columns and needs
nothing of the other ranks. Everything else goes through sharded_formulas.py. torch.compile breaks its graph here.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops, sharded_formulas
from .autograd import RowStatistics
from .divergences import Jeffreys
from .ops import Recipe, Rows
from .sharding import RUNS_EAGERLY, Shards
from .stats import RECIPE_STATISTICS, SLOPES, STATISTICS, TEMPERATURE_STATISTICS, statistics_count


@torch.compiler.disable(reason=RUNS_EAGERLY)
def sharded_row_statistics(rows: Rows, shards: Shards, inplace_gradient: bool, backend: str) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS of every row, differentiable as RowStatistics says; rows.labels are global ids."""
    if backend == "reference" or not merges(rows):
        return sharded_formulas.row_statistics(rows, shards, inplace_gradient)
    return ShardedRowStatistics.apply(*rows, inplace_gradient, backend, shards)


def merges(rows: Rows) -> bool:
    """Whether the kernels' statistics of shards are all that those of the rows are made of."""
    recipe = Recipe.of(rows.recipe)
    if rows.temperatures is not None and rows.temperatures.requires_grad:
        return False
    return recipe is None or (recipe.divergence == Jeffreys.code and not recipe.standardize)


class ShardedRowStatistics(Function):
    """RowStatistics of rows of which this rank has some columns: apply(*Rows, inplace_gradient, backend, shards).

    Of the KL family, without standardised logits and without slopes in a temperature. One collective, in forward.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *fields, inplace, backend, shards = arguments
        rows = Rows(*fields)
        labels = rows.labels
        if labels is not None:
            rows = rows._replace(labels=shards.own_labels(labels))
        ctx.no_columns = rows.vocab_size == 0
        statistics = merged(of_shard(rows, backend, False), rows, shards, labels)
        return RowStatistics.keep(ctx, rows, statistics, inplace, backend)

    @staticmethod
    def backward(ctx, *upstream):
        if not ctx.no_columns:
            return *RowStatistics.backward(ctx, *upstream), None
        return torch.zeros_like(ctx.saved_tensors[0]), *[None] * (len(Rows._fields) + 2)


def of_shard(rows: Rows, backend: str, slopes: bool) -> Tensor:
    """slopes: with d/dtau."""
    if rows.vocab_size > 0:
        return ops.row_statistics(*rows, slopes, backend)
    recipe = Recipe.of(rows.recipe)
    fields = statistics_count(recipe and len(recipe.factors), slopes)
    return torch.zeros(
        fields,
        *rows.student_logits.shape[:-1],
        dtype=ops.statistics_dtype(*rows[:2]),
        device=rows.student_logits.device,
    )


# ---- merging -----------------------------------------------------------------------------------------------------

# What merging reads, by the names of stats.STATISTICS and, with a recipe, of stats.RECIPE_STATISTICS.
_SHARED = ("teacher_entropy", "student_entropy", "cross_entropy", "student_max")
_SUMS = ("teacher_entropy_sum", "student_entropy_sum", "student_hard_sum")
_PLAIN = (*_SHARED, *_SUMS, "teacher_max", "divergence", "teacher_sum", "student_sum")
_WITH_RECIPE = (*_SHARED, *_SUMS, "rest_teacher_max")
_OF_TEMPERATURE = ("forward_kl", "rest_teacher_sum", "rest_student_sum", "reverse_kl", "pull")
_SLOPE = "student_lse_slope"


def merged(statistics: Tensor, rows: Rows, shards: Shards, labels: Tensor | None) -> Tensor:
    """The statistics tensor of whole rows from that of this rank's columns, with one collective.

    Shares of a shard r in a sum of exponentials are e^(lse_r - lse). With P_r, Q_r those at tau and pi_r at t,
        KL(p || q) = sum_r P_r (KL_r + ln P_r - ln Q_r)      H = sum_r pi_r (H_r - ln pi_r)
    labels: of the whole vocabulary; None: no cross-entropy. Of slopes, the student's alone is merged.
    """
    recipe = Recipe.of(rows.recipe)
    names = _names(recipe)
    wanted = _PLAIN if recipe is None else (*_WITH_RECIPE, *_of_temperatures(recipe, _OF_TEMPERATURE))
    if len(statistics) > len(names):
        names, wanted = (*names, *SLOPES), (*wanted, _SLOPE)
    gathered = shards.gather(torch.stack([statistics[names.index(name)] for name in wanted])).double()
    parts = dict(zip(wanted, gathered.unbind(1), strict=True))
    if recipe is not None:
        parts["teacher_max"] = parts["rest_teacher_max"]
    whole = _merge_entropies(parts, rows, None if labels is None else shards.owners(labels))
    (_merge_kl if recipe is None else _merge_recipe)(whole, parts, rows, recipe)
    zero = torch.zeros_like(whole["divergence"])
    fields = torch.stack([whole.get(name, zero) for name in names])
    # A label may be anything in a row left out.
    fields = fields if rows.keep is None else torch.where(rows.keep, fields, 0.0)
    return fields.to(statistics.dtype)


def _names(recipe: Recipe | None) -> tuple[str, ...]:
    if recipe is None:
        return STATISTICS
    return *RECIPE_STATISTICS, *_of_temperatures(recipe, TEMPERATURE_STATISTICS)


def _of_temperatures(recipe: Recipe, names: tuple[str, ...]) -> list[str]:
    return [f"{name}[{k}]" for k in range(len(recipe.temperatures)) for name in names]


def _largest(maxima: Tensor, sums: Tensor) -> Tensor:
    """[ranks, ...] -> [...], over shards that have seen anything but -inf: the others' maxima mean nothing."""
    return torch.where(sums == 0, -torch.inf, maxima).amax(0)


def _shares(sums: Tensor, maxima: Tensor, largest: Tensor, temperature) -> tuple[Tensor, Tensor]:
    """(log of the sum about `largest`, log of every shard's share in it), -inf where there is none."""
    logs = torch.where(sums == 0, -torch.inf, sums.log() + (maxima - largest) / temperature)
    total = logs.logsumexp(0)
    none = (logs == -torch.inf) & ~total.isnan()  # nothing hides NaN
    return total, torch.where(none, -torch.inf, logs - total)


def merged_normalisers(maxima: Tensor, sums: Tensor, temperature) -> tuple[Tensor, Tensor]:
    """(M, sum exp((x - M)/temperature)) of whole rows from those of shards; a sum of 0 where there is nothing."""
    largest = _largest(maxima, sums)
    total, _ = _shares(sums, maxima, largest, temperature)
    return largest, total.exp()


def merged_slopes(maxima: Tensor, sums: Tensor, temperature, slopes: Tensor) -> Tensor:
    """d lse/dtau of whole rows from those of shards."""
    return _average(_shares(sums, maxima, _largest(maxima, sums), temperature)[1], slopes)


def _average(log_shares: Tensor, values: Tensor) -> Tensor:
    """Over shards; one without a share counts for nothing, whatever its value is."""
    shares = log_shares.exp()
    return torch.where(shares == 0, 0.0, shares * values).sum(0)


def _merge_entropies(parts: dict[str, Tensor], rows: Rows, owners: Tensor | None) -> dict[str, Tensor]:
    """Everything that has no temperature tau, and `teacher_max` and `student_max`, by the names of the statistics."""
    whole, t = {}, rows.entropy_temperature
    for side in ("teacher", "student"):
        maxima, sums = parts[f"{side}_max"], parts[f"{side}_entropy_sum"]
        largest = whole[f"{side}_max"] = _largest(maxima, sums)
        total, log_shares = _shares(sums, maxima, largest, t)
        whole[f"{side}_entropy_sum"] = total.exp()
        whole[f"{side}_entropy"] = _average(log_shares, parts[f"{side}_entropy"] - log_shares)
    if owners is None:
        return whole
    total, log_shares = _shares(parts["student_hard_sum"], parts["student_max"], whole["student_max"], 1.0)
    whole["student_hard_sum"] = total.exp()
    ranks = torch.arange(len(log_shares), device=owners.device).view(-1, *[1] * owners.dim())
    # The shard's log-sum-exp less the label's logit, raised to that of the row. Its own reads 0 where it is all -inf.
    cross_entropy = torch.where(ranks == owners, parts["cross_entropy"] - log_shares, 0.0).sum(0)
    cross_entropy = torch.where(owners < 0, torch.nan, cross_entropy)
    whole["cross_entropy"] = torch.where(total == -torch.inf, 0.0, cross_entropy)
    return whole


def _merge_kl(whole: dict[str, Tensor], parts: dict[str, Tensor], rows: Rows, recipe: None) -> None:
    tau = rows.temperature if rows.temperatures is None else rows.temperatures.double()
    teacher, p = _shares(parts["teacher_sum"], parts["teacher_max"], whole["teacher_max"], tau)
    student, q = _shares(parts["student_sum"], parts["student_max"], whole["student_max"], tau)
    whole["teacher_sum"], whole["student_sum"] = teacher.exp(), student.exp()
    whole["teacher_lse"] = _lse(whole["teacher_max"], tau, teacher)
    whole["student_lse"] = _lse(whole["student_max"], tau, student)
    whole["divergence"] = _average(p, parts["divergence"] + p - q) + _nan_stays(teacher, student)
    if _SLOPE in parts:
        whole[_SLOPE] = _average(q, parts[_SLOPE])


def _merge_recipe(whole: dict[str, Tensor], parts: dict[str, Tensor], rows: Rows, recipe: Recipe) -> None:
    y_max, z_max = whole["rest_teacher_max"], whole["rest_student_max"] = whole["teacher_max"], whole["student_max"]
    whole["divergence"] = torch.zeros_like(y_max)
    for k, (tau, factor) in enumerate(zip(recipe.temperatures, recipe.factors, strict=True)):
        tau = tau if rows.temperatures is None else rows.temperatures.double()
        teacher, p = _shares(parts[f"rest_teacher_sum[{k}]"], parts["teacher_max"], y_max, tau)
        student, q = _shares(parts[f"rest_student_sum[{k}]"], parts["student_max"], z_max, tau)
        divergence, pull = _nan_stays(teacher, student), parts[f"pull[{k}]"]
        if recipe.first != 0:
            divergence = divergence + recipe.first * _average(p, parts[f"forward_kl[{k}]"] + p - q)
        if recipe.second != 0:
            divergence = divergence + recipe.second * _average(q, parts[f"reverse_kl[{k}]"] + q - p)
            pull = _average(q, pull + recipe.second * (q - p))
        else:
            pull = _average(p, pull)
        whole["divergence"] = whole["divergence"] + factor * divergence
        whole[f"rest_teacher_sum[{k}]"], whole[f"rest_student_sum[{k}]"] = teacher.exp(), student.exp()
        whole[f"pull[{k}]"] = pull
        whole["teacher_lse"], whole["student_lse"] = _lse(y_max, tau, teacher), _lse(z_max, tau, student)
    if _SLOPE in parts:
        whole[_SLOPE] = _average(q, parts[_SLOPE])


def _lse(largest: Tensor, tau, log_sum: Tensor) -> Tensor:
    return torch.where(log_sum == -torch.inf, 0.0, largest / tau + log_sum)


def _nan_stays(teacher: Tensor, student: Tensor) -> Tensor:
    """0, or NaN where a side is: whatever the other side's mass is."""
    return 0.0 * (teacher.exp() + student.exp())
