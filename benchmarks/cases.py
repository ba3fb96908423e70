"""What is timed: one list of cases a device, shared with the tests, and what the package is to reach on them."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from .methods import METHODS

CE_WEIGHT = 0.5

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Model whose vocabulary (or number of classes) it is, its size, and rows. On a CPU: a batch of images, or as many
# tokens as keep an fp32 tensor near 40 MB, beyond the last-level cache of most machines.
QUICK_SHAPES = (("Qwen 2.5", 151936, 64), ("Llama 2", 32000, 128), ("CIFAR-100", 100, 4096))
OTHER_SHAPES = (("Gemma 3", 262144, 32), ("Llama 3", 128256, 64), ("GPT-2", 50257, 128), ("ImageNet", 1000, 4096))

# Of the memory that is plotted against them.
ROWS = (64, 128, 256, 512, 1024)

# On a GPU: tokens that fill it, rows fewer where they are longer. The first two are those that goals are set for.
TOKENS = (("Llama 3", 128256, 8192), ("Qwen 2.5", 151936, 8192))
OTHER_TOKENS = (("Llama 2", 32000, 8192), ("GPT-2", 50257, 8192), ("Gemma 3", 262144, 4096))
IMAGES = (("ImageNet", 1000, 512), ("CIFAR-100", 100, 64), ("CIFAR-100", 100, 4096))
# Below this many bytes of logits on a GPU a call is mostly the launching of kernels, which events do not see.
LAUNCH_BOUND = 16 << 20


class Inputs(NamedTuple):
    student: Tensor  # [rows, vocab], requires grad where the case has a gradient
    teacher: Tensor  # [rows, vocab]
    labels: Tensor | None  # [rows], where cross-entropy is part of the loss


@dataclass(frozen=True)
class Case:
    """A field's default is what a results file without that column was measured at."""

    model: str
    vocab_size: int
    rows: int
    dtype: str
    operation: str = "gradient"  # loss and gradient | "labels": cross-entropy too | "statistics": loss without gradient
    # Two temperatures of which neither is a small multiple of the other are the dearest: each needs exponentials.
    temperature: float = 2.0
    entropy_temperature: float = 3.0
    device: str = "cpu"
    method: str = "KL"  # of methods.METHODS

    def __str__(self):
        temperatures = f"tau={self.temperature:g} t={self.entropy_temperature:g}"
        return f"{self.model} {self.vocab_size}x{self.rows} {self.dtype} {self.operation} {temperatures} {self.method}"

    @property
    def streams(self) -> int:
        """How often something of size [rows, vocab] must move: both logits in, the gradient out."""
        return 2 if self.operation == "statistics" else 3

    @property
    def clock(self) -> str:
        """ "events": the GPU's own time, from a cold cache. "wall": what the caller waits for, launching included."""
        logits = self.rows * self.vocab_size * DTYPES[self.dtype].itemsize
        return "events" if self.device == "cuda" and logits >= LAUNCH_BOUND else "wall"

    def inputs(self) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(self.vocab_size)
        drawn = {"generator": generator, "device": self.device}
        student, teacher = (
            torch.randn(self.rows, self.vocab_size, **drawn).mul_(3).to(DTYPES[self.dtype]) for _ in range(2)
        )
        labels = torch.randint(self.vocab_size, (self.rows,), **drawn)
        student.requires_grad_(self.operation != "statistics")
        return Inputs(student, teacher, labels if self.operation == "labels" else None)

    def is_case_of(self, row: dict[str, str]) -> bool:
        """Whether a row of a results file measures this case."""
        return all(row.get(field.name, str(field.default)) == str(getattr(self, field.name)) for field in fields(self))


def on_gpu(*what, temperature: float = 1.0) -> Case:
    """At the package's default temperatures, which GPU goals are for."""
    return Case(*what, temperature=temperature, device="cuda")


def cases(full: bool = False, device: str = "cpu") -> list[Case]:
    """The quick list; with `full` every vocabulary, fp16, the other operations in bf16, and the other methods."""
    return gpu_cases(full) if device == "cuda" else cpu_cases(full)


def cpu_cases(full: bool) -> list[Case]:
    quick = [Case(*shape, dtype) for shape in QUICK_SHAPES for dtype in ("fp32", "bf16")]
    if not full:
        return quick
    shapes = QUICK_SHAPES + OTHER_SHAPES
    every_dtype = [Case(*shape, dtype) for shape in shapes for dtype in DTYPES]
    operations = [Case(*shape, "bf16", operation) for shape in shapes for operation in ("labels", "statistics")]
    return every_dtype + operations + [of_method(method) for method in METHODS if method != "KL"]


def cases_over_rows() -> list[Case]:
    """Those whose memory, and nothing else, is measured."""
    model, vocab_size, _ = QUICK_SHAPES[1]
    return [Case(model, vocab_size, rows, dtype) for dtype in ("fp32", "bf16") for rows in ROWS]


def of_method(method: str) -> Case:
    return Case(*QUICK_SHAPES[1], "fp32", method=method)


def gpu_cases(full: bool) -> list[Case]:
    """The most telling first: a run that is out of time leaves out the end of the list."""
    main = [on_gpu(*shape, "bf16", operation) for shape in TOKENS for operation in ("gradient", "statistics")]
    model, vocab_size, rows = TOKENS[0]
    dearest = on_gpu(model, vocab_size, rows, "bf16", temperature=2.0)
    fp32 = on_gpu(model, vocab_size, rows // 2, "fp32")  # as many bytes
    quick = [*main, *(on_gpu(*shape, "fp32") for shape in IMAGES), fp32]
    quick += [on_gpu(*shape, "bf16") for shape in OTHER_TOKENS] + [dearest]
    if not full:
        return quick
    other = [on_gpu(*shape, "bf16", "statistics") for shape in OTHER_TOKENS]
    other += [on_gpu(*shape, "fp16") for shape in TOKENS + OTHER_TOKENS]
    other += [on_gpu(*shape, "bf16", "labels") for shape in TOKENS + OTHER_TOKENS]
    other += [on_gpu(*shape, "bf16", operation) for shape in IMAGES for operation in ("gradient", "labels")]
    equal = on_gpu(model, vocab_size, rows, "bf16", temperature=3.0)
    return [*quick, *other, equal]


class Goal(NamedTuple):
    """What a column of the results is to reach: less than `at_least` is a regression, `goal` is where it should get."""

    case: Case
    column: str
    at_least: float
    goal: float
    provider: str = ""  # "": the best of this package's


CPU_GOALS = tuple(
    Goal(Case(*shape, dtype), f"x_{baseline}", at_least, goal)
    for shape, dtype, baseline, at_least, goal in (
        (QUICK_SHAPES[0], "fp32", "eager", 18, 25),
        (QUICK_SHAPES[0], "fp32", "compile", 6, 8),
        (QUICK_SHAPES[0], "bf16", "eager", 20, 30),
        (QUICK_SHAPES[0], "bf16", "compile", 6, 8),
        (QUICK_SHAPES[1], "fp32", "eager", 10, 10),
        (QUICK_SHAPES[1], "fp32", "compile", 5, 5),
        (QUICK_SHAPES[1], "bf16", "eager", 12, 12),
        (QUICK_SHAPES[1], "bf16", "compile", 5, 5),
        (QUICK_SHAPES[2], "fp32", "eager", 3, 3),
        (QUICK_SHAPES[2], "fp32", "compile", 2, 3),
        (QUICK_SHAPES[2], "bf16", "eager", 3, 3),
        (QUICK_SHAPES[2], "bf16", "compile", 2, 3),
    )
)

METHOD_GOALS = tuple(
    Goal(of_method(method), column, at_least, goal)
    for method, column, at_least, goal in (
        ("reverse KL", "x_compile", 3, 4),
        ("Jeffreys", "x_compile", 3, 4),
        ("AlphaBeta", "x_compile", 2.5, 4),
        ("JSD", "x_compile", 2.5, 3),
        ("skew KL", "x_compile", 2.5, 3),
        ("skew reverse KL", "x_compile", 2.5, 3),
        ("MLD", "x_compile", 3.5, 4),
        ("MLD", "x_one_temperature", 0.3, 1 / 3),
    )
)

TOKEN_GOALS = tuple(
    Goal(on_gpu(*shape, "bf16", operation), column, goal, goal, provider)
    for shape in TOKENS
    for operation, column, goal, provider in (
        ("gradient", "x_compile", 3, ""),
        ("gradient", "x_eager", 12, ""),
        ("gradient", "x_liger_kl", 2.5, ""),
        ("gradient", "x_trl", 4, ""),
        ("statistics", "percent_of_copy", 88, "eakd triton"),
        ("gradient", "percent_at_5_streams", 85, "eakd triton"),
        ("statistics", "percent_of_copy", 90, "eakd cuda"),
        ("gradient", "percent_of_copy", 85, "eakd cuda"),
    )
)
IMAGE_GOALS = tuple(Goal(on_gpu(*shape, "fp32"), "x_eager", 5, 5) for shape in IMAGES[:2])

GOALS = CPU_GOALS + METHOD_GOALS + TOKEN_GOALS + IMAGE_GOALS
