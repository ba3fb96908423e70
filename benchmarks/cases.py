"""What is timed: one list of cases, shared with the tests, and what the package is expected to reach on them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Two temperatures are the dearer setting: each needs exponentials of its own.
TEMPERATURE, ENTROPY_TEMPERATURE = 2.0, 3.0
CE_WEIGHT = 0.5

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Model whose vocabulary (or number of classes) it is, its size, and rows: a batch of images, or as many tokens as keep
# an fp32 tensor near 40 MB, beyond the last-level cache of most machines.
QUICK_SHAPES = (("Qwen 2.5", 151936, 64), ("Llama 2", 32000, 128), ("CIFAR-100", 100, 4096))
OTHER_SHAPES = (("Gemma 3", 262144, 32), ("Llama 3", 128256, 64), ("GPT-2", 50257, 128), ("ImageNet", 1000, 4096))


class Inputs(NamedTuple):
    student: Tensor  # [rows, vocab], requires grad where the case has a gradient
    teacher: Tensor  # [rows, vocab]
    labels: Tensor | None  # [rows], where cross-entropy is part of the loss


@dataclass(frozen=True)
class Case:
    model: str
    vocab_size: int
    rows: int
    dtype: str
    operation: str = "gradient"  # loss and gradient | "labels": cross-entropy too | "statistics": loss without gradient

    def __str__(self):
        return f"{self.model} {self.vocab_size}x{self.rows} {self.dtype} {self.operation}"

    @property
    def streams(self) -> int:
        """How often something of size [rows, vocab] must move: both logits in, the gradient out."""
        return 2 if self.operation == "statistics" else 3

    def inputs(self) -> Inputs:
        generator = torch.Generator().manual_seed(self.vocab_size)
        student, teacher = (
            (torch.randn(self.rows, self.vocab_size, generator=generator) * 3).to(DTYPES[self.dtype]) for _ in range(2)
        )
        labels = torch.randint(self.vocab_size, (self.rows,), generator=generator)
        student.requires_grad_(self.operation != "statistics")
        return Inputs(student, teacher, labels if self.operation == "labels" else None)


def cases(full: bool = False) -> list[Case]:
    """The quick list; with `full` every vocabulary, fp16, and the other operations in bf16."""
    quick = [Case(*shape, dtype) for shape in QUICK_SHAPES for dtype in ("fp32", "bf16")]
    if not full:
        return quick
    shapes = QUICK_SHAPES + OTHER_SHAPES
    every_dtype = [Case(*shape, dtype) for shape in shapes for dtype in DTYPES]
    return every_dtype + [Case(*shape, "bf16", operation) for shape in shapes for operation in ("labels", "statistics")]


class Goal(NamedTuple):
    """How many times faster than a baseline: less than `at_least` is a regression, `goal` is where it should get."""

    model: str
    dtype: str
    baseline: str
    at_least: float
    goal: float


# On a CPU, loss and gradient.
GOALS = (
    Goal("Qwen 2.5", "fp32", "eager", 18, 25),
    Goal("Qwen 2.5", "fp32", "compile", 6, 8),
    Goal("Qwen 2.5", "bf16", "eager", 20, 30),
    Goal("Qwen 2.5", "bf16", "compile", 6, 8),
    Goal("Llama 2", "fp32", "eager", 10, 10),
    Goal("Llama 2", "fp32", "compile", 5, 5),
    Goal("Llama 2", "bf16", "eager", 12, 12),
    Goal("Llama 2", "bf16", "compile", 5, 5),
    Goal("CIFAR-100", "fp32", "eager", 3, 3),
    Goal("CIFAR-100", "fp32", "compile", 2, 3),
    Goal("CIFAR-100", "bf16", "eager", 3, 3),
    Goal("CIFAR-100", "bf16", "compile", 2, 3),
)
