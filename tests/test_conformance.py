"""Published loss functions, to the tolerance that each case states."""

import math

import pytest
import torch
from golden import CASES, check, check_loss_and_gradient, inputs, load, of_kind
from support import assert_gradient_within_rounding, assert_within_error_rule, eager, leaf

from eakd_kernels import distill_stats, ea_kd_loss

KD = of_kind("ea_kd", "kd", "er_kd")
MASKED = of_kind("kd_masked")
CTKD = of_kind("ctkd*")
EDGE = of_kind("edge")
WEIGHTING = {"ea_kd": "ea", "er_kd": "teacher", "kd": "none", "edge": "ea", "ctkd": "none", "ctkd_er": "teacher"}


def options(name, backend):
    case = CASES[name]
    params = case["params"]
    tau = params.get("tau", 1.0)
    if "theta" in params:
        tau = params["t_start"] + params["t_end"] / (1 + math.exp(-params["theta"]))
    chosen = {"temperature": tau, "entropy_temperature": params.get("t", 3.0), "backend": backend}
    return {**chosen, "weighting": WEIGHTING.get(case["kind"], "none"), "entropy_bound": params.get("h_ub")}


@pytest.mark.parametrize("name", KD)
def test_kd(name, backend):
    data, tolerance = load(name), CASES[name]["tolerance"]
    student, teacher = inputs(data, backend)
    loss, stats = ea_kd_loss(student, teacher, return_stats=True, **options(name, backend))
    check_loss_and_gradient(name, loss, student, data)
    row_tolerance = tolerance.get("row_atol", tolerance["loss_atol"])
    check(stats.loss, data["rows"], max(tolerance["loss_rtol"], 1e-11), row_tolerance)
    if "weights" in data:
        check(stats.weight, data["weights"], 1e-11, tolerance["weight_atol"])


@pytest.mark.parametrize("name", MASKED)
def test_masked_kd(name, backend):
    data = load(name)
    student, teacher = inputs(data, backend)
    count = CASES[name]["params"]["num_batch_labels"]
    loss = ea_kd_loss(student, teacher, data["labels"], num_items=count, **options(name, backend))
    check_loss_and_gradient(name, loss, student, data)


@pytest.mark.parametrize("name", CTKD)
def test_learnable_temperature(name, backend):
    data, params = load(name), CASES[name]["params"]
    tolerance = CASES[name]["tolerance"]
    student, teacher = inputs(data, backend)
    theta = torch.tensor(params["theta"], dtype=torch.float64, requires_grad=True)
    temperature = params["t_start"] + params["t_end"] * theta.sigmoid()
    temperature.retain_grad()
    loss = ea_kd_loss(student, teacher, **{**options(name, backend), "temperature": temperature})
    check_loss_and_gradient(name, loss, student, data)
    loss.backward()
    # d(tau^2 D)/dtau = 2 tau D + tau^2 dD/dtau, which nearly cancel
    how = {"fp32": loss.dtype == torch.float32, "terms": 2 * loss.item() / temperature.item()}
    check(temperature.grad, data["grad_temperature"], tolerance["grad_rtol"], tolerance["grad_atol"], **how)
    reversed_gradient = params["reversal"] * theta.grad  # CTKD's gradient reversal layer
    how["terms"] *= abs(theta.grad / temperature.grad).item()
    check(reversed_gradient, data["grad_theta"], tolerance["grad_rtol"], tolerance["grad_atol"], **how)


@pytest.mark.parametrize("name", EDGE)
def test_edge(name, backend):
    data, tolerance = load(name), CASES[name]["tolerance"]
    student, teacher = inputs(data, backend)
    chosen = options(name, backend)
    loss = ea_kd_loss(student, teacher, **chosen)
    check_loss_and_gradient(name, loss, student, data)
    stats = distill_stats(student, teacher, data["labels"], **chosen)
    rtol, atol = tolerance["loss_rtol"], tolerance["loss_atol"]
    names = {"H_T": "teacher_entropy", "H_S": "student_entropy", "weights": "weight", "fkl": "divergence"}
    for theirs, ours in {**names, "ce": "cross_entropy", "rows": "loss"}.items():
        check(getattr(stats, ours), data[theirs], rtol, atol)
    (gradient,) = torch.autograd.grad(stats.divergence.sum(), student)
    check(gradient, data["grad_fkl"], tolerance["grad_rtol"], tolerance["grad_atol"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*KD, *MASKED, *CTKD, *EDGE])
def test_narrower_dtypes_within_the_error_rule(name, dtype, kernels):
    data = load(name)
    labels = data.get("labels") if name in MASKED else None
    rounded, teacher = data["student"].to(dtype), data["teacher"].to(dtype)  # exact, but for edge_*
    chosen = options(name, kernels)
    student = leaf(rounded, dtype)
    stats = distill_stats(student, teacher, labels, **chosen)
    kept = torch.ones(len(rounded), dtype=torch.bool) if labels is None else labels != -100
    arguments = {"tau": chosen["temperature"], "t": chosen["entropy_temperature"]}
    arguments |= {"weighting": chosen["weighting"], "bound": chosen["entropy_bound"]}
    wide = {d: leaf(rounded[kept], d) for d in (torch.float64, torch.float32)}
    exact, baseline = (eager(z, teacher[kept].to(d), **arguments) for d, z in wide.items())
    for field in ("divergence", "teacher_entropy", "student_entropy", "weight", "loss"):
        factor = exact["weight"] * chosen["temperature"] ** 2 if field == "loss" else None
        assert_within_error_rule(getattr(stats, field)[kept], exact[field], baseline[field], rounded.shape[-1], factor)
    (gradient,) = torch.autograd.grad(stats.loss.sum(), student)
    wanted = [
        torch.autograd.grad(rows["loss"].sum(), z)[0] for rows, z in zip((exact, baseline), wide.values(), strict=True)
    ]
    assert_gradient_within_rounding(gradient[kept], *wanted)
    assert not gradient[~kept].any()
