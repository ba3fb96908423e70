"""One torch.autograd.Function per operator. Most people want eakd_kernels.ea_kd_loss; these are for building others.

RowStatistics   per-row statistics, differentiable in the student's logits and in a temperature tensor
RowGradient     the gradient for given per-row coefficients; differentiating it again raises
OnePass         loss and finished gradient in one sweep; saves the gradient and no logits

They take a kernel backend. backend="reference" is not behind an operator: `row_statistics` hands it to PyTorch.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .ops import Rows
from .stats import PUBLIC_FIELDS, SLOPES

_NUM_ROWS, _TEMPERATURES = len(Rows._fields), Rows._fields.index("temperatures")
_TENSORS = (*range(_TEMPERATURES + 1), Rows._fields.index("class_bias"))


def _is_retained() -> bool:
    """Whether the running backward keeps its graph; yes where that cannot be known."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if query is None else query()


class _NoSecondBackward(Function):
    """The identity on a gradient; differentiating it raises."""

    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError(
            "eakd_kernels does not support double backward (create_graph=True and a second derivative of the loss); "
            "write the formula with torch.nn.functional.log_softmax where second derivatives are needed"
        )


def once(gradient: Tensor, anchor: Tensor) -> Tensor:
    """`gradient`, tied to the graph by `anchor` where a graph of the backward is being made."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _NoSecondBackward.apply(gradient, anchor)
    return gradient


class RowGradient(Function):
    """[..., V] gradient of the student's logits, from upstream gradients [...] of a row's statistics.

    apply(*Rows, statistics, inplace, grad_divergence, grad_student_entropy, grad_student_lse, grad_cross_entropy,
    backend): `statistics` as ops.row_statistics returned them, each grad_* [...] or None.
    """

    @staticmethod
    def forward(ctx, *arguments):
        return _row_gradient(*arguments)

    @staticmethod
    def backward(ctx, grad_output):
        return _NoSecondBackward.backward(ctx, grad_output)


class ReferenceStudent(Function):
    """The identity on the student's logits, whose gradient keeps what the kernels' promises: once, and in place."""

    @staticmethod
    def forward(ctx, student_logits: Tensor, inplace: bool) -> Tensor:
        ctx.inplace = inplace
        ctx.save_for_backward(student_logits)
        return student_logits.view_as(student_logits)

    @staticmethod
    def backward(ctx, gradient):
        (student_logits,) = ctx.saved_tensors
        if ctx.inplace:
            gradient = student_logits.detach().copy_(gradient)
        return once(gradient, student_logits), None


def row_statistics(rows: Rows, inplace_gradient: bool, backend: str) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS of every row, differentiable as RowStatistics says, on any backend."""
    if backend != "reference":
        return RowStatistics.apply(*rows, inplace_gradient, backend)
    from .backends import reference

    student = ReferenceStudent.apply(rows.student_logits, inplace_gradient)
    return reference.statistics(rows._replace(student_logits=student))


def _row_gradient(*arguments) -> Tensor:
    rows, (statistics, inplace, *upstream, backend) = arguments[:_NUM_ROWS], arguments[_NUM_ROWS:]
    if not inplace:
        return ops.row_gradient(*rows, statistics, *upstream, backend)
    # A detached alias shares the version counter: whoever saved the logits gets an error, not wrong values.
    gradient = rows[0].detach()
    ops.row_gradient_(gradient, *rows[1:], statistics, *upstream, backend)
    torch.autograd.graph.increment_version(gradient)
    return gradient


def save_tensors(ctx, *tensors: Tensor | None) -> None:
    """save_for_backward, which refuses what torch.inference_mode() made: a teacher's logits, most likely."""
    ctx.unsaved = {}
    if not torch.compiler.is_compiling():
        ctx.unsaved = {i: tensor for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unsaved else tensor for i, tensor in enumerate(tensors)))


def saved_tensors(ctx) -> tuple[Tensor | None, ...]:
    return tuple(ctx.unsaved.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors))


class RowStatistics(Function):
    """(divergence, teacher_entropy, student_entropy, teacher_lse, student_lse, cross_entropy), each [...].

    apply(*Rows, inplace_gradient, backend). Differentiable in student_logits (divergence, student_entropy,
    student_lse, cross_entropy) and in `temperatures` (divergence, student_lse). Saves both logits and the statistics:
    52 bytes a row, 100 with a recipe (and 28 for every temperature after the first), 8 more where a temperature
    requires grad.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *rows, inplace, backend = arguments
        statistics = ops.row_statistics(*rows, ctx.needs_input_grad[_TEMPERATURES], backend)
        return RowStatistics.keep(ctx, rows, statistics, inplace, backend)

    @staticmethod
    def keep(ctx, rows, statistics: Tensor, inplace: bool, backend: str) -> tuple[Tensor, ...]:
        """The public fields of `statistics`, which backward will take for those of the rows."""
        ctx.inplace, ctx.backend = inplace, backend
        save_tensors(ctx, *(rows[i] for i in _TENSORS), statistics)
        ctx.constants = [None if i in _TENSORS else constant for i, constant in enumerate(rows)]
        ctx.set_materialize_grads(False)
        fields = statistics.unbind(0)[: len(PUBLIC_FIELDS)]
        ctx.mark_non_differentiable(fields[1], fields[3])  # the teacher's
        return fields

    @staticmethod
    def backward(ctx, g_divergence, _g_teacher_entropy, g_entropy, _g_teacher_lse, g_lse, g_hard):
        *tensors, statistics = saved_tensors(ctx)
        arguments = list(ctx.constants)
        for i, tensor in zip(_TENSORS, tensors, strict=True):
            arguments[i] = tensor
        rows = Rows(*arguments)
        grads = [None] * (_NUM_ROWS + 2)
        if ctx.needs_input_grad[_TEMPERATURES]:
            grads[_TEMPERATURES] = _temperature_gradient(rows, statistics, g_divergence, g_lse)
        if ctx.needs_input_grad[0]:
            # A graph of the backward needs a node that raises; otherwise the operator alone will do.
            differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            gradient = RowGradient.apply if differentiated else _row_gradient
            upstream = (g_divergence, g_entropy, g_lse, g_hard)
            grads[0] = gradient(*rows, statistics, ctx.inplace, *upstream, ctx.backend)
        return tuple(grads)


def _temperature_gradient(rows: Rows, statistics: Tensor, g_divergence: Tensor | None, g_lse: Tensor | None) -> Tensor:
    total = torch.zeros_like(statistics[0])
    for g, slope in zip((g_divergence, g_lse), statistics[-len(SLOPES) :], strict=True):
        if g is not None:
            # An infinite divergence has no slope; where nothing flows back into it, it must not matter.
            total = total + torch.where(g == 0, 0.0, g * slope)
    if rows.keep is not None:
        total = torch.where(rows.keep, total, 0.0)
    if rows.temperatures.dim() == 0:
        total = total.sum()
    return once(total.to(rows.temperatures.dtype), rows.temperatures)


class OnePass(Function):
    """(loss 0-d, statistics, anchor): scale / denominator * sum over rows of the row losses, and stats.LOSS_STATISTICS.

    apply(*Rows, *LossRule, inplace_gradient, backend). The loss is differentiable in student_logits. The gradient is
    finished in forward; backward multiplies it by the upstream scalar, in place unless the graph is retained. The
    anchor is for `once` alone: the loss itself may be modified in place (loss /= 4) before its backward.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *operands, inplace, ctx.backend = arguments
        if inplace:
            gradient = operands[0].detach()  # see _row_gradient
            loss, statistics = ops.one_pass_(gradient, *operands[1:], ctx.backend)
            torch.autograd.graph.increment_version(gradient)
        else:
            loss, statistics, gradient = ops.one_pass(*operands, ctx.backend)
        ctx.num_inputs = len(arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(statistics)
        anchor = torch.empty_like(loss)
        ctx.save_for_backward(gradient, anchor)
        return loss, statistics, anchor

    @staticmethod
    def backward(ctx, g_loss, *_):
        gradient, anchor = ctx.saved_tensors
        grads = [None] * ctx.num_inputs
        if g_loss is not None:
            grads[0] = once(scaled(gradient, g_loss, ctx.backend), anchor)
        return tuple(grads)


def scaled(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    """gradient * factor with one rounding; over the gradient itself where nobody needs it afterwards."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_retained():
        return ops.scale_gradient(gradient.detach(), factor, backend)
    ops.scale_gradient_(gradient, factor, backend)
    return gradient
