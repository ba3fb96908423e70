"""eakd_kernels.report.TrainingRecord over long trainings and several processes."""

import gc
import pickle
import weakref

import pytest
import torch
from training_records import BOUND, random_batch, random_stats, record_of, stats_of

from eakd_kernels import RowStats, distill_stats
from eakd_kernels.report import TrainingRecord
from eakd_kernels.report.rows import _columns

# Merging


def state(record):
    return (
        [(cell.first, cell.last, cell.counts.tolist(), cell.smallest.tolist(), cell.largest.tolist())
         for cell in record.steps.cells()],
        [(phase.first, phase.last, phase.norms, phase.odd_norms, phase.plane.extent, phase.samples.found)
         for phase in record.phases.cells()],
    )  # fmt: skip


def same(merged, one):
    assert state(merged) == state(one)
    same_sums(merged, one)


def same_sums(merged, one):
    for ours, theirs in zip(merged.phases.cells(), one.phases.cells(), strict=True):
        torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-14, atol=0)
        torch.testing.assert_close(ours.plane.sums, theirs.plane.sums, rtol=1e-14, atol=0)


def test_records_of_ranks_merge_into_that_of_all():
    """Each has its rows of every step; there are too many steps for a cell each."""
    ranks, one = [TrainingRecord(bound=BOUND, keep=4) for _ in range(2)], TrainingRecord(bound=BOUND, keep=4)
    for step in range(150):
        (stats, ids, labels), keywords = random_batch(step)
        for half, rank in enumerate(ranks):
            rows = slice(half, half + 1)
            part = RowStats(*(None if x is None else x[rows] for x in stats))
            norms = keywords["gradient_norms"][rows]
            for record in (rank, one):
                record.add(part, ids[rows], labels[rows], step=step, gradient_norms=norms)
    second = pickle.loads(pickle.dumps(ranks[1]))
    before = state(second)
    assert ranks[0].merge(second) is ranks[0]
    same(ranks[0], one)
    assert state(second) == before
    assert ranks[0].render() == one.render()


def test_parts_of_a_training_merge():
    parts = [record_of(range(0, 20)), record_of(range(20, 290)), record_of(range(290, 300))]
    same(parts[0].merge(*parts[1:]), record_of(range(300)))


def test_planes_of_other_extents_merge():
    records = [TrainingRecord() for _ in range(3)]
    for record, entropies in zip(records, ([0.3], [300.0], [0.3, 300.0]), strict=True):
        record.add(stats_of(entropies, entropies, [1.0] * len(entropies), [1.0] * len(entropies)), step=0)
    small, large, both = records
    for merged in (pickle.loads(pickle.dumps(small)).merge(large), large.merge(small)):
        same_sums(merged, both)


def test_merging_with_nothing():
    same(record_of(range(3)).merge(TrainingRecord(bound=BOUND)), record_of(range(3)))
    same(TrainingRecord(bound=BOUND).merge(record_of(range(3))), record_of(range(3)))


def test_records_of_other_settings_do_not_merge():
    for name, other in (("bound", None), ("keep", 3), ("context", 3), ("every", 2)):
        with pytest.raises(ValueError, match=f"must have the same {name}"):
            TrainingRecord(bound=BOUND).merge(TrainingRecord(**{"bound": BOUND, name: other}))


def gather(rank_steps):
    """On each rank: its own record, and on the first, what they make together."""
    from torch import distributed as dist

    rank = dist.get_rank()
    record = record_of(rank_steps[rank], decode=lambda token: f"<{token}>")  # which nobody can pickle
    records = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(record, records)
    return record.merge(*records[1:]).render() if rank == 0 else None


def test_records_are_gathered_from_processes(world):
    page, _ = world(2).run(gather, [range(0, 30, 2), range(1, 30, 2)])
    assert page == record_of([*range(0, 30, 2), *range(1, 30, 2)], decode=lambda token: f"<{token}>").render()


def test_pickles_leave_decode_behind():
    record = record_of(range(2), decode=str)
    loaded = pickle.loads(pickle.dumps(record))
    assert loaded.decode is None and record.decode is str
    loaded.decode = str
    assert loaded.render() == record.render()


# Memory


def size(record):
    return len(pickle.dumps(record))


@pytest.mark.slow
def test_size_has_a_bound():
    stats, ids = random_stats(2, 8), torch.arange(16).view(2, 8)
    record, sizes = TrainingRecord(), []
    for step in range(10_000):
        record.add(stats, ids + step, step=step)
        if step + 1 in (2_048, 4_096, 8_192):
            sizes.append(size(record))
    assert size(record) <= max(sizes) * 1.001 <= 14e6
    assert max(sizes) - min(sizes) <= 4096  # integers of more digits
    assert len(record.steps.cells()) <= 128 and len(record.phases.cells()) <= 16


def test_no_graph_is_kept():
    student = torch.randn(4, 9, requires_grad=True)
    stats = distill_stats(student, torch.randn(4, 9))
    norms = student.norm(dim=-1)
    alive = [weakref.ref(stats.divergence), weakref.ref(norms)]
    record = TrainingRecord()
    record.add(stats, step=0, gradient_norms=norms)
    del stats, norms
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_one_copy(monkeypatch):
    """Before it nothing waits for a value: there meta tensors, which have none, would raise."""
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or copy(self))
    record_of(range(1))
    assert copies == [(8, 24)]
    (stats, ids, labels), keywords = random_batch(0)
    stats = RowStats(*(None if x is None else x.to("meta") for x in stats))
    ids, labels, norms = (x.to("meta") for x in (ids, labels, keywords["gradient_norms"]))
    columns = _columns(stats, ids, labels, labels != 3, norms, -100)
    assert {(x.device.type, x.dtype, x.shape) for x in columns.values()} == {("meta", torch.int32, (24,))}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_copy_from_a_gpu():
    (stats, ids, labels), keywords = random_batch(0)
    stats = RowStats(*(None if x is None else x.cuda() for x in stats))
    record, norms = TrainingRecord(bound=BOUND), keywords["gradient_norms"].cuda()
    with torch.profiler.profile() as profiler:
        record.add(stats, ids.cuda(), labels.cuda(), step=0, gradient_norms=norms)
    copies = [event for event in profiler.events() if "DtoH" in event.name]
    assert len(copies) == 1
    same(record, record_of(range(1)))


# Where it may be called


def test_under_inference_mode_and_after():
    record = TrainingRecord(bound=BOUND)
    with torch.inference_mode():
        arguments, keywords = random_batch(0)
        record.add(*arguments, **keywords)
        merged = TrainingRecord(bound=BOUND).merge(record)
    for each in (record, merged):
        each.add(*arguments, **keywords)
        same(each, record_of([0, 0]))


def test_default_dtype_and_device():
    arguments, keywords = random_batch(0)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        record = TrainingRecord(bound=BOUND)
        record.add(*arguments, **keywords)
        page = record.render()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert page == record_of(range(1)).render()
