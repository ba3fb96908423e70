"""benchmarks/gpu.py: its steps and what it makes of their output; the benchmarks on a GPU, and where there is none."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, measure
from benchmarks.cases import cases
from benchmarks.providers import providers

ROOT = Path(__file__).parents[1]
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MAIN = next(case for case in cases(device="cuda") if case.operation == "gradient")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def test_steps_stop_when_time_is_up_and_tell_what_failed(tmp_path, capsys):
    steps = gpu.Steps(tmp_path / "check.log", minutes=1 / 60)
    status, _ = steps.run("sleeper", ["sleep", "60"])
    steps.note("sleeper", status == 0, gpu.outcome(status, ""))
    assert steps.run("speaker", ["echo", "said"]) == (0, "said\n")
    assert steps.summary() == 1
    assert capsys.readouterr().out.endswith("said\n\nsleeper: FAILED: out of time\n")
    assert "said\n" in (tmp_path / "check.log").read_text()


def test_what_pytest_and_the_sanitizer_say_is_put_into_a_line():
    pytest_says = "....\n=== 12 passed, 3 deselected in 4.1s ===\n"
    assert gpu.outcome(0, pytest_says) == "12 passed, 3 deselected in 4.1s"
    assert gpu.outcome(86, f"{pytest_says}========= ERROR SUMMARY: 2 errors\n").endswith("; ERROR SUMMARY: 2 errors")
    assert gpu.outcome(5, "no tests ran") == "no such test is marked gpu"


def test_what_keeps_the_sanitizer_from_working_is_told():
    refused = "========= COMPUTE-SANITIZER\n=========\n========= Error: Device not supported\n========= done\n"
    assert gpu.refusal(1, refused) == "Error: Device not supported"
    assert gpu.refusal(3, "========= COMPUTE-SANITIZER\n") == "status 3"


@needs_no_gpu
@pytest.mark.parametrize(
    "script",
    [
        *(["benchmarks/gpu.py", command] for command in gpu.COMMANDS),
        *(["-m", module, "--device", "cuda"] for module in ("benchmarks", "benchmarks.rivals")),
    ],
    ids=" ".join,
)
def test_without_a_gpu_there_is_one_line_and_no_success(script):
    done = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("no GPU: torch ") and done.stderr.count("\n") == 1


def without_compiling(case, reference):
    found = providers(case)
    return {**found, "compile": found["eager"]}


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize(("rows", "clock"), [(512, "events"), (1, "wall")])
def test_a_case_on_a_gpu(rows, clock, monkeypatch):
    monkeypatch.setattr(measure, "providers", without_compiling)
    case = replace(MAIN, vocab_size=32000, rows=rows)
    lines = {row["provider"]: row for row in measure.measure(case, rounds=2)}
    assert {row["clock"] for row in lines.values()} == {clock}
    assert all(float(lines[name]["ms"]) > 0 for name in ("eager", "compile", "copy"))
    measured = [row for name, row in lines.items() if name.startswith("eakd ") and row["ms"]]
    assert measured
    for row in measured:
        assert bool(row["percent_at_5_streams"]) == bool(row["percent_of_copy"]) == (clock == "events")
        assert rows == 1 or 0.99 <= float(row["retained_memory"]) <= float(row["peak_memory"]) <= 1.01
