"""Other packages' losses: those that are installed agree with the formula, and the others are named; their tables."""

import sys
from dataclasses import replace

import pytest
import torch
from support import eager, make_logits

from benchmarks import check, report, timing
from benchmarks.check import Provider
from benchmarks.rivals import __main__ as command
from benchmarks.rivals import entries as taking_part
from benchmarks.rivals import formulas, hidden, measure, packages, table
from benchmarks.rivals.cases import APART, NEAR, HiddenCase, LogitsCase, cases
from benchmarks.rivals.entries import Entry, entries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = LogitsCase("ImageNet", 1000, 8, "fp32")
TINY_HIDDEN = HiddenCase(300, 24, 32, "fp32")
DTYPES = ("fp32", "bf16")


class Scalar(float):
    """A float as Triton's compiler hands it to a kernel; its interpreter hands over Python's."""

    def to(self, dtype):
        return self


@pytest.fixture
def loaded(monkeypatch):
    """Loads a rival, or skips. Kernels run in Triton's interpreter where there is no GPU."""

    def load(rival):
        found = packages.load(rival)
        if isinstance(found, str):
            pytest.skip(found)
        if rival is packages.RIVALS["liger kl"] and DEVICE == "cpu":
            from liger_kernel.transformers import LigerKLDIVLoss

            monkeypatch.setattr(LigerKLDIVLoss.__init__, "__defaults__", (Scalar(1e-10),))
        return found

    return load


@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_formulas(name):
    student, teacher = make_logits(7, 50, dtype=torch.float64)
    expected = eager(student, teacher, tau=1.0, t=1.0, weighting=name)["loss"].mean()
    torch.testing.assert_close(formulas.FORMULAS[name](student, teacher), expected)


def test_cross_entropy_has_the_gradient_of_the_divergence():
    student, teacher = make_logits(7, 50, dtype=torch.float64)
    of_kl, of_cross_entropy = (
        torch.autograd.grad(formula(student, teacher), student)[0] for formula in (formulas.kl, formulas.cross_entropy)
    )
    torch.testing.assert_close(of_kl, of_cross_entropy)


@pytest.mark.parametrize("student", [APART, NEAR])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", packages.RIVALS)
def test_a_rival_on_logits_agrees_with_the_formula(name, dtype, student, loaded):
    rival = packages.RIVALS[name]
    ways = taking_part.ways(name, rival, loaded(rival), dtype)
    inputs = replace(TINY, dtype=dtype, student=student, device=DEVICE).inputs()
    exact = [entry for entry in ways if entry.logits != "as is"]
    assert len(exact) == 2 and len(ways) == (2 if rival.casts or dtype == "fp32" else 4)
    for entry, provider in ways.items():
        if entry in exact or student == APART:  # 16 bits do not hold the difference of near models
            assert provider == taking_part.ONE_NUMBER or check.check(provider, inputs).wrong is None, entry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hidden.RIVALS)
def test_a_rival_on_hidden_states_agrees_with_the_formula(name, dtype, loaded):
    rival = hidden.RIVALS[name]
    found = taking_part.hidden_ways(name, rival, loaded(rival), dtype)
    inputs = replace(TINY_HIDDEN, dtype=dtype, device=DEVICE).inputs()
    assert len(found) == 2
    for entry, provider in found.items():
        assert provider == taking_part.ONE_NUMBER or hidden.check(provider, inputs).wrong is None, entry


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [TINY, TINY_HIDDEN], ids=lambda case: case.family)
def test_ours_and_the_formula_take_part(case, dtype):
    case = replace(case, dtype=dtype, device=DEVICE)
    inputs, found = case.inputs(), entries(case)
    for weights in formulas.FORMULAS:
        assert {Entry("eager", weights), Entry("compile", weights)} < set(found)
        ours = [entry for entry in found if entry.provider.startswith("eakd ") and entry.weights == weights]
        assert ours
        for entry in (Entry("eager", weights), *ours):
            assert measure.check_of(found[entry], inputs).wrong is None, entry


def test_teacher_entropies_are_made_a_few_rows_at_a_time(monkeypatch):
    inputs = TINY_HIDDEN.inputs()
    logits = (inputs.teacher_hidden @ inputs.teacher_weight.T).double()
    expected = eager(logits, logits, t=1.0)["teacher_entropy"].float()
    monkeypatch.setattr(hidden, "ENTROPY_ROWS", 7)
    torch.testing.assert_close(hidden.teacher_entropies(inputs.teacher_hidden, inputs.teacher_weight), expected)


def off_by_a_thousandth(*tensors):
    return 1.001 * hidden.dense(formulas.kl, *tensors)


def wrong_gradient_of_the_weight(hidden_states, weight, *teacher):
    return hidden.dense(formulas.kl, hidden_states, weight.detach(), *teacher) + 0 * weight.sum()


def wrong_gradient_of_one_row(hidden_states, weight, *teacher):
    loss = hidden.dense(formulas.kl, hidden_states, weight, *teacher)
    return loss + 1e-4 * (hidden_states[3, 0] - hidden_states[3, 0].detach())


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        (off_by_a_thousandth, "loss "),
        (wrong_gradient_of_the_weight, "gradient of weight"),
        (wrong_gradient_of_one_row, "gradient of hidden states"),
    ],
)
def test_a_wrong_loss_on_hidden_states_is_noticed(loss, complaint):
    provider = Provider(loss, formulas.kl, tolerance=check.FP32_TOLERANCE)
    assert hidden.check(provider, TINY_HIDDEN.inputs()).wrong.startswith(complaint)


def test_a_row_is_held_to_its_own_gradient():
    """Which is small where the student is as good as the teacher."""
    hidden_states, weight, teacher_hidden, _ = TINY_HIDDEN.inputs()
    teacher_hidden = hidden_states.detach() + teacher_hidden
    teacher_hidden[3] = hidden_states[3].detach() + 0.01 * teacher_hidden[3]
    inputs = hidden.HiddenInputs(hidden_states, weight, teacher_hidden, weight.detach())

    def wrong_in_row_3(hidden_states, *heads):
        parts = hidden_states[:3], OffByAThousandth.apply(hidden_states[3:4]), hidden_states[4:]
        return hidden.dense(formulas.kl, torch.cat(parts), *heads)

    provider = Provider(wrong_in_row_3, formulas.kl, tolerance=check.FP32_TOLERANCE)
    assert hidden.check(provider, inputs).wrong.startswith("gradient of hidden states")


class OffByAThousandth(torch.autograd.Function):
    """In the gradient alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.001 * gradient


def test_a_check_a_few_rows_at_a_time_says_the_same(monkeypatch):
    provider = Provider(wrong_gradient_of_one_row, formulas.kl, tolerance=check.FP32_TOLERANCE)
    whole = hidden.check(provider, TINY_HIDDEN.inputs())
    monkeypatch.setattr(hidden, "CHECKED_BYTES", 5 * 8 * TINY_HIDDEN.vocab_size)
    parts = hidden.check(provider, TINY_HIDDEN.inputs())
    assert parts.gradient_error == pytest.approx(whole.gradient_error, rel=1e-6) and parts.wrong


def plain(student, teacher, dtype):
    return formulas.kl(student, teacher)


def wrong(student, teacher, dtype):
    return 1.001 * formulas.kl(student, teacher)


def missing():
    raise ModuleNotFoundError("No module named 'absent'")


@pytest.fixture
def made_up(monkeypatch):
    """Rivals that are right, wrong, not there, and for GPUs; eager stands in for its compilation."""
    known = {
        "right": packages.Rival("torch", "right", lambda: packages.Loaded(plain)),
        "wrong": packages.Rival("torch", "wrong", lambda: packages.Loaded(wrong)),
        "absent": packages.Rival("absent", "absent", missing),
        "kernel": packages.Rival("torch", "kernel", missing, on_gpus_only="needs a GPU"),
    }
    monkeypatch.setattr(taking_part, "RIVALS", known)
    monkeypatch.setattr(hidden, "RIVALS", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(timing, "SAMPLE_MS", 1.0)


def test_who_is_not_measured_is_named_with_the_reason(made_up):
    rows = measure.measure(TINY, rounds=1)
    timed = {(row["provider"], row["weights"]) for row in rows if row["ms"]}
    assert timed == {(name, w) for name in ("eager", "compile", "eakd cpu") for w in ("none", "ea")} | {
        ("right", "none")
    }
    told = table.left_out(rows).splitlines()[2:]
    assert told[0].startswith("- wrong: wrong: loss ")
    assert told[1:] == ["- absent: not importable: No module named 'absent'", "- kernel: needs a GPU"]
    lines = [line for line in table.of_time(rows).splitlines() if " right " in line]
    assert len(lines) == 1 and "cannot be weighted" in lines[0]


def test_ours_is_not_timed_where_it_is_wrong(made_up, monkeypatch):
    monkeypatch.setattr(taking_part, "ours", lambda student, teacher, labels=None, **_: 1.001 * student.sum())
    with pytest.raises(SystemExit, match="eakd cpu is wrong and will not be timed"):
        measure.measure(TINY, rounds=1)
    rows = measure.measure(replace(TINY, family="errors"), rounds=1)
    assert all(float(row["gradient_error"]) > 1 for row in rows if row["provider"] == "eakd cpu")
    assert not any(row["ms"] for row in rows)


def test_packages_that_are_not_there_are_named(monkeypatch):
    modules = ("trl", "trl.experimental.gkd", "trl.kernels.chunked_divergence", "torchdistill.losses.mid_level")
    modules += ("modelopt.torch.distill.losses", "liger_kernel.transformers", "liger_kernel.chunked_loss")
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    for rival in (*packages.RIVALS.values(), *hidden.RIVALS.values()):
        assert packages.load(rival).startswith("not importable: "), rival.calls


def test_who_is_better_is_said():
    case = {"family": "logits", "vocab_size": "10", "rows": "2", "hidden": "", "dtype": "bf16", "student": APART}
    ours = case | {"provider": "eakd cpu", "weights": "ea", "logits": "", "gradient_error": "2e-3", "left_out": ""}
    ours |= {"ms": "2", "peak_mb": "3", "retained_mb": "5", "x_ours_q3": ""}
    theirs = ours | {"provider": "theirs", "logits": "as is", "ms": "1.5", "x_ours": "0.75", "x_ours_q3": "0.9"}
    theirs |= {"peak_mb": "2.9", "retained_mb": "0", "gradient_error": "9e-4"}
    assert table.who_is_better([theirs, ours]).splitlines()[2:] == [
        "- faster: theirs, as is (10 x 2, bf16, weighted: 0.750 of our time)",
        "- less retained: theirs, as is (10 x 2, bf16, weighted: 0.00, ours 5.00)",
    ]
    equal = theirs | {"x_ours_q3": "1.1", "retained_mb": "5"}
    assert table.who_is_better([equal, ours]) == "Nobody else is better at any of this."
    assert table.who_is_better([equal | {"weights": "none"}, ours]) == "Nobody else is better at any of this."
    errors = [row | {"family": "errors", "ms": "", "peak_mb": "", "retained_mb": ""} for row in (theirs, ours)]
    assert table.who_is_better(errors).endswith("(10 x 2, bf16, weighted, apart: 0.000900, ours 0.00200)")
    errors[0]["gradient_error"] = "1.1e-3"
    assert table.who_is_better(errors) == "Nobody else is better at any of this."


def test_the_command_prints_what_it_saves(made_up, monkeypatch, tmp_path, capsys):
    listed = [TINY, replace(TINY, family="errors", dtype="fp16", student=NEAR), TINY_HIDDEN]
    monkeypatch.setattr(command, "cases", lambda device, quick: listed)
    monkeypatch.setattr("sys.argv", ["rivals", "--quick", "--out", str(tmp_path)])
    command.main()
    (path,) = tmp_path.glob("*.csv")
    rows = report.load(path)
    printed = capsys.readouterr().out
    assert table.tables(rows) in printed and str(path) in printed
    assert {row["family"] for row in rows} == {"logits", "errors", "hidden"}
    assert "compile" not in {row["provider"] for row in rows}  # it is quick
    assert report.kind(rows) == "rivals" and report.device(rows) == "cpu"


def test_memory_of_a_step():
    """This package's is its gradient; others hold more."""
    case = replace(TINY, vocab_size=32000, rows=64, model="Llama 2")
    logits = case.rows * case.vocab_size * 4 / 1e6
    entered = entries(case)
    ours, theirs = (
        measure.memory_of(case, entry, entered[entry], None)
        for entry in (Entry("eakd cpu", "ea"), Entry("eager", "ea"))
    )
    assert 0.9 <= float(ours["retained_mb"]) / logits <= float(ours["peak_mb"]) / logits <= 1.2
    assert float(theirs["peak_mb"]) > 2.5 * logits


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases(device):
    listed = cases(device)
    assert len(set(map(str, listed))) == len(listed)
    assert {case.family for case in listed} == {"logits", "hidden", "errors"} and {c.device for c in listed} == {device}
    assert any(case.measures_memory and case.family == "logits" for case in listed)
    assert all(case.rows * case.vocab_size <= 1 << 17 for case in cases(device, quick=True))


def test_near_students_are_near():
    apart, near = (replace(TINY, student=student).inputs() for student in (APART, NEAR))
    assert torch.equal(apart.teacher, near.teacher)
    assert (near.student - near.teacher).std().item() == pytest.approx(0.3, rel=0.05)
    assert (apart.student - apart.teacher).std().item() == pytest.approx(4.24, rel=0.05)


RESULTS = sorted((report.RESULTS / "rivals").glob("*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_has_every_measurement(path):
    rows = report.load(path)
    text = table.for_docs(rows)
    for row in rows:
        if row["family"] == "errors" and row["weights"] != "none":
            continue  # errors are shown of plain losses
        shown = f"{report.number(row['ms'])} [" if row["ms"] else row["gradient_error"]
        assert row["provider"] in text and (row["left_out"] or shown) in text.replace(
            "cannot be weighted", taking_part.ONE_NUMBER
        ), row
    pictures = [line for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == (len(table.PICTURES) if report.latest(path.parent)[-1] == path else 0)
