"""`pytest benchmarks --benchmark-only`: the cases and providers of `python -m benchmarks`, a group a case.

pytest-benchmark keeps the runs, --benchmark-autosave, and compares with an earlier one, --benchmark-compare. It times
one provider after the other: on a machine that others use, ratios hold in `python -m benchmarks`, which interleaves.
"""

import pytest
import torch

from .cases import cases
from .check import Check, run
from .measure import admit
from .providers import providers


def pytest_generate_tests(metafunc):
    config = metafunc.config
    listed = cases(config.getoption("full"), config.getoption("device"))
    competing = [(provider, case) for case in listed for provider in providers(case)]
    metafunc.parametrize(("provider", "case"), competing, ids=lambda part: str(part).replace(" ", "_"))


@pytest.mark.benchmark(warmup=True, warmup_iterations=3, disable_gc=True, min_rounds=15)
def test_speed(provider, case, benchmark):
    inputs, competitor = case.inputs(), providers(case)[provider]
    checked = admit(case, provider, competitor, inputs)
    if not isinstance(checked, Check):
        pytest.skip(checked)
    benchmark.group = str(case)
    wait = torch.cuda.synchronize if case.device == "cuda" else lambda: None

    def step():
        run(competitor.loss, inputs)
        wait()

    benchmark(step)
