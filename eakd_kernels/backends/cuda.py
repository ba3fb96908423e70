"""The CUDA kernels (csrc/cuda) on CUDA tensors, or, in the emulator that tests use, on CPU tensors."""

import importlib
import importlib.machinery
import importlib.util

import torch

from .. import env

_PAIRS = {
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
}


EMULATOR = env.cuda_emulator()


def _load():
    """(the extension, which registers torch.ops.eakd_cuda, or None, why there is none)"""
    name = "eakd_kernels._C_cuda"
    try:
        if EMULATOR is not None:
            loader = importlib.machinery.ExtensionFileLoader(name, EMULATOR)
            module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
            loader.exec_module(module)
            return module, None
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name), None
    except ImportError as error:
        return None, f"{EMULATOR or name} cannot be loaded: {error}"
    if torch.version.cuda is None:
        return None, "there are no CUDA kernels: this PyTorch was built without CUDA, and so was eakd_kernels"
    return None, "eakd_kernels was installed without its CUDA kernels; reinstall it where nvcc is found"


_C_cuda, _reason = _load()


def unavailable_reason():
    if _C_cuda is None or EMULATOR is not None:
        return _reason
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    torch.cuda.init()
    if (error := _C_cuda.device_error()) is None:
        return None
    compiled = _C_cuda.build_info()["architectures"]
    return f"the CUDA kernels, compiled for {compiled}, cannot run on {torch.cuda.get_device_name()}: {error}"


def unsupported_reason(device, dtypes):
    wanted = "cuda" if EMULATOR is None else "cpu"
    if device != wanted:
        return f"it takes {wanted} tensors, got {device}"
    if dtypes not in _PAIRS:
        student, teacher = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return (
            "it takes a student and a teacher of the same dtype out of float32, bfloat16 and float16, or a float32 "
            f'student, got {student} and {teacher}; backend="triton" takes every pair of these, backend="reference" '
            "float64 too"
        )
    return None


def launch_plan(
    rows: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    teacher_dtype: torch.dtype | None = None,
    *,
    operation: str = "one_pass",
    aligned: bool = True,
    plan: str = "",
    capability: int = 90,
    processors: int = 132,
    shared_bytes: int = 232448,
    l2_bytes: int = 50 << 20,
    largest_cluster: int = 16,
) -> dict[str, int | str]:
    """Which CUDA kernel takes [rows, vocab_size] logits, and in what shape; no GPU is needed to ask.

    operation: "one_pass" or "row_statistics". aligned: rows of both logits and of the gradient begin alike within 16
    bytes, as they do where all are contiguous. plan: what EAKD_CUDA_PLAN would say. The rest describes the device; an
    H100 if not given: capability 10 major + minor, multiprocessors, shared memory a block may have, L2, blocks a
    cluster may have. An A100: capability=80, processors=108, shared_bytes=166912, l2_bytes=40 << 20.

    Calls that cannot take one pass (fp16 students, reduction="none", weight_norm="mean", callables, live weights and
    temperatures) are row statistics, and a gradient kernel whose plan has no choices. Other divergences than KL(p || q)
    at one temperature, and standardised, capped, scaled or weighted logits, have one kernel for all of it, which
    EAKD_CUDA_PLAN can tell to keep rows in shared memory ("resident") or to read them again ("stream").

    Returns kernel ("small", "resident", "ring" or "stream"), width (columns a load), cluster (blocks that share a row),
    threads (a block), blocks (at most: the device may run fewer at once, and smaller clusters where these do not fit),
    lanes (of "small": threads a row), stages and slice (of "ring": row pairs in shared memory, vectors of each),
    shared_bytes (of "ring"). docs/performance.md says how they are chosen.

    Raises ValueError for an unknown operation, sizes or dtypes that no kernel takes, or a plan that cannot take such
    rows; RuntimeError without the compiled extension.

    Examples:
        >>> launch_plan(8192, 128256)["kernel"]  # doctest: +SKIP
        'ring'
    """
    try:
        from .. import _C
    except ImportError as error:
        raise RuntimeError(f"launch plans are in the extension eakd_kernels._C, which is not there ({error})") from None
    if operation not in ("one_pass", "row_statistics"):
        raise ValueError(f'operation must be "one_pass" or "row_statistics", got {operation!r}')
    if rows < 0 or vocab_size < 1:
        raise ValueError(f"rows must be at least 0 and vocab_size at least 1, got {rows} and {vocab_size}")
    dtypes = dtype, teacher_dtype or dtype
    if dtypes not in _PAIRS:
        raise ValueError(f"no kernel takes dtype {dtypes[0]} with teacher_dtype {dtypes[1]}")
    if operation == "one_pass" and dtype == torch.float16:
        raise ValueError('fp16 students take no one pass; ask for operation="row_statistics"')
    sizes = [dtype.itemsize for dtype in dtypes]
    return _C.cuda_plan(
        operation == "one_pass",
        *sizes,
        rows,
        vocab_size,
        aligned,
        plan,
        capability=capability,
        processors=processors,
        shared_bytes=shared_bytes,
        l2_bytes=l2_bytes,
        largest_cluster=largest_cluster,
    )


def row_statistics(rows, temperature_slopes):
    return torch.ops.eakd_cuda.row_statistics(*rows, temperature_slopes, env.cuda_plan())


def row_gradient(rows, statistics, upstream, gradient):
    torch.ops.eakd_cuda.row_gradient(*rows, statistics, *upstream, gradient, env.cuda_plan())


def one_pass(rows, rule, gradient):
    return torch.ops.eakd_cuda.one_pass(*rows, *rule, gradient, env.cuda_plan())


def scale_gradient(gradient, factor, out):
    torch.ops.eakd_cuda.scale_gradient(gradient, factor, out)
