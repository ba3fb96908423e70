"""The operators as torch.library ops: schemas, fakes, and the call into the chosen backend.

    row_statistics   [..., V] x 2 -> [..., ] per field       two reads
    row_gradient     [..., V] x 2 and [...] per field -> [..., V]   two reads, one write
    one_pass         both, with the weight in between        two reads, one write in all
    scale_gradient   a finished gradient times a scalar that lives on its device
    rest_statistics  the student's normaliser over the columns that a row does not name; two reads, a copy in blocks

A trailing underscore writes the gradient over the student's logits. None of them is differentiable by itself:
eakd_kernels.autograd wraps them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import backend_module
from .stats import LOSS_STATISTICS, normaliser, statistics_count


class Rows(NamedTuple):
    """What every operator takes: a pair of logits, and what is the same for, or given per, row."""

    student_logits: Tensor  # [..., V or wider], fp64/fp32/bf16/fp16
    teacher_logits: Tensor  # the same leading shape; any of these dtypes
    labels: Tensor | None  # [...] int64; given where cross-entropy is wanted
    keep: Tensor | None  # [...] bool; rows that are False are not read and give 0
    temperatures: Tensor | None  # [...] or 0-d; takes the place of `temperature`
    temperature: float
    entropy_temperature: float
    vocab_size: int  # columns used
    recipe: Sequence[float] = ()  # Recipe.flat(); empty: KL(p || q) of the logits as they are
    class_bias: Tensor | None = None  # [V]; added to the teacher's logits / temperature, <= 0; only with a recipe


class Recipe(NamedTuple):
    """What a divergence is made of: csrc/recipe.h, Recipe. The defaults are KL(p || q) of the logits as they are.

    Logits are multiplied by their scale, then capped: cap * tanh(scale * logits / cap).
    """

    divergence: int = 0  # divergences.Divergence.code, or divergences.DECOUPLED
    first: float = 1.0  # the divergence's parameters
    second: float = 0.0
    standardize: int = 0  # STANDARDIZE
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_cap: float = 0.0  # 0: none
    teacher_cap: float = 0.0
    # D = sum over k of factors_k D at temperatures_k. One of them, with Rows.temperatures in its place, if there are.
    temperatures: tuple[float, ...] = (1.0,)
    factors: tuple[float, ...] = (1.0,)

    def flat(self) -> list[float]:
        pairs = zip(self.temperatures, self.factors, strict=True)
        return [*map(float, self[:8]), *(number for pair in pairs for number in pair)]

    @classmethod
    def of(cls, flat: Sequence[float]) -> "Recipe | None":
        if not flat:
            return None
        code, first, second, standardize, *rest = flat[:8]
        return cls(int(code), first, second, int(standardize), *rest, tuple(flat[8::2]), tuple(flat[9::2]))


STANDARDIZE = {False: 0, True: 1, "all": 2}  # "all": the entropies take the standardised logits too


class LossRule(NamedTuple):
    """How one_pass weights and scales a row: csrc/row_state.h, LossRule."""

    weights: Tensor | None  # [...], for WEIGHTINGS["tensor"]
    weighting: int
    entropy_bound: float
    weight_scale: float
    tau_squared: bool
    kd_weight: float
    ce_weight: float
    scale: float
    denominator: Tensor | None  # 0-d; loss = scale / denominator * sum over rows


WEIGHTINGS = {"none": 0, "teacher": 1, "student": 2, "ea": 3, "tensor": 4}

_ROWS = (
    "Tensor student_logits, Tensor teacher_logits, Tensor? labels, Tensor? keep, Tensor? temperatures, "
    "float temperature, float entropy_temperature, SymInt vocab_size, float[] recipe, Tensor? class_bias"
)
_RULE = (
    "Tensor? weights, int weighting, float entropy_bound, float weight_scale, bool tau_squared, float kd_weight, "
    "float ce_weight, float scale, Tensor? denominator"
)
_UPSTREAM = (
    "Tensor? grad_divergence, Tensor? grad_student_entropy, Tensor? grad_student_lse, Tensor? grad_cross_entropy"
)
_ROWS_MUTABLE = _ROWS.replace("Tensor student_logits", "Tensor(a!) student_logits", 1)

_library = torch.library.Library("eakd", "DEF")
_NUM_ROWS = len(Rows._fields)


def statistics_dtype(student_logits: Tensor, teacher_logits: Tensor) -> torch.dtype:
    double = torch.float64 in (student_logits.dtype, teacher_logits.dtype)
    return torch.float64 if double else torch.float32


def _new_statistics(rows: Rows, fields: int) -> Tensor:
    shape = (fields, *rows.student_logits.shape[:-1])
    return rows.student_logits.new_empty(shape, dtype=statistics_dtype(*rows[:2]))


def _new_gradient(rows: Rows) -> Tensor:
    return torch.empty_like(rows.student_logits, memory_format=torch.contiguous_format)


def _define(name: str, arguments: str, returns: str, implementation, fake) -> None:
    _library.define(f"{name}({arguments}, str backend) -> {returns}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"eakd::{name}", fake, lib=_library)


def _row_statistics(*arguments):
    *rows, temperature_slopes, backend = arguments
    return backend_module(backend).row_statistics(Rows(*rows), temperature_slopes)


def _fake_statistics(*arguments):
    *fields, temperature_slopes, _backend = arguments
    rows = Rows(*fields)
    recipe = Recipe.of(rows.recipe)
    return _new_statistics(rows, statistics_count(recipe and len(recipe.factors), temperature_slopes))


_define(
    "row_statistics",
    f"{_ROWS}, bool temperature_slopes",
    "Tensor",
    _row_statistics,
    _fake_statistics,
)


def _row_gradient(*arguments):
    rows, (statistics, *upstream, backend) = Rows(*arguments[:_NUM_ROWS]), arguments[_NUM_ROWS:]
    gradient = _new_gradient(rows)
    backend_module(backend).row_gradient(rows, statistics, upstream, gradient)
    return gradient


def _row_gradient_(*arguments):
    rows, (statistics, *upstream, backend) = Rows(*arguments[:_NUM_ROWS]), arguments[_NUM_ROWS:]
    backend_module(backend).row_gradient(rows, statistics, upstream, rows.student_logits)


_define(
    "row_gradient",
    f"{_ROWS}, Tensor statistics, {_UPSTREAM}",
    "Tensor",
    _row_gradient,
    lambda *arguments: _new_gradient(Rows(*arguments[:_NUM_ROWS])),
)
_define(
    "row_gradient_", f"{_ROWS_MUTABLE}, Tensor statistics, {_UPSTREAM}", "()", _row_gradient_, lambda *arguments: None
)


def _split_loss(arguments) -> tuple[Rows, LossRule, str]:
    *rest, backend = arguments
    return Rows(*rest[:_NUM_ROWS]), LossRule(*rest[_NUM_ROWS:]), backend


def _one_pass(*arguments):
    rows, rule, backend = _split_loss(arguments)
    gradient = _new_gradient(rows)
    loss, statistics = backend_module(backend).one_pass(rows, rule, gradient)
    return loss, statistics, gradient


def _one_pass_(*arguments):
    rows, rule, backend = _split_loss(arguments)
    return backend_module(backend).one_pass(rows, rule, rows.student_logits)


def _fake_loss(*arguments):
    rows = Rows(*arguments[:_NUM_ROWS])
    statistics = _new_statistics(rows, len(LOSS_STATISTICS))
    return statistics.new_empty(()), statistics


_define(
    "one_pass",
    f"{_ROWS}, {_RULE}",
    "(Tensor, Tensor, Tensor)",
    _one_pass,
    lambda *arguments: (*_fake_loss(*arguments), _new_gradient(Rows(*arguments[:_NUM_ROWS]))),
)
_define("one_pass_", f"{_ROWS_MUTABLE}, {_RULE}", "(Tensor, Tensor)", _one_pass_, _fake_loss)


def _scale_gradient(gradient: Tensor, factor: Tensor, backend: str) -> Tensor:
    out = torch.empty_like(gradient)
    backend_module(backend).scale_gradient(gradient, factor, out)
    return out


def _scale_gradient_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    backend_module(backend).scale_gradient(gradient, factor, gradient)


_define(
    "scale_gradient", "Tensor gradient, Tensor factor", "Tensor", _scale_gradient, lambda g, *_: torch.empty_like(g)
)
_define("scale_gradient_", "Tensor(a!) gradient, Tensor factor", "()", _scale_gradient_, lambda *arguments: None)


# What rest_statistics copies at a time: on a CPU it stays in the caches; a GPU's work should outlast its launches.
_BLOCK_BYTES = {"cpu": 4 << 20}
_BLOCK_BYTES_ELSEWHERE = 64 << 20


def _flat_views(logits: Tensor) -> list[Tensor]:
    """Views [N, V] that make up [..., V] in order, one unless the leading dimensions lie apart."""
    try:
        return [logits.view(-1, logits.shape[-1])]
    except RuntimeError:
        return [view for part in logits.unbind(0) for view in _flat_views(part)]


def _rest_statistics(*arguments):
    rows, (ids, temperature_slopes, backend) = Rows(*arguments[:_NUM_ROWS]), arguments[_NUM_ROWS:]
    out = _new_statistics(rows, 3 if temperature_slopes else 2)
    ids, vocab_size = ids.reshape(-1, ids.shape[-1]), rows.vocab_size
    flat = out.view(len(out), len(ids))
    keep = None if rows.keep is None else rows.keep.flatten()
    temperatures = rows.temperatures
    per_row = temperatures is not None and temperatures.dim() > 0
    temperatures = temperatures.flatten() if per_row else temperatures
    width = (vocab_size // 64 + 1) * 64  # aligned rows, with a column beyond the vocabulary
    block_bytes = _BLOCK_BYTES.get(rows.student_logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    size = max(1, block_bytes // (width * rows.student_logits.element_size()))
    blocks = [block for view in _flat_views(rows.student_logits) for block in view.split(size) if len(block)]
    buffer = rows.student_logits.new_empty(max(map(len, blocks), default=0), width)
    start = 0
    for block in blocks:
        part = slice(start, start + len(block))
        logits = buffer[: len(block)]
        logits[:, :vocab_size].copy_(block[:, :vocab_size])
        logits.scatter_(-1, ids[part], -torch.inf)
        block_rows = rows._replace(
            student_logits=logits,
            teacher_logits=logits,
            labels=None,
            keep=None if keep is None else keep[part],
            temperatures=temperatures[part] if per_row else temperatures,
        )
        statistics = backend_module(backend).row_statistics(block_rows, temperature_slopes)
        flat[:2, part] = torch.stack(normaliser(statistics, bool(rows.recipe)))
        if temperature_slopes:
            flat[2, part] = statistics[-1]
        start += len(block)
    return out


_define(
    "rest_statistics",
    f"{_ROWS}, Tensor ids, bool temperature_slopes",
    "Tensor",
    _rest_statistics,
    lambda *arguments: _new_statistics(Rows(*arguments[:_NUM_ROWS]), 3 if arguments[-2] else 2),
)

row_statistics = torch.ops.eakd.row_statistics.default
row_gradient = torch.ops.eakd.row_gradient.default
row_gradient_ = torch.ops.eakd.row_gradient_.default
one_pass = torch.ops.eakd.one_pass.default
one_pass_ = torch.ops.eakd.one_pass_.default
rest_statistics = torch.ops.eakd.rest_statistics.default
scale_gradient = torch.ops.eakd.scale_gradient.default
scale_gradient_ = torch.ops.eakd.scale_gradient_.default
