"""The benchmarks run: every case and provider once on two rows; timing on numbers known beforehand."""

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import make_logits

from benchmarks import __main__ as command
from benchmarks import check, measure, report, timing
from benchmarks.cases import GOALS, Case, cases
from benchmarks.check import Provider
from benchmarks.memory import memory_on_cpu
from benchmarks.providers import ea_kd, providers
from benchmarks.rivals import packages

ROOT = Path(__file__).parents[1]
TINY = Case("CIFAR-100", 100, 4, "fp32")
ON_GPU = cases(full=True, device="cuda")

formula = partial(ea_kd, tau=TINY.temperature, t=TINY.entropy_temperature)
formula_on_cpu = {"eager": Provider(formula, formula)}


@pytest.mark.parametrize("case", [*cases(full=True), *cases(device="cuda")], ids=str)
def test_every_provider_agrees_with_fp64(case):
    case = replace(case, rows=2, device="cpu")
    inputs = case.inputs()
    for name, provider in providers(case, reference=True).items():
        if name != "compile":  # the same function, below
            assert check.check(provider, inputs).wrong is None, name


@pytest.mark.slow
def test_compile_agrees_with_fp64():
    assert check.check(providers(TINY)["compile"], TINY.inputs()).wrong is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quick_cases_are_part_of_the_full_list(device):
    quick, full = cases(device=device), cases(full=True, device=device)
    assert set(quick) < set(full)
    assert len(set(map(str, full))) == len(full)
    assert {case.device for case in full} == {device}


def test_goals_are_for_cases_that_are_timed():
    assert {goal.case for goal in GOALS if goal.case.method == "KL"} <= {*cases(), *cases(device="cuda")}
    assert {goal.case for goal in GOALS} <= {*cases(full=True), *cases(device="cuda")}


def test_small_cases_on_a_gpu_are_timed_with_their_launching():
    assert {case.model for case in ON_GPU if case.clock == "wall"} == {"ImageNet", "CIFAR-100"}
    assert {case.clock for case in cases(full=True)} == {"wall"}


def wrong_loss(student, teacher, labels):
    return formula(student, teacher, labels) * (1 + 3e-5)


def wrong_gradient(student, teacher, labels):
    loss = formula(student, teacher, labels)
    return 1.001 * loss - 0.001 * loss.detach()


def nan_gradient(student, teacher, labels):
    return formula(student, teacher, labels) + (student[0, 0] - student[0, 0]).abs().sqrt()


@pytest.mark.parametrize(
    ("loss", "complaint"), [(wrong_loss, "loss"), (wrong_gradient, "gradient"), (nan_gradient, "gradient nan")]
)
def test_a_wrong_provider_is_noticed_and_not_timed(loss, complaint, monkeypatch):
    provider = Provider(loss, formula)
    assert check.check(provider, TINY.inputs()).wrong.startswith(complaint)
    monkeypatch.setattr(measure, "providers", lambda case, reference: {**formula_on_cpu, "eakd cpu": provider})
    with pytest.raises(SystemExit, match="eakd cpu is wrong and will not be timed"):
        measure.measure(TINY, rounds=1)


def fails(student, teacher, labels):
    raise RuntimeError("its kernel\ndoes not compile")


def test_another_package_that_is_wrong_or_fails_is_left_out(monkeypatch):
    others = {"rounds": Provider(wrong_loss, formula), "breaks": Provider(fails, formula), "is not there": "no module"}
    monkeypatch.setattr(measure, "providers", lambda case, reference: {**formula_on_cpu, **others})
    monkeypatch.setattr(timing, "SAMPLE_MS", 1.0)
    rows = measure.measure(TINY, rounds=1)
    assert [row["provider"] for row in rows if row["ms"]] == ["eager", "copy"]
    told = report.left_out(rows).splitlines()
    assert told[0].startswith("rounds: not timed: wrong: loss ")
    assert told[1:] == [
        "breaks: not timed: fails: its kernel (CIFAR-100 fp32 gradient)",
        "is not there: not timed: no module (CIFAR-100 fp32 gradient)",
    ]


def test_a_check_a_few_rows_at_a_time_says_the_same(monkeypatch):
    inputs = replace(TINY, operation="labels", rows=7).inputs()
    whole = check.check(Provider(wrong_gradient, formula), inputs)
    monkeypatch.setattr(check, "CHECKED_BYTES", 3 * 8 * TINY.vocab_size)
    parts = check.check(Provider(wrong_gradient, formula), inputs)
    assert parts.gradient_error == pytest.approx(whole.gradient_error, rel=1e-6) and parts.wrong
    assert check.check(Provider(formula, formula), inputs).wrong is None
    # one wrong row among those checked last
    last = Provider(lambda s, t, y: formula(s, t, y) + 1e-3 * (s[6, 0] - s[6, 0].detach()), formula)
    assert check.check(last, inputs).wrong.startswith("gradient")


def test_statistics_make_no_gradient():
    inputs = replace(TINY, operation="statistics").inputs()
    check.run(formula, inputs)
    assert inputs.student.grad is None


def test_rivals_that_are_not_there_are_named_with_the_reason(monkeypatch):
    for package in ("liger_kernel", "liger_kernel.transformers", "trl", "trl.experimental.gkd"):
        monkeypatch.setitem(sys.modules, package, None)
    found = packages.plain_rivals("bf16")
    assert set(found) == set(packages.WITH_GOALS)
    assert all(reason.startswith("not importable: import of ") for reason in found.values())


def test_trl_computes_the_plain_kl():
    found = packages.plain_rivals("bf16")
    if isinstance(found["trl"], str):
        pytest.skip(found["trl"])
    inputs = check.Inputs(*make_logits(6, 100, dtype=torch.bfloat16), None)
    for name in ("trl", "trl in bf16"):
        assert check.check(found[name], inputs).wrong is None, name


def test_flushing_writes_more_than_the_cache_holds():
    assert timing.flushing_bytes(50 << 20) == 100 << 20
    assert timing.flushing_bytes(0) == 256 << 20  # where its size is not known


@pytest.fixture
def clock():
    """Instead of being timed, a call is a list of the times to report; `taken` has (call, repeats, gc.isenabled())."""

    def sample(call, repeats):
        sample.taken.append((call, repeats, gc.isenabled()))
        return call.pop(0) if len(call) > 1 else call[0]

    sample.taken = []
    return sample


def test_rounds_are_interleaved_with_gc_off(clock):
    a, b = [30.0], [40.0]
    ticks = []
    before, after_round = partial(ticks.append, "before"), partial(ticks.append, "round")
    samples = timing.interleaved({"a": a, "b": b}, 2, clock, before, after_round)
    assert samples == {"a": [30, 30], "b": [40, 40]}
    assert clock.taken == [(a, 1, False), (b, 1, False)] * (timing.WARM_UP_ROUNDS.start + 2)
    assert ticks[-6:] == ["before", "before", "round"] * 2
    assert gc.isenabled()


def test_rounds_are_thrown_away_until_none_gets_faster(clock):
    samples = timing.interleaved({"a": [90.0, 80.0, 70.0, 60.0, 50.0, 49.0]}, 1, clock)
    assert samples == {"a": [49]} and len(clock.taken) == 7
    endless = [float(2**k) for k in range(50, 0, -1)]
    timing.interleaved({"a": endless}, 1, clock)
    assert len(clock.taken) == 7 + timing.WARM_UP_ROUNDS.stop


def test_short_calls_are_repeated(clock):
    timing.interleaved({"a": [2.0], "b": [90.0]}, 1, clock)
    assert [repeats for _, repeats, _ in clock.taken[-2:]] == [10, 1]


def test_ratios_are_taken_round_by_round():
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3, 2, 4)
    # a disturbance that slows a whole round leaves its ratio alone
    assert timing.ratios([10.0, 1000.0, 12.0], [5.0, 500.0, 6.0]) == (2, 2, 2)


def without_compiling(case, reference):
    found = providers(case)
    return {**found, "compile": found["eager"]}


@pytest.fixture
def printed(monkeypatch, tmp_path, capsys):
    """`python -m benchmarks` on two tiny cases, eager standing in for its compilation."""
    listed = [TINY, replace(TINY, dtype="bf16", operation="statistics")]
    monkeypatch.setattr(command, "cases", lambda full, device: listed)
    monkeypatch.setattr(measure, "providers", without_compiling)
    monkeypatch.setattr(timing, "SAMPLE_MS", 1.0)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--rounds", "2", "--out", str(tmp_path)])
    command.main()
    return capsys.readouterr().out


def test_the_command_prints_what_it_saves(printed, tmp_path):
    (path,) = tmp_path.glob("*.csv")
    rows = report.load(path)
    table = report.table(rows)
    assert table in printed and report.goals(rows) in printed and str(path) in printed
    assert {row["provider"] for row in rows} >= {"eager", "compile", "eakd cpu", "copy"}
    assert all(float(row["ms"]) > 0 and float(row["gb_per_s"]) > 0 for row in rows)
    assert len({len(line) for line in table.splitlines()[2:]}) == 1  # aligned
    assert "memory" not in table  # it was not measured


def test_a_case_that_begins_too_late_is_left_out(capsys):
    in_time, late = command.Progress(1, minutes=1), command.Progress(1, minutes=-1)
    assert in_time.begins("A") and not late.begins("B")
    assert "A\n" in (told := capsys.readouterr().err) and "B: left out: out of time\n" in told


def test_a_step_needs_and_keeps_its_gradient():
    """It is made in forward. The formula keeps more, and needs more than it keeps."""
    case = Case("Llama 2", 32000, 128, "fp32")
    ours, eager = (memory_on_cpu(case, name) for name in ("eakd cpu", "eager"))
    assert 0.9 <= ours.retained <= ours.peak <= 1.2
    assert 1.9 * ours.retained <= eager.retained < eager.peak


def test_statistics_keep_nothing():
    case = Case("Llama 2", 32000, 128, "fp32", "statistics")
    assert memory_on_cpu(case, "eakd cpu").retained <= 0.1


def test_pytest_times_the_same_cases(tmp_path):
    """And saves where it ran. The quickest of them is run."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "--benchmark-only"]
    # pytest-benchmark refuses to time inside a worker of pytest-xdist, which this process may be, but that one is not.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    start = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    listed = start([*command, "--collect-only"]).stdout
    expected = [(name, case) for case in cases() for name in providers(case)]
    assert listed.count("::test_speed[") == len(expected)
    assert all(f"[{name}-{case}]".replace(" ", "_") in listed for name, case in expected)

    saved = tmp_path / "saved.json"
    command += ["-k", "eakd_cpu-CIFAR-100 and fp32", "--benchmark-max-time=0.01", f"--benchmark-json={saved}"]
    done = start(command)
    assert done.returncode == 0, done.stdout
    run = json.loads(saved.read_text())
    (timed,) = run["benchmarks"]
    assert timed["group"] == next(str(case) for case in cases() if (case.model, case.dtype) == ("CIFAR-100", "fp32"))
    assert timed["stats"]["rounds"] >= 15
    assert run["machine_info"]["eakd_kernels"]["torch"] == torch.__version__
