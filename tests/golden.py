"""The vectors of tests/conformance, and how close to them is close enough."""

import json
from pathlib import Path

import numpy as np
import torch
from support import leaf, widest

FOLDER = Path(__file__).parent / "conformance"
CASES = {case["name"]: case for case in json.loads((FOLDER / "index.json").read_text())["cases"]}
FP32_TOLERANCE = 4e-6


def of_kind(*kinds):
    """Names of the cases of these kinds; "tt_*" means all kinds that begin so."""
    found = [
        name
        for name, case in CASES.items()
        if any(case["kind"] == kind or (kind.endswith("*") and case["kind"].startswith(kind[:-1])) for kind in kinds)
    ]
    assert found, kinds
    return found


def load(name):
    data = np.load(FOLDER / CASES[name]["file"])
    return {key: torch.from_numpy(data[key]).to(torch.get_default_device()) for key in data.files}


def inputs(data, backend):
    """(student, teacher) as the backend takes them."""
    return leaf(data["student"], widest(backend)), data["teacher"].to(widest(backend))


def check(got, want, rtol, atol, fp32=False, terms=0.0):
    """In fp32 to the error rule's bound: the case's tolerance is for fp64. terms: what `want` is a difference of."""
    if fp32 or got.dtype == torch.float32:
        largest = max(want[want.isfinite()].abs().max().item(), terms)
        rtol, atol = max(rtol, FP32_TOLERANCE), max(atol, FP32_TOLERANCE * largest)
    torch.testing.assert_close(got.double(), want.reshape(got.shape), rtol=rtol, atol=atol)


def check_loss_and_gradient(name, loss, student, data, factor=1.0):
    """factor: what the published loss is multiplied by to be ours."""
    tolerance = CASES[name]["tolerance"]
    (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
    check(loss, factor * data["loss"], tolerance["loss_rtol"], factor * tolerance["loss_atol"])
    check(gradient, factor * data["grad_student"], tolerance["grad_rtol"], factor * tolerance["grad_atol"])
