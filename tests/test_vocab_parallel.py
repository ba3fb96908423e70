"""Vocabularies sharded over process groups, against the same call on whole rows."""

import math

import pytest
import torch
from processes import Collectives
from support import make_logits, takes_fp64
from torch import distributed as dist

from eakd_kernels import distill_stats, ea_dkd_loss, ea_kd_loss, ea_weights
from eakd_kernels import divergences as D
from eakd_kernels.stats import RowStats

VOCAB, ROWS = 61, 7
LAYOUTS = {"2 even": (31, 30), "2 uneven": (3, 58), "4 even": (16, 16, 16, 13), "4 uneven": (1, 40, 0, 20)}


def positions(rows):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 40, (rows,), generator=generator)
    labels[1::5] = -100
    return labels


def difficulty(stats):
    """A weighting of one's own, on statistics of whole rows."""
    return stats.teacher_entropy + 0.1 * stats.student_lse.detach() + stats.student_entropy


# What the kernels' statistics are merged for, and what plain PyTorch computes.
MERGED = {
    "plain": {},
    "cross-entropy": {"ce_weight": 0.5, "temperature": 2.0},
    "equal temperatures": {"temperature": 3.0, "ce_weight": 0.5},
    "live weights": {"detach_weights": False},
    "mean weights": {"weight_norm": "mean", "weighting": "student"},
    "bound": {"weight_norm": "bound", "entropy_bound": 3.0},
    "callable": {"weighting": difficulty, "detach_weights": False},
    "weights given": {"weighting": torch.linspace(0, 2, ROWS), "detach_weights": True},
    "rows": {"reduction": "none", "mask": torch.arange(ROWS) != 3},
    "items": {"reduction": "sum", "num_items": torch.tensor(3)},
    "temperatures of rows": {"temperature": torch.linspace(0.5, 4, ROWS)},
    "reverse": {"divergence": "reverse_kl", "temperature": 2.0},
    "jeffreys": {"divergence": D.Jeffreys(0.9), "ce_weight": 0.3},
    "temperatures": {"temperature": (1.0, 2.0, 3.0, 5.0), "ce_weight": 0.1},
    "reverse at temperatures": {"temperature": (1.0, 4.0), "divergence": "jeffreys"},
    "caps": {
        **{"student_softcap": 5.0, "teacher_softcap": 6.0, "student_logit_scale": 0.7, "teacher_logit_scale": 1.2},
        **{"ce_weight": 0.3, "detach_weights": False},
    },
    "class weights": {"teacher_class_weights": torch.linspace(0.2, 3, VOCAB), "temperature": 2.0},
    "cut": {"vocab_size": 40, "ce_weight": 0.5},
    "cut class weights": {"teacher_class_weights": torch.linspace(0.2, 3, 40), "vocab_size": 40},
}
FORMULAS = {
    "JSD": {"divergence": D.JSD(0.3), "ce_weight": 0.5, "temperature": 2.0},
    "skew": {"divergence": D.SkewForwardKL(0.1), "temperature": (1.0, 3.0)},
    "skew reverse": {"divergence": D.SkewReverseKL(0.2), "temperature": 2.0},
    "total variation": {"divergence": D.TotalVariation(), "vocab_size": 40},
    "alpha-beta": {"divergence": D.AlphaBeta(0.5, 0.7), "detach_weights": False},
    "hellinger": {"divergence": D.SquaredHellinger(), "student_softcap": 9.0},
    "class weights": {"divergence": D.JSD(0.5), "teacher_class_weights": torch.linspace(0.2, 3, VOCAB)},
}
STANDARDIZED = {
    "standardised": {"standardize": True, "temperature": 2.0, "ce_weight": 0.5},
    "all standardised": {"standardize": "all", "detach_weights": False},
    "standardised JSD": {"standardize": True, "divergence": D.JSD(0.5), "temperature": torch.linspace(0.5, 4, ROWS)},
}
CASES = {**MERGED, **{f"formulas: {name}": case for name, case in {**FORMULAS, **STANDARDIZED}.items()}}


def own_columns(widths):
    first = sum(widths[: dist.get_rank()])
    return slice(first, first + widths[dist.get_rank()])


def upstream_of(values):
    return torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)


def sharded(widths, function, student, teacher, labels, options):
    """This rank's part of a call on shards: what a process is asked to do."""
    columns = own_columns(widths)
    student, teacher = student[..., columns].clone().requires_grad_(), teacher[..., columns].clone()
    options = {**options, "process_group": dist.group.WORLD}
    temperature = options.get("temperature")
    if torch.is_tensor(temperature):
        options["temperature"] = temperature = temperature.detach().clone().requires_grad_(temperature.requires_grad)
    with Collectives() as forward:
        loss, stats = function(student, teacher, labels, return_stats=True, **options)
    with Collectives() as backward:
        (loss * upstream_of(loss)).sum().backward()
    return {
        "loss": loss.detach(),
        "stats": stats,
        "gradient": student.grad,
        "temperature": temperature.grad if torch.is_tensor(temperature) else None,
        "sizes": sum(dtype == torch.int64 for _, dtype in forward.calls),
        "forward": len(forward.calls),
        "backward": len(backward.calls),
    }


def whole(function, student, teacher, labels, options):
    student = student.clone().requires_grad_()
    loss, stats = function(student, teacher, labels, return_stats=True, **options)
    (loss * upstream_of(loss)).sum().backward()
    return loss.detach(), stats, student.grad


def assert_close(got, want, bound=1e-6, name="it"):
    """Statistics: bound * max(1, |want|), and the same places infinite or NaN."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite) and got.dtype == want.dtype, f"{name} is {got}, not {want}"
    assert torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()), f"{name} is {got}, not {want}"
    error = (got - want).abs()[finite] / want.abs()[finite].clamp(min=1)
    assert not error.numel() or error.max() <= bound, f"{name} is off by {error.max():.2g}"


def check(world, widths, student, teacher, labels, options, function=ea_kd_loss, backend="cpu", collectives=1):
    options = {"backend": backend, **options}
    student, teacher = student.detach(), teacher.detach()
    answers = world(len(widths)).run(sharded, widths, function, student, teacher, labels, options)
    loss, stats, gradient = whole(function, student, teacher, labels, options)
    for answer in answers:
        assert torch.equal(answer["loss"].nan_to_num(7), answers[0]["loss"].nan_to_num(7))
        for name, got, want, first in zip(RowStats._fields, answer["stats"], stats, answers[0]["stats"], strict=True):
            assert (got is None) == (want is None), name
            if got is not None:
                assert torch.equal(got.nan_to_num(7), first.nan_to_num(7)), f"{name} differs between ranks"
                assert_close(got, want, name=name)
        assert (answer["sizes"], answer["forward"], answer["backward"]) == (1, 1 + collectives, 0)
    assert_close(answers[0]["loss"], loss)
    got = torch.cat([answer["gradient"] for answer in answers], -1)
    assert got.dtype == gradient.dtype and torch.equal(got.isnan(), gradient.isnan())
    error = (got - gradient).nan_to_num().double().norm() / gradient.nan_to_num().double().norm().clamp(min=1e-30)
    assert error <= (1e-6 if gradient.dtype.itemsize > 2 else torch.finfo(gradient.dtype).eps), f"off by {error:.2g}"
    return answers


def collectives_of(name):
    return 1 if name in MERGED else 3 if name.split(": ")[1] in STANDARDIZED else 2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options(layout, name, world):
    student, teacher = make_logits(ROWS, VOCAB)
    check(world, LAYOUTS[layout], student, teacher, positions(ROWS), CASES[name], collectives=collectives_of(name))


@pytest.mark.parametrize("name", ["cross-entropy", "jeffreys", "temperatures", "class weights", "caps"])
def test_backends(name, world, kernels):
    student, teacher = make_logits(ROWS, VOCAB)
    check(world, LAYOUTS["2 uneven"], student, teacher, positions(ROWS), CASES[name], backend=kernels)


@pytest.mark.parametrize("name", MERGED)
def test_reference(name, world):
    """The formulas on shards, of what the kernels' statistics are merged for."""
    student, teacher = make_logits(ROWS, VOCAB, dtype=torch.float64)
    labels, options = positions(ROWS), {**MERGED[name], "backend": "reference"}
    answers = check(world, LAYOUTS["2 uneven"], student, teacher, labels, options, collectives=2)
    loss, _, gradient = whole(ea_kd_loss, student.detach(), teacher, labels, options)
    torch.testing.assert_close(answers[0]["loss"], loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([a["gradient"] for a in answers], -1), gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"divergence": "jeffreys"}, {"divergence": D.JSD(0.4)}], ids=str)
@pytest.mark.parametrize("dtypes", ["fp64 fp64", "bf16 bf16", "fp16 fp16", "fp32 bf16", "bf16 fp64"])
def test_dtypes(dtypes, options, world):
    names = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    one, other = (names[name] for name in dtypes.split())
    student, teacher = make_logits(2, 4, VOCAB)
    student, teacher = student.detach().to(one), teacher.to(other)
    collectives = 2 if "JSD" in str(options) else 1
    check(world, LAYOUTS["2 even"], student, teacher, None, options, collectives=collectives)


@pytest.mark.parametrize("name", ["plain", "cross-entropy", "jeffreys", "formulas: JSD"])
def test_far_from_zero(name, world):
    """Sums are about maxima, of shards and of rows: an offset costs nothing."""
    student, teacher = make_logits(ROWS, VOCAB, offset=512.0)
    student, teacher = (x.detach().mul(64).round().div(64) for x in (student, teacher))
    student[:3, :30] -= 300
    check(world, LAYOUTS["2 even"], student, teacher, positions(ROWS), CASES[name], collectives=collectives_of(name))


def strained(first):
    """Rows in which shards, the first of `first` columns, have no mass on one side or on both, NaN, +inf or less."""
    student, teacher = (x.detach() for x in make_logits(14, VOCAB))
    inf, labels = math.inf, torch.full((14,), first + 1)
    student[0, :first] = teacher[0, :first] = -inf
    teacher[1, :first] = -inf
    student[2, :first] = -inf
    student[3] = teacher[3] = -inf
    student[4], teacher[5] = -inf, -inf
    student[6, 3] = teacher[6, 3] = -inf
    student[7, first + 2] = -inf
    student[8, 0], teacher[9, first] = math.nan, math.nan
    student[10, 1], teacher[11, first] = inf, inf
    labels[2] = labels[6] = 0
    student[12], teacher[12], labels[12] = math.nan, math.nan, -100
    teacher[13, first:] -= 2000
    return student, teacher, labels


@pytest.mark.parametrize("name", ["plain", "cross-entropy", "reverse", "jeffreys", "temperatures", "formulas: JSD"])
@pytest.mark.parametrize("layout", ["2 even", "4 uneven"])
def test_masked_infinite_and_nan(layout, name, world):
    widths = LAYOUTS[layout]
    student, teacher, labels = strained(widths[0] + widths[1] * (len(widths) > 2))
    # The kernels and the reference agree on all but the log-sum-exp of a row with +inf, which is +inf in formulas.
    backend = "cpu" if name in MERGED else "reference"
    options = {**CASES[name], "reduction": "none", "backend": backend}
    check(world, widths, student, teacher, labels, options, collectives=collectives_of(name))


@pytest.mark.parametrize("options", [{}, {"divergence": D.JSD(0.4)}, {"standardize": True}], ids=str)
@pytest.mark.parametrize("shape", [(0,), (), (2, 0), (2, 3)], ids=str)
def test_leading_shapes(shape, options, world):
    student, teacher = make_logits(*shape, VOCAB)
    labels = torch.full(shape, 4)
    collectives = 1 + 2 * ("standardize" in options) + ("divergence" in options)
    check(world, LAYOUTS["2 uneven"], student, teacher, labels, {**options, "ce_weight": 0.5}, collectives=collectives)


def test_every_row_left_out(world):
    student, teacher = make_logits(3, VOCAB)
    answers = check(world, LAYOUTS["2 even"], student, teacher, torch.full((3,), -100), {"ce_weight": 1.0})
    assert not answers[0]["loss"] and not answers[1]["gradient"].any()


@pytest.mark.parametrize("cut", [3, 31, 32])
@pytest.mark.parametrize("options", [{}, {"divergence": "reverse_kl"}, {"divergence": D.JSD(0.4)}], ids=str)
def test_columns_past_the_vocabulary(options, cut, world):
    student, teacher = make_logits(4, VOCAB)
    student.data[:, cut:] = math.nan
    options = {**options, "vocab_size": cut}
    answers = check(
        world, LAYOUTS["2 even"], student, teacher, None, options, collectives=2 if "JSD" in str(options) else 1
    )
    assert not torch.cat([answer["gradient"] for answer in answers], -1)[:, cut:].any()


@pytest.mark.parametrize("options", [{}, {"standardize": "all"}], ids=str)
def test_decoupled(options, world):
    student, teacher = make_logits(ROWS, VOCAB)
    options = {**options, "ce_weight": 0.2, "beta": 2.0}
    for layout in ("2 uneven", "4 uneven"):
        collectives = 3 if "standardize" in options else 2
        check(world, LAYOUTS[layout], student, teacher, positions(ROWS), options, ea_dkd_loss, collectives=collectives)


@pytest.mark.parametrize("options", [{}, {"divergence": D.JSD(0.4)}, {"standardize": True}], ids=str)
@pytest.mark.parametrize("temperature", [torch.tensor(2.0), torch.linspace(1, 3, ROWS)], ids=["one", "of rows"])
def test_temperature_that_learns(temperature, options, world):
    """Every rank gets the whole gradient."""
    student, teacher = make_logits(ROWS, VOCAB)
    temperature = temperature.clone().requires_grad_()
    options = {**options, "temperature": temperature}
    collectives = 3 if "standardize" in options else 2
    answers = check(world, LAYOUTS["4 uneven"], student, teacher, positions(ROWS), options, collectives=collectives)
    for answer in answers:
        torch.testing.assert_close(answer["temperature"], temperature.grad, rtol=1e-5, atol=1e-5)


def others(widths, student, teacher, labels):
    """The functions that do not return a loss."""
    columns, group = own_columns(widths), dist.group.WORLD
    student = student[..., columns].clone().requires_grad_()
    teacher = teacher[..., columns]
    stats = distill_stats(student, teacher, labels, temperature=2.0, process_group=group)
    fields = (stats.divergence, stats.student_entropy, stats.student_lse, stats.cross_entropy)
    sum((field * upstream_of(field)).sum() for field in fields).backward()
    weights = ea_weights(student, teacher, process_group=group)
    with torch.no_grad():
        quiet = ea_kd_loss(student, teacher, labels, ce_weight=0.5, process_group=group)
    return stats.detach(), student.grad, weights, quiet


def test_statistics_and_weights(world):
    student, teacher = make_logits(ROWS, VOCAB)
    labels = positions(ROWS)
    answers = world(2).run(others, LAYOUTS["2 uneven"], student.detach(), teacher, labels)
    stats = distill_stats(student, teacher, labels, temperature=2.0)
    fields = (stats.divergence, stats.student_entropy, stats.student_lse, stats.cross_entropy)
    (gradient,) = torch.autograd.grad(sum((field * upstream_of(field)).sum() for field in fields), student)
    got = torch.cat([answer[1] for answer in answers], -1)
    assert (got - gradient).norm() <= 1e-6 * gradient.norm()
    for got_stats, _, weights, quiet in answers:
        for got, want in zip(got_stats, stats.detach(), strict=True):
            assert_close(got, want)
        assert_close(weights, ea_weights(student, teacher))
        assert_close(quiet, ea_kd_loss(student.detach(), teacher, labels, ce_weight=0.5))


def behaviour(widths, student, teacher, divergence):
    columns, group = own_columns(widths), dist.group.WORLD
    leaf = student[..., columns].clone().requires_grad_()
    teacher = teacher[..., columns]

    def loss_of(logits, **options):
        return ea_kd_loss(logits, teacher, divergence=divergence, process_group=group, **options)

    loss = loss_of(leaf)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    with pytest.raises(RuntimeError, match="double backward"):
        (create,) = torch.autograd.grad(loss, leaf, create_graph=True)
        torch.autograd.grad(create.sum(), leaf)
    logits = leaf * 1
    (inplace,) = torch.autograd.grad(loss_of(logits, inplace_gradient=True), logits)
    compiled = torch.compile(lambda x: loss_of(x * 1), backend="aot_eager")(leaf)
    (traced,) = torch.autograd.grad(compiled, leaf)
    with pytest.raises(ValueError, match="inplace_gradient"):
        loss_of(leaf, inplace_gradient=True)
    return {
        "again": torch.equal(loss, loss_of(leaf)) and torch.equal(first, second),
        "in place": torch.equal(inplace, first) and torch.equal(logits.detach(), first),
        "compiled": torch.equal(compiled, loss) and torch.equal(traced, first),
        "teacher": not teacher.requires_grad,
    }


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
    import re

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
    import re

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
