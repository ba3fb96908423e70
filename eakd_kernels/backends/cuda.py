"""The CUDA kernels (csrc/cuda) on CUDA tensors, or, in the emulator that tests use, on CPU tensors."""

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


def _load_emulator(path):
    loader = importlib.machinery.ExtensionFileLoader("_C_cuda", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C_cuda", loader))
    loader.exec_module(module)
    return module


_reason = None
EMULATOR = env.cuda_emulator()
try:
    if EMULATOR is not None:
        _C_cuda = _load_emulator(EMULATOR)
    else:
        from .. import _C_cuda  # registers torch.ops.eakd_cuda
except ImportError as error:
    _C_cuda = None
    _reason = f"the extension eakd_kernels._C_cuda is not there ({error})"
    if torch.version.cuda is None:
        _reason += "; this PyTorch was built without CUDA, and so was eakd_kernels"
    elif "circular import" in str(error) or "cannot import name" in str(error):
        _reason = "eakd_kernels was installed without its CUDA kernels; reinstall it where nvcc is on PATH"


def unavailable_reason():
    if _reason is not None or EMULATOR is not None:
        return _reason
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def unsupported_reason(device, dtypes):
    wanted = "cuda" if EMULATOR is None else "cpu"
    if device != wanted:
        return f"it takes {wanted} tensors, got {device}"
    if dtypes not in _PAIRS:
        student, teacher = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return (
            f"it takes a student and a teacher of the same dtype out of float32, bfloat16 and float16, or a float32 "
            f'student, got {student} and {teacher}; backend="triton" takes every pair of these'
        )
    return None


def row_statistics(rows, temperature_slopes):
    return torch.ops.eakd_cuda.row_statistics(*rows, temperature_slopes, env.cuda_plan())


def row_gradient(rows, statistics, upstream, gradient):
    torch.ops.eakd_cuda.row_gradient(*rows, statistics, *upstream, gradient, env.cuda_plan())


def one_pass(rows, rule, gradient):
    return torch.ops.eakd_cuda.one_pass(*rows, *rule, gradient, env.cuda_plan())


def scale_gradient(gradient, factor, out):
    torch.ops.eakd_cuda.scale_gradient(gradient, factor, out)
