"""Counts of numbers by size, of which any number of sums takes no more room, and quantiles of known error out of them.

A bin is what shares sign, exponent and the first 6 bits of the mantissa as fp32: it is at most 1/64 as wide as the
numbers in it are large, so that its middle is off by at most 1/128. 0 and what is below 2^-24, negative numbers among
it, are one bin; so is what is from 2^16 on.
"""

import torch
from torch import Tensor

_MANTISSA_BITS, _LEAST, _MOST = 6, -24, 16
_SHIFT = 23 - _MANTISSA_BITS
_BEFORE_FIRST = ((127 + _LEAST) << _MANTISSA_BITS) - 1  # an fp32's exponent has a bias of 127
FINITE = ((_MOST - _LEAST) << _MANTISSA_BITS) + 2
NAN, INFINITE = FINITE, FINITE + 1
BINS = FINITE + 2


def bins_of(values: Tensor) -> Tensor:
    """Which of BINS bins each of the fp32 values is in."""
    bins = ((values.view(torch.int32) >> _SHIFT) - _BEFORE_FIRST).clamp(0, FINITE - 1)
    return bins.masked_fill(values.isnan(), NAN).masked_fill(values.isinf(), INFINITE)


def edges() -> Tensor:
    """[FINITE + 1], fp64: bin i of the finite ones goes from edges[i] up to edges[i + 1]. The last, open one
    counts as one without width."""
    bits = torch.arange(1, FINITE, dtype=torch.int32, device="cpu").add(_BEFORE_FIRST) << _SHIFT
    inner = bits.view(torch.float32).double()
    return torch.cat([inner.new_zeros(1), inner, inner[-1:]])


def quantiles(counts: Tensor, probabilities: tuple[float, ...], smallest: float, largest: float) -> list[float]:
    """The ceil(p n)-th smallest of the n finite values for every p, off by at most 1/128 of itself. What is below
    2^-24 counts as 0, and what is from 2^16 on as the largest. NaN where there are none.

    counts: [BINS]. smallest, largest: of the values; no quantile lies beyond, so that those of a constant are exact.
    """
    cumulative = counts[:FINITE].cumsum(0)
    total = int(cumulative[-1])
    if total == 0:
        return [float("nan")] * len(probabilities)
    ranks = torch.tensor(probabilities, dtype=torch.float64, device="cpu").mul(total).ceil().clamp(1, total)
    bins = torch.searchsorted(cumulative, ranks.long())
    bounds = edges()
    middles = torch.where(bins == 0, 0.0, (bounds[bins] + bounds[bins + 1]) / 2)
    middles = torch.where(bins == FINITE - 1, largest, middles)
    return middles.clamp(smallest, largest).tolist()


def histogram(counts: Tensor, end: float, parts: int) -> Tensor:
    """[parts], fp64: how many of the finite values lie in each of so many equal parts of 0..end; what lies beyond is in
    the last. A bin that parts share is shared out by width."""
    bounds = torch.linspace(0, end, parts + 1, dtype=torch.float64, device="cpu")
    below = _interpolate(bounds, edges(), _cumulative(counts[:FINITE].double()))
    below[-1] = counts[:FINITE].sum()
    return below.diff()


def shares_by_quantile(counts: Tensor, sums: Tensor, parts: int) -> Tensor:
    """[..., parts]: which part of each total falls on so many equal parts of the values, smallest first. A bin that
    parts share is shared out by count. NaN where a total is 0, or what is left of sums of both signs.

    counts: [FINITE] fp64, sums: [..., FINITE] fp64, of the same values.
    """
    cumulative = _cumulative(counts)
    bounds = torch.linspace(0, 1, parts + 1, dtype=torch.float64, device="cpu") * cumulative[-1]
    rows = [_interpolate(bounds, cumulative, _cumulative(row)) for row in sums.flatten(0, -2)]
    below = torch.stack(rows).view(*sums.shape[:-1], parts + 1)
    totals = sums.sum(-1, keepdim=True)
    return (below.diff() / totals).masked_fill(totals <= 1e-3 * sums.abs().sum(-1, keepdim=True), torch.nan)


def _cumulative(amounts: Tensor) -> Tensor:
    return torch.cat([amounts.new_zeros(1), amounts.cumsum(0)])


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """ys at xs, both of which never decrease, and straight lines in between."""
    above = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    width = xs[above] - xs[above - 1]
    fraction = torch.where(width > 0, (x - xs[above - 1]) / width, 0.0).clamp(0, 1)
    return ys[above - 1] + fraction * (ys[above] - ys[above - 1])
