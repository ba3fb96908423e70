"""Sharded vocabularies: under autograd and torch.compile, DTensors, shards that do not fit, groups of one."""

import re

import pytest
import torch
from processes import Collectives
from shards import LAYOUTS, ROWS, VOCAB, assert_close, own_columns, promises, upstream_of, whole
from support import make_logits, takes_fp64
from torch import distributed as dist

from eakd_kernels import divergences as D
from eakd_kernels import ea_kd_loss


def behaviour(widths, student, teacher, divergence):
    columns, group = own_columns(widths), dist.group.WORLD
    leaf = student[..., columns].clone().requires_grad_()
    teacher = teacher[..., columns]

    def loss_of(logits, **options):
        return ea_kd_loss(logits, teacher, divergence=divergence, process_group=group, **options)

    loss, gradient, kept = promises(loss_of, leaf)
    with torch.inference_mode():
        same = torch.equal(loss_of(leaf * 1), loss)
        inferred = teacher * 1
    (by_inferred,) = torch.autograd.grad(ea_kd_loss(leaf, inferred, divergence=divergence, process_group=group), leaf)
    with pytest.raises(ValueError, match="inplace_gradient"):
        loss_of(leaf, inplace_gradient=True)
    return {**kept, "inference": same and torch.equal(by_inferred, gradient)}


@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys", D.JSD(0.4)], ids=str)
def test_behaviour(divergence, world):
    student, teacher = make_logits(ROWS, VOCAB)
    for answer in world(2).run(behaviour, LAYOUTS["2 even"], student.detach(), teacher, divergence):
        assert all(answer.values()), answer


# ---- DTensor -----------------------------------------------------------------------------------------------------


def as_dtensors(student, teacher, labels, options, shape, placements):
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", shape)
    student = distribute_tensor(student, mesh, placements).requires_grad_()
    teacher = distribute_tensor(teacher, mesh, placements)
    with Collectives() as counted:
        loss, stats = ea_kd_loss(student, teacher, labels, return_stats=True, **options)
    loss.backward()
    return loss.detach(), stats, student.grad.full_tensor(), len(counted.calls)


@pytest.mark.parametrize("vocab_size", [60, 61, 3])
@pytest.mark.parametrize("mesh", ["tp", "dp tp", "whole"])
def test_dtensor(mesh, vocab_size, world):
    """Its spec has the sizes: one collective is spared. Three columns leave the last of four ranks none."""
    from torch.distributed.tensor import Replicate, Shard

    shape, placements, collectives = {
        "tp": ((4,), [Shard(-1)], 1),
        "dp tp": ((2, 2), [Replicate(), Shard(1)], 1),
        "whole": ((4,), [Replicate()], 0),
    }[mesh]
    student, teacher = make_logits(ROWS, vocab_size)
    labels = torch.arange(ROWS) % 3
    options = {"ce_weight": 0.5, "temperature": 2.0}
    loss, stats, gradient = whole(ea_kd_loss, student.detach(), teacher, labels, options)
    gradient = gradient / upstream_of(loss)
    for got in world(4).run(as_dtensors, student.detach(), teacher, labels, options, shape, placements):
        assert_close(got[0], loss / 1)
        for field, want in zip(got[1], stats, strict=True):
            assert_close(field, want)
        assert (got[2] - gradient).norm() <= 1e-6 * gradient.norm() and got[3] == collectives


def dtensor_error(change):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    columns, rows, options = [Shard(-1)], [Shard(0)], {}
    student, teacher = (distribute_tensor(x, mesh, rows if change == "rows" else columns) for x in (student, teacher))
    if change == "plain teacher":
        teacher = teacher.to_local()
    if change == "replicated teacher":
        teacher = teacher.redistribute(mesh, [Replicate()])
    if change == "wider teacher":
        teacher = DTensor.from_local(torch.randn(4, 6), mesh, columns)
    if change == "group":
        options = {"process_group": dist.group.WORLD}
    if change == "leaf in place":
        student, options = student.requires_grad_(), {"inplace_gradient": True}
    try:
        ea_kd_loss(student, teacher, **options)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize(
    "change, message",
    [
        ("rows", r"Replicate\(\) in every mesh dimension but one"),
        ("plain teacher", "must both be DTensors"),
        ("replicated teacher", "sharded alike"),
        ("wider teacher", "10 columns and teacher_logits 12"),
        ("group", "process_group must be None for DTensors"),
        ("leaf in place", "inplace_gradient"),
    ],
)
def test_dtensors_that_do_not_fit(change, message, world):
    for answer in world(2).run(dtensor_error, change):
        assert answer is not None and re.search(message, answer), answer


# ---- errors, and a group of one ----------------------------------------------------------------------------------


def error_of(students, teachers, rows, options):
    rank = dist.get_rank()
    try:
        ea_kd_loss(
            torch.randn(rows[rank], students[rank]),
            torch.randn(rows[rank], teachers[rank]),
            torch.zeros(rows[rank], dtype=torch.long) + options.pop("label", 0),
            process_group=dist.group.WORLD,
            **options,
        )
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "students, teachers, rows, options, message",
    [
        ((5, 4), (5, 5), (2, 2), {}, "must hold the same columns"),
        ((5, 4), (5, 4), (2, 3), {}, "the same rows"),
        ((5, 4), (5, 4), (2, 2), {"vocab_size": 10}, "1..9"),
        ((0, 0), (0, 0), (2, 2), {}, "no columns"),
        ((5, 4), (5, 4), (2, 2), {"ce_weight": 1.0, "label": 9}, "0..8"),
        ((5, 4), (5, 4), (2, 2), {"teacher_class_weights": torch.ones(5)}, r"must have shape \(9,\)"),
    ],
)
def test_shards_that_do_not_fit(students, teachers, rows, options, message, world):
    """The same error on every rank: none waits for another."""
    for answer in world(2).run(error_of, students, teachers, rows, options):
        assert answer is not None and re.search(message, answer), answer


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_is_no_group(group_of_one, backend):
    student, teacher = make_logits(4, VOCAB, dtype=torch.float64 if takes_fp64(backend) else torch.float32)
    labels, options = torch.arange(4), {"ce_weight": 0.1, "backend": backend}
    with Collectives() as counted:
        got = ea_kd_loss(student, teacher, labels, process_group=group_of_one, **options)
    assert not counted.calls
    want = ea_kd_loss(student, teacher, labels, **options)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (got, want)))
