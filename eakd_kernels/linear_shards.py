"""The fused linear loss where every rank of a process group has some columns of the heads (docs/parallel.md).

Ranks make their columns' logits chunk by chunk and keep the statistics; one all-gather brings those of all rows
together. In backward the logits are made again, and the merged statistics make their gradient exact.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .autograd import once
from .linear_teachers import DenseTeacher
from .ops import Rows
from .projection import Head, HeadGradient
from .stats import PUBLIC_FIELDS
from .vocab_parallel import merged, merges, of_shard


def check_shards(call) -> None:
    """Raises NotImplementedError for what only whole rows, or logits that are all there, can have."""
    if not isinstance(call.teacher, DenseTeacher):
        raise NotImplementedError(
            "fused_linear_ea_kd_loss does not take teacher_topk with process_group in this version; topk_ea_kd_loss "
            "does, on logits"
        )
    if call.problem.backend == "reference" or not merges(call.problem.rows):
        raise NotImplementedError(
            "fused_linear_ea_kd_loss with process_group takes the KL family (forward, reverse, Jeffreys, several "
            "temperatures) on a kernel backend, without standardize and without a temperature that requires grad; "
            "ea_kd_loss takes the others, on logits"
        )


def _chunks(call):
    """(numbers of rows, Rows of this rank's columns) of every chunk."""
    whole, shards = call.problem.rows, call.problem.shards
    for chunk, student, teacher in call.logits():
        temperatures, labels = whole.temperatures, whole.labels
        if temperatures is not None and temperatures.dim() > 0:
            temperatures = temperatures.reshape(-1)[chunk]
        if labels is not None:
            labels = shards.own_labels(labels.reshape(-1)[chunk])
        yield (
            chunk,
            whole._replace(
                student_logits=student,
                teacher_logits=teacher,
                labels=labels,
                keep=None,
                temperatures=temperatures,
            ),
        )


class ShardedStatistics(Function):
    """stats.PUBLIC_FIELDS, [N] each. apply(_Call, temperature tensor or None, *Head). One collective, in forward."""

    @staticmethod
    def forward(ctx, call, temperatures, *head):
        backend, shards = call.problem.backend, call.problem.shards
        parts = [(chunk, of_shard(rows, backend)) for chunk, rows in _chunks(call)]
        fields = call.new_fields(len(PUBLIC_FIELDS))
        statistics = None
        if parts:
            rows, labels = _rows_kept(call)
            statistics = merged(torch.cat([part for _, part in parts], -1), rows, shards, labels)
            for field, found in zip(fields, statistics, strict=False):
                field[slice(None) if call.kept is None else call.kept] = found
        ctx.call = call._replace(student=None)
        ctx.save_for_backward(statistics, *head)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fields[1], fields[3])  # the teacher's
        return tuple(fields)

    @staticmethod
    def backward(ctx, *upstream):
        statistics, *head = ctx.saved_tensors
        call = ctx.call._replace(student=Head(*head))
        with torch.no_grad():
            gradients = _gradients(call, statistics, [upstream[i] for i in (0, 2, 4, 5)], ctx.needs_input_grad[2:])
        return None, None, *(None if g is None else once(g, head[0]) for g in gradients)


def _rows_kept(call) -> tuple[Rows, Tensor | None]:
    """(what merging looks at, labels of the whole vocabulary) of the rows kept, in their order."""
    kept = slice(None) if call.kept is None else call.kept
    rows = call.problem.rows
    labels = None if rows.labels is None else rows.labels.reshape(-1)[kept]
    temperatures = rows.temperatures
    if temperatures is not None and temperatures.dim() > 0:
        temperatures = temperatures.reshape(-1)[kept]
    return rows._replace(keep=None, temperatures=temperatures), labels


def _gradients(call, statistics: Tensor | None, upstream, needed) -> tuple[Tensor | None, ...]:
    """Of the Head; upstream: of divergence, student_entropy, student_lse and cross_entropy, [N] or None."""
    every_row = call.kept is None and call.problem.rows.vocab_size > 0
    gradient = HeadGradient(call.student, needed, every_row, call.accumulate_in_fp32)
    begin = 0
    for chunk, rows in _chunks(call):
        end = begin + len(rows.student_logits)
        if rows.vocab_size > 0:
            given = [None if g is None else g[chunk].contiguous() for g in upstream]
            saved = statistics[:, begin:end].contiguous()
            ops.row_gradient_(*rows, saved, *given, call.problem.backend)
            gradient.add(chunk, rows.student_logits)
        begin = end
    return gradient.finished()
