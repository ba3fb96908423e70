"""Recipes where numbers go astray: rows of many blocks, masked beginnings, flat sides, and weights near 0 and 1."""

import pytest
import torch
from support import assert_gradient_within_rounding, leaf, make_logits

from eakd_kernels import distill_stats, ea_dkd_loss, ea_kd_loss
from eakd_kernels import divergences as d

WIDE = 4500  # several blocks of any instruction set, several tiles of Triton's
EVERY = [
    *(d.ForwardKL(), d.ReverseKL(), d.JSD(0.3), d.SkewForwardKL(0.1), d.SkewReverseKL(0.1)),
    *(d.TotalVariation(), d.AlphaBeta(0.2, 0.7), d.SquaredHellinger()),
]


def logits_of(*shape, **options):
    student, teacher = make_logits(*shape, **options)
    return student.detach(), teacher


def wide_rows(dtype=torch.float32):
    """Whose maxima come first, last, later and later, and in other places for teacher and student."""
    student, teacher = logits_of(5, WIDE, seed=3)
    rise = torch.linspace(-4, 4, WIDE)
    student[0, 3], teacher[0, 5] = 15, 14
    student[1, -3], teacher[1, -1] = 15, 14
    student[2] += rise
    teacher[3] += rise
    student[4, 0], teacher[4, -1] = 12, 12
    return student.to(dtype), teacher.to(dtype)


def loss_and_gradients(divergence, backend, dtype, **options):
    student, teacher = wide_rows(dtype)
    student = leaf(student, dtype)
    temperature = torch.full((5,), 2.0, dtype=dtype, requires_grad=True)
    options = {"temperature": temperature, "weighting": "none", "backend": backend, **options}
    if divergence == "dkd":
        loss = ea_dkd_loss(student, teacher, torch.tensor([3, 7, WIDE - 1, 0, 100]), **options)
    else:
        loss = ea_kd_loss(student, teacher, divergence=divergence, **options)
    return loss.detach(), *torch.autograd.grad(loss, (student, temperature))


@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"student_logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("divergence", [*EVERY, "dkd"], ids=str)
def test_temperature_gradient_of_wide_rows(divergence, options, kernels):
    """Moments of blocks about centres of their own would add up to anything."""
    exact = loss_and_gradients(divergence, "reference", torch.float64, **options)
    got = loss_and_gradients(divergence, kernels, torch.float32, **options)
    eager = loss_and_gradients(divergence, "reference", torch.float32, **options)
    for value, plain, right in zip(got, eager, exact, strict=True):
        off, allowed = ((x.double() - right).abs().max() / right.abs().max() for x in (value, plain))
        assert off <= 2 * allowed + 4e-6


@pytest.mark.parametrize("side", ["both", "student", "teacher"])
@pytest.mark.parametrize("divergence", [*EVERY, "dkd"], ids=str)
def test_masked_beginning_far_below_zero(divergence, side, kernels):
    """The first blocks have no maximum, and 0 is none: it would be e^200 away."""
    student, teacher = logits_of(2, WIDE, seed=4, offset=-200.0)
    for name, logits in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            logits[:, :2500] = -torch.inf
    if side == "student":
        teacher[:, :2500] = -1e4  # no mass either: the divergence stays finite
    labels = torch.tensor([2600, WIDE - 1])

    def run(backend, dtype):
        z = leaf(student, dtype)
        if divergence == "dkd":
            loss = ea_dkd_loss(z, teacher.to(dtype), labels, temperature=1.0, weighting="none", backend=backend)
        else:
            loss = ea_kd_loss(z, teacher.to(dtype), divergence=divergence, weighting="none", backend=backend)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    (loss, gradient), (exact, right) = run(kernels, torch.float32), run("reference", torch.float64)
    assert torch.allclose(loss.double(), exact, rtol=2e-5)
    if exact == torch.inf:  # reverse KL, whose gradient has no limit there
        return
    assert torch.allclose(gradient.double(), right, atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize("flat", ["teacher", "student"])
@pytest.mark.parametrize("divergence", EVERY, ids=str)
def test_standardised_flat_sides(divergence, flat, kernels):
    """Standardised, a nearly constant side has a factor of thousands, which must not meet the other side's logits."""
    student, teacher = logits_of(4, 1000, seed=5)
    narrow = {"teacher": teacher, "student": student}[flat]
    narrow.mul_(torch.tensor([0.0, 1e-3, 1e-2, 1.0])[:, None] if flat == "teacher" else 1e-2)
    options = dict(divergence=divergence, standardize=True, weighting="none", reduction="none")
    exact = ea_kd_loss(student.double(), teacher.double(), **options, backend="reference")
    got = ea_kd_loss(student, teacher, **options, backend=kernels)
    eager = ea_kd_loss(student, teacher, **options, backend="reference")
    allowed = 2 * (eager.double() - exact).abs().max() + 2e-6
    assert (got.double() - exact).abs().max() <= allowed


def test_standardised_far_from_zero(kernels):
    """The mean of logits about 1000 has no digits left for their distances of 0.1."""
    student, teacher = logits_of(3, 16, scale=0.1, offset=1000.0, seed=6)
    options = dict(standardize=True, weighting="none")
    (exact,) = torch.autograd.grad(
        ea_kd_loss(z := leaf(student, torch.float64), teacher.double(), **options, backend="reference"), z
    )
    for reduction in ("mean", "none"):  # one pass; gradient from saved statistics
        loss = ea_kd_loss(
            z := leaf(student, torch.float32), teacher, **options, reduction=reduction, backend=kernels
        ).mean()
        (gradient,) = torch.autograd.grad(loss, z)
        assert (gradient.double() - exact).abs().max() <= 4e-6 * exact.abs().max()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_infinite_label_of_dkd_is_nan(side, kernels):
    student, teacher = logits_of(2, 50, seed=7)
    {"student": student, "teacher": teacher}[side][0, 2] = torch.inf
    student = leaf(student, torch.float32)
    loss = ea_dkd_loss(student, teacher, torch.tensor([2, 2]), weighting="none", reduction="none", backend=kernels)
    assert loss.isnan().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient[0].isnan().any() and gradient[1].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])  # one pass; gradient from saved statistics
def test_masked_label_under_a_cap_does_not_move(reduction, kernels):
    """Its slope is 0 times the cross-entropy's -1, whatever 1 - (z/cap)^2 is."""
    student, teacher = logits_of(2, 50, seed=7)
    student[0, 2] = -torch.inf
    options = dict(student_softcap=5.0, weighting="none", kd_weight=0.0, ce_weight=1.0, reduction=reduction)

    def gradient_of(dtype, backend):
        z = leaf(student, dtype)
        loss = ea_kd_loss(z, teacher.to(dtype), torch.tensor([2, 2]), **options, backend=backend)
        return torch.autograd.grad(loss.mean(), z)[0].double()

    got = gradient_of(torch.float32, kernels)
    assert got[0, 2] == 0
    torch.testing.assert_close(got, gradient_of(torch.float64, "reference"), rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize(
    "divergence",
    [*(d.SkewReverseKL(alpha) for alpha in (1e-9, 1e-6, 1e-4)), d.JSD(0.9999), d.JSD(1e-4), d.SkewForwardKL(0.9999)],
    ids=str,
)
def test_weights_of_a_mixture_near_0_and_1(divergence, kernels):
    """1 - alpha of an fp32 alpha has lost what alpha is about."""
    student, teacher = logits_of(4, 100, scale=15.0, seed=8)
    options = dict(divergence=divergence, weighting="none", reduction="none")
    exact = ea_kd_loss(student.double(), teacher.double(), **options, backend="reference")
    got = ea_kd_loss(student, teacher, **options, backend=kernels)
    assert torch.allclose(got.double(), exact, rtol=6e-6, atol=5e-8)


@pytest.mark.parametrize("call", ["statistics", "one pass"])
@pytest.mark.parametrize("divergence", [*EVERY, d.AlphaBeta(0.5, 0.5), d.AlphaBeta(1.8, 0.2)], ids=str)
def test_gradient_of_peaked_rows(divergence, call, kernels):
    """p_k and q_k near 1, where h_k and sum h nearly cancel: both have to come from the same normalisers."""
    student, teacher = logits_of(16, 100)
    student[:, 3] += 22
    teacher[:, 3] += 25

    def gradient(dtype, backend):
        z, y = leaf(student, dtype), teacher.to(dtype)
        if call == "statistics":
            loss = distill_stats(z, y, divergence=divergence, backend=backend).divergence.sum()
        else:
            loss = ea_kd_loss(z, y, divergence=divergence, backend=backend, weighting="none", reduction="sum")
        return torch.autograd.grad(loss, z)[0]

    exact, eager = gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    # h_k, of terms up to 5 where AlphaBeta has the power 0.2, counts 1 - q_k times.
    terms = 5 * (1 - student.double().softmax(-1)[:, 3]).max()
    assert_gradient_within_rounding(gradient(torch.float32, kernels), exact, eager, terms)
