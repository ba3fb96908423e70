"""What a training's page shows of its record: numbers, before they become charts and tables."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .binning import FINITE, INFINITE, NAN, quantiles, shares_by_quantile
from .pages import end_of_scale
from .phases import SUMS, Distributions, Phase
from .rows import QUANTITIES
from .samples import Sample

BANDS = (0.05, 0.25, 0.5, 0.75, 0.95)
TENTHS = 10
# Of all rows, at least so many are early, and late.
PART = 0.1
SHADES = 12


class Part(NamedTuple):
    """Some of the training. name: "Early", "Late" or, of a training too short for both, "In all"."""

    name: str
    distributions: Distributions
    phase: Phase

    @property
    def steps(self) -> str:
        return span(self.phase.first, self.phase.last)

    def quantiles(self, quantity: str, probabilities: tuple[float, ...] = BANDS) -> list[float]:
        return _quantiles(self.distributions, QUANTITIES.index(quantity), probabilities)


class TrainingView(NamedTuple):
    """steps: of the charts over time; bands: for each of them and of QUANTITIES, quantiles at BANDS; weight_scale:
    where the shades of w end."""

    steps: list[Distributions]
    bands: list[list[list[float]]]
    in_all: Distributions
    parts: list[Part]
    odd_norms: int
    has_norms: bool
    weight_scale: float
    bound: float | None
    decode: Callable[[int], str] | None
    tokens_known: bool
    odd_samples: list[Sample]

    def shade(self, weight: float) -> int:
        """Of SHADES; what lies beyond the scale has the last."""
        return min(max(int(weight / self.weight_scale * SHADES), 0), SHADES - 1)


def view_of(record) -> TrainingView:
    steps, phases = record.steps.cells(), record.phases.cells()
    in_all = _merged(steps, Distributions())
    weight = QUANTITIES.index("weight")
    samples = [sample for phase in phases for found in phase.samples.found.values() for sample in found]
    return TrainingView(
        steps,
        [[_quantiles(cell, i, BANDS) for i in range(len(QUANTITIES))] for cell in steps],
        in_all,
        _parts(steps, phases, record.phases.new_cell),
        sum(phase.odd_norms for phase in phases),
        any(phase.norms for phase in phases),
        end_of_scale(max(0.0, _quantiles(in_all, weight, (0.99,))[0])),  # 0 for NaN
        record.bound,
        record.decode,
        any(sample.token is not None for sample in samples),
        _merged(phases, record.phases.new_cell()).samples.found["not finite"],
    )


def odd(cell: Distributions, quantity: int) -> int:
    """How many rows are NaN or infinite there."""
    return int(cell.counts[quantity, FINITE:].sum())


def odd_kinds(cell: Distributions, quantity: int) -> tuple[int, int]:
    """How many are NaN, and how many infinite."""
    return int(cell.counts[quantity, NAN]), int(cell.counts[quantity, INFINITE])


def share_of_tenths(phase: Phase) -> dict[str, list[float]]:
    """By the name of the sum, which part of it is in each tenth of the rows by H_T, those of lowest first; NaN for one
    that is 0 altogether."""
    rows, *sums = phase.sums
    shares = shares_by_quantile(rows, torch.stack(sums), TENTHS)
    return dict(zip(SUMS[1:], shares.tolist(), strict=True))


def bounds_of_tenths(part: Part) -> list[float]:
    counts = torch.nn.functional.pad(part.phase.sums[0].long(), (0, 2))
    distributions = part.distributions
    bounds = tuple(i / TENTHS for i in range(TENTHS + 1))
    return quantiles(counts, bounds, float(distributions.smallest[0]), float(distributions.largest[0]))


def common_planes(parts: Sequence[Part]) -> tuple[float, list[Tensor]]:
    """The extent that all planes fit in, and their [2, SIDE, SIDE] for it."""
    planes = [_merged([part.phase.plane], type(part.phase.plane)()) for part in parts]
    extent = max(plane.extent for plane in planes)
    for plane in planes:
        plane.reach(extent / 2)
    return extent, [plane.sums for plane in planes]


def span(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _parts(steps: list[Distributions], phases: list[Phase], new_phase: Callable[[], Phase]) -> list[Part]:
    """The first and the last phases that have a tenth of the rows each; everything, where these overlap. Cells of steps
    lie within phases: both are powers of two wide."""

    def within(chosen: list[Phase]) -> Distributions:
        first, last = chosen[0].first, chosen[-1].last
        return _merged([cell for cell in steps if first <= cell.first and cell.last <= last], Distributions())

    enough = PART * sum(cell.rows for cell in steps)
    rows = [within([phase]).rows for phase in phases]
    early = _shortest(rows, enough)
    late = _shortest(rows[::-1], enough)
    if early + late > len(phases):
        chosen = {"In all": phases}
    else:
        chosen = {"Early": phases[:early], "Late": phases[len(phases) - late :]}
    return [Part(name, within(some), _merged(some, new_phase())) for name, some in chosen.items()]


def _shortest(rows: list[int], enough: float) -> int:
    """How many of them, from the first on, add up to enough."""
    total = 0
    for count, more in enumerate(rows, 1):
        total += more
        if total >= enough:
            return count
    return len(rows)


def _quantiles(cell: Distributions, quantity: int, probabilities: tuple[float, ...]) -> list[float]:
    smallest, largest = float(cell.smallest[quantity]), float(cell.largest[quantity])
    return quantiles(cell.counts[quantity], probabilities, smallest, largest)


def _merged(cells, into):
    for cell in cells:
        into.merge(cell)
    return into
