"""Which backend runs. A backend asked for by name runs or raises; only "auto" chooses, and says once what it chose."""

import functools
import importlib
import logging
from types import ModuleType

import torch

from . import env

BACKENDS = ("cuda", "triton", "cpu", "reference")
# What "auto" tries, in this order. On CPU tensors Triton is an interpreter and CUDA an emulator, for who asks for them.
# On a GPU no measurement puts cuda before triton yet: benchmarks/results has none of either.
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}
_log = logging.getLogger(__name__)


@functools.cache
def _load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none."""
    try:
        module = importlib.import_module(f".backends.{name}", __package__)
    except ModuleNotFoundError as error:
        return "this version of eakd_kernels has no such kernels" if error.name.endswith(f".{name}") else str(error)
    except Exception as error:  # a broken Triton, say: no reason for the other backends not to run
        return f"{type(error).__name__}: {error}"
    return module.unavailable_reason() or module


def backend_module(name: str) -> ModuleType:
    module = _load(name)
    if isinstance(module, str):
        raise RuntimeError(f'backend="{name}" cannot run: {module}')
    return module


def available_backends() -> dict[str, str | None]:
    """Every backend's name -> None where it can run on this machine, else the reason why it cannot.

    Examples:
        >>> available_backends()["reference"] is None
        True
    """
    return {name: module if isinstance(module := _load(name), str) else None for name in reversed(BACKENDS)}


def _reason(name: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> str | None:
    module = _load(name)
    return module if isinstance(module, str) else module.unsupported_reason(device, dtypes)


@functools.cache
def _announce(chosen: str, device: str) -> None:
    level = logging.WARNING if chosen == "reference" else logging.INFO  # several tensors of the logits' size, and slow
    _log.log(level, 'eakd_kernels: backend="auto" runs "%s" for %s tensors', chosen, device)


def resolve(backend: str, device: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> str:
    """The name of the backend that will run.

    Raises ValueError for a name that is none, RuntimeError where the one asked for cannot take these tensors.
    """
    automatic = backend == "auto" and env.preferred_backend() is None
    wanted = env.preferred_backend() if backend == "auto" and not automatic else backend
    if not automatic and wanted not in BACKENDS:
        source = "backend" if backend != "auto" else "EAKD_BACKEND"
        raise ValueError(f"{source} must be one of {('auto', *reversed(BACKENDS))}, got {wanted!r}")
    dtypes = (student_dtype, teacher_dtype)
    reasons = {}
    for name in _AUTOMATIC.get(device, BACKENDS) if automatic else (wanted,):
        reasons[name] = _reason(name, device, dtypes)
        if reasons[name] is None:
            if automatic:
                _announce(name, device)
            return name
    asked = f'backend="{wanted}"' if backend != "auto" else f"EAKD_BACKEND={wanted}"
    raise RuntimeError(
        f"{asked} cannot run: {reasons[wanted]}; usable here: "
        + ", ".join(name for name in BACKENDS if _reason(name, device, dtypes) is None)
    )


# torch.compile evaluates the choice while tracing and keeps its result. torch.compiler.assume_constant_result sets this
# attribute too, and imports the compiler, which takes longer than torch itself.
resolve._dynamo_marked_constant = True
