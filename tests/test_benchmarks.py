"""The benchmarks run: every case and provider once on two rows; timing and report on numbers known beforehand."""

import gc
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support import make_logits

from benchmarks import __main__ as command
from benchmarks import check, gpu, measure, report, rivals, sparse_bias, timing
from benchmarks.cases import GOALS, Case, Goal, cases
from benchmarks.check import Provider
from benchmarks.memory import peak_on_cpu
from benchmarks.providers import ea_kd, providers

README = Path(__file__).parents[1] / "README.md"
TINY = Case("CIFAR-100", 100, 4, "fp32")
ON_GPU = cases(full=True, device="cuda")
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")

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
    found = rivals.rivals("bf16")
    assert set(found) == set(rivals.RIVALS)
    assert all(reason.startswith("not importable: import of ") for reason in found.values())


def test_trl_computes_the_plain_kl():
    found = rivals.rivals("bf16")
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


MAIN = next(case for case in ON_GPU if case.operation == "gradient")


def a_row(case, provider, **columns):
    """As `measure` writes it."""
    where = {"machine": "H1", "capability": "sm_90", "threads": "", "driver": "1", "cuda": "13", "triton": "3"}
    where |= {"torch": "2.11.0", "eakd_kernels": "0", "date": "2026-01-01", "rounds": "15"}
    described = {field: str(value) for field, value in vars(case).items()} | {"clock": case.clock}
    return {**where, **described, "provider": provider, **dict.fromkeys(measure.COLUMNS, ""), **columns}


def verdicts(rows):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.goals(rows).splitlines()[2:]]
    return {line[2]: line[-1] for line in lines}


@pytest.mark.parametrize(("ratio", "verdict"), [(8.0, "goal met"), (6.0, "pass"), (5.9, "MISS")])
def test_goals_are_met_passed_or_missed(ratio, verdict, monkeypatch):
    monkeypatch.setattr(report, "GOALS", [Goal(TINY, "x_eager", at_least=6, goal=8)])
    assert verdicts([a_row(TINY, "eakd cpu", ms="1", x_eager=str(ratio))]) == {"x eager": verdict}


def test_goals_of_a_gpu_name_what_kept_them_from_being_measured():
    ours = {"ms": "3", "x_compile": "3.5", "x_eager": "11", "percent_of_copy": "60", "percent_at_5_streams": "86"}
    rows = [
        a_row(MAIN, "eager", ms="33"),
        a_row(MAIN, "eakd triton", **ours),
        a_row(MAIN, "eakd cuda", left_out="no such kernels"),
        a_row(MAIN, "liger kl", left_out="wrong: loss 2, in fp64 1"),
        a_row(MAIN, "trl", left_out="not importable: No module named 'datasets'"),
    ]
    assert verdicts(rows) == {
        "x compile": "goal met",
        "x eager": "MISS",
        "x liger kl": "not measured (wrong: loss 2, in fp64 1)",
        "x trl": "not measured (not importable: No module named 'datasets')",
        "triton: % of copy at 5 streams": "goal met",
        "cuda: % of copy at 3 streams": "not measured (no such kernels)",
    }
    assert report.goals([a_row(replace(MAIN, rows=64), "eakd triton", **ours)]) == ""  # no goal is for so few rows


def test_the_summary_is_of_this_package_and_says_what_others_compute():
    images = next(case for case in ON_GPU if case.clock == "wall")
    rows = [
        a_row(MAIN, "liger kl", ms="9", formula="KL", version="0.8.5"),
        a_row(MAIN, "liger kl in bf16", ms="6", formula="KL", version="0.8.5", gradient_error="0.023"),
        a_row(MAIN, "eakd triton", ms="2.5", x_liger_kl="3.6", percent_of_copy="51.2", percent_at_5_streams="85.4"),
        a_row(images, "eakd triton", ms="0.05"),
        a_row(MAIN, "eakd cuda", left_out="no such kernels"),
    ]
    text = report.summary(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0][3:] == ["backend", "ms", "% of copy", "at 5", "x liger kl"]
    assert [line[3:] for line in lines[2:]] == [
        ["triton", "2.50", "51.2 at 3", "85.4", "3.60"],
        ["triton", "0.0500 *", "", "", ""],
    ]
    assert "* What the caller waits for" in text and "\nliger kl (0.8.5): the plain KL" in text
    assert "off by up to 2.3 % of" in text


def test_the_table_goes_between_the_markers():
    begin, end = report.markers("cpu")
    readme = f"above\n{begin}\nold\n{end}\nbelow\n"
    assert report.insert("new", readme) == readme.replace("old", "new")
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.insert("new", "no markers")


def test_a_gpus_table_goes_below_the_cpus(monkeypatch, tmp_path):
    rows = [a_row(MAIN, "eakd triton", ms="2.5", percent_of_copy="51.2")]
    readme, results = tmp_path / "README.md", tmp_path / "results"
    begin, end = report.markers("cpu")
    readme.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    files = [*report.RESULTS.glob("*.csv"), report.save(rows, results)]
    cpu = next(path for path in files if report.device(report.load(path)) == "cpu")
    monkeypatch.setattr("sys.argv", ["report", str(cpu), str(files[-1]), "--readme", str(readme)])
    for _ in range(2):  # the second time between the markers that the first has made
        report.main()
        gpu_begin, gpu_end = report.markers("cuda")
        assert readme.read_text() == (
            f"above\n{begin}\n{report.table(report.load(cpu))}\n{end}\n\n"
            f"{gpu_begin}\n{report.summary(rows)}\n{gpu_end}\nbelow\n"
        )


def test_the_latest_file_of_each_device_is_chosen(tmp_path):
    for machine in ("H1", "H2"):
        for date in ("2026-01-02", "2026-01-01"):
            case = MAIN if machine == "H1" else TINY
            report.save([{**a_row(case, "copy"), "machine": machine, "date": date}], tmp_path)
    names = {path.name for path in report.latest(tmp_path)}
    assert names == {"h1-torch2.11.0-2026-01-02.csv", "h2-torch2.11.0-2026-01-02.csv"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_readme_shows_files_of_results(device):
    begin, end = report.markers(device)
    shown = README.read_text().partition(begin)[2].partition(end)[0]
    for path in report.RESULTS.glob("*.csv"):
        rows = report.load(path)
        if report.device(rows) == device:
            shown = shown.replace(report.for_readme(rows), "")
    assert not shown.strip()


def test_peak_memory_of_a_step_is_its_gradient():
    case = Case("Llama 2", 32000, 128, "fp32")
    assert 0.9 <= peak_on_cpu(case, "eakd cpu") <= 1.2


def test_bias_of_sparse_teachers(monkeypatch, tmp_path):
    """Two batches of made-up logits, and a k of all columns, which has none."""
    monkeypatch.setattr(sparse_bias, "SIZES", (5, 40))
    pairs = [tuple(x.detach() for x in make_logits(rows, 40, seed=rows)) for rows in (3, 5)]
    rows = sparse_bias.rows_of(iter(pairs))
    assert [(row["tail"], row["k"]) for row in rows[:2]] == [("whole", "40"), ("bucket", "5")] and len(rows) == 7
    teacher = torch.cat([teacher for _, teacher in pairs]).double()
    p = teacher.softmax(-1)
    whole, few, *_ = rows
    assert float(whole["entropy_t1"]) == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-3)
    assert float(few["outside"]) == pytest.approx(1 - p.topk(5).values.sum(-1).mean().item(), rel=1e-3)
    assert float(few["divergence_tau2_of_tau2"]) < float(whole["divergence_tau2_of_tau2"])
    assert float(few["gradient_error_tau1_of_tau1"]) > 0.01
    for row in rows[4:]:
        assert float(row["gradient_error_tau2_of_tau1"]) < 1e-5
        assert float(row["divergence_tau2_of_tau1"]) == pytest.approx(float(whole["divergence_tau2_of_tau2"]), rel=1e-3)
    sparse_bias.save(rows, tmp_path / "folder" / "bias.csv")
    assert sparse_bias.load(tmp_path / "folder" / "bias.csv") == rows
    begin, end = sparse_bias.MARKERS
    assert sparse_bias.insert("new", f"a\n{begin}\nold\n{end}\nb") == f"a\n{begin}\nnew\n{end}\nb"


def test_page_of_sparse_teachers_shows_the_file():
    assert sparse_bias.table(sparse_bias.load(sparse_bias.CSV)) in sparse_bias.PAGE.read_text()


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
        assert rows == 1 or 0.99 <= float(row["peak_memory"]) <= 1.01


@needs_no_gpu
@pytest.mark.parametrize(
    "script", [["benchmarks/gpu.py", "check"], ["benchmarks/gpu.py", "bench"], ["-m", "benchmarks", "--device", "cuda"]]
)
def test_without_a_gpu_there_is_one_line_and_no_success(script):
    done = subprocess.run([sys.executable, *script], cwd=README.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("no GPU: torch ") and done.stderr.count("\n") == 1


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
