"""Statistics of a training, gathered step by step: distributions, not rows, so that their size has a bound."""

import math
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..stats import RowStats
from . import training_page
from .phases import Distributions, Phase
from .rows import rows_of
from .timeline import Timeline

# At most so many cells, of which at least half are in use once there are as many steps.
CELLS, PHASES = 128, 16
_CONVERTED = 2**20  # numbers at a time
TITLE = "What the student was taught"
INTRODUCTION = (
    "Entropies of teacher and student, the weights that came of them and the divergence that they weighted, over a "
    "training. A row is what both models expect in one place, the next token of a text for example."
)


class TrainingRecord:
    """What became of entropies, weights and divergences during a training, for one HTML page.

        record = TrainingRecord(decode=tokenizer.decode, bound=math.log(vocab_size))
        loss, stats = ea_kd_loss(..., return_stats=True)
        record.add(stats, input_ids, labels, step=step)  # in every step
        record.save("training.html")

    It holds counts, sums and a few rows: at most 13 MB on the CPU (arithmetic), however long the training; no tensor of
    size [rows, vocab], no graph, nothing on a GPU. Rows are counted in bins as wide as 1/64 of what is in them, so that
    quantiles are off by at most 1/128 of themselves, for each step up to 128 steps, and beyond that for 2, 4, 8, ...
    consecutive steps at a time.

    Records can be pickled, but for `decode`: set `record.decode` on one that was loaded.

    Args:
        decode: a tokenizer, or a callable from a token's id (or a class) to its text. None: pages show ids.
        bound: H_ub in nats, as the loss has it: log(V) unless entropy_bound was given. Pages mark it. None: they do
            not.
        keep: how many of the heaviest, of the lightest and of rows that are not finite are kept, in each of up to 16
            phases.
        context: with how many tokens before them.
        every: steps that are no multiple of it are left out, and cost nothing.
        ignore_index: the label of rows left out.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        *,
        decode: Any | Callable[[int], str] | None = None,
        bound: float | None = None,
        keep: int = 10,
        context: int = 16,
        every: int = 1,
        ignore_index: int = -100,
    ):
        for name, value, least in (("keep", keep, 0), ("context", context, 0), ("every", every, 1)):
            if operator.index(value) < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"bound must be a finite number > 0, H_ub in nats, got {bound!r}")
        self.decode = decode
        self.bound, self.keep, self.context, self.every, self.ignore_index = bound, keep, context, every, ignore_index
        self.steps = Timeline(CELLS, Distributions)
        self.phases = Timeline(PHASES, partial(Phase, keep, context))

    @property
    def decode(self) -> Callable[[int], str] | None:
        return self._decode

    @decode.setter
    def decode(self, decode) -> None:
        decode = getattr(decode, "decode", decode)
        if decode is not None and not callable(decode):
            raise TypeError(f"decode must be a tokenizer or callable, got {type(decode).__name__}")
        self._decode = decode

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(
        self,
        stats: RowStats,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        step: int,
        mask: Tensor | None = None,
        gradient_norms: Tensor | None = None,
    ) -> None:
        """Counts the rows of a batch. Several calls may have the same step (gradient accumulation), and steps may come
        in any order.

        Everything is copied to the CPU at once: on a GPU a call waits for it once, and moves 4 bytes a row for each of
        up to eight numbers.

        Args:
            stats: [...], from ea_kd_loss(..., return_stats=True), distill_stats and their like.
            input_ids: [..., L] integers, in the statistics' shape: tokens up to a row's own are its context.
            labels: [...] integers as the loss has them: what the row predicts, `ignore_index` in rows left out, which
                read 0 in `stats` and are not counted. Without labels, input_ids's next token takes their place.
            step: the training step, an integer >= 0.
            mask: [...] bool, True in rows that count, as the loss has it; combined with labels by "and".
            gradient_norms: [...] floats, of the gradient that each row's logits got: `row_gradient_norms`.

        Raises:
            TypeError, ValueError: an argument is not as above; `stats` has no weights.
        """
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if step % self.every != 0:
            return
        rows = rows_of(stats, input_ids, labels, mask, gradient_norms, ignore_index=self.ignore_index, step=step)
        if len(rows.places) > 0:
            self.steps.at(step).add(rows)
            self.phases.at(step).add(rows)

    @torch.inference_mode(False)
    def merge(self, *others: "TrainingRecord") -> "TrainingRecord":
        """Adds what other records hold, of other ranks or other parts of a training, and returns this one, which then
        holds what it would if it had got every row itself.

        Sums are fp64, so that their order can show in the last digits. Of rows with weight and step in common, those of
        this record are kept first.

        Raises:
            ValueError: records whose bound, keep, context or every differ.
        """
        for other in others:
            for name in ("bound", "keep", "context", "every"):
                ours, theirs = getattr(self, name), getattr(other, name)
                if ours != theirs:
                    raise ValueError(f"records to merge must have the same {name}, got {ours!r} and {theirs!r}")
            self.steps.merge(other.steps)
            self.phases.merge(other.phases)
        return self

    def render(self, *, title: str = TITLE, introduction: str = INTRODUCTION) -> str:
        """The page: HTML that asks for no other file. title and introduction are plain text, as are all tokens.

        Raises:
            ValueError: the record has no rows.
        """
        if not self.steps.cells():
            raise ValueError(
                "the record has no rows: no call of add had any that count (see labels, mask, ignore_index and every)"
            )
        return training_page.render(self, title=title, introduction=introduction)

    def save(self, path, *, title: str = TITLE, introduction: str = INTRODUCTION) -> None:
        """Writes what `render` returns to a file."""
        Path(path).write_text(self.render(title=title, introduction=introduction), encoding="utf-8")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_decode": None}


def row_gradient_norms(gradient: Tensor) -> Tensor:
    """The Euclidean norm of each row of a loss's gradient in the logits: [..., V] -> [...], in fp32 (fp64 for fp64).

    How far a step of plain gradient descent would move the row's logits, and so how much of the training falls on the
    row. For `TrainingRecord.add`, with backward taken apart at the logits:

        (gradient,) = torch.autograd.grad(loss, student_logits)
        record.add(stats, input_ids, labels, step=step, gradient_norms=row_gradient_norms(gradient))
        student_logits.backward(gradient)

    Nothing of the gradient's size is made.

    Raises:
        TypeError: the gradient is not as above.
    """
    if not gradient.is_floating_point() or gradient.dim() == 0:
        raise TypeError(
            f"gradient must be a floating-point tensor [..., V], got {gradient.dtype} {tuple(gradient.shape)}"
        )
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    gradient = gradient.detach()
    if gradient.dtype == dtype or gradient.device.type != "cpu" or gradient.numel() <= _CONVERTED:
        return torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype)
    # On a CPU vector_norm would convert all of it first.
    rows = gradient.reshape(-1, gradient.shape[-1]).split(max(1, _CONVERTED // gradient.shape[-1]))
    return torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=dtype) for part in rows]).view(gradient.shape[:-1])
