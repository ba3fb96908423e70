"""The loss from hidden states and output heads: logits exist for a chunk of rows at a time, and never all at once.

One pass: a chunk's logits are made, its loss and gradient taken, and the gradient carried on to hidden states and
weights before the next chunk comes. Where a row's gradient cannot be finished without the other rows (docs/design.md,
"When one pass runs"), forward keeps the rows' statistics, and backward makes the logits again.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import row_losses
from .autograd import once, scaled
from .functional import Options, ea_kd_loss
from .linear_teachers import Teacher, teacher_of
from .options import takes_options
from .projection import Head, HeadGradient, chunk_size
from .sparse_teacher import TopK, check_topk_options
from .stats import PUBLIC_FIELDS, RowStats
from .validation import Problem


@takes_options(ea_kd_loss, without=("inplace_gradient",))
def fused_linear_ea_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, ...] | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    recompute: bool = False,
    accumulate_in_fp32: bool = True,
    tail: str = "bucket",
    teacher_temperature: float = 1.0,
    **options,
) -> Tensor | tuple[Tensor, RowStats]:
    """`ea_kd_loss` of logits = hidden @ weight.T + bias, of which only `chunk_rows` rows exist at a time.

    Args:
        student_hidden: [..., H], fp64, fp32, bf16 or fp16.
        student_weight: [V, H], the output head, tied to the embedding or not. Frozen, no gradient of it is made.
        teacher_hidden, teacher_weight: [..., H_T] and [V, H_T], without grad; H_T need not be H.
        labels: [...], as for `ea_kd_loss`.
        teacher_logits: [..., V], in the place of teacher_hidden and teacher_weight.
        teacher_topk: (ids [..., k], logprobs [..., k]) or (ids, logprobs, entropy [...]), or what `teacher_topk`
            returns, in their place; with `tail` and `teacher_temperature` as for `topk_ea_kd_loss`.
        student_bias, teacher_bias: [V].
        chunk_rows: rows whose logits are held at a time, in fp32. None: what 48 MB hold on a CPU, and on a GPU a
            quarter of the free memory, at most 2 GB.
        recompute: make the logits again in backward, instead of keeping finished gradients of hidden states and weight
            until then. Always so for fp16, whose loss scale would come too late, and where one pass cannot run.
        accumulate_in_fp32: sum the weight's gradient over chunks in fp32. False: in the weight's dtype.
        options: those of `ea_kd_loss`, on the logits. With process_group, student_weight, teacher_weight (or
            teacher_logits) and the biases are this rank's part of the vocabulary, and hidden states are whole on every
            rank; it takes the KL family without standardize, and always recomputes. The gradient of student_hidden is
            then this rank's summand, as a column-parallel layer's: sum it over the group.

    Logits are fp32 (fp64 if a tensor is fp64): 16-bit hidden states and weights are multiplied into fp32, and nothing
    is rounded before the softmax. Rows left out are not projected; on a GPU counting the others waits for it. autocast
    changes nothing.

    Returns:
        What `ea_kd_loss` returns, differentiable in student_hidden, student_weight, student_bias and temperature.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says what would work.
        RuntimeError: a backend asked for by name cannot run; differentiating twice.
    """
    model, options = check_fused_linear_options(
        chunk_rows=chunk_rows,
        recompute=recompute,
        accumulate_in_fp32=accumulate_in_fp32,
        teacher_topk=teacher_topk,
        tail=tail,
        teacher_temperature=teacher_temperature,
        **options,
    )
    student = Head(student_hidden, student_weight, student_bias)
    teacher = teacher_of(student, teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_topk, model)
    call = _Call.of(student, teacher, labels, options, chunk_rows, accumulate_in_fp32)
    with torch.autocast(student_hidden.device.type, enabled=False):
        if not recompute and call.runs_in_one_pass():
            loss, *fields = _OnePass.apply(call, *call.student)
            row_loss, weight, *public = (field.view(call.leading) for field in fields)
            stats = row_losses.row_stats(call.problem, row_loss, weight, call.known(public))
        else:
            function = _Statistics if call.problem.shards is None else sharded_statistics(call)
            fields = function.apply(call, call.problem.rows.temperatures, *call.student)
            public = [field.view(call.leading) for field in fields]
            stats = row_losses.finish(call.known(public), call.problem, options)
            loss = row_losses.reduce(stats.loss, call.problem, options)
            stats = stats.detach()
    return (loss, stats) if options.return_stats else loss


def check_fused_linear_options(
    *,
    chunk_rows=None,
    recompute=False,
    accumulate_in_fp32=True,
    teacher_topk=None,
    tail="bucket",
    teacher_temperature=1.0,
    **options,
):
    """(a sparse teacher's model or None, Options); raises what `fused_linear_ea_kd_loss` raises for these alone."""
    for name, flag in (("recompute", recompute), ("accumulate_in_fp32", accumulate_in_fp32)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if chunk_rows is not None and not (isinstance(chunk_rows, int) and chunk_rows >= 1):
        raise ValueError(f"chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    if teacher_topk is not None or tail != "bucket" or teacher_temperature != 1.0:
        return check_topk_options(tail=tail, teacher_temperature=teacher_temperature, **options)
    return None, Options(**options)


class _Call(NamedTuple):
    """What is the same for all chunks of a call. Rows are numbered through, [N]."""

    student: Head  # [N, H]
    teacher: Teacher  # [N, ...]
    labels: Tensor | None  # [N]
    options: Options  # type: ignore[valid-type]
    problem: Problem  # of all rows in their leading shape; its logits are of their shape alone
    kept: Tensor | None  # numbers of the rows kept; None: all
    chunk: int
    accumulate_in_fp32: bool

    @classmethod
    def of(cls, student, teacher, labels, options, chunk_rows, accumulate_in_fp32) -> "_Call":
        leading = student.hidden.shape[:-1]
        double = any(x is not None and x.dtype == torch.float64 for x in (*student, *teacher.tensors))
        dtype = torch.float64 if double else torch.float32
        shape = student.hidden.new_empty((), dtype=dtype).expand(*leading, len(student.weight))
        problem = teacher.validate(shape, labels, options)
        keep = problem.rows.keep
        kept = None if keep is None else keep.flatten().nonzero()[:, 0]
        if kept is not None and len(kept) == leading.numel():
            kept = None
        if chunk_rows is None:
            chunk_rows = chunk_size(len(student.weight) + teacher.columns, dtype, student.hidden.device)
        labels = None if labels is None else labels.reshape(-1)
        return cls(student.flat(), teacher.flat(), labels, options, problem, kept, chunk_rows, accumulate_in_fp32)

    @property
    def leading(self) -> torch.Size:
        return self.problem.rows.student_logits.shape[:-1]

    def runs_in_one_pass(self) -> bool:
        needs_gradient = any(x is not None and x.requires_grad for x in self.student)
        half = torch.float16 in (self.student.hidden.dtype, self.student.weight.dtype)
        whole = self.problem.shards is None
        return needs_gradient and whole and not half and row_losses.is_scale_known(self.problem, self.options)

    def chunks(self) -> Iterator[slice | Tensor]:
        """Numbers of the rows of every chunk."""
        count = len(self.student.hidden) if self.kept is None else len(self.kept)
        for begin in range(0, count, self.chunk):
            rows = slice(begin, min(begin + self.chunk, count))
            yield rows if self.kept is None else self.kept[rows]

    def logits(self) -> Iterator[tuple[slice | Tensor, Tensor, Tensor | TopK]]:
        """(rows, student's logits, the teacher's logits or top k) of every chunk, all logits in the same memory."""
        rows = min(self.chunk, len(self.student.hidden))
        shape = self.problem.rows.student_logits
        student = shape.new_empty(rows, len(self.student.weight))
        teacher = shape.new_empty(rows, self.teacher.columns)
        for chunk in self.chunks():
            yield chunk, self.student.logits(chunk, student), self.teacher.rows(chunk, teacher)

    def loss(self, chunk, student: Tensor, teacher, num_items) -> tuple[Tensor, RowStats | None]:
        options = self.chunk_options(chunk, reduction="sum", num_items=num_items)
        out = self.teacher.loss(student, teacher, self._labels(chunk), options)
        return out if self.options.return_stats else (out, None)

    def statistics(self, chunk, student: Tensor, teacher, temperature: Tensor | None) -> tuple[Tensor | None, ...]:
        """stats.PUBLIC_FIELDS; temperature: of these rows, where it is to be differentiated."""
        changes = dict(weighting="none", weight_norm="none", reduction="none", num_items=None)
        if temperature is not None:
            changes["temperature"] = temperature
        options = self.chunk_options(chunk, **changes)
        return self.teacher.fields(student, teacher, self._labels(chunk), options, self.problem.labelled)

    def known(self, public: list[Tensor]) -> list[Tensor | None]:
        """stats.PUBLIC_FIELDS, without what a teacher does not have."""
        named = zip(PUBLIC_FIELDS, public, strict=True)
        return [None if name == "teacher_lse" and not self.teacher.has_lse else field for name, field in named]

    def new_fields(self, count: int) -> list[Tensor]:
        """[N] each, 0 in rows left out."""
        return [self.problem.rows.student_logits.new_zeros(len(self.student.hidden)) for _ in range(count)]

    def chunk_options(self, chunk, **changes):
        """The options as they are for these rows."""
        for name in ("weighting", "temperature"):
            value = getattr(self.options, name)
            if torch.is_tensor(value) and value.dim() > 0:
                changes.setdefault(name, value.reshape(-1)[chunk])
        return replace(self.options, mask=None, inplace_gradient=True, **changes)

    def _labels(self, chunk) -> Tensor | None:
        return None if self.labels is None else self.labels[chunk]


def sharded_statistics(call: _Call) -> type[Function]:
    from .linear_shards import ShardedStatistics, check_shards  # see sharding.py

    check_shards(call)
    return ShardedStatistics


class _Computed(Function):
    """Logits as an operation's result, whose gradient may take their place."""

    @staticmethod
    def forward(ctx, logits: Tensor, anchor: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def _computed(logits: Tensor) -> Tensor:
    return _Computed.apply(logits, torch.empty((), requires_grad=True))


class _OnePass(Function):
    """(loss 0-d, and [N] each: row losses, weights, stats.PUBLIC_FIELDS). apply(_Call, *Head)."""

    @staticmethod
    def forward(ctx, call: _Call, *head):
        gradient = HeadGradient(Head(*head), ctx.needs_input_grad[1:], call.kept is None, call.accumulate_in_fp32)
        scale, num_items = row_losses.scale_of(call.problem, call.options)
        total, fields = call.new_fields(1)[0].new_zeros(()), call.new_fields(len(RowStats._fields))
        for chunk, student, teacher in call.logits():
            with torch.enable_grad():
                student = _computed(student)
                loss, stats = call.loss(chunk, student, teacher, 1 / scale if num_items is None else num_items)
            gradient.add(chunk, *torch.autograd.grad(loss, student))
            total += loss.detach()
            for field, part in zip(fields, stats or (), strict=False):
                if part is not None:
                    field[chunk] = part
        ctx.backend = call.problem.backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*fields)
        ctx.save_for_backward(total, *gradient.finished())
        return total, *fields

    @staticmethod
    def backward(ctx, g_loss, *_):
        total, *gradients = ctx.saved_tensors
        if g_loss is None:
            return (None,) * (1 + len(gradients))
        return None, *(None if g is None else once(scaled(g, g_loss, ctx.backend), total) for g in gradients)


class _Statistics(Function):
    """stats.PUBLIC_FIELDS, [N] each. apply(_Call, temperature tensor or None, *Head)."""

    @staticmethod
    def forward(ctx, call: _Call, temperatures, *head):
        fields = call.new_fields(len(PUBLIC_FIELDS))
        for chunk, student, teacher in call.logits():
            for field, part in zip(fields, call.statistics(chunk, student, teacher, None), strict=True):
                if part is not None:
                    field[chunk] = part
        ctx.call = call._replace(student=None)
        ctx.save_for_backward(temperatures, *head)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(fields[1], fields[3])  # the teacher's
        return tuple(fields)

    @staticmethod
    def backward(ctx, *upstream):
        temperatures, *head = ctx.saved_tensors
        call = ctx.call._replace(student=Head(*head))
        with torch.no_grad():  # a graph of the backward goes no further than `once`
            gradients = _gradients(call, temperatures, upstream, ctx.needs_input_grad[1:])
        return None, *(None if g is None else once(g, head[0]) for g in gradients)


def _gradients(call: _Call, temperatures: Tensor | None, upstream, needed) -> tuple[Tensor | None, ...]:
    """Of (temperatures, *Head), from upstream gradients [N] of stats.PUBLIC_FIELDS."""
    gradient = HeadGradient(call.student, needed[1:], call.kept is None, call.accumulate_in_fp32)
    g_temperatures = torch.zeros_like(temperatures).reshape(-1) if needed[0] else None
    for chunk, student, teacher in call.logits():
        with torch.enable_grad():
            inputs = [_computed(student)]
            if needed[0]:
                rows = temperatures if temperatures.dim() == 0 else temperatures.reshape(-1)[chunk]
                inputs.append(rows.detach().requires_grad_())
            fields = call.statistics(chunk, inputs[0], teacher, inputs[1] if needed[0] else None)
        used = [
            (field, g[chunk])
            for field, g in zip(fields, upstream, strict=True)
            if g is not None and field is not None and field.requires_grad
        ]
        outputs, grads = zip(*used, strict=True)
        g_logits, *g_rows = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
        gradient.add(chunk, g_logits)
        for g in g_rows:
            g_temperatures[chunk if g.dim() > 0 else slice(None)] += g
    return (None if g_temperatures is None else g_temperatures.view_as(temperatures), *gradient.finished())
