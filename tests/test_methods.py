"""Published losses beyond KL(p || q), to the tolerance that each case of tests/conformance states."""

import math

import pytest
import torch
from golden import CASES, check, check_loss_and_gradient, inputs, load, of_kind

from eakd_kernels import distill_stats, divergences, ea_dkd_loss, ea_kd_loss, weighting


def token_options(name, backend):
    """The settings of language-model losses: temperature 1 or the case's, no weights, no tau^2."""
    tau = CASES[name]["params"].get("tau", 1.0)
    return {
        "temperature": tau,
        "entropy_temperature": tau,
        "weighting": "none",
        "scale_by_temperature_squared": False,
        "backend": backend,
    }


def check_rows(name, stats, data, weights=True):
    tolerance = CASES[name]["tolerance"]
    check(stats.loss, data["rows"], max(tolerance["loss_rtol"], 1e-11), tolerance.get("row_atol", 1e-11))
    if weights and "weights" in data:
        check(stats.weight, data["weights"], 1e-11, tolerance.get("weight_atol", 1e-11))


@pytest.mark.parametrize("name", of_kind("ea_dkd", "dkd"))
def test_dkd(name, backend):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    loss, stats = ea_dkd_loss(
        student,
        teacher,
        data["labels"],
        alpha=params["alpha"],
        beta=params["beta"],
        temperature=params["tau"],
        entropy_temperature=params.get("t", 3.0),
        weighting="ea" if "h_ub" in params else "none",
        entropy_bound=params.get("h_ub"),
        standardize="all" if params.get("standardise") else False,
        return_stats=True,
        backend=backend,
    )
    check_loss_and_gradient(name, loss, student, data)
    check_rows(name, stats, data)


@pytest.mark.parametrize("name", of_kind("ea_mld"))
def test_mld(name, backend):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    loss, stats = ea_kd_loss(
        student,
        teacher,
        temperature=tuple(params["taus"]),
        entropy_temperature=params["t"],
        entropy_bound=params["h_ub"],
        standardize=params["standardise"],
        return_stats=True,
        backend=backend,
    )
    assert (stats.teacher_lse is None) == (len(params["taus"]) > 1)
    check_loss_and_gradient(name, loss, student, data)
    check_rows(name, stats, data)


@pytest.mark.parametrize("name", of_kind("bkd"))
def test_bkd(name, backend):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    loss = ea_kd_loss(
        student,
        teacher,
        data["labels"],
        temperature=params["tau"],
        weighting="none",
        teacher_class_weights=data["class_weights"] if params["class_weights"] else None,
        kd_weight=params["alpha"],
        ce_weight=1.0,
        backend=backend,
    )
    check_loss_and_gradient(name, loss, student, data)


def divergence_of(name):
    """(ours, how much of the teacher's entropy the published value has on top)."""
    params = CASES[name]["params"]
    lam, beta = params.get("lam"), params.get("beta")
    return {
        "dlm_forward_kl": lambda: (divergences.ForwardKL(), 1),
        "dlm_reverse_kl": lambda: (divergences.ReverseKL(), 0),
        "dlm_symmetric_kl": lambda: (divergences.Jeffreys(lam), 1 - lam),
        "dlm_js_distance": lambda: (divergences.JSD(1 - lam), 0),
        "dlm_tv_distance": lambda: (divergences.TotalVariation(), 0),
        "dlm_skewed_forward_kl": lambda: (divergences.SkewForwardKL(lam), 1),
        "dlm_skewed_reverse_kl": lambda: (divergences.SkewReverseKL(lam), 0),
        "tt_ForwardKLLoss": lambda: (divergences.ForwardKL(), 1),
        "tt_ReverseKLLoss": lambda: (divergences.ReverseKL(), 0),
        "tt_SymmetricKLLoss": lambda: (
            divergences.Jeffreys(1 - params["sym_kd_ratio"]),
            params["sym_kd_ratio"],
        ),
        "gjsd": lambda: (divergences.generalized_jsd(beta), 0),
        "ab": lambda: (divergences.AlphaBeta(params["alpha"], beta), 0),
        "ab_vision": lambda: (divergences.AlphaBeta(params["alpha"], beta), 0),
    }[CASES[name]["kind"]]()


def published_reduction(name, data):
    """Keywords of ea_kd_loss."""
    params, convention = CASES[name]["params"], CASES[name]["convention"]["reduction"]
    labels = data.get("labels")
    if params.get("num_items_in_batch"):
        return {"num_items": params["num_items_in_batch"]}
    if params.get("normalize") is False or convention.startswith("sum over rows with label != -100, not"):
        return {"reduction": "sum"}
    if params.get("reduction") in ("sum", "none") or convention == "none":
        return {"reduction": params["reduction"]}
    assert "divided by" in convention or "mean" in convention, convention
    return {"num_items": int((labels != -100).sum())} if labels is not None else {}


@pytest.mark.parametrize("name", of_kind("dlm_*", "tt_*", "gjsd", "ab", "ab_vision"))
def test_token_divergences(name, backend):
    data = load(name)
    student, teacher = inputs(data, backend)
    divergence, entropies = divergence_of(name)
    loss, stats = ea_kd_loss(
        student,
        teacher,
        data.get("labels"),
        divergence=divergence,
        return_stats=True,
        **published_reduction(name, data),
        **token_options(name, backend),
    )
    # Cross-entropy in the place of KL: larger by the teacher's entropy, with the same gradient.
    rows = stats.loss + entropies * stats.teacher_entropy
    total = (loss / stats.loss.sum()).detach() * (entropies * stats.teacher_entropy).sum()
    # The published limits at a = 0 or b = 0 have a factor 1/b where continuity needs 1/b^2.
    params = CASES[name]["params"]
    factor = 1 / (params["beta"] or params["alpha"]) if params.get("limit_prefactor_quirk") else 1.0
    check_loss_and_gradient(name, loss + total if loss.dim() == 0 else rows, student, data, factor)
    tolerance = CASES[name]["tolerance"]
    check(rows, factor * data["rows"], max(tolerance["loss_rtol"], 1e-11), 1e-11)


@pytest.mark.parametrize("name", of_kind("bdkd"))
def test_bdkd(name, backend):
    """a KL(p || q) + b KL(q || p), each gated by which entropy is larger."""
    data, high = load(name), CASES[name]["params"]["gate_high"]
    student, teacher = inputs(data, backend)
    forward_gate = lambda s: weighting.threshold(s, teacher_entropy=s.student_entropy, above=high, below=1.0)  # noqa: E731
    reverse_gate = lambda s: weighting.threshold(s, student_entropy=s.teacher_entropy, above=high, below=1.0)  # noqa: E731
    chosen = {**token_options(name, backend), "return_stats": True}
    chosen["num_items"] = int((data["labels"] != -100).sum())
    forward, stats = ea_kd_loss(student, teacher, data["labels"], **{**chosen, "weighting": forward_gate})
    reverse, _ = ea_kd_loss(
        student, teacher, data["labels"], divergence="reverse_kl", **{**chosen, "weighting": reverse_gate}
    )
    entropy = (stats.weight * stats.teacher_entropy).sum() / chosen["num_items"]
    check_loss_and_gradient(name, forward + reverse + entropy, student, data)


@pytest.mark.parametrize("name", of_kind("akl"))
def test_akl(name, backend):
    """The ratios come from plain PyTorch and go in as weights."""
    data, mu = load(name), CASES[name]["params"]["mu"]
    student, teacher = inputs(data, backend)
    p, order = teacher.softmax(-1).sort(-1, descending=True)
    q = student.detach().softmax(-1).gather(-1, order)
    head = p.cumsum(-1) <= mu
    head[..., 0] = True
    gap = (p - q).abs()
    share = (gap * head).sum(-1) / gap.sum(-1)
    chosen = token_options(name, backend) | {"num_items": int((data["labels"] != -100).sum())}
    loss = sum(
        ea_kd_loss(student, teacher, data["labels"], divergence=d, **{**chosen, "weighting": w})
        for d, w in (("forward_kl", share), ("reverse_kl", 1 - share))
    )
    check_loss_and_gradient(name, loss, student, data)


def test_published_mask_of_mld_is_a_factor(backend):
    """Published MLD multiplies the batch mean by the mask's mean; what was meant is one option away."""
    generator = torch.Generator("cpu").manual_seed(0)
    student, teacher = (torch.randn(16, 30, generator=generator).to(torch.get_default_device()) for _ in range(2))
    confidence = teacher.softmax(-1).amax(-1)
    mask = confidence <= confidence.median()
    taus = (2.0, 3.0, 4.0)
    rows = distill_stats(student, teacher, temperature=taus, backend=backend).loss
    published = (rows.mean() * mask.float()).mean()
    meant = ea_kd_loss(student, teacher, temperature=taus, mask=mask, num_items=16, backend=backend)
    torch.testing.assert_close(meant, (mask * rows).mean(), rtol=4e-6, atol=0)
    assert abs(published - meant) > 0.01 * meant


def test_dkd_is_kl_where_its_parts_are_put_together(backend):
    """KL = TCKD + (1 - p_k) NCKD, with the second weight per row by two calls."""
    generator = torch.Generator("cpu").manual_seed(1)
    student, teacher = (3 * torch.randn(8, 40, generator=generator).to(torch.get_default_device()) for _ in range(2))
    labels = torch.randint(0, 40, (8,), generator=generator, device="cpu").to(torch.get_default_device())
    keywords = {"temperature": 2.0, "weighting": "none", "backend": backend, "reduction": "none"}
    target = ea_dkd_loss(student, teacher, labels, alpha=1.0, beta=0.0, **keywords)
    rest = ea_dkd_loss(student, teacher, labels, alpha=0.0, beta=1.0, **keywords)
    p = (teacher / 2).softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(target + (1 - p) * rest, ea_kd_loss(student, teacher, **keywords), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gap", [30.0, 300.0])
def test_dkd_where_the_label_is_all_there_is(gap, backend):
    """1 - p_k is e^-gap: gone in fp32 for the first, in any dtype for the second; the rest must not be."""
    generator = torch.Generator("cpu").manual_seed(2)
    student, teacher = (torch.randn(4, 20, generator=generator).to(torch.get_default_device()) for _ in range(2))
    labels = torch.arange(4, device=torch.get_default_device())
    rest = ea_dkd_loss(
        student, teacher, labels, alpha=0.0, beta=1.0, temperature=1.0, weighting="none", backend=backend
    )
    at_label = torch.zeros_like(student).scatter_(-1, labels[:, None], gap)
    student, teacher = (student + at_label).requires_grad_(), teacher + at_label
    options = {"temperature": 1.0, "weighting": "none", "backend": backend}
    loss = ea_dkd_loss(student, teacher, labels, alpha=1.0, beta=1.0, **options)
    torch.testing.assert_close(loss, rest, rtol=1e-4, atol=1e-6)  # the target's part is e^-gap
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-3
    assert math.isclose(gradient.double().sum().item(), 0, abs_tol=1e-6)
