"""eakd_kernels.report.binning against sorting and counting."""

import math

import pytest
import torch

from eakd_kernels.report.binning import (
    BINS,
    FINITE,
    INFINITE,
    NAN,
    bins_of,
    edges,
    histogram,
    quantiles,
    shares_by_quantile,
)

PROBABILITIES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def counted(values):
    return bins_of(values).bincount(minlength=BINS)


def samples(kind, n=5000):
    draw = torch.randn(n, generator=torch.Generator().manual_seed(0))
    return {"entropies": 10.8 * draw.abs().clamp(max=1), "sizes": (2.5 * draw).exp(), "tiny": draw.abs() * 1e-5}[kind]


kinds = pytest.mark.parametrize("kind", ["entropies", "sizes", "tiny"])


@kinds
def test_values_lie_in_their_bins(kind):
    values = samples(kind)
    bins, bounds = bins_of(values).long(), edges()
    assert (bounds[bins] <= values).all() and (values < bounds[bins + 1]).all()
    inner = bins[bins > 0]
    assert (bounds[inner + 1] / bounds[inner]).max() <= 1 + 1 / 64
    assert len(bounds) == FINITE + 1 and (bounds.diff()[:-1] > 0).all()


def test_values_of_their_own():
    values = torch.tensor(
        [0.0, -0.0, -3.0, 2.0**-25, 2.0**-24, 2.0**16, 3e38, math.nan, -math.nan, math.inf, -math.inf]
    )
    assert bins_of(values).tolist() == [0, 0, 0, 0, 1, FINITE - 1, FINITE - 1, NAN, NAN, INFINITE, INFINITE]


@kinds
def test_quantiles_are_off_by_at_most_one_in_128(kind):
    values = samples(kind).sort().values
    found = quantiles(counted(values), PROBABILITIES, float(values[0]), float(values[-1]))
    for p, quantile in zip(PROBABILITIES, found, strict=True):
        exact = float(values[max(math.ceil(p * len(values)), 1) - 1])
        assert abs(quantile - exact) <= exact / 128 + 2.0**-24


def test_quantiles_of_a_constant_are_exact():
    assert quantiles(counted(torch.full((7,), 1.0)), PROBABILITIES, 1.0, 1.0) == [1.0] * len(PROBABILITIES)


def test_quantiles_beyond_the_bins():
    values = torch.tensor([-5.0, 1e-9, 1e6, 1e7])
    assert quantiles(counted(values), (0.25, 0.5, 0.75, 1.0), -5.0, 1e7) == [0.0, 0.0, 1e7, 1e7]


def test_quantiles_of_nothing():
    found = quantiles(counted(torch.tensor([math.nan, math.inf])), PROBABILITIES, math.inf, -math.inf)
    assert all(map(math.isnan, found))


@kinds
def test_histogram_is_off_by_bins_that_parts_share(kind):
    values = samples(kind)
    end, parts, bounds = float(values.quantile(0.9)), 13, edges()
    found = histogram(counted(values), end, parts)
    assert found.sum() == len(values)
    for i in range(1, parts):
        at = end * i / parts
        shared = int((torch.tensor([at]) < bounds).nonzero()[0, 0])
        within = ((values >= bounds[shared - 1]) & (values < bounds[shared])).sum()
        assert abs(found[:i].sum() - (values < at).sum()) <= within


def test_histogram_where_no_bin_is_shared():
    values = torch.tensor([0.0, 0.5, 1.0, 1.0, 3.5, 70.0, 1e9, -1.0])
    assert histogram(counted(values), 4.0, 4).tolist() == [3, 2, 0, 3]


def test_shares_where_every_value_has_a_bin():
    values = 1.1 ** torch.arange(40.0)
    amounts = torch.rand(3, 40, dtype=torch.float64)
    order = torch.randperm(40)
    bins = bins_of(values[order])
    sums = torch.stack([bins.bincount(row[order], minlength=FINITE) for row in amounts])
    found = shares_by_quantile(bins.bincount(minlength=FINITE).double(), sums, 10)
    torch.testing.assert_close(found, amounts.view(3, 10, 4).sum(-1) / amounts.sum(-1, keepdim=True))


def test_values_in_one_bin_have_equal_shares():
    bins = bins_of(torch.full((8,), 2.5))
    sums = bins.bincount(torch.arange(8.0, dtype=torch.float64), minlength=FINITE)
    found = shares_by_quantile(bins.bincount(minlength=FINITE).double(), sums[None], 10)
    torch.testing.assert_close(found, torch.full((1, 10), 0.1, dtype=torch.float64))


def test_shares_of_nothing():
    counts = bins_of(torch.tensor([1.0, 2.0])).bincount(minlength=FINITE).double()
    assert shares_by_quantile(counts, torch.zeros(1, FINITE, dtype=torch.float64), 2).isnan().all()
