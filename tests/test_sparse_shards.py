"""Sparse teachers of vocabularies that are sharded over process groups, against the same call on whole rows."""

import math
import re

import pytest
import torch
from processes import Collectives
from shards import LAYOUTS, ROWS, VOCAB, assert_close, check, own_columns, positions, promises, whole
from sparse_problems import MODELS, TAILS, sparse_problem
from support import make_logits
from torch import distributed as dist

from eakd_kernels import divergences as D
from eakd_kernels import teacher_topk, topk_ea_kd_loss


def difficulty(stats):
    """A weighting of one's own, on statistics of whole rows."""
    return stats.teacher_entropy + 0.1 * stats.student_lse.detach() + stats.student_entropy


OPTIONS = {
    "cross-entropy": {"ce_weight": 0.5, "temperature": 2.0},
    "generated": {"teacher_temperature": 2.0, "temperature": 3.0},
    "live weights": {"detach_weights": False, "weight_norm": "bound"},
    "callable": {"weighting": difficulty, "detach_weights": False, "ce_weight": 0.1},
    "rows": {"reduction": "none", "mask": torch.arange(ROWS) != 3},
    "temperature": {"temperature": torch.tensor(2.0)},
    "temperatures of rows": {"temperature": torch.linspace(0.5, 4, ROWS), "ce_weight": 0.3},
    "caps": {"student_softcap": 5.0, "student_logit_scale": 0.7, "ce_weight": 0.3, "detach_weights": False},
}
CASES = {
    **{f"{tail} {divergence}": {"tail": tail, "divergence": divergence} for tail, divergence in MODELS},
    **{f"{tail} {name}": {"tail": tail, **options} for tail in TAILS for name, options in OPTIONS.items()},
    "total variation": {"divergence": D.TotalVariation(), "ce_weight": 0.1},
    "JSD, caps": {**OPTIONS["caps"], "divergence": D.JSD(0.3)},
}


def problem(rows=ROWS, k=9, dtype=torch.float32):
    """Student, teacher and labels; some ids are padding, and some labels are among the ids."""
    student, _, ids, logprobs, _ = sparse_problem(rows, VOCAB, k, dtype)
    labels = positions(rows)
    labels[::3] = ids[::3, 1]
    ids[::2, 0], logprobs[1::4, 2] = -1, -torch.inf
    return student, (ids, logprobs), labels


def check_sparse(world, layout, student, teacher, labels, options, **given):
    return check(world, LAYOUTS[layout], student, teacher, labels, options, topk_ea_kd_loss, collectives=2, **given)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(layout, name, world):
    check_sparse(world, layout, *problem(), CASES[name])


@pytest.mark.parametrize("name", [*(f"bucket {d}" for d in ("forward_kl", "reverse_kl")), "zero caps"])
def test_backends(name, world, kernels):
    check_sparse(world, "2 uneven", *problem(), CASES[name], backend=kernels)


@pytest.mark.parametrize("name", CASES)
def test_reference(name, world):
    student, teacher, labels = problem(dtype=torch.float64)
    options = {**CASES[name], "backend": "reference"}
    answers = check(world, LAYOUTS["4 uneven"], student, teacher, labels, options, topk_ea_kd_loss)
    loss, _, gradient = whole(topk_ea_kd_loss, student.detach(), teacher, labels, options)
    torch.testing.assert_close(answers[0]["loss"], loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([a["gradient"] for a in answers], -1), gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, tail, world):
    for layout in ("2 even", "4 uneven"):
        check_sparse(world, layout, *problem(dtype=dtype), {"tail": tail, "ce_weight": 0.1})


@pytest.mark.parametrize("tail, divergence", MODELS)
def test_every_column(tail, divergence, world):
    """k = V: nothing is left beside the ids, on any rank."""
    student, (ids, logprobs), labels = problem(k=VOCAB)
    options = {"tail": tail, "divergence": divergence, "ce_weight": 0.2}
    _, _, ids, logprobs, _ = sparse_problem(ROWS, VOCAB, VOCAB, torch.float32)
    for layout in ("2 uneven", "4 uneven"):
        check_sparse(world, layout, student, (ids, logprobs), labels, options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("tail", TAILS)
def test_ids_on_one_rank(tail, backend, world):
    """The other has none of them, and the last row names nothing anywhere; 4 uneven ranks: one has no columns."""
    student, (ids, logprobs), labels = problem()
    ids = torch.where(ids < 0, ids, torch.arange(9).expand_as(ids) + 5)
    ids[-1] = -1
    for layout in ("2 even", "4 uneven"):
        options = {"tail": tail, "ce_weight": 0.2, "reduction": "none", "backend": backend}
        collectives = 1 if backend == "reference" else 2
        check(
            world, LAYOUTS[layout], student, (ids, logprobs), labels, options, topk_ea_kd_loss, collectives=collectives
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jeffreys"])
def test_masked_infinite_and_nan(divergence, backend, world):
    """Shards that are -inf throughout, NaN in one, logits at ids that are -inf."""
    student, (ids, logprobs), _ = problem()
    student, inf = student.detach(), math.inf
    student[0, :31], student[1, 31:], student[2] = -inf, -inf, -inf
    student[3, int(ids[3, 4])] = -inf
    student[4, 7], student[5, 50] = math.nan, -inf
    student[6] = math.nan
    labels = torch.tensor([40, 3, 4, 5, 6, 7, -100])
    options = {"divergence": divergence, "ce_weight": 0.5, "reduction": "none", "backend": backend}
    collectives = 1 if backend == "reference" else 2
    for layout in ("2 even", "4 even"):
        check(
            world, LAYOUTS[layout], student, (ids, logprobs), labels, options, topk_ea_kd_loss, collectives=collectives
        )


@pytest.mark.parametrize("gap", [15.0, 50.0])
def test_a_student_that_is_sure(gap, world):
    """The rest's mass is e^-50, of which every rank has a part; far from 0, too."""
    student, (ids, logprobs), labels = problem()
    student = student.detach().mul(64).round().div(64) + 512
    student += gap * torch.zeros_like(student).scatter(-1, ids.clamp(min=0), 1.0)
    for layout in ("2 even", "4 uneven"):
        check_sparse(world, layout, student, (ids, logprobs), labels, {"ce_weight": 0.2})


@pytest.mark.parametrize("name", ["bucket", "renormalize", "zero", "bucket jeffreys", "bucket caps"])
@pytest.mark.parametrize("temperature", [torch.tensor(2.0), torch.linspace(1, 3, ROWS)], ids=["one", "of rows"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_temperature_that_learns(backend, temperature, name, world):
    """Every rank gets the whole gradient, from no collective more."""
    tail, case = name.split()[0], CASES[f"{name} forward_kl"] if name in TAILS else CASES[name]
    temperature = temperature.clone().requires_grad_()
    options = {**case, "tail": tail, "temperature": temperature, "backend": backend}
    collectives = 1 if backend == "reference" else 2
    student, teacher, labels = problem()
    answers = check(
        world, LAYOUTS["4 uneven"], student, teacher, labels, options, topk_ea_kd_loss, collectives=collectives
    )
    for answer in answers:
        assert torch.equal(answer["temperature"], answers[0]["temperature"])
        torch.testing.assert_close(answer["temperature"], temperature.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (), (2, 0), (2, 3)], ids=str)
def test_leading_shapes(shape, world):
    student, teacher = make_logits(*shape, VOCAB)
    labels = torch.full(shape, 4)
    check_sparse(world, "2 uneven", student, teacher_topk(teacher, 5)[:2], labels, {"ce_weight": 0.5})


@pytest.mark.parametrize("cut", [3, 31, 32])
def test_columns_past_the_vocabulary(cut, world):
    student, teacher = make_logits(4, VOCAB)
    student.data[:, cut:] = math.nan
    teacher = teacher_topk(teacher[:, :cut], 3)[:2]
    answers = check_sparse(world, "2 even", student, teacher, None, {"vocab_size": cut})
    assert not torch.cat([answer["gradient"] for answer in answers], -1)[:, cut:].any()


# ---- behaviour ---------------------------------------------------------------------------------------------------


def behaviour(widths, student, teacher, backend):
    leaf = student[..., own_columns(widths)].clone().requires_grad_()

    def loss_of(logits, **options):
        return topk_ea_kd_loss(logits, *teacher, process_group=dist.group.WORLD, backend=backend, **options)

    loss, _, kept = promises(loss_of, leaf)
    with torch.no_grad():
        quiet = loss_of(leaf, temperature=torch.tensor(1.0, requires_grad=True))
    return {**kept, "without gradients": torch.equal(quiet, loss)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_behaviour(backend, world):
    student, teacher, _ = problem()
    for answer in world(2).run(behaviour, LAYOUTS["2 even"], student.detach(), teacher, backend):
        assert all(answer.values()), answer


def as_dtensor(student, teacher, labels, k):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (4,))
    student, teacher = (distribute_tensor(x, mesh, [Shard(-1)]) for x in (student, teacher))
    student.requires_grad_()
    with Collectives() as counted:
        ids, logprobs, entropy, _ = teacher_topk(teacher, k)
        loss = topk_ea_kd_loss(student, ids, logprobs, labels, teacher_entropy=entropy, ce_weight=0.5)
    loss.backward()
    return loss.detach(), student.grad.full_tensor(), len(counted.calls)


@pytest.mark.parametrize("vocab_size", [60, 61, 3])
def test_dtensor(vocab_size, world):
    student, teacher = make_logits(ROWS, vocab_size)
    labels = torch.arange(ROWS) % 3
    ids, logprobs, entropy, _ = teacher_topk(teacher, 3)
    want = topk_ea_kd_loss(student, ids, logprobs, labels, teacher_entropy=entropy, ce_weight=0.5)
    (gradient,) = torch.autograd.grad(want, student)
    for loss, got, collectives in world(4).run(as_dtensor, student.detach(), teacher, labels, 3):
        assert_close(loss, want.detach())
        assert (got - gradient).norm() <= 1e-6 * gradient.norm() and collectives == 4


def error_of(ids):
    try:
        topk_ea_kd_loss(torch.randn(2, 5), ids, torch.full(ids.shape, -2.0), process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("ids, message", [([[9, 10], [1, 2]], "below 10.*got 10"), ([[9, 9], [1, 2]], "9 twice")])
def test_ids_are_of_the_whole_vocabulary(ids, message, world):
    for answer in world(2).run(error_of, torch.tensor(ids)):
        assert answer is not None and re.search(message, answer), answer


# ---- teacher_topk ------------------------------------------------------------------------------------------------


def likeliest(widths, logits, k, options, backend):
    columns = own_columns(widths)
    with pytest.MonkeyPatch.context() as environment, Collectives() as counted:
        environment.setenv("EAKD_BACKEND", backend)
        answer = teacher_topk(logits[..., columns], k, process_group=dist.group.WORLD, **options)
    return answer, len(counted.calls)


@pytest.mark.parametrize("k", [1, 9, VOCAB])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_teacher_topk(layout, dtype, k, world, fp64_backend):
    _, logits = make_logits(2, 3, VOCAB, dtype=dtype, offset=40.0)
    options = {"temperature": 2.0, "entropy_temperature": 1.5}
    want = teacher_topk(logits, k, **options)
    answers = world(len(LAYOUTS[layout])).run(likeliest, LAYOUTS[layout], logits, k, options, fp64_backend)
    for (ids, *fields), collectives in answers:
        assert collectives == 3
        assert torch.equal(logits.gather(-1, ids), logits.gather(-1, want[0]))
        assert torch.equal(ids.sort(-1).values, want[0].sort(-1).values) or dtype == torch.bfloat16
        for got, field, first in zip(fields, want[1:], answers[0][0][1:], strict=True):
            assert torch.equal(got, first)
            assert_close(got, field, 1e-12 if dtype == torch.float64 else 1e-6)


def test_teacher_topk_of_equal_logits(world, fp64_backend):
    """The lower rank's first; columns of -inf, which are not mistaken for those that a rank does not have, last."""
    logits = torch.zeros(3, VOCAB)
    logits[0, 5:], logits[2] = -torch.inf, -torch.inf
    answers = world(4).run(likeliest, LAYOUTS["4 uneven"], logits, VOCAB, {}, fp64_backend)
    for (ids, logprobs, entropy, lse), _ in answers:
        assert all(sorted(row) == list(range(VOCAB)) for row in ids.tolist())
        assert ids[1, 0] == 0 and sorted(ids[1, 1:41].tolist()) == list(range(1, 41))
        torch.testing.assert_close(lse, torch.tensor([5.0, VOCAB, 1.0]).log())  # log 1: of the row without mass, 0
        torch.testing.assert_close(entropy, lse)
        assert (logprobs[2] == -torch.inf).all() and (logprobs[0, 5:] == -torch.inf).all()
        torch.testing.assert_close(logprobs[0, :5], -lse[0].expand(5))
