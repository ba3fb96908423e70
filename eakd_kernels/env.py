"""Every EAKD_* environment variable: its name, when it is read, what it does; docs/install.md has the same table."""

import os
from typing import NamedTuple


class Variable(NamedTuple):
    name: str
    read: str  # "run time" | "import" | "install"
    meaning: str


VARIABLES = (
    Variable("EAKD_BACKEND", "run time", 'the backend that backend="auto" takes: reference, cpu, triton or cuda'),
    Variable(
        "EAKD_CUDA_PLAN",
        "run time",
        'with backend="cuda": small, stream, or for one pass resident or ring; ":8" behind it for clusters of 8',
    ),
    Variable(
        "EAKD_CUDA_EMULATOR",
        "import",
        'what `make emulator` made, tests/emulator/libeakd_cuda_emulator.so: backend="cuda" takes CPU tensors',
    ),
    Variable(
        "EAKD_CHECK_IDS",
        "run time",
        "1: teacher_ids and teacher_logprobs on a GPU are checked too; the CPU waits",
    ),
    Variable("EAKD_NO_EXT", "install", "1: pure Python, no compiler needed; the loss runs through reference or triton"),
    Variable("EAKD_NO_CUDA", "install", "1: no CUDA kernels, where PyTorch has CUDA"),
    Variable("EAKD_DEBUG", "install", "1: compile without optimisation, with debug information"),
    Variable("EAKD_SANITIZE", "install", "compile with these sanitizers, e.g. address,undefined"),
    Variable("EAKD_BUILD_TORCH", "install", "the torch to build against where the build cannot see the installed one"),
)


def preferred_backend() -> str | None:
    return os.environ.get("EAKD_BACKEND") or None


def cuda_plan() -> str:
    return os.environ.get("EAKD_CUDA_PLAN", "")


def cuda_emulator() -> str | None:
    return os.environ.get("EAKD_CUDA_EMULATOR") or None


def check_ids() -> bool:
    return os.environ.get("EAKD_CHECK_IDS", "") not in ("", "0")


def given() -> dict[str, str]:
    """Those that are set, with their values."""
    return {v.name: os.environ[v.name] for v in VARIABLES if v.name in os.environ}
