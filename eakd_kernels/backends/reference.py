"""The definition of every number: log_softmax formulas in plain PyTorch, differentiated by PyTorch.

It shares no maths with the kernels and takes any floating dtype on any device. It is not fast and holds several
[rows, vocab] tensors.
"""

import torch
from torch import Tensor

from .. import weighting
from ..ops import WEIGHTINGS, LossRule, Rows, statistics_dtype
from ..stats import LOSS_STATISTICS, PUBLIC_FIELDS, STATISTICS, RowStats

_WEIGHTING_NAMES = {code: name for name, code in WEIGHTINGS.items()}


def unavailable_reason():
    return None


def unsupported_reason(device, dtypes):
    return None


def _logits(logits: Tensor, rows: Rows) -> Tensor:
    """The used columns in the arithmetic dtype. Rows left out become zeros: whatever they hold cannot spread."""
    logits = logits[..., : rows.vocab_size].to(statistics_dtype(*rows[:2]))
    return logits if rows.keep is None else torch.where(rows.keep[..., None], logits, 0.0)


def _divided(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature, with a derivative in the temperature that a masked column (-inf) does not make NaN."""
    masked = logits == -torch.inf
    divided = torch.where(masked, 0.0, logits) / temperature[..., None]
    return torch.where(masked, -torch.inf, divided)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, torch.zeros_like(p).masked_fill(p.isnan(), torch.nan))).sum(-1)


def _cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    valid = (labels >= 0) & (labels < student.shape[-1])
    picked = student.log_softmax(-1).gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    return torch.where(valid, -picked, torch.nan)


def _formulas(rows: Rows, student: Tensor, teacher: Tensor, temperature: Tensor) -> dict[str, Tensor]:
    """The public fields; `student` and `temperature` may carry a graph."""
    no_student, no_teacher = ((x == -torch.inf).all(-1) for x in (student, teacher))
    student = torch.where(no_student[..., None], 0.0, student)
    teacher = torch.where(no_teacher[..., None], 0.0, teacher)
    scaled = _divided if temperature.requires_grad else lambda x, tau: x / tau[..., None]
    log_p, log_q = scaled(teacher, temperature).log_softmax(-1), scaled(student, temperature).log_softmax(-1)
    fields = {
        "divergence": torch.where(no_teacher, 0.0, torch.where(no_student, torch.inf, _forward_kl(log_p, log_q))),
        "teacher_entropy": _entropy((teacher / rows.entropy_temperature).log_softmax(-1)).masked_fill(no_teacher, 0),
        "student_entropy": _entropy((student / rows.entropy_temperature).log_softmax(-1)).masked_fill(no_student, 0),
        "teacher_lse": scaled(teacher, temperature).logsumexp(-1).masked_fill(no_teacher, 0),
        "student_lse": scaled(student, temperature).logsumexp(-1).masked_fill(no_student, 0),
        "cross_entropy": torch.zeros_like(log_p[..., 0]),
    }
    if rows.labels is not None:
        fields["cross_entropy"] = _cross_entropy(student, rows.labels).masked_fill(no_student, 0)
    if rows.keep is not None:
        fields = {name: torch.where(rows.keep, value, 0.0) for name, value in fields.items()}
    return fields


def _temperature(rows: Rows, dtype: torch.dtype) -> Tensor:
    leading, device = rows.student_logits.shape[:-1], rows.student_logits.device
    if rows.temperatures is None:
        return torch.full(leading, rows.temperature, dtype=dtype, device=device)
    tau = rows.temperatures.to(dtype).expand(leading)
    return tau.clone() if rows.keep is None else torch.where(rows.keep, tau, 1.0)


def row_statistics(rows, temperature_slopes):
    student, teacher = _logits(rows.student_logits, rows), _logits(rows.teacher_logits, rows)
    temperature = _temperature(rows, student.dtype)
    fields = _formulas(rows, student, teacher, temperature)
    if temperature_slopes:
        with torch.enable_grad():
            temperature.requires_grad_()
            live = _formulas(rows, student, teacher, temperature)
            for name in ("divergence", "student_lse"):
                (slope,) = torch.autograd.grad(live[name].sum(), temperature, retain_graph=True)
                fields[f"{name}_slope"] = slope
    zero = torch.zeros_like(temperature)
    # The maxima and sums that kernels save for their gradient stay 0: here PyTorch differentiates the formulas.
    return torch.stack([fields.get(name, zero).detach() for name in STATISTICS])


def row_gradient(rows, statistics, upstream, gradient):
    student, teacher = _logits(rows.student_logits, rows), _logits(rows.teacher_logits, rows)
    with torch.enable_grad():
        student = student.detach().requires_grad_()
        fields = _formulas(rows, student, teacher, _temperature(rows, student.dtype))
        names = ("divergence", "student_entropy", "student_lse", "cross_entropy")
        given = [(fields[name], g.to(student.dtype)) for name, g in zip(names, upstream, strict=True) if g is not None]
        outputs = [output for output, _ in given if output.requires_grad]
        upstreams = [g.expand(output.shape) for output, g in given if output.requires_grad]
        (exact,) = torch.autograd.grad(outputs, student, upstreams, materialize_grads=True)
    if rows.keep is not None:
        exact = torch.where(rows.keep[..., None], exact, 0.0)
    gradient[..., : rows.vocab_size].copy_(exact)
    gradient[..., rows.vocab_size :].zero_()


def one_pass(rows, rule: LossRule, gradient):
    statistics = row_statistics(rows, False)
    stats = RowStats(None, None, *statistics[: len(PUBLIC_FIELDS)])
    name = _WEIGHTING_NAMES[rule.weighting]
    weight = rule.weights if name == "tensor" else weighting.BUILT_IN[name](stats, rule.entropy_bound)
    weight = weight.to(statistics.dtype) * rule.weight_scale
    if rows.keep is not None:
        weight = torch.where(rows.keep, weight, 0.0)
    tau_squared = _temperature(rows, statistics.dtype) ** 2 if rule.tau_squared else 1.0
    loss = weighting.row_loss(
        stats.divergence, weight, stats.cross_entropy, tau_squared, rule.kd_weight, rule.ce_weight
    )
    scale = rule.scale if rule.denominator is None else rule.scale / rule.denominator.to(statistics.dtype)
    factor = torch.as_tensor(rule.kd_weight * weight * tau_squared * scale).expand(loss.shape)
    hard = None if rule.ce_weight == 0 else torch.full_like(loss, rule.ce_weight) * scale
    row_gradient(rows, statistics, (factor, None, None, hard), gradient)
    named = dict(zip(PUBLIC_FIELDS, stats[2:], strict=True), weight=weight, loss=loss)
    return loss.sum() * scale, torch.stack([named[field] for field in LOSS_STATISTICS])
