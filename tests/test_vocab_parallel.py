"""Vocabularies sharded over process groups, against the same call on whole rows."""

import math

import pytest
import torch
from shards import LAYOUTS, ROWS, VOCAB, assert_close, check, own_columns, positions, upstream_of, whole
from support import make_logits
from torch import distributed as dist

from eakd_kernels import distill_stats, ea_dkd_loss, ea_kd_loss, ea_weights
from eakd_kernels import divergences as D


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


@pytest.mark.parametrize("name", ["plain", "cross-entropy", "reverse", "temperatures", "class weights", "caps"])
def test_masked_shards_far_from_zero(name, world, kernels):
    """A shard of -inf has no maximum of its own, and 0 is far from that of the row."""
    student, teacher = (x.detach().mul(64).round().div(64) - 1024 for x in make_logits(ROWS, VOCAB))
    student[:3, 31:] = teacher[:3, 31:] = -math.inf
    teacher[3, 31:] = -math.inf if name != "reverse" else -1024
    options = {**CASES[name], "student_softcap": None, "teacher_softcap": None}
    check(world, LAYOUTS["2 even"], student, teacher, torch.full((ROWS,), 4), options, backend=kernels)


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
