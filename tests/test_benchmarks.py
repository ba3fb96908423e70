"""The benchmarks run: every case and provider once on two rows; timing and report on numbers known beforehand."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import report, timing
from benchmarks.cases import Case, Goal, cases
from benchmarks.memory import peak_memory
from benchmarks.providers import eager, in_fp64, providers, run, wrong

README = Path(__file__).parents[1] / "README.md"
TINY = Case("CIFAR-100", 100, 4, "fp32")


@pytest.mark.parametrize("case", cases(full=True), ids=str)
def test_every_provider_agrees_with_fp64(case):
    case = replace(case, rows=2)
    inputs = case.inputs()
    exact = in_fp64(inputs)
    for name, provider in providers(case, reference=True).items():
        if name != "compile":  # the same function, below
            assert wrong(provider, inputs, exact) is None, name


@pytest.mark.slow
def test_compile_agrees_with_fp64():
    inputs = TINY.inputs()
    assert wrong(providers(TINY)["compile"], inputs, in_fp64(inputs)) is None


def test_quick_cases_are_part_of_the_full_list():
    quick, full = cases(), cases(full=True)
    assert set(quick) < set(full)
    assert len(set(map(str, full))) == len(full)


def wrong_loss(student, teacher, labels):
    return eager(student, teacher, labels) * (1 + 3e-5)


def wrong_gradient(student, teacher, labels):
    loss = eager(student, teacher, labels)
    return 1.001 * loss - 0.001 * loss.detach()


def nan_gradient(student, teacher, labels):
    return eager(student, teacher, labels) + (student[0, 0] - student[0, 0]).abs().sqrt()


@pytest.mark.parametrize(
    ("provider", "complaint"), [(wrong_loss, "loss"), (wrong_gradient, "gradient"), (nan_gradient, "gradient nan")]
)
def test_a_wrong_provider_is_noticed_and_not_timed(provider, complaint, monkeypatch):
    inputs = TINY.inputs()
    assert wrong(provider, inputs, in_fp64(inputs)).startswith(complaint)
    monkeypatch.setattr(command, "providers", lambda case, reference: {"eager": eager, "mine": provider})
    with pytest.raises(SystemExit, match="mine is wrong and will not be timed"):
        command.measure(TINY, rounds=1)


def test_statistics_make_no_gradient():
    inputs = replace(TINY, operation="statistics").inputs()
    run(eager, inputs)
    assert inputs.student.grad is None


@pytest.fixture
def clock(monkeypatch):
    """Instead of being timed, a call is a list of the times to report; `taken` has (call, repeats, gc.isenabled())."""
    taken = []

    def sample(call, repeats):
        taken.append((call, repeats, gc.isenabled()))
        return call.pop(0) if len(call) > 1 else call[0]

    monkeypatch.setattr(timing, "_sample", sample)
    return taken


def test_rounds_are_interleaved_with_gc_off(clock):
    a, b = [30.0], [40.0]
    ticks = []
    samples = timing.interleaved({"a": a, "b": b}, 2, lambda: ticks.append("before"), lambda: ticks.append("round"))
    assert samples == {"a": [30, 30], "b": [40, 40]}
    assert clock == [(a, 1, False), (b, 1, False)] * (timing.WARM_UP_ROUNDS.start + 2)
    assert ticks[-6:] == ["before", "before", "round"] * 2
    assert gc.isenabled()


def test_rounds_are_thrown_away_until_none_gets_faster(clock):
    samples = timing.interleaved({"a": [90.0, 80.0, 70.0, 60.0, 50.0, 49.0]}, rounds=1)
    assert samples == {"a": [49]} and len(clock) == 7
    endless = [float(2**k) for k in range(50, 0, -1)]
    timing.interleaved({"a": endless}, rounds=1)
    assert len(clock) == 7 + timing.WARM_UP_ROUNDS.stop


def test_short_calls_are_repeated(clock):
    timing.interleaved({"a": [2.0], "b": [90.0]}, rounds=1)
    assert [repeats for _, repeats, _ in clock[-2:]] == [10, 1]


def test_ratios_are_taken_round_by_round():
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3, 2, 4)
    # a disturbance that slows a whole round leaves its ratio alone
    assert timing.ratios([10.0, 1000.0, 12.0], [5.0, 500.0, 6.0]) == (2, 2, 2)


@pytest.fixture
def printed(monkeypatch, tmp_path, capsys):
    """`python -m benchmarks` on two tiny cases, eager standing in for its compilation."""
    listed = [TINY, replace(TINY, dtype="bf16", operation="statistics")]
    monkeypatch.setattr(command, "cases", lambda full: listed)
    monkeypatch.setattr(command, "providers", lambda case, reference: {**providers(case), "compile": eager})
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


@pytest.mark.parametrize(("ratio", "verdict"), [(8.0, "goal met"), (6.0, "pass"), (5.9, "MISS")])
def test_goals_are_met_passed_or_missed(ratio, verdict, monkeypatch):
    monkeypatch.setattr(report, "GOALS", [Goal(TINY.model, TINY.dtype, "eager", at_least=6, goal=8)])
    row = {**vars(TINY), "provider": "eakd cpu", **dict.fromkeys(("x_eager", "x_eager_q1", "x_eager_q3"), str(ratio))}
    assert report.goals([row]).splitlines()[-1].split("|")[-2].strip() == verdict


def test_the_table_goes_between_the_markers():
    readme = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    assert report.insert("new", readme) == readme.replace("old", "new")
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.insert("new", "no markers")


def test_readme_shows_a_file_of_results():
    shown = README.read_text().split(report.BEGIN)[1].split(report.END)[0].strip()
    assert shown in ([report.table(report.load(path)) for path in report.RESULTS.glob("*.csv")] or [""])


def test_peak_memory_of_a_step_is_its_gradient():
    case = Case("Llama 2", 32000, 128, "fp32")
    assert 0.9 <= peak_memory(case, "eakd cpu") <= 1.2
