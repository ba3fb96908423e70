"""Sparse teachers of rows whose columns are sharded over a process group; docs/parallel.md has the exchange.

A rank's kernels sweep its own columns, as they would those of a whole row. What log q at the ids and of the rest is
made of comes from all ranks: merged statistics, the logits at the ids, each from the rank that has it, and the
normalisers over the columns that are not named. Every rank then computes sparse_rows' formulas on the same numbers, and
writes over the gradient at those ids that it has. torch.compile breaks its graph here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops, sharded_formulas
from .autograd import ReferenceStudent, once, save_tensors, saved_tensors
from .backends import reference
from .ops import Rows, statistics_dtype
from .sharded_formulas import GivenLogits
from .sharding import RUNS_EAGERLY, Shards
from .sparse_rows import (
    Columns,
    RowBackward,
    StudentRow,
    owners,
    student_fields,
    student_gradient,
    temperature_gradient,
    upstream_of,
)
from .vocab_parallel import merged, merged_normalisers, merged_slopes, of_shard

_NUM_ROWS, _TEMPERATURES = len(Rows._fields), Rows._fields.index("temperatures")
_SAVED = ("student_logits", "labels", "keep", "temperatures")


@torch.compiler.disable(reason=RUNS_EAGERLY)
def sharded_student_row(
    rows: Rows, columns: Columns, shards: Shards, wants_rest: bool, inplace: bool, backend: str
) -> StudentRow:
    """sparse_rows.student_row; labels and columns are global ids."""
    if backend != "reference":
        return StudentRow(*ShardedSparseStatistics.apply(*rows, *columns, wants_rest, inplace, backend, shards))
    student = ReferenceStudent.apply(rows.student_logits, inplace)
    return reference_row(rows, columns, shards, wants_rest, GivenLogits, *_alone(student))


def _alone(student: Tensor) -> tuple[Tensor, Tensor]:
    """(student, teacher) for GivenLogits [rows, columns]: the teacher has no columns to compute with."""
    (student,) = sharded_formulas.flat(student)
    return student, student[:, :0].detach()


def own_columns(columns: Columns, shards: Shards) -> Columns:
    """Those of this rank, as it numbers them."""
    ids = shards.own_labels(columns.ids)
    here = columns.member & (ids >= 0)
    ids = torch.where(here, ids, 0)
    width = shards.columns.stop - shards.columns.start
    return Columns(here, ids.gather(-1, owners(here)), torch.where(here, ids, width))


def _of_owners(gathered: Tensor, columns: Columns, shards: Shards) -> Tensor:
    """[ranks, K, ...] -> [..., K]: from the rank that has each id."""
    return gathered.movedim(1, -1).gather(0, shards.owners(columns.ids)[None])[0]


class ShardedSparseStatistics(Function):
    """sparse_rows.SparseStatistics of rows of which this rank has some columns.

    apply(*Rows, *Columns, wants_rest, inplace_gradient, backend, shards). Two collectives, in forward. Saves the
    student's logits, the statistics, and 14 bytes for each id (18 in fp64).
    """

    @staticmethod
    def forward(ctx, *arguments):
        *columns, wants_rest, ctx.inplace, ctx.backend, shards = arguments[_NUM_ROWS:]
        rows, columns = Rows(*arguments[:_NUM_ROWS]), Columns(*columns)
        labels, slopes = rows.labels, ctx.needs_input_grad[_TEMPERATURES]
        if labels is not None:
            rows = rows._replace(labels=shards.own_labels(labels))
        own = own_columns(columns, shards)
        swept = sweep(rows, own, wants_rest, slopes, ctx.backend)
        whole = exchanged(swept, rows, columns, own, shards, labels)
        ctx.set_materialize_grads(False)
        ctx.constants = rows._replace(teacher_logits=None, **dict.fromkeys(_SAVED))
        save_tensors(ctx, *(getattr(rows, name) for name in _SAVED), *whole)
        return whole.fields(rows)

    @staticmethod
    def backward(ctx, *upstream):
        tensors = saved_tensors(ctx)
        rows = ctx.constants._replace(**dict(zip(_SAVED, tensors, strict=False)))
        grads = [None] * (_NUM_ROWS + len(Columns._fields) + 4)
        with torch.no_grad():
            job = WholeRows(*tensors[len(_SAVED) :]).backward_of(rows, upstream)
            if ctx.needs_input_grad[_TEMPERATURES]:
                grads[_TEMPERATURES] = temperature_gradient(job)
            if ctx.needs_input_grad[0]:
                grads[0] = shard_gradient(job, ctx.inplace, ctx.backend)
        return tuple(None if g is None else once(g, rows[i]) for i, g in enumerate(grads))


class Swept(NamedTuple):
    """Of this rank's columns; last dimensions [...]."""

    statistics: Tensor  # ops.row_statistics
    parts: Tensor  # [K, ...] logits at the ids, and behind them, if wanted, ops.rest_statistics


def sweep(rows: Rows, own: Columns, wants_rest: bool, slopes: bool, backend: str) -> Swept:
    """slopes: with d/dtau."""
    statistics = of_shard(rows, backend, slopes)
    shape = own.ids.movedim(-1, 0).shape
    if rows.vocab_size == 0:
        return Swept(statistics, statistics.new_zeros(shape[0] + (2 + slopes) * wants_rest, *shape[1:]))
    parts = rows.student_logits.gather(-1, own.ids).movedim(-1, 0).to(statistics.dtype)
    if wants_rest:
        parts = torch.cat([parts, ops.rest_statistics(*rows, own.masked, slopes, backend)])
    return Swept(statistics, parts)


class WholeRows(NamedTuple):
    """What the fields of whole rows, and the gradient of this rank's columns, are made of."""

    member: Tensor  # Columns.member
    here: Tensor  # own_columns' member and ids
    ids: Tensor
    logits: Tensor  # [..., K] at all ids
    statistics: Tensor
    rest: Tensor | None  # ops.rest_statistics

    def part(self, rows: slice) -> "WholeRows":
        """Of [rows, ...], some rows."""
        by_field = (None if x is None else x[:, rows].contiguous() for x in self[4:])
        return WholeRows(*(x[rows] for x in self[:4]), *by_field)

    def fields(self, rows: Rows) -> tuple[Tensor | None, ...]:
        """StudentRow."""
        return student_fields(rows, self.member, self.logits, self.statistics, self.rest)

    def backward_of(self, rows: Rows, upstream) -> RowBackward:
        rows = rows._replace(teacher_logits=rows.student_logits.detach())
        given = upstream_of(upstream, self.member, self.statistics.dtype)
        return RowBackward(rows, self.member, self.logits, self.here, self.ids, self.statistics, self.rest, given)


def exchanged(swept: Swept, rows: Rows, columns: Columns, own: Columns, shards: Shards, labels) -> WholeRows:
    """labels: of the whole vocabulary. Two collectives."""
    statistics = merged(swept.statistics, rows, shards, labels)
    gathered, k = shards.gather(swept.parts), columns.ids.shape[-1]
    logits, rest = _of_owners(gathered[:, :k], columns, shards), None
    if gathered.shape[1] > k:
        tau = rows.temperature if rows.temperatures is None else rows.temperatures.double()
        maxima, sums, *slopes = gathered[:, k:].double().unbind(1)
        rest = [*merged_normalisers(maxima, sums, tau), *(merged_slopes(maxima, sums, tau, slope) for slope in slopes)]
        rest = torch.stack(rest).to(gathered.dtype)
    return WholeRows(columns.member, own.member, own.ids, logits, statistics, rest)


def shard_gradient(job: RowBackward, inplace: bool, backend: str) -> Tensor:
    """[..., columns]"""
    if job.rows.vocab_size == 0:
        return torch.zeros_like(job.rows.student_logits)
    return student_gradient(job, inplace, backend)


# ---- plain PyTorch -----------------------------------------------------------------------------------------------


class _Numbers:
    """The one stage (sharded_formulas.py) in which this rank's columns say all that StudentRow is made of."""

    def __init__(self, rows: Rows, columns: Columns, wants_rest: bool):
        self.masked = columns.masked.reshape(-1, columns.masked.shape[-1])  # [rows, K], the number of columns elsewhere
        self.rows, self.wants_rest, self.labelled = rows, wants_rest, rows.labels is not None
        self.scalars = 3 + wants_rest + 2 * self.labelled
        self.counts = {self.numbers: self.scalars + self.masked.shape[-1]}

    def numbers(self, columns: sharded_formulas.Columns, *temperatures: Tensor) -> list[Tensor]:
        """Log-sum-exps at tau and at t, the entropy; log-sum-exp at tau of the rest; log-sum-exp at 1 and the label's
        logit; logits at the ids."""
        x, masked = columns.student, self.masked[columns.rows]
        z, at_t = reference.divided(x, *temperatures or (self.rows.temperature,)), x / self.rows.entropy_temperature
        lse_t = reference.logsumexp(at_t)
        parts = [reference.logsumexp(z), lse_t, reference.entropy(sharded_formulas.log_mass(at_t, lse_t))]
        if self.wants_rest:
            is_named = torch.zeros(len(x), x.shape[1] + 1, dtype=torch.bool, device=x.device)
            is_named = is_named.scatter(-1, masked, True)[:, :-1]
            parts.append(reference.logsumexp(z.masked_fill(is_named, -torch.inf)))
        if self.labelled:
            parts += [reference.logsumexp(x), columns.at_label(x)]
        # One column more, for the ids of other ranks.
        return [*parts, *torch.nn.functional.pad(x, (0, 1)).gather(-1, masked).unbind(-1)]


def reference_row(
    rows: Rows, columns: Columns, shards: Shards, wants_rest: bool, make: Callable, *tensors: Tensor | None
) -> StudentRow:
    """In fp64, of the logits make(*tensors); of rows' own only shape and dtype. One collective."""
    shard = sharded_formulas.Shard(rows, shards)
    part, known = _Numbers(rows, own_columns(columns, shards), wants_rest), shard.temperatures()
    gathered = sharded_formulas.exchanger(shard, make, tensors, part.counts)(part.numbers, *known)
    gathered = gathered.reshape(*gathered.shape[:2], *shard.leading)
    lses, lses_t, entropies, *others = gathered[:, : part.scalars].unbind(1)
    lse, log_rest, cross_entropy = _whole(lses), None, torch.zeros_like(lses[0])
    if wants_rest:
        log_rest = _whole(others.pop(0)) - _finite(lse)
    if part.labelled:
        flat = (x.reshape(len(x), shard.count) for x in others)
        cross_entropy = shard.cross_entropy(*flat).reshape(shard.leading)
    at_ids = _of_owners(gathered[:, part.scalars :], columns, shards)
    log_q = reference.divided(at_ids, rows.temperature if rows.temperatures is None else rows.temperatures)
    log_q = log_q - _finite(lse)[..., None]
    scalars = [_merged_entropy(entropies, lses_t), _finite(lse), cross_entropy, log_rest]
    if rows.keep is not None:
        scalars = [None if field is None else torch.where(rows.keep, field, 0.0) for field in scalars]
    has_mass = columns.member & (lse != -torch.inf)[..., None]
    fields = (*scalars[:3], torch.where(has_mass, log_q, -torch.inf), scalars[3])
    dtype = statistics_dtype(*rows[:2])
    return StudentRow(*(None if field is None else field.to(dtype) for field in fields))


def _whole(lses: Tensor) -> Tensor:
    return reference.logsumexp(lses.movedim(0, -1))


def _finite(lse: Tensor) -> Tensor:
    """0 where there are no columns."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def _merged_entropy(entropies: Tensor, lses: Tensor) -> Tensor:
    """vocab_parallel.merged's."""
    nothing = lses == -torch.inf
    log_shares = torch.where(nothing, 0.0, _finite(lses) - _finite(_whole(lses)))
    return torch.where(nothing, 0.0, log_shares.exp() * (entropies - log_shares)).sum(0)


# ---- a teacher's likeliest columns -------------------------------------------------------------------------------


@torch.compiler.disable(reason=RUNS_EAGERLY)
def sharded_topk(rows: Rows, k: int, shards: Shards, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sparse_teacher.teacher_topk; rows.student_logits are the teacher's. Two collectives."""
    logits, ids = _likeliest(rows.student_logits, k, shards)
    member = torch.ones_like(ids, dtype=torch.bool)
    if backend == "reference":
        row = reference_row(rows, Columns(member, ids, ids), shards, False, GivenLogits, *_alone(rows.student_logits))
        return ids, row.log_q, row.entropy, row.lse
    statistics = merged(of_shard(rows, backend, False), rows, shards, None)
    entropy, lse, _, logprobs, _ = student_fields(rows, member, logits, statistics, None)
    return ids, logprobs, entropy, lse


def _likeliest(logits: Tensor, k: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """(values, global ids); of equal ones those of the lower rank come first."""
    counts = [min(k, width) for width in shards.widths]
    values, ids = logits.topk(counts[shards.rank], dim=-1)
    # fp64 has room for both, so that one collective does.
    candidates = torch.stack([values.double(), (ids + shards.columns.start).double()])
    candidates = torch.nn.functional.pad(candidates, (0, max(counts) - counts[shards.rank]))
    gathered = shards.gather(candidates).unbind(0)
    values, ids = torch.cat([part[..., :n] for part, n in zip(gathered, counts, strict=True)], -1).unbind(0)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids.gather(-1, order[..., :k]).long()
