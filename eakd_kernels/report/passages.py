"""A passage and what models say about each of its tokens: plain values, and how they come out of logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import distill_stats


@dataclass(frozen=True)
class Candidate:
    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model expects where a token stands. entropy: in nats; probability: of the token that does stand there;
    candidates: the likeliest tokens, likeliest first."""

    entropy: float
    probability: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Row:
    """A token's weight in the loss, and the two predictions that the weight comes from."""

    weight: float
    teacher: Prediction
    student: Prediction


@dataclass(frozen=True)
class View:
    """One student's reading of the passage: a row a token, None for tokens that nothing predicts, such as the first."""

    label: str
    rows: tuple[Row | None, ...]


@dataclass(frozen=True)
class Passage:
    tokens: tuple[str, ...]
    views: tuple[View, ...]

    def __post_init__(self):
        for view in self.views:
            if len(view.rows) != len(self.tokens):
                raise ValueError(f"view {view.label!r} has {len(view.rows)} rows for {len(self.tokens)} tokens")


@torch.no_grad()
def rows_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    decode: Callable[[int], str],
    *,
    candidates: int = 5,
    **options,
) -> tuple[Row | None, ...]:
    """Rows of a passage, a token each, from logits [T, V] of both models and its ids [T].

    Logits of a position predict the next token, whose row they become; the first token's is None. options: those of
    `distill_stats`, the entropies' temperature and the weights' norm among them; probabilities are at temperature 1, of
    the logits within vocab_size after each side's scale and soft cap.
    """
    if not len(student_logits) == len(teacher_logits) == len(ids):
        raise ValueError(
            f"student_logits, teacher_logits and ids have {len(student_logits)}, {len(teacher_logits)} and {len(ids)} "
            "rows; each needs one a token, that of the last token included"
        )
    if len(ids) == 0:
        return ()
    stats = distill_stats(student_logits[:-1], teacher_logits[:-1], **options)
    student, teacher = (
        _seen(
            logits[:-1],
            options.get("vocab_size"),
            options.get(f"{side}_logit_scale", 1.0),
            options.get(f"{side}_softcap"),
        )
        for side, logits in (("student", student_logits), ("teacher", teacher_logits))
    )
    following = ids[1:]
    columns = student.shape[-1]
    beyond = (following < 0) | (following >= columns)
    if beyond.any():
        raise ValueError(f"ids must be in 0..{columns - 1}, the columns in use, got {following[beyond][0].item()}")
    students = _predictions(student, stats.student_entropy, following, decode, candidates)
    teachers = _predictions(teacher, stats.teacher_entropy, following, decode, candidates)
    return (None, *map(Row, stats.weight.tolist(), teachers, students))


def _seen(logits: Tensor, vocab_size: int | None, scale: float, softcap: float | None) -> Tensor:
    """What the statistics see of a side's logits."""
    logits = logits[..., :vocab_size].float() * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _predictions(logits: Tensor, entropies: Tensor, ids: Tensor, decode: Callable[[int], str], candidates: int):
    probabilities = logits.softmax(-1)
    top = probabilities.topk(min(candidates, logits.shape[-1]))
    own = probabilities.gather(-1, ids[:, None])[:, 0]
    likeliest = (
        tuple(Candidate(decode(token), p) for token, p in zip(*row, strict=True))
        for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )
    return map(Prediction, entropies.tolist(), own.tolist(), likeliest)
