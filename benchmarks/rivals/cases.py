"""What is measured beside other packages: logits of three vocabularies, hidden states, and errors in every dtype."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..cases import DTYPES, Case, Inputs

# As many rows as make an fp32 tensor of 20 MB on a CPU, in eights for those who cut them into eight.
SHAPES = (("ImageNet", 1000, 5120), ("Llama 2", 32000, 160), ("Qwen 2.5", 151936, 32))
GPU_SHAPES = (("ImageNet", 1000, 65536), ("Llama 2", 32000, 8192), ("Qwen 2.5", 151936, 4096))
# On a CPU memory is measured of these, each entry in a process of its own: in tensors of the logits' size it is the
# same for all vocabularies.
MEMORY_OF = "Llama 2"
QUICK_SHAPE = ("ImageNet", 1000, 64)
ERRORS_OF = ("Llama 2", 32000, 32)
# (vocabulary, rows, hidden size). Two of Liger's chunks on a CPU, where a step takes seconds.
HIDDEN_SHAPE, GPU_HIDDEN_SHAPE, QUICK_HIDDEN_SHAPE = (16384, 2048, 256), (128256, 4096, 2048), (1000, 64, 32)
# How far a student is from its teacher: standard deviations of the difference of their logits, in nats.
APART, NEAR = "apart", "near"


@dataclass(frozen=True)
class LogitsCase(Case):
    """`near`: a student late in training, whose gradient is a difference of nearly equal probabilities."""

    temperature: float = 1.0
    entropy_temperature: float = 1.0
    family: str = "logits"  # or "errors", which are not timed
    student: str = APART
    hidden: str = ""

    def __str__(self):
        return f"{self.family}: {self.model} {self.vocab_size}x{self.rows} {self.dtype} {self.student}"

    @property
    def measures_memory(self) -> bool:
        return self.family == "logits" and (self.device == "cuda" or self.model == MEMORY_OF)

    def inputs(self) -> Inputs:
        drawn = super().inputs()
        if self.student == NEAR:
            with torch.no_grad():
                drawn.student.mul_(0.1).add_(drawn.teacher)
        return drawn


class HiddenInputs(NamedTuple):
    hidden: Tensor  # [rows, H]; this and the next require grad
    weight: Tensor  # [vocab, H]
    teacher_hidden: Tensor
    teacher_weight: Tensor


@dataclass(frozen=True)
class HiddenCase:
    vocab_size: int
    rows: int
    hidden: int
    dtype: str
    device: str = "cpu"
    family: str = "hidden"
    model: str = ""
    student: str = APART

    measures_memory = True
    clock = "wall"  # matrix products last long enough

    def __str__(self):
        return f"hidden: {self.vocab_size}x{self.rows}, hidden size {self.hidden}, {self.dtype}"

    def inputs(self) -> HiddenInputs:
        """Logits of deviation 3, as the other cases have."""
        drawn = {"generator": torch.Generator(self.device).manual_seed(self.vocab_size), "device": self.device}
        tensors = []
        for _ in range(2):
            hidden = torch.randn(self.rows, self.hidden, **drawn)
            weight = torch.randn(self.vocab_size, self.hidden, **drawn).mul_(3 / self.hidden**0.5)
            tensors += [hidden.to(DTYPES[self.dtype]), weight.to(DTYPES[self.dtype])]
        for tensor in tensors[:2]:
            tensor.requires_grad_()
        return HiddenInputs(*tensors)


def cases(device: str = "cpu", quick: bool = False) -> list[LogitsCase | HiddenCase]:
    """In the order of their vocabularies; the dearest come last."""
    if quick:
        shapes, errors, hidden = (QUICK_SHAPE,), QUICK_SHAPE, QUICK_HIDDEN_SHAPE
    else:
        shapes, hidden = (GPU_SHAPES, GPU_HIDDEN_SHAPE) if device == "cuda" else (SHAPES, HIDDEN_SHAPE)
        errors = ERRORS_OF
    timed = [LogitsCase(*shape, dtype, device=device) for shape in shapes for dtype in ("fp32", "bf16")]
    checked = [
        LogitsCase(*errors, dtype, device=device, family="errors", student=student)
        for dtype in DTYPES
        for student in (APART, NEAR)
    ]
    return [*checked, *timed, *(HiddenCase(*hidden, dtype, device) for dtype in ("fp32", "bf16"))]
