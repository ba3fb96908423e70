"""Triton kernels, for every GPU that Triton reaches; under TRITON_INTERPRET=1 for CPU tensors, slowly.

row_state, row_result                    the maths of a row
divergence, recipe, recipe_sums, recipe_result, recipe_gradient
                                         the same with a recipe (ops.Recipe)
tiles, rows, recipe_rows                 how programs read and write rows, and the sweeps along them
launch                                   which launch fits which tensors
row_statistics, row_gradient, one_pass   the operators: kernels and launchers
"""

import torch

try:
    import numpy as np
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"{error}; pip install triton numpy") from error

from .arithmetic import INTERPRETED
from .one_pass import one_pass
from .row_gradient import row_gradient, scale_gradient
from .row_statistics import row_statistics

__all__ = ["one_pass", "row_gradient", "row_statistics", "scale_gradient", "unavailable_reason", "unsupported_reason"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def unavailable_reason():
    if not INTERPRETED.value:
        there = torch.cuda.is_available() or torch.xpu.is_available()
        interpreter = "TRITON_INTERPRET=1, set before Python starts, runs it on the CPU, slowly"
        return None if there else f"there is no GPU; {interpreter}"
    if isinstance(tl.sum, triton.JITFunction):
        return "TRITON_INTERPRET was set after Triton had been imported; set it before Python starts"
    # https://github.com/triton-lang/triton/issues/9171
    if _version(triton) < (3, 7) and _version(np) >= (2, 4):
        return f"Triton {triton.__version__} interprets no loops with numpy {np.__version__}; it needs numpy < 2.4"
    return None


def unsupported_reason(device, dtypes):
    devices = ("cpu",) if INTERPRETED.value else ("cuda", "xpu")
    if device not in devices:
        return f"it takes {' and '.join(devices)} tensors, got {device}"
    if wrong := [str(dtype) for dtype in dtypes if dtype not in _DTYPES]:
        return f'it takes float32, bfloat16 and float16, got {wrong[0]}; backend="reference" takes float64 too'
    return None
