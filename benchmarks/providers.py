"""Who competes: the formula as one writes it in PyTorch, the same through torch.compile, and this package.

A provider takes (student, teacher, labels) and returns the loss. `wrong` compares one with fp64 before it is timed.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import eakd_kernels
from eakd_kernels.dispatch import resolve

from .cases import CE_WEIGHT, DTYPES, ENTROPY_TEMPERATURE, TEMPERATURE, Case, Inputs

Provider = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Relative errors allowed of the mean loss, and of a gradient row in units of its largest element (beside the rounding
# to the gradient's dtype). A wrong formula is off by far more, fp32 arithmetic by less.
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5


def providers(case: Case, reference: bool = False) -> dict[str, Provider]:
    """By name; this package's are called "eakd <backend>". `reference`: that backend too."""
    torch.compiler.reset()  # one case's compilations are neither reused by the next nor counted against its limit
    backends = [name for name in eakd_kernels.available_backends() if reference or name != "reference"]
    ours = {f"eakd {name}": partial(ours_on, name) for name in backends if _takes(name, case)}
    return {"eager": eager, "compile": torch.compile(eager, dynamic=False), **ours}


def eager(student, teacher, labels):
    """Logits go to fp32, as everybody does who has compared bf16's result with it."""
    return formula(student.float(), teacher.float(), labels)


def formula(student, teacher, labels):
    log_p, log_q = (teacher / TEMPERATURE).log_softmax(-1), (student / TEMPERATURE).log_softmax(-1)
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    teacher_entropy = entropy(teacher)
    with torch.no_grad():
        student_entropy = entropy(student)
    weight = (teacher_entropy + teacher_entropy * student_entropy / math.log(student.shape[-1])) / 2
    loss = (weight * TEMPERATURE**2 * divergence).mean()
    return loss if labels is None else loss + CE_WEIGHT * F.cross_entropy(student, labels)


def entropy(logits):
    log_probabilities = (logits / ENTROPY_TEMPERATURE).log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def ours_on(backend, student, teacher, labels):
    return eakd_kernels.ea_kd_loss(
        student,
        teacher,
        labels,
        temperature=TEMPERATURE,
        entropy_temperature=ENTROPY_TEMPERATURE,
        ce_weight=0.0 if labels is None else CE_WEIGHT,
        backend=backend,
    )


def run(provider: Provider, inputs: Inputs) -> Tensor:
    """One step: the loss, and a fresh gradient where there is one."""
    inputs.student.grad = None
    loss = provider(*inputs)
    if loss.requires_grad:
        loss.backward()
    return loss


def in_fp64(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The loss and the gradient, in fp64 from the same rounded inputs."""
    student = inputs.student.detach().double().requires_grad_(inputs.student.requires_grad)
    loss = run(formula, Inputs(student, inputs.teacher.double(), inputs.labels))
    return loss.detach(), student.grad


def wrong(provider: Provider, inputs: Inputs, exact: tuple[Tensor, Tensor | None]) -> str | None:
    """What is wrong with a provider's result, or None."""
    loss, exact_loss, exact_gradient = run(provider, inputs).item(), exact[0].item(), exact[1]
    if not abs(loss - exact_loss) <= LOSS_TOLERANCE * abs(exact_loss):
        return f"loss {loss:.9g}, in fp64 {exact_loss:.9g}"
    if exact_gradient is None:
        return None
    gradient, limits = inputs.student.grad, torch.finfo(inputs.student.dtype)
    rounding = limits.eps / 2 * exact_gradient.abs() + limits.eps * limits.tiny
    noise = GRADIENT_TOLERANCE * exact_gradient.abs().amax(-1, keepdim=True)
    excess = (gradient - exact_gradient).abs() / (rounding + noise)
    if not excess.max() <= 1:  # NaN is wrong too
        row, column = divmod(int(excess.argmax()), excess.shape[-1])
        return f"gradient {gradient[row, column]:.6g} at {row, column}, in fp64 {exact_gradient[row, column]:.6g}"
    return None


def _takes(backend: str, case: Case) -> bool:
    dtype = DTYPES[case.dtype]
    try:
        resolve(backend, "cpu", dtype, dtype)
    except RuntimeError:
        return False
    return True
