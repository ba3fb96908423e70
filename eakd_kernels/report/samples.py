"""Single rows that a record keeps: the heaviest, the lightest, and those that are not finite."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from .rows import QUANTITIES, Rows


class Sample(NamedTuple):
    """A row. token: what it predicts; context: the tokens before that. Entropies and divergence in nats."""

    step: int
    token: int | None
    context: tuple[int, ...]
    teacher_entropy: float
    student_entropy: float
    weight: float
    divergence: float
    gradient_norm: float | None


# Of rows that are equal in these, the ones added first come first.
ORDERS: dict[str, Callable[[Sample], tuple]] = {
    "heaviest": lambda sample: (-sample.weight, sample.step),
    "lightest": lambda sample: (sample.weight, sample.step),
    "not finite": lambda sample: (sample.step,),
}


class Samples:
    """The first `keep` rows in each of the ORDERS, with up to `context` tokens before theirs. A token in its context is
    there once, however often it is trained on."""

    def __init__(self, keep: int, context: int):
        self.keep, self.context = keep, context
        self.found: dict[str, list[Sample]] = {name: [] for name in ORDERS}

    def add(self, rows: Rows) -> None:
        for name in ORDERS if self.keep > 0 else ():
            self._take(name, _different(self._candidates(name, rows), self.keep))

    def merge(self, other: "Samples") -> None:
        for name, found in other.found.items():
            self._take(name, found)

    def _take(self, name: str, new: Iterable[Sample]) -> None:
        self.found[name] = _different(sorted([*self.found[name], *new], key=ORDERS[name]), self.keep)

    def _candidates(self, name: str, rows: Rows) -> Iterator[Sample]:
        """In their order, the rows that may come before one of those that are found."""
        last = self.found[name][-1] if len(self.found[name]) == self.keep else None
        if name == "not finite":
            chosen = ~rows.finite() if last is None or rows.step < last.step else None
            order = [] if chosen is None else chosen.nonzero()[:, 0].tolist()
        else:
            order = _by_weight(rows, -1 if name == "heaviest" else 1, last)
        return (self._sample(rows, i) for i in order)

    def _sample(self, rows: Rows, i: int) -> Sample:
        norm = None if rows.norms is None else rows.norms[i].item()
        values = dict(zip(QUANTITIES, rows.values[:, i].tolist(), strict=True))
        return Sample(rows.step, rows.token(i), rows.context(i, self.context), **values, gradient_norm=norm)


def _by_weight(rows: Rows, sign: int, last: Sample | None) -> list[int]:
    """Rows with a finite weight by sign * weight: those that come before the last, if it is given."""
    weights: Tensor = sign * rows.values[QUANTITIES.index("weight")]
    chosen = weights.isfinite()
    if last is not None:
        limit = sign * last.weight
        chosen &= weights <= limit if rows.step < last.step else weights < limit
    places = chosen.nonzero()[:, 0]
    return places[weights[places].argsort(stable=True)].tolist()


def _different(samples: Iterable[Sample], most: int) -> list[Sample]:
    """The first `most` whose tokens, in their contexts, differ; of rows without context nobody knows."""
    found, seen = [], set()
    for sample in samples:
        passage = (sample.token, sample.context)
        if sample.context and passage in seen:
            continue
        seen.add(passage)
        found.append(sample)
        if len(found) == most:
            break
    return found
