"""Derivatives of the public functions: gradcheck in fp64, and what upstream factors and narrow dtypes do to them."""

import pytest
import torch
from support import (
    eager,
    interpreted,
    leaf,
    make_logits,
    takes_fp64,
    widest,
)

from eakd_kernels import distill_stats, ea_kd_loss, ea_weights


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("weight_norm", ["none", "mean", "bound"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(detach, weight_norm, reduction, backend):
    if not takes_fp64(backend):
        pytest.skip("needs fp64; test_gradients_are_the_references has the same cases")
    student, teacher = make_logits(2, 2, 9, dtype=torch.float64)
    labels = torch.tensor([[1, -100], [3, 8]])
    options = {"temperature": 1.7, "ce_weight": 0.3, "weight_norm": weight_norm, "backend": backend}
    frozen = ea_weights(student, teacher, mask=labels != -100, backend=backend)

    def loss(z):
        weighting = frozen if detach else "ea"
        return ea_kd_loss(
            z, teacher, labels, weighting=weighting, detach_weights=detach, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, (student,))
    if detach:  # what gradcheck cannot see: the weights that were frozen above move with the student
        ours = torch.autograd.grad(ea_kd_loss(student, teacher, labels, reduction=reduction, **options).sum(), student)
        torch.testing.assert_close(ours[0], torch.autograd.grad(loss(student).sum(), student)[0])


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("weight_norm", ["none", "mean", "bound"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [None, (), (2, 2)], ids=["no tensor", "0-d", "per row"])
def test_gradients_are_the_references(detach, weight_norm, reduction, shape, kernels):
    """In fp32 against fp64, with every term and row-dependent upstream gradients."""
    labels, upstream = torch.tensor([[1, -100], [3, 8]]), torch.rand(2, 2) if reduction == "none" else torch.rand(())
    tau = 1.7 if shape is None else 1 + torch.rand(shape)
    results = []
    for dtype, backend in ((torch.float32, kernels), (torch.float64, "reference")):
        student, teacher = make_logits(2, 2, 9, dtype=torch.float32)
        inputs = [leaf(student, dtype)] + ([] if shape is None else [leaf(tau, dtype)])
        loss = ea_kd_loss(
            inputs[0],
            teacher.to(dtype),
            labels,
            temperature=tau if shape is None else inputs[1],
            ce_weight=0.3,
            weight_norm=weight_norm,
            detach_weights=detach,
            reduction=reduction,
            backend=backend,
        )
        results.append(torch.autograd.grad((loss * upstream).sum(), inputs))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (2, 2)], ids=["0-d", "per row"])
def test_gradcheck_temperature(shape, backend):
    if not takes_fp64(backend):
        pytest.skip("needs fp64; test_gradients_are_the_references has the same cases")
    student, teacher = make_logits(2, 2, 9, dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True]])
    temperature = (1 + torch.rand(shape, dtype=torch.float64)).requires_grad_()

    def fields(z, tau):
        stats = distill_stats(z, teacher, temperature=tau, detach_weights=False, mask=mask, backend=backend)
        return stats.loss, stats.divergence, stats.student_lse, stats.student_entropy, stats.weight

    assert torch.autograd.gradcheck(fields, (student, temperature))


def test_statistics_are_differentiable_as_promised(backend):
    student, teacher = make_logits(4, 9, dtype=widest(backend))
    labels = torch.randint(0, 9, (4,))
    stats = distill_stats(student, teacher, labels, backend=backend)
    live = {name for name, field in stats._asdict().items() if field.requires_grad}
    assert live == {"loss", "divergence", "student_entropy", "student_lse", "cross_entropy"}
    live = distill_stats(student, teacher, labels, detach_weights=False, backend=backend)
    assert live.weight.requires_grad
    _, returned = ea_kd_loss(student, teacher, labels, return_stats=True, backend=backend)
    assert not any(field.requires_grad for field in returned)
    assert distill_stats(student, teacher, backend=backend).cross_entropy is None
    for name in ("student_entropy", "student_lse", "cross_entropy"):
        z = leaf(student, student.dtype)
        want = torch.autograd.grad(eager(z, teacher, labels)[name].sum(), z)[0]
        got = torch.autograd.grad(getattr(stats, name).sum(), student, retain_graph=True)[0]
        torch.testing.assert_close(got, want)


def test_upstream_gradient_is_applied(backend):
    student, teacher = make_logits(4, 60, dtype=widest(backend))
    loss = ea_kd_loss(student, teacher, backend=backend)
    (plain,) = torch.autograd.grad(loss, student, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, student)
    torch.testing.assert_close(tripled, 3 * plain)


def test_fp16_survives_a_loss_scale(kernels):
    """A gradient rounded to fp16 before the loss scale is applied would be zero almost everywhere."""
    student, teacher = make_logits(8 if interpreted(kernels) else 64, 20000, dtype=torch.float16)
    loss = ea_kd_loss(student, teacher, num_items=4096, backend=kernels)
    (gradient,) = torch.autograd.grad(loss * 2.0**16, student)
    wide = leaf(student, torch.float64)
    want = eager(wide, teacher.double())["loss"].sum() / 4096 * 2.0**16
    (exact,) = torch.autograd.grad(want, wide)
    representable = exact.abs() > torch.finfo(torch.float16).smallest_normal * 2
    assert representable.double().mean() > 0.1
    assert (gradient[representable] != 0).all()


def test_bf16_upstream_factor_stays_within_two_ulp(kernels):
    student, teacher = make_logits(4, 500, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(1.7 * ea_kd_loss(student, teacher, backend=kernels), student)
    wide = leaf(student, torch.float64)
    (exact,) = torch.autograd.grad(eager(wide, teacher.double())["loss"].mean(), wide)
    ulp = torch.finfo(torch.bfloat16).eps * (1.7 * exact).abs()
    assert ((gradient.double() - 1.7 * exact).abs() <= 2 * ulp + 1e-9).all()
