"""The definition of every number: log_softmax formulas in plain PyTorch, differentiated by PyTorch.

It shares no maths with the kernels and takes any floating dtype on any device. It is not fast and holds several
[rows, vocab] tensors. torch.compile traces through it.
"""

import torch
from torch import Tensor

from .. import divergences
from ..ops import STANDARDIZE, Recipe, Rows, statistics_dtype


def unavailable_reason():
    return None


def unsupported_reason(device, dtypes):
    return None


def statistics(rows: Rows) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS as tensors [...], with PyTorch's own graph."""
    recipe = Recipe.of(rows.recipe) or Recipe(temperatures=(rows.temperature,))
    student = _logits(rows.student_logits, rows, recipe.student_scale, recipe.student_cap)
    teacher = _logits(rows.teacher_logits, rows, recipe.teacher_scale, recipe.teacher_cap)
    # A side that is -inf throughout has no distribution: its own statistics are 0.
    no_student, no_teacher = ((logits == -torch.inf).all(-1) for logits in (student, teacher))
    seen = student, teacher
    if recipe.standardize:
        seen = tuple(map(_standardized, seen))
    divergence, teacher_lse, student_lse = _divergence(*seen, rows, recipe)
    raw = seen if recipe.standardize == STANDARDIZE["all"] else (student, teacher)
    student_entropy, teacher_entropy = (entropy(_log_softmax(x / rows.entropy_temperature)) for x in raw)
    fields = (
        divergence,
        teacher_entropy.masked_fill(no_teacher, 0),
        student_entropy.masked_fill(no_student, 0),
        teacher_lse.masked_fill(no_teacher, 0),
        student_lse.masked_fill(no_student, 0),
        _cross_entropy(student, rows.labels).masked_fill(no_student, 0),
    )
    return fields if rows.keep is None else tuple(torch.where(rows.keep, field, 0.0) for field in fields)


def sparse_statistics(rows: Rows, columns, wants_rest: bool) -> tuple[Tensor | None, ...]:
    """sparse_rows.StudentRow as a tuple, with PyTorch's own graph. columns: sparse_rows.Columns."""
    recipe = Recipe.of(rows.recipe) or Recipe(temperatures=(rows.temperature,))
    _, _, entropy, _, lse, cross_entropy = statistics(rows)
    student = _logits(rows.student_logits, rows, recipe.student_scale, recipe.student_cap)
    z = divided(student, rows.temperature if rows.temperatures is None else rows.temperatures)
    log_q = torch.where(columns.member, _log_softmax(z).gather(-1, columns.ids), -torch.inf)
    if not wants_rest:
        return entropy, lse, cross_entropy, log_q, None
    is_named = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool, device=z.device)
    is_named = is_named.scatter(-1, columns.masked, True)[..., :-1]
    whole = logsumexp(z)
    log_rest = logsumexp(z.masked_fill(is_named, -torch.inf)) - torch.where(whole == -torch.inf, 0.0, whole)
    return entropy, lse, cross_entropy, log_q, log_rest if rows.keep is None else torch.where(rows.keep, log_rest, 0.0)


def _logits(logits: Tensor, rows: Rows, scale: float, cap: float) -> Tensor:
    """The used columns in the arithmetic dtype. Rows left out become zeros: whatever they hold cannot spread."""
    logits = logits[..., : rows.vocab_size].to(statistics_dtype(rows.student_logits, rows.teacher_logits))
    logits = logits if rows.keep is None else torch.where(rows.keep[..., None], logits, 0.0)
    return capped(logits if scale == 1 else logits * scale, cap)


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap); 0: no cap."""
    if cap == 0:
        return logits
    masked = logits == -torch.inf  # and stays so: -inf is no logit
    return torch.where(masked, -torch.inf, cap * torch.tanh(logits.masked_fill(masked, 0) / cap))


def _standardized(logits: Tensor) -> Tensor:
    """(x - mean)/(1e-7 + deviation), the deviation unbiased; masked columns do not count."""
    masked = logits == -torch.inf
    count = (~masked).sum(-1, keepdim=True)
    mean = logits.masked_fill(masked, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(masked, 0.0, logits - mean)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    # sqrt at 0 has no derivative, and equal logits have no deviation to differentiate
    deviation = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, variance).sqrt())
    return torch.where(masked, -torch.inf, centred / (1e-7 + deviation))


def _divergence(student: Tensor, teacher: Tensor, rows: Rows, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of factors_k D at temperatures_k, lse of the teacher and of the student at the last of them)."""
    total = 0.0
    for tau, factor in zip(recipe.temperatures, recipe.factors, strict=True):
        z, y = (divided(x, tau if rows.temperatures is None else rows.temperatures) for x in (student, teacher))
        if rows.class_bias is not None:
            y = y + rows.class_bias
        if recipe.divergence == divergences.DECOUPLED:
            value = _decoupled(y, z, rows.labels, recipe.first, recipe.second)
        else:
            kind = divergences.of_code(recipe.divergence, recipe.first, recipe.second)
            value = summed(kind, _log_softmax(y), _log_softmax(z))
        total = total + factor * value
    teacher_lse, student_lse = logsumexp(y), logsumexp(z)
    # Nothing hides NaN or +inf, no mass on the other side either.
    wrong = ~((teacher_lse < torch.inf) & (student_lse < torch.inf))
    return torch.where(wrong, torch.nan, total), teacher_lse, student_lse


def divided(logits: Tensor, temperature: float | Tensor) -> Tensor:
    if not torch.is_tensor(temperature):
        return logits / temperature
    # d/dtau of a masked column would be 0 * inf. Its logit stays in the graph, for the gradient of a student that is
    # -inf under teacher mass.
    tau, masked = temperature.to(logits.dtype)[..., None], logits == -torch.inf
    return torch.where(masked, logits / tau.detach(), logits.masked_fill(masked, 0) / tau)


def _log_softmax(logits: Tensor) -> Tensor:
    """-inf throughout where the logits are: no mass at all."""
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    return torch.where(nothing, -torch.inf, torch.where(nothing, 0.0, logits).log_softmax(-1))


def logsumexp(logits: Tensor) -> Tensor:
    """-inf, without a gradient, where all logits are."""
    nothing = (logits == -torch.inf).all(-1)
    return torch.where(nothing, -torch.inf, torch.where(nothing[..., None], 0.0, logits).logsumexp(-1))


def summed(divergence: divergences.Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Over columns in which a side has mass."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    columns = divergence.columns(*(torch.where(neither, 0.0, x) for x in (log_p, log_q)))
    return torch.where(neither, 0.0, columns).sum(-1)


def _decoupled(y: Tensor, z: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha TCKD + beta NCKD (functional.ea_dkd_loss)."""
    valid = (labels >= 0) & (labels < z.shape[-1])
    label = torch.where(valid, labels, 0)[..., None]
    is_label = torch.zeros_like(z, dtype=torch.bool).scatter(-1, label, True)
    rest_y, rest_z = (x.masked_fill(is_label, -torch.inf) for x in (y, z))
    # log(p_k/(1 - p_k)), from which log p_k and log(1 - p_k) come without cancellation
    p, q = (_log_odds(x, rest, label) for x, rest in ((y, rest_y), (z, rest_z)))
    rest = summed(divergences.ForwardKL(), _log_softmax(rest_y), _log_softmax(rest_z))
    return torch.where(valid, decoupled(p, q, rest, alpha, beta), torch.nan)


def decoupled(p: Tensor, q: Tensor, rest: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha TCKD + beta NCKD, from the label's log-odds on both sides and NCKD."""
    target = sum(
        torch.sigmoid(sign * p) * _where_mass(p, sign, _log_sigmoid(sign * p) - _log_sigmoid(sign * q))
        for sign in (1, -1)
    )
    parts = [(alpha, target), (beta, rest)]
    return sum((weight * part for weight, part in parts if weight != 0), torch.zeros_like(rest))


def _log_odds(logits: Tensor, rest: Tensor, label: Tensor) -> Tensor:
    return log_odds(logits.gather(-1, label)[..., 0], logsumexp(rest))


def log_odds(at_label: Tensor, others: Tensor) -> Tensor:
    """log(p_k/(1 - p_k)): +inf where the label is all there is; -inf where it has no mass, or nothing has."""
    return torch.where(at_label == -torch.inf, -torch.inf, at_label - torch.where(at_label == -torch.inf, 0.0, others))


def _log_sigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)


def _where_mass(log_odds: Tensor, sign: int, x: Tensor) -> Tensor:
    return torch.where(log_odds == -sign * torch.inf, 0.0, x)


def entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)


def _cross_entropy(student: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return torch.zeros_like(student[..., 0])
    valid = (labels >= 0) & (labels < student.shape[-1])
    picked = _log_softmax(student).gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    return torch.where(valid, -picked, torch.nan)


def scale_gradient(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    out.copy_(gradient.to(torch.promote_types(gradient.dtype, factor.dtype)) * factor)
