"""Any divergence of rows whose columns are sharded over a process group, in plain PyTorch.

A row becomes known in stages: moments (where logits are standardised), log-normalisers, then the divergence and the
entropies as sums over columns of formulas in log p and log q. The part of a stage that is this rank's is a function of
its columns and of what whole rows came to in the stages before. Parts are gathered, one collective a stage, and merged
on every rank in the order of ranks. Backward needs no collective, because parts come with their derivatives in what was
known before: what every rank's columns have to say about a normaliser is then known on every rank.

Columns are computed in fp64, a block of rows at a time: temporaries are of [rows of a block, columns of the shard].
Where the logits come from is not this file's business: GivenLogits has them all, and linear_shards.ProjectedLogits
makes those of a few rows again for every stage, and for backward.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import divergences
from .autograd import ReferenceStudent, once, save_tensors, saved_tensors
from .backends import reference
from .ops import STANDARDIZE, Recipe, Rows, statistics_dtype
from .sharding import Shards

# Entries of a block, unless one row has more. Autograd keeps some forty fp64 tensors of its size; on a CPU smaller ones
# cost no time, a GPU's work should outlast its launches.
_BLOCK = {"cpu": 1 << 18}
_BLOCK_ELSEWHERE = 1 << 20


class GivenLogits(NamedTuple):
    """Logits that are all there: one chunk."""

    student: Tensor  # [rows, columns]
    teacher: Tensor

    def chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, the student's logits, the teacher's) of every chunk."""
        yield slice(0, len(self.student)), *self

    def gradients(self, needed, fill: Callable[..., None]) -> tuple[Tensor | None, ...]:
        """Of the tensors that these logits are made of. fill(rows, student, teacher, out) computes a chunk's."""
        gradient = torch.empty_like(self.student)
        fill(slice(0, len(gradient)), *self, gradient)
        return gradient, None


def row_statistics(rows: Rows, shards: Shards, inplace_gradient: bool) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS of every row, differentiable as RowStatistics says; rows.labels are of the whole vocabulary.

    Two collectives, and one more where logits are standardised.
    """
    student = ReferenceStudent.apply(rows.student_logits, inplace_gradient)
    return statistics_of(rows, shards, GivenLogits, *flat(student, rows.teacher_logits))


def flat(*logits: Tensor) -> tuple[Tensor, ...]:
    """[..., columns] -> [rows, columns]."""
    return tuple(x.reshape(x.shape[:-1].numel(), x.shape[-1]) for x in logits)


def statistics_of(rows: Rows, shards: Shards, make: Callable, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """`row_statistics` of the logits make(*tensors), differentiable in these; of rows' own only shape and dtype."""
    leading, dtype = rows.student_logits.shape[:-1], statistics_dtype(*rows[:2])
    fields = (field.reshape(leading).to(dtype) for field in _fields(Shard(rows, shards), _Parts(rows), make, tensors))
    return tuple(field if rows.keep is None else torch.where(rows.keep, field, 0.0) for field in fields)


# ---- the parts of the stages -------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """Some rows of the shard in fp64, scaled and capped; rows left out are zeros."""

    rows: slice
    student: Tensor  # [rows, columns]
    teacher: Tensor
    is_label: Tensor | None  # [rows, columns] bool

    def at_label(self, x: Tensor) -> Tensor:
        """0 where another rank has the label."""
        return torch.where(self.is_label, x, 0.0).sum(-1)


class _Parts:
    """What columns come to in each stage: functions of Columns and of tensors [rows], to several tensors [rows].

    All but `moments` take the temperature, if it is a tensor, and what `moments` came to, if logits are standardised.
    """

    def __init__(self, rows: Rows):
        self.recipe = Recipe.of(rows.recipe) or Recipe(temperatures=(rows.temperature,))
        self.given_temperature = rows.temperatures is not None
        self.entropy_temperature, self.class_bias = rows.entropy_temperature, rows.class_bias
        self.labelled = rows.labels is not None
        self.decoupled = self.recipe.divergence == divergences.DECOUPLED
        pairs = 2 * len(self.recipe.temperatures)
        self.counts = {
            self.moments: 6 if self.recipe.standardize else 0,
            self.normalisers: pairs + 2 + (pairs if self.decoupled else 0) + (2 if self.labelled else 0),
            self.sums: pairs // 2 + 2,
        }

    def moments(self, columns: Columns) -> list[Tensor]:
        """Number, mean and squared deviations of the student's columns that are not -inf; the teacher's."""
        parts = []
        for x in (columns.student, columns.teacher):
            masked = x == -torch.inf
            count = (~masked).sum(-1).double()
            mean = x.masked_fill(masked, 0).sum(-1) / count.clamp(min=1)
            parts += [count, mean, torch.where(masked, 0.0, x - mean[:, None]).square().sum(-1)]
        return parts

    def normalisers(self, columns: Columns, *known: Tensor) -> list[Tensor]:
        """Log-sum-exps at every temperature (of all but the label, where that is apart) and at t, student and teacher.

        Then, where it is apart, the label's exponents at every temperature, and for the cross-entropy the student's
        log-sum-exp at 1 and its logit; 0 where another rank has the label.
        """
        exponents, at_t = self._exponents(columns, known)
        parts = [reference.logsumexp(self._rest(x, columns)) for x in exponents]
        parts += [reference.logsumexp(x) for x in at_t]
        if self.decoupled:
            parts += [columns.at_label(x) for x in exponents]
        if self.labelled:
            parts += [reference.logsumexp(columns.student), columns.at_label(columns.student)]
        return parts

    def sums(self, columns: Columns, *known: Tensor) -> list[Tensor]:
        """The divergence at every temperature (of all but the label), the student's entropy, the teacher's.

        known: in the end the log-sum-exps at every temperature and at t, of whole rows.
        """
        exponents, at_t = self._exponents(columns, known)
        of_temperatures = known[-2 - len(exponents) : -2]
        recipe = self.recipe
        kind = divergences.ForwardKL()
        if not self.decoupled:
            kind = divergences.of_code(recipe.divergence, recipe.first, recipe.second)
        log = [log_mass(self._rest(x, columns), lse) for x, lse in zip(exponents, of_temperatures, strict=True)]
        parts = [reference.summed(kind, log_p, log_q) for log_q, log_p in zip(log[::2], log[1::2], strict=True)]
        return parts + [reference.entropy(log_mass(x, lse)) for x, lse in zip(at_t, known[-2:], strict=True)]

    def _exponents(self, columns: Columns, known: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """([student, teacher] of every temperature, [student, teacher] at the entropy temperature), in nats."""
        temperatures = self.recipe.temperatures
        if self.given_temperature:
            temperatures, known = known[:1], known[1:]
        raw = seen = columns.student, columns.teacher
        if self.recipe.standardize:
            seen = [_standardized(x, *known[2 * i : 2 * i + 2]) for i, x in enumerate(raw)]
        exponents = [reference.divided(x, tau) for tau in temperatures for x in seen]
        if self.class_bias is not None:
            exponents[1::2] = [y + self.class_bias for y in exponents[1::2]]
        chosen = seen if self.recipe.standardize == STANDARDIZE["all"] else raw
        return exponents, [x / self.entropy_temperature for x in chosen]

    def _rest(self, x: Tensor, columns: Columns) -> Tensor:
        return x.masked_fill(columns.is_label, -torch.inf) if self.decoupled else x


def _standardized(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    masked = x == -torch.inf
    return torch.where(masked, -torch.inf, (x.masked_fill(masked, 0) - mean[:, None]) * inverse[:, None])


def log_mass(x: Tensor, lse: Tensor) -> Tensor:
    """x - lse; -inf throughout where there is no mass at all."""
    nothing = lse == -torch.inf
    return torch.where(nothing[:, None], -torch.inf, x - torch.where(nothing, 0.0, lse)[:, None])


# ---- whole rows --------------------------------------------------------------------------------------------------


def _fields(shard: "Shard", parts: _Parts, make: Callable, tensors) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS as fp64 tensors [rows], by way of all stages."""
    recipe, rows = parts.recipe, shard.rows
    exchange, known = exchanger(shard, make, tensors, parts.counts), shard.temperatures()
    if recipe.standardize:
        known += _merged_moments(exchange(parts.moments))
    gathered = exchange(parts.normalisers, *known).unbind(1)
    count = 2 * len(recipe.temperatures)
    lses = [reference.logsumexp(x.movedim(0, -1)) for x in gathered[: count + 2]]
    if not (parts.given_temperature and rows.temperatures.requires_grad):
        lses[1::2] = [lse.detach() for lse in lses[1::2]]  # derivatives in the teacher's would go nowhere
    *divergence, student_entropy, teacher_entropy = exchange(parts.sums, *known, *lses).sum(0).unbind(0)
    if parts.decoupled:
        at_label = [shard.of_owner(x) for x in gathered[count + 2 : 2 * count + 2]]
        divergence, lses[:count] = _with_labels(divergence, lses[:count], at_label, recipe)
        divergence = [shard.nan_without_owner(x) for x in divergence]
    student_lse, teacher_lse = lses[count - 2 : count]
    # Nothing hides NaN or +inf, neither no mass on the other side nor, in the gradient, the shard that has it not.
    wrong = ~((teacher_lse < torch.inf) & (student_lse < torch.inf))
    total = sum(factor * x for factor, x in zip(recipe.factors, divergence, strict=True))
    cross_entropy = torch.zeros_like(student_lse)
    if parts.labelled:
        cross_entropy = shard.cross_entropy(*gathered[-2:])
    return (
        total * torch.where(wrong, torch.nan, 1.0),
        teacher_entropy.detach(),
        student_entropy,
        torch.where(teacher_lse == -torch.inf, 0.0, teacher_lse).detach(),
        torch.where(student_lse == -torch.inf, 0.0, student_lse),
        cross_entropy,
    )


def _merged_moments(gathered: Tensor) -> list[Tensor]:
    """[mean, 1/(deviation + 1e-7)] of the student and of the teacher, from `_Parts.moments` of all ranks."""
    merged = []
    for count, mean, squares in zip(*[iter(gathered.unbind(1))] * 3, strict=True):
        total = count.sum(0)
        whole = (count * mean).sum(0) / total.clamp(min=1)
        variance = (squares + count * (mean - whole).square()).sum(0) / (total - 1).clamp(min=1)
        # sqrt at 0 has no derivative, and equal logits have no deviation to differentiate
        deviation = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, variance).sqrt())
        merged += [whole, 1 / (1e-7 + deviation)]
    return merged


def _with_labels(rests, lses, at_label, recipe: Recipe) -> tuple[list[Tensor], list[Tensor]]:
    """(alpha TCKD + beta NCKD at every temperature, log-sum-exps with the label's column) from those of the rest."""
    odds = [reference.log_odds(label, lse) for label, lse in zip(at_label, lses, strict=True)]
    values = [
        reference.decoupled(p, q, rest, recipe.first, recipe.second)
        for q, p, rest in zip(odds[::2], odds[1::2], rests, strict=True)
    ]
    both = [reference.logsumexp(torch.stack(pair, -1)) for pair in zip(at_label, lses, strict=True)]
    return values, both


# ---- the exchange ------------------------------------------------------------------------------------------------


class Shard:
    """The columns of this rank, but for their logits, and the stages that they have been through."""

    def __init__(self, rows: Rows, shards: Shards):
        self.rows, self.shards = rows, shards
        self.recipe = Recipe.of(rows.recipe) or Recipe()
        self.leading = rows.student_logits.shape[:-1]
        self.count = self.leading.numel()
        self.keep = None if rows.keep is None else rows.keep.reshape(self.count, 1)
        self.labels = self.owners = None
        if rows.labels is not None:
            labels = rows.labels.reshape(self.count)
            self.labels, self.owners = shards.own_labels(labels)[:, None], shards.owners(labels)
        self.stages = []  # (part, what was known)

    def temperatures(self) -> list[Tensor]:
        """One [rows], if they are a tensor, or none."""
        given = self.rows.temperatures
        return [] if given is None else [given.double().expand(self.leading).reshape(self.count)]

    def of_owner(self, gathered: Tensor) -> Tensor:
        """[ranks, rows] -> [rows]: from the rank that has the label."""
        ranks = torch.arange(len(gathered), device=gathered.device)[:, None]
        return torch.where(ranks == self.owners, gathered, 0.0).sum(0)

    def nan_without_owner(self, values: Tensor) -> Tensor:
        return torch.where(self.owners < 0, torch.nan, values)

    def cross_entropy(self, lses: Tensor, at_label: Tensor) -> Tensor:
        """[rows] from every rank's log-sum-exp at temperature 1 and logit of the label, [ranks, rows]."""
        lse = reference.logsumexp(lses.movedim(0, -1))
        cross_entropy = torch.where(lse < torch.inf, lse - self.of_owner(at_label), torch.nan)
        return torch.where(lse == -torch.inf, 0.0, self.nan_without_owner(cross_entropy))

    def columns(self, block: slice, student: Tensor, teacher: Tensor) -> Columns:
        """student, teacher: the block's rows."""
        recipe, used = self.recipe, self.rows.vocab_size
        scales, caps = (recipe.student_scale, recipe.teacher_scale), (recipe.student_cap, recipe.teacher_cap)
        sides = []
        for logits, scale, cap in zip((student, teacher), scales, caps, strict=True):
            logits = logits[:, :used].double()
            logits = logits if self.keep is None else torch.where(self.keep[block], logits, 0.0)
            sides.append(reference.capped(logits * scale, cap))
        if self.labels is None:
            return Columns(block, *sides, None)
        return Columns(block, *sides, self.labels[block] == torch.arange(used, device=student.device))

    def evaluate(self, logits, part, known: tuple[Tensor, ...], wanted: list[int], count: int) -> Tensor:
        """[count, 1 + wanted, rows]: the parts, and their derivatives in those of `known` that are wanted."""
        found = torch.zeros(count, 1 + len(wanted), self.count, dtype=torch.float64, device=self.rows[0].device)
        for chunk in logits.chunks():
            for block, student, teacher in _blocks(*chunk):
                columns = self.columns(block, student.detach(), teacher.detach())
                given = [x[block].detach().requires_grad_(i in wanted) for i, x in enumerate(known)]
                with torch.set_grad_enabled(bool(wanted)):
                    values = part(columns, *given)
                inputs = [given[i] for i in wanted]
                parts = [torch.stack([x.detach(), *_derivatives(x, inputs)]) for x in values]
                found[..., block] = torch.stack(parts)
        return found

    def gradients(self, logits, factors: Tensor, needed) -> tuple[Tensor | None, ...]:
        """Of what logits are made of, of the sum of factors * parts over all stages, rounded once."""

        def fill(rows: slice, student: Tensor, teacher: Tensor, out: Tensor) -> None:
            for block, z, y, into in _blocks(rows, student, teacher, out):
                z = z.detach().requires_grad_()
                with torch.enable_grad():
                    columns = self.columns(block, z, y)
                    values = [x for part, known in self.stages for x in part(columns, *(y[block] for y in known))]
                pairs = [(x, f) for x, f in zip(values, factors[:, block], strict=True) if x.requires_grad]
                outputs, upstream = zip(*pairs, strict=True)
                into.copy_(*torch.autograd.grad(outputs, z, upstream))

        return logits.gradients(needed, fill)


def _blocks(rows: slice, *tensors: Tensor) -> Iterator[tuple]:
    """(rows, of every tensor its part) of every block of a chunk."""
    entries = _BLOCK.get(tensors[0].device.type, _BLOCK_ELSEWHERE)
    step = max(entries // max(tensors[0].shape[1], 1), 1)
    for first in range(rows.start, rows.stop, step):
        block = slice(first, min(first + step, rows.stop))
        yield block, *(x[first - rows.start : block.stop - rows.start] for x in tensors)


def _derivatives(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Row by row, each [rows]."""
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, inputs))
    return torch.autograd.grad(value, inputs, torch.ones_like(value), retain_graph=True, materialize_grads=True)


def exchanger(shard: Shard, make: Callable, tensors, counts: dict[Callable, int]) -> Callable[..., Tensor]:
    """exchange(part, *known) of the logits make(*tensors); counts: how many tensors each part comes to."""
    own = _Own.apply(shard, make, sum(counts.values()), *tensors).split([*counts.values()])
    own, logits = dict(zip(counts, own, strict=True)), make(*tensors)

    def exchange(part, *known: Tensor) -> Tensor:
        return _Exchange.apply(own[part], shard, logits, part, *known)

    return exchange


class _Own(Function):
    """Zeros [parts, rows] in place of this rank's parts of all stages: apply(shard, make, parts, *tensors).

    What flows back into them is how much each part counts, from all stages at once, so that the student's gradient is
    computed and rounded once.
    """

    @staticmethod
    def forward(ctx, shard, make, parts, *tensors):
        ctx.shard, ctx.make = shard, make
        save_tensors(ctx, *tensors)
        return tensors[0].new_zeros((parts, shard.count), dtype=torch.float64)

    @staticmethod
    def backward(ctx, factors):
        tensors = saved_tensors(ctx)
        with torch.no_grad():  # a graph of the backward goes no further than `once`
            gradients = ctx.shard.gradients(ctx.make(*tensors), factors, ctx.needs_input_grad[3:])
        return None, None, None, *(None if g is None else once(g, x) for g, x in zip(gradients, tensors, strict=True))


class _Exchange(Function):
    """[ranks, parts, rows] of a stage: apply(own, shard, logits, part, *known), `own` out of _Own. One collective."""

    @staticmethod
    def forward(ctx, own, shard, logits, part, *known):
        ctx.wanted = [i for i, wanted in enumerate(ctx.needs_input_grad[4:]) if wanted]
        ctx.rank = shard.shards.rank
        shard.stages.append((part, [x.detach() for x in known]))
        gathered = shard.shards.gather(shard.evaluate(logits, part, known, ctx.wanted, len(own)))
        values, derivatives = gathered.split([1, len(ctx.wanted)], 2)
        ctx.save_for_backward(derivatives, *(known[i] for i in ctx.wanted))
        ctx.count = len(known)
        return values.squeeze(2).contiguous()

    @staticmethod
    def backward(ctx, upstream):
        derivatives, *known = ctx.saved_tensors
        grads = [None] * ctx.count
        for i, x, derivative in zip(ctx.wanted, known, derivatives.unbind(2), strict=True):
            # An infinite divergence has no derivative; where nothing flows back into it, it must not matter.
            grads[i] = once(torch.where(upstream == 0, 0.0, upstream * derivative).sum((0, 1)), x)
        return upstream[ctx.rank], None, None, None, *grads
