"""The loss from hidden states and output heads: logits exist for a chunk of rows at a time, and never all at once.

One pass: a chunk's logits are made, its loss and gradient taken, and the gradient carried on to hidden states and
weights before the next chunk comes. Where a row's gradient cannot be finished without the other rows (docs/design.md,
"When one pass runs"), forward keeps the rows' statistics, and backward makes the logits again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import row_losses
from .autograd import once, scaled
from .functional import Options
from .linear_teachers import Teacher
from .projection import Head, HeadGradient, Recomputed, chunk_size
from .sparse_teacher import TopK
from .stats import PUBLIC_FIELDS, RowStats
from .validation import Problem


@torch.compiler.disable(
    reason="fused_linear_ea_kd_loss runs eagerly, between two graphs: torch.compile needs fullgraph=False for it"
)
def run(student: Head, teacher: Teacher, labels, options, chunk_rows, recompute: bool, accumulate_in_fp32: bool):
    """What `fused_linear_ea_kd_loss` returns, of checked arguments. torch.compile breaks its graph here."""
    call = _Call.of(student, teacher, labels, options, chunk_rows, accumulate_in_fp32)
    with torch.autocast(student.hidden.device.type, enabled=False):
        if not recompute and call.runs_in_one_pass():
            loss, _, *fields = _OnePass.apply(call, *call.student)
            row_loss, weight, *public = (field.view(call.leading) for field in fields)
            stats = row_losses.row_stats(call.problem, row_loss, weight, call.known(public))
        else:
            public = [field.view(call.leading) for field in _statistics(call)]
            stats = row_losses.finish(call.known(public), call.problem, options)
            loss = row_losses.reduce(stats.loss, call.problem, options)
            stats = stats.detach()
    return (loss, stats) if options.return_stats else loss


class _Call(NamedTuple):
    """What is the same for all chunks of a call. Rows are numbered through, [N]."""

    student: Head  # [N, H]
    teacher: Teacher  # [N, ...]
    labels: Tensor | None  # [N]
    options: Options
    problem: Problem  # of all rows in their leading shape; its logits are of their shape alone
    kept: Tensor | None  # numbers of the rows kept; None: all
    chunk: int
    accumulate_in_fp32: bool
    watched: tuple["_Watched", ...]

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
        watched = _watched(teacher, labels, options)
        labels = None if labels is None else labels.reshape(-1)
        student, teacher = student.flat(), teacher.flat()
        return cls(student, teacher, labels, options, problem, kept, chunk_rows, accumulate_in_fp32, watched)

    @property
    def leading(self) -> torch.Size:
        return self.problem.rows.student_logits.shape[:-1]

    def runs_in_one_pass(self) -> bool:
        needs_gradient = any(x is not None and x.requires_grad for x in self.student)
        half = any(x is not None and x.dtype == torch.float16 for x in self.student)
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
        for name, tensor, version in self.watched:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was modified in place after fused_linear_ea_kd_loss, whose backward reads it again; "
                    f"modify it after backward, or pass {name}.clone()"
                )
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

    def head_gradient(self, needed: tuple[bool, bool, bool]) -> HeadGradient:
        return HeadGradient(self.student, needed, self.kept is None, self.accumulate_in_fp32)

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


class _Watched(NamedTuple):
    name: str
    tensor: Tensor
    version: int


def _watched(teacher: Teacher, labels, options) -> tuple[_Watched, ...]:
    """What backward reads again, and autograd does not know of."""
    named = {**teacher.named, "labels": labels, "teacher_class_weights": options.teacher_class_weights}
    if torch.is_tensor(options.temperature) and not options.temperature.requires_grad:
        named["temperature"] = options.temperature
    return tuple(_Watched(name, x, x._version) for name, x in named.items() if x is not None and not x.is_inference())


def _statistics(call: _Call) -> Sequence[Tensor]:
    """stats.PUBLIC_FIELDS, [N] each."""
    if call.problem.shards is None:
        return Recomputed.apply(call, _WholeRows, call.problem.rows.temperatures, *call.student)
    from .linear_shards import sharded_statistics  # see sharding.py

    return sharded_statistics(call)


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
    """(loss 0-d, anchor as autograd.OnePass has it, and [N] each: row losses, weights, stats.PUBLIC_FIELDS).
    apply(_Call, *Head)."""

    @staticmethod
    def forward(ctx, call: _Call, *head):
        gradient = call._replace(student=Head(*head)).head_gradient(ctx.needs_input_grad[1:])
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
        anchor = torch.empty_like(total)
        ctx.save_for_backward(anchor, *gradient.finished())
        return total, anchor, *fields

    @staticmethod
    def backward(ctx, g_loss, *_):
        anchor, *gradients = ctx.saved_tensors
        if g_loss is None:
            return (None,) * (1 + len(gradients))
        return None, *(None if g is None else once(scaled(g, g_loss, ctx.backend), anchor) for g in gradients)


class _WholeRows:
    """stats.PUBLIC_FIELDS, [N] each, as projection.Recomputed has them."""

    constant = (1, 3)  # the teacher's

    @staticmethod
    def fields(call: _Call, slopes: bool) -> tuple[list[Tensor], tuple[()]]:
        fields = call.new_fields(len(PUBLIC_FIELDS))
        for chunk, student, teacher in call.logits():
            for field, part in zip(fields, call.statistics(chunk, student, teacher, None), strict=True):
                if part is not None:
                    field[chunk] = part
        return fields, ()

    @staticmethod
    def gradients(call: _Call, saved, temperatures: Tensor | None, upstream, needed) -> tuple[Tensor | None, ...]:
        gradient = call.head_gradient(needed[1:])
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
