"""Values and gradients of the public functions against fp64, over dtypes, shapes and options."""

import math

import numpy as np
import pytest
import torch
from support import (
    FLOATS,
    assert_gradient_within_rounding,
    assert_within_error_rule,
    eager,
    interpreted,
    leaf,
    make_logits,
    takes_pair,
    widest,
)

from benchmarks.cases import OTHER_SHAPES, QUICK_SHAPES
from eakd_kernels import distill_stats, ea_kd_loss, ea_weights

# below a vector, about one, several, around a block of 2048 columns and a segment of 8 blocks, large and odd
VOCABULARIES = [1, 2, 7, 16, 17, 100, 1000, 2047, 2048, 2049, 4099, 16384, 16385, 50257]
# every way of sharing exponentials between tau and t, and none; over rows that no kernel holds whole
TEMPERATURES = [(1.0, 3.0), (2.0, 3.0), (4.0, 3.0), (3.0, 3.0), (3.0, 1.0), (1.7, 2.9), (1.0, 1.0), (0.25, 1.0)]
EXTREME = {"saturated": 30.0, "one-hot": 300.0, "flat": 1e-3}


def exact_and_baseline(student, teacher, labels=None, **options):
    wide = [leaf(student, d) for d in (torch.float64, torch.float32)]
    rows = [eager(z, teacher.detach().to(z.dtype), labels, **options) for z in wide]
    grads = [torch.autograd.grad(r["loss"].mean(), z)[0] for r, z in zip(rows, wide, strict=True)]
    return rows, grads


def in_dtype(student, teacher, **options):
    """Statistics and gradient of the eager formula in the logits' dtype."""
    z = leaf(student, student.dtype)
    rows = eager(z, teacher, **options)
    return rows, torch.autograd.grad(rows["loss"].mean(), z, retain_graph=True)[0]


def check_everything(student, teacher, backend, labels=None, tau=1.0, t=3.0, ce_weight=0.0, **options):
    keywords = {"temperature": tau, "entropy_temperature": t, "ce_weight": ce_weight, "backend": backend, **options}
    rows, grads = exact_and_baseline(student, teacher, labels, tau=tau, t=t, ce_weight=ce_weight, **options)
    loss, stats = ea_kd_loss(student, teacher, labels, return_stats=True, **keywords)
    for field in stats._fields:
        factor = rows[0]["weight"] * tau**2 if field == "loss" else None
        if getattr(stats, field) is not None:
            assert_within_error_rule(getattr(stats, field), rows[0][field], rows[1][field], student.shape[-1], factor)
    torch.testing.assert_close(loss.double(), stats.loss.double().mean(), rtol=2e-7, atol=0)
    assert loss.dtype == stats.loss.dtype
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == student.dtype
    assert_gradient_within_rounding(gradient, *grads)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_vocabularies(vocab_size, dtype, kernels):
    student, teacher = make_logits(2 if interpreted(kernels) else 6, vocab_size, dtype=dtype)
    options = {"bound": 0.5} if vocab_size == 1 else {}  # log(1) = 0 divides by zero in the eager formula
    if options:
        stats = distill_stats(student, teacher, backend=kernels)
        assert not torch.stack([stats.loss, stats.weight, stats.divergence]).any()
        return
    check_everything(student, teacher, kernels, tau=2.0)


@pytest.mark.parametrize("tau, t", TEMPERATURES)
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_temperatures(tau, t, dtype, kernels):
    student, teacher = make_logits(5, 5003, dtype=dtype)
    labels = torch.randint(0, 5003, (5,))
    check_everything(student, teacher, kernels, labels, tau=tau, t=t, ce_weight=0.5)


@pytest.mark.parametrize("student_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("teacher_dtype", FLOATS, ids=str)
def test_dtype_pairs(student_dtype, teacher_dtype, backend):
    student, teacher = make_logits(4, 333)[0].detach().to(student_dtype), make_logits(4, 333)[1].to(teacher_dtype)
    student.requires_grad_()
    if not takes_pair(backend, student_dtype, teacher_dtype):
        with pytest.raises(RuntimeError, match=r'float.*"reference"'):
            ea_kd_loss(student, teacher, backend=backend)
        return
    loss = ea_kd_loss(student, teacher, backend=backend)
    wide = torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32
    assert loss.dtype == wide
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.dtype == student_dtype
    _, (exact, baseline) = exact_and_baseline(student, teacher)
    assert_gradient_within_rounding(gradient, exact, exact if wide == torch.float64 else baseline)


@pytest.mark.parametrize("scale", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_extreme_logits(scale, offset, kernels):
    student, teacher = make_logits(8, 5000, scale=scale, offset=offset)
    check_everything(student, teacher, kernels, torch.randint(0, 5000, (8,)), tau=2.0, ce_weight=0.1)


def test_near_identical(kernels):
    student, _ = make_logits(2 if interpreted(kernels) else 8, 30000)
    teacher = student.detach() + 1e-3 * torch.randn(student.shape)
    check_everything(student, teacher, kernels, tau=2.0)
    stats = distill_stats(student, teacher, backend=kernels)
    assert (stats.divergence >= -(2.0**-22) * math.log(30000)).all()


@pytest.mark.parametrize("model, vocab_size, rows", QUICK_SHAPES + OTHER_SHAPES)
def test_model_vocabularies(model, vocab_size, rows, kernels):
    student, teacher = make_logits(1 if interpreted(kernels) else 3, vocab_size, dtype=torch.bfloat16)
    check_everything(student, teacher, kernels)


@pytest.mark.parametrize("weighting", ["ea", "teacher", "student", "none"])
@pytest.mark.parametrize("detach", [True, False])
def test_weightings(weighting, detach, backend):
    student, teacher = make_logits(6, 50, dtype=widest(backend))
    rows, exact = in_dtype(student, teacher, weighting=weighting, detach=detach)
    loss = ea_kd_loss(student, teacher, weighting=weighting, detach_weights=detach, backend=backend)
    torch.testing.assert_close(loss, rows["loss"].mean())
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], exact)


def test_weight_tensor_and_callable(backend):
    student, teacher = make_logits(6, 50, dtype=widest(backend))
    given = torch.rand(6, dtype=torch.float64)
    plain = distill_stats(student, teacher, weighting="none", backend=backend)
    loss = ea_kd_loss(student, teacher, weighting=given.float(), backend=backend)
    torch.testing.assert_close(loss, (given.float() * plain.divergence).mean())
    seen = []

    def confidence(stats):
        seen.append(stats)
        return 1 - stats.teacher_entropy / math.log(50)

    stats = distill_stats(student, teacher, weighting=confidence, backend=backend)
    torch.testing.assert_close(stats.weight, (1 - plain.teacher_entropy / math.log(50)).detach())
    assert seen[0].loss is None and seen[0].weight is None and not seen[0].divergence.requires_grad
    assert not stats.weight.requires_grad

    live = distill_stats(student, teacher, weighting=lambda s: s.student_entropy, detach_weights=False, backend=backend)
    ours = torch.autograd.grad(live.loss.sum(), student)[0]
    z = leaf(student, student.dtype)
    rows = eager(z, teacher, weighting="student", detach=False)
    torch.testing.assert_close(ours, torch.autograd.grad(rows["loss"].sum(), z)[0])


def test_weight_tensor_gets_gradient_only_when_live(backend):
    student, teacher = make_logits(6, 50, dtype=widest(backend))
    given = torch.rand(6, dtype=torch.float64, requires_grad=True)
    loss = ea_kd_loss(student, teacher, weighting=given, detach_weights=False, backend=backend)
    (gradient,) = torch.autograd.grad(loss, given)
    divergence = distill_stats(student, teacher, backend=backend).divergence
    torch.testing.assert_close(gradient, divergence.detach().double() / 6)
    assert not torch.autograd.grad(
        ea_kd_loss(student, teacher, weighting=given, backend=backend), (student, given), allow_unused=True
    )[1:][0]


def test_weight_norms(backend):
    student, teacher = make_logits(3, 4, 50, dtype=widest(backend))
    mask = torch.rand(3, 4) > 0.3
    plain = ea_weights(student, teacher, mask=mask, backend=backend)
    bound = ea_weights(student, teacher, mask=mask, weight_norm="bound", backend=backend)
    mean = ea_weights(student, teacher, mask=mask, weight_norm="mean", backend=backend)
    torch.testing.assert_close(bound, plain / math.log(50))
    torch.testing.assert_close(mean[mask].mean(), torch.ones((), dtype=widest(backend)))
    torch.testing.assert_close(mean / mean.sum(), plain / plain.sum())
    assert not plain[~mask].any() and not mean[~mask].any()
    for weighting in (torch.full((3, 4), 3.0), lambda stats: torch.full_like(stats.divergence, 3.0)):
        stats = distill_stats(student, teacher, weighting=weighting, weight_norm="mean", mask=mask, backend=backend)
        torch.testing.assert_close(stats.weight, mask.to(student.dtype))
        stats = distill_stats(student, teacher, weighting=weighting, weight_norm="bound", backend=backend)
        torch.testing.assert_close(stats.weight, torch.full((3, 4), 3 / math.log(50), dtype=widest(backend)))
    zero = distill_stats(student, teacher, weighting=torch.zeros(3, 4), weight_norm="mean", backend=backend)
    assert not zero.weight.any() and not zero.loss.any()


def test_reductions_and_num_items(backend):
    student, teacher = make_logits(3, 4, 50, dtype=widest(backend))
    mask = torch.rand(3, 4) > 0.3
    rows = ea_kd_loss(student, teacher, mask=mask, reduction="none", backend=backend)
    assert rows.shape == (3, 4) and not rows[~mask].any()

    def reduced(**options):
        loss = ea_kd_loss(student, teacher, mask=mask, backend=backend, **options)
        return loss, torch.autograd.grad(loss, student)[0]

    total = reduced(reduction="sum")
    torch.testing.assert_close(total[0], rows.sum())
    count = int(mask.sum())
    for divisor, options in {
        count: {},
        7: {"num_items": 7},
        8: {"num_items": torch.tensor(8), "reduction": "sum"},
        9: {"num_items": torch.tensor(9.0)},
        10: {"num_items": 10, "reduction": "sum"},
    }.items():
        loss, gradient = reduced(**options)
        torch.testing.assert_close(loss, total[0] / divisor)
        torch.testing.assert_close(gradient, total[1] / divisor)


def test_scale_of_the_divergence(backend):
    student, teacher = make_logits(4, 50, dtype=widest(backend))
    options = {"temperature": 3.0, "weighting": "none", "backend": backend}
    scaled = ea_kd_loss(student, teacher, **options)
    bare = ea_kd_loss(student, teacher, scale_by_temperature_squared=False, **options)
    torch.testing.assert_close(scaled, 9 * bare)
    torch.testing.assert_close(ea_kd_loss(student, teacher, kd_weight=0.25, **options), scaled / 4)


def test_entropy_bound(backend):
    student, teacher = make_logits(4, 50, dtype=widest(backend))
    rows, _ = in_dtype(student, teacher, bound=100.0)
    stats = distill_stats(student, teacher, entropy_bound=100, backend=backend)
    torch.testing.assert_close(stats.weight, rows["weight"])


def test_cross_entropy_alone(backend):
    """kd_weight=0 leaves the hard-label term, and a divergence that is infinite has no say in it."""
    student, teacher = make_logits(4, 50, dtype=widest(backend))
    labels = torch.randint(1, 50, (4,))
    blocked = torch.cat([torch.full((4, 1), -torch.inf), student.detach()[:, 1:]], -1).requires_grad_()
    loss = ea_kd_loss(blocked, teacher, labels, kd_weight=0, ce_weight=1, backend=backend)
    want = torch.nn.functional.cross_entropy(blocked, labels)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, blocked)[0], torch.autograd.grad(want, blocked)[0])


def test_per_row_temperature(backend):
    student, teacher = make_logits(2, 3, 400, dtype=widest(backend))
    temperature = torch.tensor([[1.0, 2.0, 3.0], [0.7, 1.9, 9.0]], dtype=torch.float64)
    loss = ea_kd_loss(student, teacher, temperature=temperature, reduction="none", backend=backend)
    one_pass = ea_kd_loss(student, teacher, temperature=temperature, reduction="sum", backend=backend)
    gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (loss, one_pass)]
    for i in range(2):
        for j in range(3):
            z = leaf(student[i, j], student.dtype)
            want = eager(z, teacher[i, j], tau=temperature[i, j].item())["loss"]
            torch.testing.assert_close(loss[i, j], want, rtol=4e-6, atol=1e-7)
            for gradient in gradients:
                torch.testing.assert_close(gradient[i, j], torch.autograd.grad(want, z, retain_graph=True)[0])
    torch.testing.assert_close(one_pass, loss.sum())


def test_temperature_gradient_in_fp32(kernels):
    student, teacher = make_logits(5, 3001, offset=50.0)
    results = {}
    for name, dtype, backend in (("got", torch.float32, kernels), ("exact", torch.float64, "reference")):
        tau = torch.full((5,), 1.3, dtype=dtype, requires_grad=True)
        stats = distill_stats(student.to(dtype), teacher.to(dtype), temperature=tau, backend=backend)
        results[name] = [
            torch.autograd.grad(x.sum(), tau, retain_graph=True)[0] for x in (stats.loss, stats.student_lse)
        ]
    for got, exact in zip(results["got"], results["exact"], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_narrow_temperature_is_rounded_once(dtype, backend):
    """d(tau^2 D)/dtau is a difference of two terms a thousand times its size."""
    student, teacher = make_logits(64, 100, scale=1.0)
    gradients = []
    for kind in (dtype, torch.float32):
        temperature = torch.tensor(4.0, dtype=kind, requires_grad=True)
        loss = ea_kd_loss(student, teacher, temperature=temperature, backend=backend)
        gradients.append(torch.autograd.grad(loss, temperature)[0])
    assert gradients[0] == gradients[1].to(dtype)


@pytest.mark.parametrize("options", [{}, {"weight_norm": "mean"}], ids=str)
def test_the_count_does_not_widen_the_loss(options, backend):
    student, teacher = make_logits(4, 10)
    count = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss = ea_kd_loss(student, teacher, num_items=count, backend=backend, **options)
    assert loss.dtype == torch.float32


def test_numpy_scalars_are_numbers(backend):
    student, teacher = make_logits(4, 10)
    options = {"temperature": np.float32(2), "num_items": np.int64(3), "vocab_size": np.int64(9), "backend": backend}
    want = ea_kd_loss(student, teacher, temperature=2.0, num_items=3, vocab_size=9, backend=backend)
    assert torch.equal(ea_kd_loss(student, teacher, **options), want)


def test_ea_weights_match_the_loss(backend):
    student, teacher = make_logits(4, 60)
    stats = distill_stats(student, teacher, entropy_temperature=2.0, backend=backend)
    weights = ea_weights(student, teacher, entropy_temperature=2.0, backend=backend)
    assert torch.equal(weights, stats.weight) and not weights.requires_grad


def test_autocast_changes_nothing(backend):
    student, teacher = make_logits(4, 500)
    plain = ea_kd_loss(student, teacher, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = ea_kd_loss(student, teacher, backend=backend)
    assert torch.equal(plain, under)
    assert torch.equal(torch.autograd.grad(plain, student)[0], torch.autograd.grad(under, student)[0])


def test_inputs_are_left_alone(backend):
    student, teacher = make_logits(4, 500)
    before = student.detach().clone(), teacher.clone()
    ea_kd_loss(student, teacher, torch.zeros(4, dtype=torch.long), ce_weight=1.0, backend=backend).backward()
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])
