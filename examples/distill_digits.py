"""Distil a small image classifier with EA-KD on scikit-learn's digits, on a CPU and without a network.

The shortest of the examples: 1797 digits of 8 x 8 pixels that come with scikit-learn, 1000 of them to learn from. Nets,
training and table are those of distill_vision.py: a teacher of 6 convolutions, a student of 3 that learns from labels
alone, by KD and by EA-KD, at the paper's settings for images (tau = 4, t = 3). Seeds decide split, nets and batches.
"""

import argparse
import sys

import torch
from distill_vision import compare, parse_arguments, run
from torch import Tensor

TRAINING = 1000


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in 0..1, and what they show."""
    try:
        from sklearn import datasets
    except ImportError:
        sys.exit(
            "This example needs scikit-learn's digits. `make demo-digits` installs everything and runs it; by hand:\n"
            "    pip install scikit-learn tqdm"
        )
    digits = datasets.load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, float]:
    return compare(*load_digits(), TRAINING, options, seed)


if __name__ == "__main__":
    run(one_seed, TRAINING, parse_arguments(about=__doc__, epochs=50, methods=("KD",)))
