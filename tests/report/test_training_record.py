"""eakd_kernels.report.TrainingRecord against the rows that were put into it."""

import math

import pytest
import torch
from training_records import FIELDS, random_batch, random_stats, record_of, stats_of

from eakd_kernels import RowStats, ea_kd_loss
from eakd_kernels.report import TrainingRecord, row_gradient_norms, training_record
from eakd_kernels.report.binning import FINITE, INFINITE, NAN, bins_of
from eakd_kernels.report.phases import SIDE, SUMS
from eakd_kernels.report.training_view import BANDS, share_of_tenths, view_of


def kept(steps):
    """(step, token, context, four statistics, norm) of every row of random_batch that counts."""
    found = []
    for step in steps:
        (stats, ids, labels), keywords = random_batch(step)
        for s, j in (labels != -100).nonzero().tolist():
            values = [getattr(stats, name)[s, j].item() for name in FIELDS]
            context = tuple(ids[s, max(0, j - 15) : j + 1].tolist())
            found.append((step, labels[s, j].item(), context, *values, keywords["gradient_norms"][s, j].item()))
    return found


def column(rows, name):
    return torch.tensor([row[3 + (*FIELDS, "norm").index(name)] for row in rows], dtype=torch.float32)


def summed(record):
    """Everything that adds up, over all phases."""
    phases = record.phases.cells()
    return sum(phase.sums for phase in phases)


# What is counted


def test_quantiles_of_every_step():
    steps = range(5)
    view = view_of(record_of(steps))
    for step in steps:
        for name, found in zip(FIELDS, view.bands[step], strict=True):
            values = column(kept([step]), name).sort().values
            exact = torch.tensor([float(values[math.ceil(p * len(values)) - 1]) for p in BANDS])
            torch.testing.assert_close(torch.tensor(found), exact, rtol=1 / 128, atol=1e-7)


def test_rows_left_out_are_not_counted():
    labels = torch.tensor([5, -100, 7, 7])
    mask = torch.tensor([True, True, False, True])
    stats = stats_of(*(torch.tensor([1.0, 0, 0, 3]) for _ in range(4)))
    for given, rows in (({}, 4), ({"labels": labels}, 3), ({"mask": mask}, 3), ({"labels": labels, "mask": mask}, 2)):
        record = TrainingRecord()
        record.add(stats, step=0, **given)
        assert record.steps.cells()[0].rows == rows, given
    record = TrainingRecord(ignore_index=7)
    record.add(stats, labels=labels.where(labels > 0, 1), step=0)
    assert record.steps.cells()[0].rows == 2


def test_no_row_that_counts():
    record = TrainingRecord()
    record.add(stats_of([0.0], [0.0], [0.0], [0.0]), labels=torch.tensor([-100]), step=0)
    record.add(stats_of([], [], [], []), input_ids=torch.zeros(0, dtype=torch.int64), step=1)
    with pytest.raises(ValueError, match="the record has no rows"):
        record.render()


def test_rows_by_both_entropies():
    rows = kept(range(4))
    (phase,) = _merged_phases(record_of(range(4)))
    pairs = torch.stack([column(rows, "teacher_entropy"), column(rows, "student_entropy")], 1).double()
    assert phase.plane.extent == 8.0  # the power of two above log(1000)
    for found, weights in zip(phase.plane.sums, (None, column(rows, "weight").double()), strict=True):
        exact, _ = torch.histogramdd(pairs, [SIDE, SIDE], range=[0, 8.0, 0, 8.0], weight=weights)
        torch.testing.assert_close(found, exact)


def _merged_phases(record):
    everything = record.phases.new_cell()
    for phase in record.phases.cells():
        everything.merge(phase)
    return [everything]


def test_a_plane_that_grew_is_one_that_was_large_from_the_start():
    small, large = (stats_of([h], [h / 2], [1.0], [1.0]) for h in (0.3, 300.0))
    records = [TrainingRecord(), TrainingRecord()]
    for record, order in zip(records, ((small, large), (large, small)), strict=True):
        for stats in order:
            record.add(stats, step=0)
    first, second = (record.phases.cells()[0].plane for record in records)
    assert first.extent == second.extent == 512.0
    assert torch.equal(first.sums, second.sums) and first.sums[0].nonzero().tolist() == [[0, 0], [37, 18]]


def test_shares_of_tenths():
    """Of 100 rows, each with a bin of its own: ten a tenth."""
    entropies = 0.01 * 1.05 ** torch.arange(100.0)
    amounts = torch.rand(3, 100)
    order = torch.randperm(100)
    record = TrainingRecord()
    for part in order.split(30):
        weight, divergence, norms = amounts[:, part]
        record.add(stats_of(entropies[part], entropies[part], weight, divergence), step=0, gradient_norms=norms)
    found = share_of_tenths(record.phases.cells()[0])
    weight, divergence, norms = amounts.double()
    for name, exact in zip(SUMS[1:], (divergence, weight * divergence, norms), strict=True):
        torch.testing.assert_close(torch.tensor(found[name]), (exact.view(10, 10).sum(1) / exact.sum()).float())


def test_steps_without_gradient_norms():
    record = record_of(range(2))
    arguments, _ = random_batch(2)
    record.add(*arguments, step=2)
    assert summed(record)[3].sum() == pytest.approx(float(column(kept(range(2)), "norm").double().sum()))
    assert summed(record)[0].sum() == len(kept(range(3)))
    without = TrainingRecord()
    without.add(*arguments, step=2)
    assert not view_of(without).has_norms and view_of(record).has_norms


def test_values_that_are_not_finite():
    nan, inf = math.nan, math.inf
    teacher = [1.0, nan, 1.0, 1.0, 1.0, -inf, 2.0]
    student = [1.0, 1.0, inf, 1.0, 1.0, 1.0, 2.0]
    weight = [0.5, nan, 0.5, 0.5, 0.0, 0.5, 0.25]
    divergence = [2.0, nan, 2.0, inf, inf, 2.0, 8.0]
    norms = torch.tensor([1.0, 1, 1, 1, 1, 1, nan])
    record = TrainingRecord()
    record.add(stats_of(teacher, student, weight, divergence), step=0, gradient_norms=norms)
    (cell,), (phase,) = record.steps.cells(), record.phases.cells()
    assert cell.counts[:, [NAN, INFINITE]].tolist() == [[1, 1], [0, 1], [1, 0], [1, 2]]
    assert cell.counts.sum(1).tolist() == [7] * 4
    assert cell.smallest.tolist() == [1.0, 1.0, 0.0, 2.0] and cell.largest.tolist() == [2.0, 2.0, 0.5, 8.0]
    assert phase.sums.sum(1).tolist() == [3, 12.0, 4.0, 2.0]  # of rows 0, 2 and 6
    assert phase.plane.sums.sum((1, 2)).tolist() == [4, 1.25]  # 0, 3, 4 and 6
    assert (phase.norms, phase.odd_norms) == (7, 1)
    found = phase.samples.found
    assert [sample.weight for sample in found["heaviest"]] == [0.5] * 4 + [0.25, 0.0]
    assert len(found["not finite"]) == 6


def test_fp64_statistics():
    record = TrainingRecord()
    record.add(RowStats(*(None if x is None else x.double() for x in random_stats(5))), step=0)
    assert record.steps.cells()[0].rows == 5


def test_every():
    record = record_of(range(7), every=3)
    assert [(cell.first, cell.last) for cell in record.steps.cells()] == [(0, 0), (3, 3), (6, 6)]


def test_several_calls_of_a_step():
    record = record_of([0, 0])
    assert record.steps.cells()[0].rows == 2 * len(kept([0]))


# Single rows


def best(rows, key, keep):
    """Of each token in its context the first by key, and of these the first `keep`."""
    found = {}
    for row in sorted(rows, key=key):
        found.setdefault(row[1:3], row)
    return list(found.values())[:keep]


def test_heaviest_and_lightest():
    rows = kept([*range(6), 2])  # one batch twice
    (phase,) = _merged_phases(record_of([*range(6), 2], keep=5))
    for name, sign in (("heaviest", -1), ("lightest", 1)):
        wanted = best(rows, lambda row, sign=sign: (sign * row[5], row[0]), 5)
        found = [tuple(sample) for sample in phase.samples.found[name]]
        assert [row[:3] for row in found] == [row[:3] for row in wanted]
        torch.testing.assert_close(torch.tensor([row[3:] for row in found]), torch.tensor([row[3:] for row in wanted]))


def test_what_a_row_predicts():
    ids = torch.tensor([[3, 1, 4], [1, 5, 9]])
    stats = stats_of(*(torch.arange(6.0).view(2, 3) for _ in range(4)))

    def found(**given):
        record = TrainingRecord(context=2)
        record.add(stats, step=0, **given)
        return {(sample.token, sample.context) for sample in record.phases.cells()[0].samples.found["lightest"]}

    contexts = [(3,), (3, 1), (1, 4), (1,), (1, 5), (5, 9)]
    assert found(input_ids=ids) == set(zip([1, 4, None, 5, 9, None], contexts, strict=True))
    labels = torch.tensor([[7, 7, -100], [8, 8, 8]])
    kept_contexts = contexts[:2] + contexts[3:]
    assert found(input_ids=ids, labels=labels) == set(zip([7, 7, 8, 8, 8], kept_contexts, strict=True))
    assert found(labels=labels) == {(7, ()), (8, ())}
    assert found() == {(None, ())}


def test_rows_without_context_are_all_different():
    record = TrainingRecord(keep=3)
    record.add(stats_of(*([1.0] * 5 for _ in range(4))), labels=torch.zeros(5, dtype=torch.int64), step=0)
    assert len(record.phases.cells()[0].samples.found["heaviest"]) == 3


def test_of_equal_weights_the_earlier_step():
    record = TrainingRecord(keep=1)
    for step in (5, 3, 4):
        record.add(stats_of([1.0], [1.0], [0.0], [1.0]), step=step)
    (phase,) = _merged_phases(record)
    assert phase.samples.found["heaviest"][0].step == phase.samples.found["lightest"][0].step == 3


def test_nothing_is_kept_where_nothing_shall_be():
    record = record_of(range(2), keep=0)
    assert record.phases.cells()[0].samples.found == {"heaviest": [], "lightest": [], "not finite": []}
    record.render()


# Gradient norms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_row_gradient_norms(dtype):
    gradient = torch.randn(2, 3, 1000).to(dtype)
    found = row_gradient_norms(gradient)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), gradient.double().square().sum(-1).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (7,)])
def test_norms_of_odd_shapes(shape):
    for dtype in (torch.float32, torch.bfloat16):
        found = row_gradient_norms(torch.ones(shape, dtype=dtype))
        torch.testing.assert_close(found, torch.full(shape[:-1], shape[-1] ** 0.5))


def test_norms_of_half_a_gradient_at_a_time(monkeypatch):
    monkeypatch.setattr(training_record, "_CONVERTED", 2000)
    converted, norm = [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, **more: converted.append(x.numel()) or norm(x, **more))
    gradient = torch.randn(7, 3, 300).bfloat16()
    torch.testing.assert_close(row_gradient_norms(gradient), norm(gradient.float(), dim=-1))
    assert max(converted) <= 2000 and sum(converted) == gradient.numel()


def test_row_gradient_norms_overflow_no_half():
    assert row_gradient_norms(torch.full((1, 100), 60000.0, dtype=torch.float16)).item() == pytest.approx(6e5)


def test_both_ways_to_the_gradient():
    teacher = torch.randn(4, 9)
    student = (torch.randn(4, 9, requires_grad=True) * 1.0,)[0]
    norms = []
    student.register_hook(lambda g: norms.append(row_gradient_norms(g)))
    loss = ea_kd_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    loss.backward()
    assert len(norms) == 2 and torch.equal(norms[0], norms[1]) and torch.equal(norms[1], row_gradient_norms(gradient))


@pytest.mark.parametrize("gradient", [torch.tensor(1.0), torch.ones(2, 3, dtype=torch.int64)])
def test_what_is_no_gradient(gradient):
    with pytest.raises(TypeError, match="gradient must be a floating-point tensor"):
        row_gradient_norms(gradient)


# Errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"bound": 0.0}, ValueError, "bound must be a finite number > 0"),
        ({"bound": math.inf}, ValueError, "bound must be a finite number > 0"),
        ({"keep": -1}, ValueError, "keep must be an integer >= 0, got -1"),
        ({"every": 0}, ValueError, "every must be an integer >= 1, got 0"),
        ({"every": 1.5}, TypeError, "integer"),
        ({"decode": 3}, TypeError, "decode must be a tokenizer or callable, got int"),
    ],
)
def test_settings_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        TrainingRecord(**options)


STATS = random_stats(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "stats, given, error, message",
    [
        ((torch.tensor(1.0), STATS), {}, TypeError, "stats must be RowStats, got tuple; .* the second"),
        (STATS._replace(weight=None), {}, ValueError, "stats.weight is None"),
        (STATS, {"labels": IDS[:, :2]}, ValueError, r"labels must have .* shape \(2, 3\), got \(2, 2\)$"),
        (STATS, {"input_ids": IDS[None]}, ValueError, r"input_ids must have .*, got \(1, 2, 3\); leave it out where"),
        (STATS, {"input_ids": IDS.float()}, TypeError, "input_ids must be .* integer dtype, got torch.float32"),
        (STATS, {"mask": IDS}, TypeError, "mask must be a tensor of bool dtype, got torch.int64"),
        (STATS, {"gradient_norms": IDS}, TypeError, "gradient_norms must be a tensor of floating-point dtype"),
        (STATS, {"labels": [[0]]}, TypeError, "labels must be a tensor, got list"),
        (STATS, {"labels": IDS.to("meta")}, ValueError, "labels must be on cpu, as the statistics are, got meta"),
        (STATS, {"step": -1}, ValueError, "step must be >= 0, got -1"),
        (STATS, {"step": 0.5}, TypeError, "integer"),
    ],
)  # fmt: skip
def test_what_cannot_be_added(stats, given, error, message):
    with pytest.raises(error, match=message):
        TrainingRecord().add(stats, **{"step": 0} | given)


def test_a_tokenizer_is_decoded_with():
    class Tokenizer:
        def __call__(self, text):
            raise AssertionError("encodes")

        def decode(self, token):
            return f"<{token}>"

    assert TrainingRecord(decode=Tokenizer()).decode(3) == "<3>"


def test_bins_of_entropies_are_finite():
    """What the sums of a phase rely on."""
    assert bins_of(torch.tensor([0.0, 10.8])).max() < FINITE
