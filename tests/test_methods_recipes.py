"""docs/methods.md: its Python runs, its calls compute, its switches exist, and its recipes give published values."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from golden import CASES, check, check_loss_and_gradient, inputs, load, of_kind

from eakd_kernels import (
    available_backends,
    distill_stats,
    divergences,
    ea_dkd_loss,
    ea_kd_loss,
    ea_weights,
    teacher_topk,
    topk_ea_kd_loss,
    weighting,
)

PAGE = (Path(__file__).parents[1] / "docs/methods.md").read_text()
SECTIONS = {section.split("\n", 1)[0]: section for section in PAGE.split("\n### ")[1:]}
BLOCKS = [
    pytest.param(block, id=f"{heading} {i}")
    for heading, section in SECTIONS.items()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
]
HEADER, _, *ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in re.search(r"<!-- methods:begin -->\n(.*?)<!-- methods:end -->", PAGE, re.DOTALL)[1].splitlines()
]


def cells(column):
    """(method, code) for all code in a column."""
    at = HEADER.index(column)
    return [pytest.param(code, id=f"{row[0]}: {code}") for row in ROWS for code in re.findall(r"`([^`]+)`", row[at])]


def run(block):
    names = {}
    exec(compile(block, "docs/methods.md", "exec"), names)
    return names


def recipe(heading):
    """The names of its first block."""
    return run(re.search(r"```python\n(.*?)```", SECTIONS[heading], re.DOTALL)[1])


@pytest.fixture
def as_auto(backend, monkeypatch):
    """Where the page names no backend, this one runs."""
    monkeypatch.setenv("EAKD_BACKEND", backend)
    return backend


@pytest.fixture
def symbols():
    """What the table's calls are about."""
    teacher = torch.randn(8, 100)
    ids, logprobs, *_ = teacher_topk(teacher, 16)
    return {
        **{"z": torch.randn(8, 100, requires_grad=True), "y": teacher, "V": 100, "ids": ids, "logprobs": logprobs},
        "k": torch.tensor([3, 1, -100, 4, 1, 5, -100, 9]),
        "sampled": torch.arange(8) % 3 != 0,
        "class_weights": torch.rand(100) + 0.1,
        "theta": torch.ones((), requires_grad=True),
        "tau": torch.linspace(1.0, 4.0, 8),
        "epoch": 5,
        **{"d": divergences, "weighting": weighting, "math": math},
        **{f.__name__: f for f in (ea_kd_loss, ea_dkd_loss, topk_ea_kd_loss, ea_weights, distill_stats)},
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_python_runs(block, as_auto):
    run(block)


@pytest.mark.parametrize("call", [cell for cell in cells("our call") if "(" in cell.values[0]])
def test_calls_compute(call, as_auto, symbols):
    result = eval(call, symbols)
    assert result.isfinite().all() and result.abs().max() > 0
    if not call.startswith("ea_weights"):
        assert torch.autograd.grad(result, symbols["z"])[0].isfinite().all()


@pytest.mark.parametrize("switch", [cell for cell in cells("switch") if "=" in cell.values[0]])
def test_switches_exist(switch, symbols):
    options = eval(f"dict({switch})", symbols)
    assert set(options) <= set(inspect.signature(ea_kd_loss).parameters)
    labels = symbols["k"].clamp(min=0)
    assert ea_kd_loss(symbols["z"], symbols["y"], labels, **options).isfinite()


def test_table_is_whole():
    assert HEADER[-4:] == ["reference", "cpu", "triton", "cuda"] and set(HEADER[-4:]) == set(available_backends())
    assert {len(row) for row in ROWS} == {len(HEADER)}


def inputs_without_gradient(name):
    data = load(name)
    return data["student"], data["teacher"], CASES[name]["params"]


@pytest.mark.parametrize("name", of_kind("ea_kd"))
def test_weights_with_the_published_epsilon(name):
    student, teacher, params = inputs_without_gradient(name)
    weights = recipe("Weights to the last digit")["published_weights"](student, teacher, params["t"], params["h_ub"])
    torch.testing.assert_close(weights, load(name)["weights"], rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", of_kind("ea_hcl"))
def test_hierarchical_context(name):
    data, params = load(name), CASES[name]["params"]
    features = ([data[f"{side}_{i}"] for i in range(params["stages"])] for side in ("fs", "ft"))
    rows = data["weights"] * recipe("Features (ReviewKD, FCFD, detection)")["hierarchical_context"](*features)
    torch.testing.assert_close(rows, data["rows"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", of_kind("ctkd*"))
def test_reversal(name, backend):
    data, params, tolerance = load(name), CASES[name]["params"], CASES[name]["tolerance"]
    student, teacher = inputs(data, backend)
    reverse = recipe("A temperature that learns (CTKD)")["Reversal"].apply
    theta = torch.tensor(params["theta"], dtype=torch.float64, requires_grad=True)
    temperature = params["t_start"] + params["t_end"] * reverse(theta, params["reversal"]).sigmoid()
    loss = ea_kd_loss(
        student,
        teacher,
        temperature=temperature,
        entropy_temperature=params.get("t", 3.0),
        weighting="teacher" if "t" in params else "none",
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(loss, theta)
    # It is the difference of two larger terms, 2 tau D and tau^2 dD/dtau.
    slope = params["t_end"] * theta.sigmoid() * (1 - theta.sigmoid())
    how = {"fp32": loss.dtype == torch.float32, "terms": 2 * loss.item() * slope.item() / temperature.item()}
    check(gradient, data["grad_theta"], tolerance["grad_rtol"], tolerance["grad_atol"], **how)


@pytest.mark.parametrize("name", of_kind("akl", "bdkd"))
def test_mixed_by_the_row(name, as_auto):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, as_auto)
    names = recipe("Forward and reverse, by the row (AKL, BDKD)")
    if CASES[name]["kind"] == "akl":
        share = names["head_share"](student, teacher, params["mu"])
        loss = names["mixed"](student, teacher, data["labels"], share, 1 - share)
    else:
        forward, reverse = names["gates"](student, teacher)
        entropy = distill_stats(student, teacher, data["labels"], entropy_temperature=1.0).teacher_entropy
        missing = (forward * entropy).sum() / (data["labels"] != -100).sum()
        loss = names["mixed"](student, teacher, data["labels"], forward, reverse) + missing.detach()
    check_loss_and_gradient(name, loss, student, data)


def test_head_share_of_equal_rows_is_a_number():
    share = recipe("Forward and reverse, by the row (AKL, BDKD)")["head_share"]
    assert torch.equal(share(torch.ones(2, 5), torch.ones(2, 5)), torch.full((2,), 0.5))


def test_top_tokens(as_auto):
    """KL of the teacher renormalised over 16 tokens against the student's whole softmax, where H_T > 0.8."""
    torch.manual_seed(1)
    names = recipe("A gate and the teacher's top tokens (EOPD)")
    z, y = (names[name].double() for name in "zy")
    log_p, log_q = y.log_softmax(-1), z.log_softmax(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    top, at = y.topk(16)
    log_top = top.log_softmax(-1)
    forward = (log_top.exp() * (log_top - log_q.gather(-1, at))).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(names["loss"].double(), (reverse + (entropy > 0.8) * forward).mean(), rtol=4e-6, atol=0)


def test_z_loss(as_auto):
    names = recipe("z-loss")
    z, y, keep = names["z"].double(), names["y"].double(), names["k"] != -100
    stats = distill_stats(z, y, names["k"], entropy_temperature=1.0, ce_weight=0.1, backend="reference")
    want = (stats.loss[keep] + 1e-4 * z.logsumexp(-1)[keep] ** 2).mean()
    torch.testing.assert_close(names["loss"].double(), want, rtol=4e-6, atol=0)


def test_temperatures_by_difficulty(as_auto):
    """Hard tokens, and those alone, at low temperatures around 2."""
    names = recipe("Temperatures by the row")
    hard, temperature = names["hard"], names["temperature"]
    p, q = (names[name].detach().softmax(-1) for name in "yz")
    torch.testing.assert_close(hard, (1 - (p * q).sqrt().sum(-1)).sqrt(), rtol=1e-4, atol=1e-4)
    assert torch.equal(hard.flatten().argsort(), temperature.flatten().argsort(descending=True))
    assert 2 * math.exp(-0.5) < temperature.min() <= 2 <= temperature.max() < 2 * math.exp(0.5)
    assert names["chosen"].all()  # at first


def test_share_of_tokens_follows_the_loss():
    focus = recipe("Temperatures by the row")["Share"](tolerance=0.05, step=0.1, memory=0.0)
    shares = []
    for loss in (1.0, 0.96, 0.94, 0.93, 0.80, 0.99, 1.5, 3.0):
        focus.update(loss)
        shares.append(round(focus.share, 3))
    assert shares == [1.0, 1.0, 0.9, 0.9, 0.81, 0.891, 0.98, 1.0]
