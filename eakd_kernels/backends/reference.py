"""The definition of every number: log_softmax formulas in plain PyTorch, differentiated by PyTorch.

It shares no maths with the kernels and takes any floating dtype on any device. It is not fast and holds several
[rows, vocab] tensors. torch.compile traces through it.
"""

import torch
from torch import Tensor

from ..ops import Rows, statistics_dtype


def unavailable_reason():
    return None


def unsupported_reason(device, dtypes):
    return None


def statistics(rows: Rows) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS as tensors [...], with PyTorch's own graph."""
    student, teacher = _logits(rows.student_logits, rows), _logits(rows.teacher_logits, rows)
    # A side that is -inf throughout has no distribution: its statistics are 0.
    no_student, no_teacher = ((logits == -torch.inf).all(-1) for logits in (student, teacher))
    student = torch.where(no_student[..., None], 0.0, student)
    teacher = torch.where(no_teacher[..., None], 0.0, teacher)
    z, y = _divided(student, rows), _divided(teacher, rows)
    student_lse, teacher_lse = z.logsumexp(-1), y.logsumexp(-1).detach()
    # 0 without a teacher, +inf without a student alone; NaN or +inf on the other side makes both NaN.
    divergence = torch.where(no_student, torch.inf + 0 * teacher_lse, _forward_kl(y.log_softmax(-1), z.log_softmax(-1)))
    fields = (
        torch.where(no_teacher, 0 * student_lse, divergence),
        _entropy((teacher / rows.entropy_temperature).log_softmax(-1)).masked_fill(no_teacher, 0),
        _entropy((student / rows.entropy_temperature).log_softmax(-1)).masked_fill(no_student, 0),
        teacher_lse.masked_fill(no_teacher, 0),
        student_lse.masked_fill(no_student, 0),
        _cross_entropy(student, rows.labels).masked_fill(no_student, 0),
    )
    return fields if rows.keep is None else tuple(torch.where(rows.keep, field, 0.0) for field in fields)


def _logits(logits: Tensor, rows: Rows) -> Tensor:
    """The used columns in the arithmetic dtype. Rows left out become zeros: whatever they hold cannot spread."""
    logits = logits[..., : rows.vocab_size].to(statistics_dtype(rows.student_logits, rows.teacher_logits))
    return logits if rows.keep is None else torch.where(rows.keep[..., None], logits, 0.0)


def _divided(logits: Tensor, rows: Rows) -> Tensor:
    """logits / temperature."""
    if rows.temperatures is None:
        return logits / rows.temperature
    # d/dtau of a masked column would be 0 * inf. Its logit stays in the graph, for the gradient of a student that is
    # -inf under teacher mass.
    tau, masked = rows.temperatures.to(logits.dtype)[..., None], logits == -torch.inf
    return torch.where(masked, logits / tau.detach(), logits.masked_fill(masked, 0) / tau)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)


def _cross_entropy(student: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return torch.zeros_like(student[..., 0])
    valid = (labels >= 0) & (labels < student.shape[-1])
    picked = student.log_softmax(-1).gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    return torch.where(valid, -picked, torch.nan)
