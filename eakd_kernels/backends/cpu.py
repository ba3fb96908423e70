"""The C++ kernels (csrc/cpu) on CPU tensors."""

from pathlib import Path

import torch

try:
    from .. import _C  # registers torch.ops.eakd_cpu
except ImportError as error:
    _C = None
    _sources = Path(__file__).parents[2]
    _remedy = (
        f"these are the sources in {_sources}, which hide an installed package: work in another folder, or "
        "`pip install --editable .`, without EAKD_NO_EXT=1"
        if (_sources / "csrc").is_dir()
        else "reinstall without EAKD_NO_EXT=1"
    )
    _reason = f"the extension eakd_kernels._C is not there ({error}); {_remedy}"


def unavailable_reason():
    return _reason if _C is None else None


def unsupported_reason(device, dtypes):
    return None if device == "cpu" else f"it takes CPU tensors, got {device}"


def row_statistics(rows, temperature_slopes):
    return torch.ops.eakd_cpu.row_statistics(*rows, temperature_slopes)


def row_gradient(rows, statistics, upstream, gradient):
    torch.ops.eakd_cpu.row_gradient(*rows, statistics, *upstream, gradient)


def one_pass(rows, rule, gradient):
    return torch.ops.eakd_cpu.one_pass(*rows, *rule, gradient)


def scale_gradient(gradient, factor, out):
    # A 0-d tensor would be rounded to the gradient's dtype before the product; a Python number is not.
    factor = factor.item()
    if factor != 1 or out.data_ptr() != gradient.data_ptr():
        torch.mul(gradient, factor, out=out)
