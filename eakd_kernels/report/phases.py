"""What a record counts: by step, and in a few phases of training."""

import torch
from torch import Tensor

from .binning import BINS, FINITE, bins_of
from .rows import QUANTITIES, Rows
from .samples import Samples

SIDE = 64  # cells of the plane of entropies, either way
SUMS = ("rows", "divergence", "weighted divergence", "gradient norm")


class Span:
    """The steps that something was counted in. Empty: first > last."""

    def __init__(self):
        self.first, self.last = float("inf"), -float("inf")

    def stretch(self, first: int, last: int) -> None:
        self.first, self.last = min(self.first, first), max(self.last, last)


class Distributions(Span):
    """Of the four QUANTITIES over a span of steps. counts: [4, BINS]; smallest, largest: [4], of the finite values."""

    def __init__(self):
        super().__init__()
        self.counts = torch.zeros(len(QUANTITIES), BINS, dtype=torch.int64, device="cpu")
        self.smallest = torch.full((len(QUANTITIES),), torch.inf, dtype=torch.float32, device="cpu")
        self.largest = -self.smallest

    @property
    def rows(self) -> int:
        return int(self.counts[0].sum())

    def add(self, rows: Rows) -> None:
        self.stretch(rows.step, rows.step)
        bins = bins_of(rows.values) + BINS * torch.arange(len(QUANTITIES), device="cpu")[:, None]
        self.counts += bins.flatten().bincount(minlength=self.counts.numel()).view_as(self.counts)
        odd = ~rows.values.isfinite()
        smallest, largest = rows.values.masked_fill(odd, torch.inf), rows.values.masked_fill(odd, -torch.inf)
        self._reach(smallest.amin(1), largest.amax(1))

    def merge(self, other: "Distributions") -> None:
        self.stretch(other.first, other.last)
        self.counts += other.counts
        self._reach(other.smallest, other.largest)

    def _reach(self, smallest: Tensor, largest: Tensor) -> None:
        self.smallest, self.largest = self.smallest.minimum(smallest), self.largest.maximum(largest)


class Plane:
    """Rows by H_T and H_S: [2, SIDE, SIDE], their number and the sum of their weights, [H_T, H_S] each, in equal cells
    from 0 to the extent: the smallest power of two that is above both entropies."""

    def __init__(self):
        self.extent = 2.0**-6
        self.sums = torch.zeros(2, SIDE, SIDE, dtype=torch.float64, device="cpu")

    def add(self, entropies: Tensor, weights: Tensor) -> None:
        """entropies: [2, n], weights: [n], all finite."""
        if weights.numel() == 0:
            return
        self.reach(float(entropies.max()))
        teacher, student = (entropies * (SIDE / self.extent)).long().clamp(0, SIDE - 1)
        cells = teacher * SIDE + student
        self.sums[0] += cells.bincount(minlength=SIDE * SIDE).view(SIDE, SIDE)
        self.sums[1] += cells.bincount(weights.double(), minlength=SIDE * SIDE).view(SIDE, SIDE)

    def merge(self, other: "Plane") -> None:
        theirs = Plane()
        theirs.extent, theirs.sums = other.extent, other.sums
        theirs.reach(self.extent / 2)
        self.reach(other.extent / 2)
        self.sums += theirs.sums

    def reach(self, entropy: float) -> None:
        while self.extent <= entropy:
            half = SIDE // 2
            quarter = self.sums.view(2, half, 2, half, 2).sum((2, 4))
            self.extent, self.sums = 2 * self.extent, torch.zeros_like(self.sums)
            self.sums[:, :half, :half] = quarter


class Phase(Span):
    """What is too much to be kept for every step. sums: [4, FINITE], SUMS over the rows in each bin of H_T; of
    divergences over rows that have H_T, w and D finite, of norms over those of them that have a finite one."""

    def __init__(self, keep: int, context: int):
        super().__init__()
        self.plane, self.samples = Plane(), Samples(keep, context)
        self.sums = torch.zeros(len(SUMS), FINITE, dtype=torch.float64, device="cpu")
        self.norms = self.odd_norms = 0  # rows that had one, and those of them whose was not finite

    def add(self, rows: Rows) -> None:
        self.stretch(rows.step, rows.step)
        self.samples.add(rows)
        finite = rows.values.isfinite()
        on_plane = finite[:3].all(0)
        self.plane.add(rows.values[:2, on_plane], rows.values[2, on_plane])
        summed = finite[[0, 2, 3]].all(0)
        self._add_sums(rows.values[:, summed], None if rows.norms is None else rows.norms[summed])
        if rows.norms is not None:
            self.norms += len(rows.norms)
            self.odd_norms += int((~rows.norms.isfinite()).sum())

    def merge(self, other: "Phase") -> None:
        self.stretch(other.first, other.last)
        self.samples.merge(other.samples)
        self.plane.merge(other.plane)
        self.sums += other.sums
        self.norms, self.odd_norms = self.norms + other.norms, self.odd_norms + other.odd_norms

    def _add_sums(self, values: Tensor, norms: Tensor | None) -> None:
        bins, (weight, divergence) = bins_of(values[0]), values[2:].double()
        amounts = [torch.ones_like(weight), divergence, weight * divergence]
        if norms is not None:
            amounts.append(norms.double().masked_fill(~norms.isfinite(), 0))
        for sums, amount in zip(self.sums, amounts, strict=False):
            sums += bins.bincount(amount, minlength=FINITE)
