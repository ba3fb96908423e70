"""Weights alone, for losses on features and regions: ReviewKD, FCFD, detection. The recipes of docs/methods.md."""

import math

import golden
import pytest
import torch
import torch.nn.functional as F
from golden import CASES, of_kind
from support import eager, leaf, make_logits, widest

from eakd_kernels import distill_stats, ea_kd_loss, ea_weights

HCL = of_kind("ea_hcl")
CLASSES = 81  # COCO's 80 and the background


def per_sample(student_features, teacher_features):
    """[B, ...] x 2 -> [B]: the mean squared difference of every sample."""
    return F.mse_loss(student_features, teacher_features, reduction="none").flatten(1).mean(1)


def hcl(student_features, teacher_features):
    """[B]: ReviewKD's hierarchical context loss; of every stage [B, C, h, w], and of it pooled to 4, 2 and 1."""
    total = 0.0
    for fs, ft in zip(student_features, teacher_features, strict=True):
        stage, share, shares = per_sample(fs, ft), 1.0, 1.0
        for level in (4, 2, 1):
            if level < fs.shape[2]:
                share /= 2
                shares += share
                stage = stage + share * per_sample(*(F.adaptive_avg_pool2d(f, level) for f in (fs, ft)))
        total = total + stage / shares
    return total


def load(name):
    data = golden.load(name)
    stages = range(CASES[name]["params"]["stages"])
    return data, [leaf(data[f"fs_{i}"], torch.float64) for i in stages], [data[f"ft_{i}"] for i in stages]


def check_hcl(name, weights, tolerance):
    """tolerance: of the case, by "loss_rtol" and so on."""
    data, student_features, teacher_features = load(name)
    rows = weights * hcl(student_features, teacher_features)
    gradients = torch.autograd.grad(rows.mean(), student_features)
    loss_tolerance = {"rtol": tolerance["loss_rtol"], "atol": tolerance["loss_atol"]}
    torch.testing.assert_close(rows.mean(), data["loss"].reshape(()), **loss_tolerance)
    row_tolerance = {"rtol": tolerance["loss_rtol"], "atol": tolerance.get("row_atol", tolerance["loss_atol"])}
    torch.testing.assert_close(rows, data["rows"], **row_tolerance)
    for i, gradient in enumerate(gradients):
        grad_tolerance = {"rtol": tolerance["grad_rtol"], "atol": tolerance["grad_atol"]}
        torch.testing.assert_close(gradient, data[f"grad_fs_{i}"], **grad_tolerance)


def test_golden_vectors_are_there():
    assert HCL == ["ea_hcl_0", "ea_hcl_1"]


@pytest.mark.parametrize("name", HCL)
def test_hcl_with_the_published_weights(name):
    check_hcl(name, load(name)[0]["weights"], CASES[name]["tolerance"]["with_eps"])


@pytest.mark.parametrize("name", HCL)
def test_reviewkd(name, backend):
    """The logits decide the weights and get no gradient: the loss is on the features."""
    data, *_ = load(name)
    params, tolerance = CASES[name]["params"], dict(CASES[name]["tolerance"])
    student, teacher = leaf(data["student"], widest(backend)), data["teacher"].to(widest(backend))
    chosen = {"entropy_temperature": params["t"], "entropy_bound": params["h_ub"], "backend": backend}
    weights = ea_weights(student, teacher, **chosen)
    assert not weights.requires_grad
    if weights.dtype == torch.float32:  # the error rule's bound on a weight, which is at least 1 in these cases
        tolerance |= dict.fromkeys(("loss_rtol", "grad_rtol"), 4e-6)
    torch.testing.assert_close(
        weights.double(), data["weights"], rtol=tolerance["loss_rtol"], atol=tolerance["weight_atol"]
    )
    check_hcl(name, weights, tolerance)


def fcfd_features():
    """What a student and a teacher of 6 samples show: two stages, and pooled features, which have no pixels.

    Sample n is n + 1 times as large, so that it matters whose weight it gets.
    """

    def draw(*shape):
        return torch.randn(6, *shape, dtype=torch.float64) * torch.arange(1.0, 7.0).view(6, *[1] * len(shape))

    shapes = [(8, 4, 4), (16, 2, 2), (32,)]
    return [draw(*shape).requires_grad_() for shape in shapes], [draw(*shape) for shape in shapes]


def appearance(student_features, teacher_features, weights):
    """FCFD's L2 terms, each weighted sample by sample."""
    terms = [per_sample(fs, ft) for fs, ft in zip(student_features, teacher_features, strict=True)]
    return sum((weights * term).mean() for term in terms)


def test_fcfd(backend):
    """H_T at t = 4 on every L2 term; features of sample n get the gradient of their own weight."""
    student, teacher = make_logits(6, 100, dtype=widest(backend))
    weights = ea_weights(student, teacher, entropy_temperature=4.0, weighting="teacher", backend=backend)
    rows = eager(student, teacher, t=4.0)
    torch.testing.assert_close(weights, rows["teacher_entropy"])
    fs, ft = fcfd_features()
    loss = appearance(fs, ft, weights)
    want = sum(
        weights[n] * ((s[n] - t[n]) ** 2).sum() / s[n].numel() / 6
        for s, t in zip(fs, ft, strict=True)
        for n in range(6)
    )
    torch.testing.assert_close(loss, want)
    for s, t, gradient in zip(fs, ft, torch.autograd.grad(loss, fs), strict=True):
        each = torch.stack([weights[n] * 2 * (s[n] - t[n]) / s[n].numel() / 6 for n in range(6)])
        torch.testing.assert_close(gradient, each.detach())


def test_fcfd_weights_belong_to_their_samples(backend):
    """The first published version multiplied [B, D] by [B, 1, 1, 1]: mean times mean, whichever weight is whose."""
    student, teacher = make_logits(6, 100, dtype=widest(backend))
    teacher = teacher * torch.arange(1.0, 7.0)[:, None]  # ever more certain
    weights = ea_weights(student, teacher, entropy_temperature=4.0, weighting="teacher", backend=backend)
    for fs, ft in zip(*fcfd_features(), strict=True):
        loss = appearance([fs], [ft], weights)
        outer = weights.mean() * per_sample(fs, ft).mean()
        for other in (outer, *(appearance([fs], [ft], weights.roll(shift)) for shift in range(1, 6))):
            assert (other - loss).abs() > 0.01 * loss


def test_fcfd_paths(backend):
    """The paths through the other network's layers: logits like any, tau = t = 4, the teacher's entropy as weight."""
    student, teacher = make_logits(6, 100, dtype=widest(backend))
    loss = ea_kd_loss(student, teacher, temperature=4.0, entropy_temperature=4.0, weighting="teacher", backend=backend)
    z = leaf(student, student.dtype)
    want = eager(z, teacher, tau=4.0, t=4.0, weighting="teacher")["loss"].mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(want, z)[0])


def regions(backend):
    """(student, teacher, keep) of sampled regions [R, 81]; those to be ignored hold anything."""
    student, teacher = make_logits(12, CLASSES, dtype=widest(backend))
    keep = torch.arange(12) % 3 != 0
    spoilt = torch.where(keep[:, None], student.detach(), torch.nan).requires_grad_()
    return spoilt, torch.where(keep[:, None], teacher, torch.inf), keep


@pytest.mark.parametrize("weighting", ["teacher", "ea"])
def test_detection(weighting, backend):
    """tau^2 mean of w KL over the regions kept, t = 4, tau = 1: published with H_T; with H_S too H_ub = log 81."""
    student, teacher, keep = regions(backend)
    chosen = {"entropy_temperature": 4.0, "weighting": weighting, "mask": keep, "backend": backend}
    loss = ea_kd_loss(student, teacher, temperature=1.0, **chosen)
    z = leaf(student[keep], student.dtype)
    rows = eager(z, teacher[keep], tau=1.0, t=4.0, weighting=weighting, bound=math.log(CLASSES))
    want = (rows["weight"] * 1.0**2 * rows["divergence"]).sum() / keep.sum()
    torch.testing.assert_close(loss, want)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient[keep], torch.autograd.grad(want, z)[0])
    assert not gradient[~keep].any()


@pytest.mark.parametrize("weighting", ["teacher", "ea"])
def test_detection_by_weights_alone(weighting, backend):
    """Weights times a per-region loss of one's own: the same as the loss, and boxes may take them too."""
    student, teacher, keep = regions(backend)
    chosen = {"entropy_temperature": 4.0, "mask": keep, "backend": backend}
    weights = ea_weights(student, teacher, weighting=weighting, **chosen)
    assert weights.shape == keep.shape and not weights[~keep].any() and (weights[keep] > 0).all()
    stats = distill_stats(student, teacher, weighting="none", **chosen)
    loss = ea_kd_loss(student, teacher, weighting=weighting, **chosen)
    torch.testing.assert_close((weights * stats.divergence).sum() / keep.sum(), loss)
    given = ea_kd_loss(student, teacher, weighting=weights, **chosen)
    torch.testing.assert_close(given, loss)
