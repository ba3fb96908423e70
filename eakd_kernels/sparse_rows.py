"""What a sparse teacher's loss needs of a student's row: its log-probabilities at the teacher's ids, and of the rest.

The dense operators run with the student as its own teacher: one sweep has its entropy, log-sum-exp and cross-entropy,
and `ops.rest_statistics` the normaliser over all columns but the ids', since 1 minus their probabilities would have no
digits left where they are nearly all there is. In backward `ops.row_gradient` writes every column, and the ids' columns
are then written over, from their closed form: there two large terms would cancel.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .autograd import ReferenceStudent, once, save_tensors, saved_tensors
from .ops import Recipe, Rows
from .stats import named, normaliser

_NUM_ROWS, _TEMPERATURES = len(Rows._fields), Rows._fields.index("temperatures")
_SAVED = ("student_logits", "labels", "keep", "temperatures")


class Columns(NamedTuple):
    """Which columns a row names."""

    member: Tensor  # [..., K] bool; False for padding, and in rows left out
    ids: Tensor  # [..., K] int64, in 0..V-1; padding repeats a member's, or is 0 in a row without any
    masked: Tensor  # [..., K] int64; V for padding


def owners(member: Tensor) -> Tensor:
    """[..., K]: every slot's own number; for padding that of the first member, or 0 where there is none."""
    slots = torch.arange(member.shape[-1], device=member.device)
    first = torch.where(member, slots, member.shape[-1]).amin(-1, keepdim=True)
    return torch.where(member, slots, torch.where(first == member.shape[-1], 0, first))


class StudentRow(NamedTuple):
    """Tensors [...], 0 in rows left out, differentiable in the student and in a temperature that requires grad."""

    entropy: Tensor  # at the entropy temperature
    lse: Tensor  # logsumexp(x / tau)
    cross_entropy: Tensor
    log_q: Tensor  # [..., K], at tau; -inf for padding
    log_rest: Tensor | None  # log of what is left beside them, -inf if nothing


def student_row(rows: Rows, columns: Columns, wants_rest: bool, inplace: bool, backend: str) -> StudentRow:
    """rows.teacher_logits must be the student's own, detached, with the same scale and cap in the recipe."""
    if backend != "reference":
        return StudentRow(*SparseStatistics.apply(*rows, *columns, wants_rest, inplace, backend))
    from .backends import reference

    student = ReferenceStudent.apply(rows.student_logits, inplace)
    return StudentRow(*reference.sparse_statistics(rows._replace(student_logits=student), columns, wants_rest))


class _Picked(NamedTuple):
    """A row at its ids, [..., K] and [..., 1]."""

    x: Tensor  # logits, scaled and capped
    slope: Tensor | float  # dx/dz
    centre: Tensor  # the row's largest x; 0 if that is -inf
    log_sum: Tensor  # log sum exp((x - centre)/tau); +inf without columns, so that all probabilities are 0
    tau: Tensor | float


def _pick(rows: Rows, logits: Tensor, statistics: Tensor) -> _Picked:
    """logits: the row's at its ids, as they are."""
    x = logits.to(statistics.dtype)
    slope, recipe = 1.0, Recipe.of(rows.recipe)
    if recipe is not None:
        x, slope = _transformed(x, recipe.student_scale, recipe.student_cap)
    largest, total = (field[..., None] for field in normaliser(statistics, recipe is not None))
    nothing = total == 0
    centre = torch.where(nothing, 0.0, largest)
    log_sum = torch.where(nothing, torch.inf, total.log())
    tau = rows.temperature
    if rows.temperatures is not None:
        tau = rows.temperatures.detach().to(x.dtype)[..., None]
    return _Picked(x, slope, centre, log_sum, tau)


def _transformed(x: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor | float]:
    """(x, dx/dz): scaled, then capped; -inf stays, and does not move."""
    x = x * scale
    if cap == 0:
        return x, scale
    masked = x == -torch.inf
    share = torch.tanh(x.masked_fill(masked, 0) / cap)
    return torch.where(masked, -torch.inf, cap * share), torch.where(masked, 0.0, scale * (1 - share * share))


def _log_q(picked: _Picked, member: Tensor) -> Tensor:
    return torch.where(member, (picked.x - picked.centre) / picked.tau - picked.log_sum, -torch.inf)


def _log_rest(rest: Tensor, picked: _Picked) -> Tensor:
    """rest: ops.rest_statistics."""
    largest, total = rest[0][..., None], rest[1][..., None]
    nothing = total == 0
    log_rest = (torch.where(nothing, 0.0, largest) - picked.centre) / picked.tau + total.log() - picked.log_sum
    return torch.where(nothing, -torch.inf, log_rest)[..., 0]


def student_fields(
    rows: Rows, member: Tensor, logits: Tensor, statistics: Tensor, rest: Tensor | None
) -> tuple[Tensor | None, ...]:
    """StudentRow, from the row's logits at its ids, ops.row_statistics and ops.rest_statistics."""
    picked, fields = _pick(rows, logits, statistics), named(statistics, bool(rows.recipe))
    log_rest = None
    if rest is not None:
        log_rest = _log_rest(rest, picked)
        log_rest = log_rest if rows.keep is None else torch.where(rows.keep, log_rest, 0.0)
    scalars = (fields[name] for name in ("student_entropy", "student_lse", "cross_entropy"))
    return *scalars, _log_q(picked, member), log_rest


class SparseStatistics(Function):
    """StudentRow on a kernel backend.

    apply(*Rows, *Columns, wants_rest, inplace_gradient, backend). Saves the student's logits, the statistics, and 9
    bytes for each id.
    """

    @staticmethod
    def forward(ctx, *arguments):
        rows, (*columns, wants_rest, ctx.inplace, ctx.backend) = Rows(*arguments[:_NUM_ROWS]), arguments[_NUM_ROWS:]
        columns = Columns(*columns)
        slopes = ctx.needs_input_grad[_TEMPERATURES]
        statistics = ops.row_statistics(*rows, slopes, ctx.backend)
        rest = ops.rest_statistics(*rows, columns.masked, slopes, ctx.backend) if wants_rest else None
        ctx.set_materialize_grads(False)
        ctx.constants = rows._replace(teacher_logits=None, **dict.fromkeys(_SAVED))
        save_tensors(ctx, *(getattr(rows, name) for name in _SAVED), columns.member, columns.ids, statistics, rest)
        return student_fields(rows, columns.member, rows.student_logits.gather(-1, columns.ids), statistics, rest)

    @staticmethod
    def backward(ctx, *upstream):
        *tensors, member, ids, statistics, rest = saved_tensors(ctx)
        rows = ctx.constants._replace(**dict(zip(_SAVED, tensors, strict=True)))
        rows = rows._replace(teacher_logits=rows.student_logits.detach())
        grads = [None] * (_NUM_ROWS + len(Columns._fields) + 3)
        with torch.no_grad():
            logits = rows.student_logits.gather(-1, ids)
            given = upstream_of(upstream, member, statistics.dtype)
            job = RowBackward(rows, member, logits, member, ids, statistics, rest, given)
            temperature = temperature_gradient(job) if ctx.needs_input_grad[_TEMPERATURES] else None
            student = student_gradient(job, ctx.inplace, ctx.backend) if ctx.needs_input_grad[0] else None
        if temperature is not None:
            grads[_TEMPERATURES] = once(temperature, rows.temperatures)
        if student is not None:
            grads[0] = once(student, rows.student_logits)
        return tuple(grads)


class _Upstream(NamedTuple):
    """Of StudentRow's fields, [...] unless said otherwise."""

    entropy: Tensor | None
    lse: Tensor | float
    cross_entropy: Tensor | None
    log_q: Tensor  # [..., K], 0 for padding
    log_rest: Tensor | float


def upstream_of(gradients, member: Tensor, dtype: torch.dtype) -> _Upstream:
    entropy, lse, cross_entropy, log_q, log_rest = gradients
    log_q = torch.zeros_like(member, dtype=dtype) if log_q is None else torch.where(member, log_q, 0.0)
    return _Upstream(entropy, 0.0 if lse is None else lse, cross_entropy, log_q, 0.0 if log_rest is None else log_rest)


class RowBackward(NamedTuple):
    rows: Rows  # of the columns that the gradient is for
    member: Tensor  # of all columns that the row names, as are logits
    logits: Tensor  # [..., K]
    here: Tensor  # members among the rows' columns: all of them, unless the vocabulary is sharded
    ids: Tensor  # Columns.ids of those
    statistics: Tensor
    rest: Tensor | None  # ops.rest_statistics
    upstream: _Upstream


def student_gradient(job: RowBackward, inplace: bool, backend: str) -> Tensor:
    """[..., V]: the dense operator's, written over at the ids."""
    rows, (entropy, _, cross_entropy, *_) = job.rows, job.upstream
    picked = _pick(rows, job.logits, job.statistics)
    upstream = (None, entropy, _slope_elsewhere(job, picked), cross_entropy)
    if inplace:
        # See autograd._row_gradient. A column is read, as both sides, before it is written.
        gradient = rows.student_logits.detach()
        ops.row_gradient_(gradient, *rows[1:], job.statistics, *upstream, backend)
    else:
        gradient = ops.row_gradient(*rows, job.statistics, *upstream, backend)
    at_ids = _gradient_at_ids(job, picked).to(gradient.dtype)
    # A row that names nothing here has padding point at column 0, which stays what it is.
    at_ids = torch.where(job.here.any(-1, keepdim=True), at_ids, gradient.gather(-1, job.ids))
    gradient.scatter_(-1, job.ids, at_ids)
    if inplace:
        torch.autograd.graph.increment_version(gradient)
    return gradient


def _slope_elsewhere(job: RowBackward, picked: _Picked) -> Tensor:
    """[...]: tau times what the columns that are not named get for each of their q_j.

    d log q_k / d x_j = -q_j/tau of every named k, and d log r / d x_j = q_j (1 - r)/(r tau) of the rest's r.
    """
    upstream = job.upstream
    slope = upstream.lse - upstream.log_q.sum(-1)
    if job.rest is None:
        return slope
    named_mass = _log_q(picked, job.member).exp().sum(-1)
    # The smallest rest that is told from none: below it q_j, too, leaves the range of the dtype.
    smallest = torch.finfo(slope.dtype).tiny ** (2 / 3)
    return slope + upstream.log_rest * (named_mass / _log_rest(job.rest, picked).exp().clamp(min=smallest))


def _gradient_at_ids(job: RowBackward, picked: _Picked) -> Tensor:
    """[..., K]: d log q_k / d x_j = ([j = k] - q_j)/tau, d log r / d x_j = -q_j/tau, and those of docs/math.md."""
    upstream, fields, t = job.upstream, named(job.statistics, bool(job.rows.recipe)), job.rows.entropy_temperature
    masked = picked.x == -torch.inf
    x = torch.where(masked, 0.0, picked.x - picked.centre)
    q = _log_q(picked, job.member).exp()
    moved = upstream.lse - upstream.log_q.sum(-1) - upstream.log_rest
    gradient = (upstream.log_q + q * moved[..., None]) / picked.tau
    if upstream.entropy is not None:
        log_q = x / t - fields["student_entropy_sum"].log()[..., None]
        pull = -log_q.exp() * (log_q + fields["student_entropy"][..., None]) / t
        gradient = gradient + torch.where(masked, 0.0, upstream.entropy[..., None] * pull)
    if upstream.cross_entropy is not None and job.rows.labels is not None:  # torch.compile brings zeros for None
        share = torch.where(masked, 0.0, x.exp() / fields["student_hard_sum"][..., None])
        is_label = (job.ids == job.rows.labels[..., None]).to(share.dtype)
        gradient = gradient + upstream.cross_entropy[..., None] * (share - is_label)
    gradient = gradient * picked.slope
    # Padding repeats a member's column, and has to write what the member writes.
    gradient = gradient.gather(-1, owners(job.here))
    return gradient if job.rows.keep is None else torch.where(job.rows.keep[..., None], gradient, 0.0)


def temperature_gradient(job: RowBackward) -> Tensor:
    """d log q_k / d tau = -x_k/tau^2 - d lse / d tau, and likewise of the rest, whose lse has a slope of its own."""
    upstream, slope, tau = job.upstream, job.statistics[-1], job.rows.temperatures
    picked = _pick(job.rows, job.logits, job.statistics)
    terms = upstream.log_q * -(picked.x / picked.tau**2 + slope[..., None])
    # An infinite divergence has no slope; where nothing flows back into it, it must not matter.
    total = torch.where(upstream.log_q == 0, 0.0, terms).sum(-1) + upstream.lse * slope
    if job.rest is not None:
        total = total + upstream.log_rest * (job.rest[2] - slope)
    if job.rows.keep is not None:
        total = torch.where(job.rows.keep, total, 0.0)
    return (total.sum() if tau.dim() == 0 else total).to(tau.dtype)
