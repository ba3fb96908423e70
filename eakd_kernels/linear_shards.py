"""The fused linear loss where every rank of a process group has some columns of the heads (docs/parallel.md).

Ranks make their columns' logits chunk by chunk and keep numbers of rows; one collective brings those of all rows
together. Every further sweep, of a divergence that needs one and of backward, makes the logits again.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, sharded_formulas
from .linear_teachers import DenseTeacher
from .ops import Rows
from .projection import Head, Recomputed
from .sparse_rows import Columns, StudentRow, temperature_gradient
from .sparse_shards import Swept, WholeRows, exchanged, own_columns, reference_row, shard_gradient, sweep
from .sparse_teacher import fields_of_topk
from .stats import PUBLIC_FIELDS
from .vocab_parallel import merged, merges, of_shard


def sharded_statistics(call) -> list[Tensor]:
    """stats.PUBLIC_FIELDS, [N] each, of a linear_chunks._Call. As many collectives as `ea_kd_loss` and
    `topk_ea_kd_loss` need of the same options."""
    rows = _rows_kept(call)
    if not isinstance(call.teacher, DenseTeacher):
        topk = call.teacher.rows(slice(None) if call.kept is None else call.kept, None)
        problem = call.problem._replace(rows=rows)
        fields = fields_of_topk(problem, topk, call.teacher.model, call.options, partial(_student_row, call))
    elif call.problem.backend == "reference" or not merges(rows):
        fields = sharded_formulas.statistics_of(rows, call.problem.shards, _maker(call), *call.student)
    else:
        fields = Recomputed.apply(call, _Merged, rows.temperatures, *call.student)
    return [_of_all_rows(call, field) for field in fields]


def _rows_kept(call) -> Rows:
    """The rows kept, in their order: labels of the whole vocabulary; logits of their shape and dtype alone."""
    kept, rows = slice(None) if call.kept is None else call.kept, call.problem.rows
    labels = None if rows.labels is None else rows.labels.reshape(-1)[kept]
    temperatures = rows.temperatures
    if temperatures is not None and temperatures.dim() > 0:
        temperatures = temperatures.reshape(-1)[kept]
    count = len(call.student.hidden) if call.kept is None else len(call.kept)
    shape = rows.student_logits.new_empty(()).expand(count, rows.student_logits.shape[-1])
    return rows._replace(
        student_logits=shape, teacher_logits=shape, labels=labels, keep=None, temperatures=temperatures
    )


def _of_all_rows(call, field: Tensor | None) -> Tensor:
    """[N] from what the rows kept have, 0 elsewhere."""
    if field is None:
        return call.new_fields(1)[0]
    return field if call.kept is None else field.new_zeros(len(call.student.hidden)).index_copy(0, call.kept, field)


def _places(call) -> Iterator[tuple]:
    """(place among the rows kept, and what call.logits() has) of every chunk."""
    begin = 0
    for chunk, student, teacher in call.logits():
        yield slice(begin, begin + len(student)), chunk, student, teacher
        begin += len(student)
    if begin == 0:  # a chunk without rows, since ranks meet in every collective
        empty = call.problem.rows.student_logits.new_empty(0, len(call.student.weight))
        yield slice(0, 0), slice(0, 0), empty, empty


def _chunks(call) -> Iterator[tuple[slice, Tensor | slice, Rows]]:
    """(place among the rows kept, numbers of rows, Rows of this rank's columns) of every chunk."""
    kept = _rows_kept(call)
    for place, chunk, student, teacher in _places(call):
        temperatures, labels = kept.temperatures, kept.labels
        if temperatures is not None and temperatures.dim() > 0:
            temperatures = temperatures[place]
        if labels is not None:
            labels = call.problem.shards.own_labels(labels[place])
        logits = {"student_logits": student, "teacher_logits": teacher if torch.is_tensor(teacher) else student}
        yield place, chunk, kept._replace(**logits, labels=labels, temperatures=temperatures)


class _Merged:
    """stats.PUBLIC_FIELDS of the rows kept, for projection.Recomputed, where statistics of shards are all that those of
    rows are made of. One collective."""

    constant = (1, 3)  # the teacher's

    @staticmethod
    def fields(call, slopes: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor]]:
        rows = _rows_kept(call)
        parts = [of_shard(part, call.problem.backend, slopes) for _, _, part in _chunks(call)]
        statistics = merged(torch.cat(parts, -1), rows, call.problem.shards, rows.labels)
        return statistics.unbind(0)[: len(PUBLIC_FIELDS)], (statistics,)

    @staticmethod
    def gradients(call, saved, temperatures, upstream, needed) -> tuple[Tensor | None, ...]:
        (statistics,), gradient = saved, call.head_gradient(needed[1:])
        upstream = [upstream[i] for i in (0, 2, 4, 5)]
        for place, chunk, rows in _chunks(call):
            if rows.vocab_size > 0:
                given = (None if g is None else g[place].contiguous() for g in upstream)
                ops.row_gradient_(*rows, statistics[:, place].contiguous(), *given, call.problem.backend)
            else:
                rows.student_logits.zero_()
            gradient.add(chunk, rows.student_logits)
        return None, *gradient.finished()


# ---- divergences that need more sweeps ---------------------------------------------------------------------------


def _maker(call) -> partial:
    """Of ProjectedLogits, from the tensors of a Head."""
    return partial(ProjectedLogits, call._replace(student=None))


class ProjectedLogits:
    """sharded_formulas.GivenLogits, but made by chunks, of the rows kept. A sparse teacher has no columns."""

    def __init__(self, call, *head: Tensor | None):
        self.call = call._replace(student=Head(*head))

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for place, _, student, teacher in _places(self.call):
            yield place, student, teacher if torch.is_tensor(teacher) else student[:, :0]

    def gradients(self, needed, fill) -> tuple[Tensor | None, ...]:
        gradient = self.call.head_gradient(needed)
        for place, chunk, student, teacher in _places(self.call):
            fill(place, student, teacher if torch.is_tensor(teacher) else student[:, :0], student)
            gradient.add(chunk, student)
        return gradient.finished()


# ---- sparse teachers ---------------------------------------------------------------------------------------------


def _student_row(call, problem, columns: Columns, wants_rest: bool, inplace: bool) -> StudentRow:
    """Of the rows kept. problem: theirs."""
    rows, shards = problem.rows, problem.shards
    if problem.backend == "reference":
        return reference_row(rows, columns, shards, wants_rest, _maker(call), *call.student)
    part = _SparseSweep(columns, own_columns(columns, shards), wants_rest)
    return StudentRow(*Recomputed.apply(call, part, rows.temperatures, *call.student))


class _SparseSweep(NamedTuple):
    """StudentRow, for projection.Recomputed. Two collectives."""

    columns: Columns
    own: Columns
    wants_rest: bool
    constant = ()

    def fields(self, call, slopes: bool) -> tuple[tuple[Tensor | None, ...], WholeRows]:
        rows, backend = _rows_kept(call), call.problem.backend
        swept = []
        for place, _, part in _chunks(call):
            own = Columns(*(x[place] for x in self.own))
            swept.append(sweep(part, own, self.wants_rest, slopes, backend))
        swept = Swept(*(torch.cat(parts, -1) for parts in zip(*swept, strict=True)))
        whole = exchanged(swept, rows, self.columns, self.own, call.problem.shards, rows.labels)
        return whole.fields(rows), whole

    def gradients(self, call, saved, temperatures, upstream, needed) -> tuple[Tensor | None, ...]:
        whole, gradient = WholeRows(*saved), call.head_gradient(needed[1:])
        for place, chunk, rows in _chunks(call):
            job = whole.part(place).backward_of(rows, [None if g is None else g[place] for g in upstream])
            gradient.add(chunk, shard_gradient(job, True, call.problem.backend))
        slope = temperature_gradient(whole.backward_of(_rows_kept(call), upstream)) if needed[0] else None
        return slope, *gradient.finished()
