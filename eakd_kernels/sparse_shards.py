"""Sparse teachers of rows whose columns are sharded over a process group; docs/parallel.md has the exchange.

A rank's kernels sweep its own columns, as they would those of a whole row. What log q at the ids and of the rest is
made of comes from all ranks: merged statistics, the logits at the ids, each from the rank that has it, and the
normalisers over the columns that are not named. Every rank then computes sparse_rows' formulas on the same numbers, and
writes over the gradient at those ids that it has. torch.compile breaks its graph here.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from . import ops
from .autograd import ReferenceStudent, once, save_tensors, saved_tensors
from .backends import reference
from .ops import Recipe, Rows, statistics_dtype
from .sharding import Shards
from .sparse_rows import Columns, RowBackward, StudentRow, owners, student_fields, student_gradient, upstream_of
from .vocab_parallel import merged, merged_normalisers, of_shard

_NUM_ROWS = len(Rows._fields)
_SAVED = ("student_logits", "labels", "keep", "temperatures")


@torch.compiler.disable
def sharded_student_row(
    rows: Rows, columns: Columns, shards: Shards, wants_rest: bool, inplace: bool, backend: str
) -> StudentRow:
    """sparse_rows.student_row, but for a temperature that requires grad; labels and columns are global ids."""
    if torch.is_grad_enabled() and rows.temperatures is not None and rows.temperatures.requires_grad:
        raise NotImplementedError(
            "temperature requires grad, for which sharded logits and a sparse teacher do not go together: pass "
            "temperature.detach(), or gather the logits and leave process_group at None"
        )
    if backend != "reference":
        return StudentRow(*ShardedSparseStatistics.apply(*rows, *columns, wants_rest, inplace, backend, shards))
    student = ReferenceStudent.apply(rows.student_logits, inplace)
    return _reference_row(rows._replace(student_logits=student), columns, shards, wants_rest)


def _own(columns: Columns, shards: Shards) -> Columns:
    """Those of this rank, as it numbers them."""
    ids = shards.own_labels(columns.ids)
    here = columns.member & (ids >= 0)
    ids = torch.where(here, ids, 0)
    width = shards.columns.stop - shards.columns.start
    return Columns(here, ids.gather(-1, owners(here)), torch.where(here, ids, width))


def _of_owners(gathered: Tensor, columns: Columns, shards: Shards) -> Tensor:
    """[ranks, K, ...] -> [..., K]: from the rank that has each id."""
    return gathered.movedim(1, -1).gather(0, shards.owners(columns.ids)[None])[0]


class ShardedSparseStatistics(Function):
    """sparse_rows.SparseStatistics of rows of which this rank has some columns.

    apply(*Rows, *Columns, wants_rest, inplace_gradient, backend, shards). Two collectives, in forward. Saves the
    student's logits, the statistics, and 14 bytes for each id (18 in fp64).
    """

    @staticmethod
    def forward(ctx, *arguments):
        *columns, wants_rest, ctx.inplace, ctx.backend, shards = arguments[_NUM_ROWS:]
        rows, columns = Rows(*arguments[:_NUM_ROWS]), Columns(*columns)
        labels = rows.labels
        if labels is not None:
            rows = rows._replace(labels=shards.own_labels(labels))
        own = _own(columns, shards)
        statistics = merged(of_shard(rows, ctx.backend), rows, shards, labels)
        parts = _parts(rows, own, wants_rest, ctx.backend).to(statistics.dtype)
        logits, rest = _merged_parts(shards.gather(parts), rows, columns, shards)
        ctx.set_materialize_grads(False)
        ctx.constants = rows._replace(teacher_logits=None, **dict.fromkeys(_SAVED))
        saved = (columns.member, logits, own.member, own.ids, statistics, rest)
        save_tensors(ctx, *(getattr(rows, name) for name in _SAVED), *saved)
        return student_fields(rows, columns.member, logits, statistics, rest)

    @staticmethod
    def backward(ctx, *upstream):
        *tensors, member, logits, here, ids, statistics, rest = saved_tensors(ctx)
        rows = ctx.constants._replace(**dict(zip(_SAVED, tensors, strict=True)))
        rows = rows._replace(teacher_logits=rows.student_logits.detach())
        with torch.no_grad():
            if rows.vocab_size == 0:
                gradient = torch.zeros_like(rows.student_logits)
            else:
                given = upstream_of(upstream, member, statistics.dtype)
                job = RowBackward(rows, member, logits, here, ids, statistics, rest, given)
                gradient = student_gradient(job, ctx.inplace, ctx.backend)
        return once(gradient, rows.student_logits), *[None] * (_NUM_ROWS + len(Columns._fields) + 3)


def _parts(rows: Rows, own: Columns, wants_rest: bool, backend: str) -> Tensor:
    """[K, ...]: the shard's logits at the ids; and behind them, if wanted, ops.rest_statistics."""
    shape = own.ids.movedim(-1, 0).shape
    if rows.vocab_size == 0:
        return rows.student_logits.new_zeros(shape[0] + 2 * wants_rest, *shape[1:])
    logits = rows.student_logits.gather(-1, own.ids).movedim(-1, 0)
    if not wants_rest:
        return logits
    rest = ops.rest_statistics(*rows, own.masked, False, backend)
    return torch.cat([logits.to(rest.dtype), rest])


def _merged_parts(gathered: Tensor, rows: Rows, columns: Columns, shards: Shards) -> tuple[Tensor, Tensor | None]:
    """(logits at the ids, ops.rest_statistics) of whole rows, from _parts of all ranks."""
    k = columns.ids.shape[-1]
    logits = _of_owners(gathered[:, :k], columns, shards)
    if gathered.shape[1] == k:
        return logits, None
    tau = rows.temperature if rows.temperatures is None else rows.temperatures.double()
    rest = merged_normalisers(*gathered[:, k:].double().unbind(1), tau)
    return logits, torch.stack(rest).to(gathered.dtype)


# ---- plain PyTorch -----------------------------------------------------------------------------------------------


class _Gathered(Function):
    """Shards.gather of what is a function of this rank's columns alone: apply(values, shards).

    Every rank goes on with the same formulas, so the gradient of its own values is all that its columns need.
    """

    @staticmethod
    def forward(ctx, values, shards):
        ctx.rank = shards.rank
        return shards.gather(values)

    @staticmethod
    def backward(ctx, upstream):
        return upstream[ctx.rank], None


def _reference_row(rows: Rows, columns: Columns, shards: Shards, wants_rest: bool) -> StudentRow:
    """In fp64, with PyTorch's own graph. One collective."""
    x = _used_logits(rows)
    own, at_t = _own(columns, shards), x / rows.entropy_temperature
    z = reference.divided(x, rows.temperature if rows.temperatures is None else rows.temperatures)
    lse_t = reference.logsumexp(at_t)
    parts = [reference.logsumexp(z), lse_t, reference.entropy(at_t - _finite(lse_t)[..., None])]
    if wants_rest:
        is_named = torch.zeros(*z.shape[:-1], z.shape[-1] + 1, dtype=torch.bool, device=z.device)
        is_named = is_named.scatter(-1, own.masked, True)[..., : z.shape[-1]]
        parts.append(reference.logsumexp(z.masked_fill(is_named, -torch.inf)))
    if rows.labels is not None:
        label = shards.own_labels(rows.labels)[..., None].clamp(min=0)
        parts += [reference.logsumexp(x), x.gather(-1, label)[..., 0]]
    at_ids = z.gather(-1, own.ids).movedim(-1, 0)
    gathered = _Gathered.apply(torch.cat([torch.stack(parts), at_ids]), shards)
    lses, lses_t, entropies, *others = gathered[:, : len(parts)].unbind(1)
    lse, log_rest, cross_entropy = _whole(lses), None, torch.zeros_like(lses[0])
    if wants_rest:
        log_rest = _whole(others.pop(0)) - _finite(lse)
    if rows.labels is not None:
        cross_entropy = _cross_entropy(*others, shards.owners(rows.labels))
    log_q = _of_owners(gathered[:, len(parts) :], columns, shards) - _finite(lse)[..., None]
    scalars = [_merged_entropy(entropies, lses_t), _finite(lse), cross_entropy, log_rest]
    if rows.keep is not None:
        scalars = [None if field is None else torch.where(rows.keep, field, 0.0) for field in scalars]
    has_mass = columns.member & (lse != -torch.inf)[..., None]
    fields = (*scalars[:3], torch.where(has_mass, log_q, -torch.inf), scalars[3])
    dtype = statistics_dtype(rows.student_logits, rows.teacher_logits)
    return StudentRow(*(None if field is None else field.to(dtype) for field in fields))


def _used_logits(rows: Rows) -> Tensor:
    """The shard's used columns, scaled and capped, or one of -inf if it has none; rows left out are zeros."""
    recipe = Recipe.of(rows.recipe) or Recipe()
    logits = rows.student_logits[..., : rows.vocab_size].double()
    if rows.vocab_size == 0:
        return torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    logits = logits if rows.keep is None else torch.where(rows.keep[..., None], logits, 0.0)
    return reference.capped(logits * recipe.student_scale, recipe.student_cap)


def _whole(lses: Tensor) -> Tensor:
    """[ranks, ...] -> [...]"""
    return reference.logsumexp(lses.movedim(0, -1))


def _finite(lse: Tensor) -> Tensor:
    """0 where there are no columns."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def _merged_entropy(entropies: Tensor, lses: Tensor) -> Tensor:
    """vocab_parallel.merged's."""
    nothing = lses == -torch.inf
    log_shares = torch.where(nothing, 0.0, _finite(lses) - _finite(_whole(lses)))
    return torch.where(nothing, 0.0, log_shares.exp() * (entropies - log_shares)).sum(0)


def _cross_entropy(lses: Tensor, at_label: Tensor, owner: Tensor) -> Tensor:
    """owner: the rank that has each label."""
    lse = _whole(lses)
    cross_entropy = _finite(lse) - at_label.gather(0, owner.clamp(min=0)[None])[0]
    cross_entropy = torch.where(owner < 0, torch.nan, cross_entropy)
    return torch.where(lse == -torch.inf, 0.0, cross_entropy)


# ---- a teacher's likeliest columns -------------------------------------------------------------------------------


@torch.compiler.disable
def sharded_topk(rows: Rows, k: int, shards: Shards, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sparse_teacher.teacher_topk; rows.student_logits are the teacher's. Two collectives."""
    logits, ids = _likeliest(rows.student_logits, k, shards)
    member = torch.ones_like(ids, dtype=torch.bool)
    if backend == "reference":
        row = _reference_row(rows, Columns(member, ids, ids), shards, False)
        return ids, row.log_q, row.entropy, row.lse
    statistics = merged(of_shard(rows, backend), rows, shards, None)
    entropy, lse, _, logprobs, _ = student_fields(rows, member, logits, statistics, None)
    return ids, logprobs, entropy, lse


def _likeliest(logits: Tensor, k: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """(values, global ids); of equal ones those of the lower rank come first."""
    counts = [min(k, width) for width in shards.widths]
    values, ids = logits.topk(counts[shards.rank], dim=-1)
    # fp64 has room for both, so that one collective does.
    candidates = torch.stack([values.double(), (ids + shards.columns.start).double()])
    candidates = torch.nn.functional.pad(candidates, (0, max(counts) - counts[shards.rank]))
    gathered = shards.gather(candidates).unbind(0)
    values, ids = torch.cat([part[..., :n] for part, n in zip(gathered, counts, strict=True)], -1).unbind(0)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], ids.gather(-1, order[..., :k]).long()
