"""A competitor, one step of it, and whether it computes what it claims: nothing is timed before that is known."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Inputs

# Relative errors allowed of the mean loss, and of a gradient row in units of its largest element (beside the rounding
# to the gradient's dtype): ours, and PyTorch's in fp32, whose sums over 262144 columns are off by 1e-5. A wrong formula
# is off by far more.
TOLERANCE, FP32_TOLERANCE = 1e-5, 5e-5
# fp64 logits that `check` holds at a time.
CHECKED_BYTES = 1 << 28

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of (student, teacher, labels): a scalar


class Provider(NamedTuple):
    loss: Loss
    formula: Loss  # what it computes
    name_of_formula: str = "EA-KD"
    tolerance: float = TOLERANCE
    version: str = ""  # of another package


class Check(NamedTuple):
    loss_error: float  # relative
    gradient_error: float | None  # in units of the row's largest element
    wrong: str | None


def in_a_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def forget(inputs: tuple[Tensor | None, ...]) -> None:
    """Gradients of an earlier step."""
    for tensor in inputs:
        if tensor is not None:
            tensor.grad = None


def run(loss: Loss, inputs: tuple[Tensor | None, ...], between: Callable[[], object] = lambda: None) -> Tensor:
    """One step: the loss, and fresh gradients where there are any. `between` is called after forward."""
    forget(inputs)
    value = loss(*inputs)
    between()
    if value.requires_grad:
        value.backward()
    return value


def in_fp64(formula: Loss, inputs: Inputs, rows: slice = slice(None)) -> tuple[float, Tensor | None]:
    """What these rows add to the mean loss, and their gradient, from the same rounded inputs."""
    student = inputs.student.detach()[rows].double().requires_grad_(inputs.student.requires_grad)
    labels = None if inputs.labels is None else inputs.labels[rows]
    share = len(student) / len(inputs.student)
    part = run(lambda *tensors: formula(*tensors) * share, Inputs(student, inputs.teacher[rows].double(), labels))
    return part.item(), student.grad


def check(provider: Provider, inputs: Inputs, in_fp64: Callable = in_fp64) -> Check:
    """How far off a provider is, and what is wrong with it where that is too far. All rows, a few at a time."""
    loss, gradient = run(provider.loss, inputs).item(), inputs.student.grad
    height = max(1, CHECKED_BYTES // (8 * inputs.student.shape[-1]))
    exact_loss, gradient_error, wrong = 0.0, None, None
    for start in range(0, len(inputs.student), height):
        rows = slice(start, start + height)
        part, exact = in_fp64(provider.formula, inputs, rows)
        exact_loss += part
        if exact is not None:
            error, complaint = _compare(gradient[rows], exact, provider.tolerance)
            gradient_error = max(error, gradient_error or 0.0)
            wrong = wrong or complaint
    loss_error = abs(loss - exact_loss) / abs(exact_loss)
    if not loss_error <= provider.tolerance:
        wrong = f"loss {loss:.9g}, in fp64 {exact_loss:.9g}"
    return Check(loss_error, gradient_error, wrong)


def _compare(gradient: Tensor, exact: Tensor, tolerance: float) -> tuple[float, str | None]:
    limits, largest = torch.finfo(gradient.dtype), exact.abs().amax(-1, keepdim=True)
    error = (gradient - exact).abs()
    excess = error / (limits.eps / 2 * exact.abs() + limits.eps * limits.tiny + tolerance * largest)
    complaint = None
    if not excess.max() <= 1:  # NaN is wrong too
        row, column = divmod(int(excess.argmax()), excess.shape[-1])
        complaint = f"gradient {gradient[row, column]:.6g} at column {column}, in fp64 {exact[row, column]:.6g}"
    return (error / largest).max().item(), complaint
