"""Logits of a few rows from hidden states, and the gradient's way back: torch's matrix products, by chunks of rows.

Logits come in fp32 (fp64 from fp64), and are never rounded to the dtype of hidden states before the softmax: where a
product of 16-bit matrices cannot give fp32, a CPU converts blocks of the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .autograd import once
from .validation import part_of

# Columns of a 16-bit weight that a CPU converts at a time.
_BLOCK = 4096
# What chunks may take: on a CPU small enough to stay beside the weights, on a GPU large enough for its matrix units.
_CPU_BYTES, _GPU_BYTES = 48 << 20, 2 << 30


class Head(NamedTuple):
    """Logits are hidden @ weight.T + bias."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    def flat(self) -> "Head":
        return self._replace(hidden=self.hidden.flatten(0, -2) if self.hidden.dim() > 1 else self.hidden[None])

    def logits(self, rows: Tensor | slice, out: Tensor) -> Tensor:
        """Those of some rows, into the first of `out` [chunk, V], fp32 or fp64."""
        hidden = self.hidden[rows]
        out = out[: len(hidden)]
        if self.takes_units(out.dtype):
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            for block in _blocks(self.weight, out.dtype):
                torch.mm(hidden.to(out.dtype), self.weight[block].to(out.dtype).t(), out=out[:, block])
        return out if self.bias is None else out.add_(self.bias)

    def takes_units(self, dtype: torch.dtype) -> bool:
        """Whether a GPU multiplies these 16-bit tensors into `dtype`, which is fp32."""
        hidden, weight, _ = self
        return hidden.is_cuda and hidden.dtype == weight.dtype and weight.dtype.itemsize == 2 and dtype == torch.float32


class HeadGradient:
    """Gradients of a head's tensors, summed over chunks of rows; None for those that need none.

    The weight's is summed in fp32, whatever its dtype, unless accumulate_in_fp32 is False.
    """

    def __init__(self, head: Head, needed: tuple[bool, bool, bool], all_rows: bool, accumulate_in_fp32: bool):
        hidden, weight, bias = head
        self.head = head
        self.accumulator = _sum_dtype(weight) if accumulate_in_fp32 else weight.dtype
        # Rows that no chunk has get 0.
        self.hidden = (torch.empty_like if all_rows else torch.zeros_like)(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=self.accumulator) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=_sum_dtype(bias)) if bias is not None and needed[2] else None

    def add(self, rows: Tensor | slice, gradient: Tensor) -> None:
        """gradient: [chunk, V] of the logits of these rows; fp32 or fp64."""
        if len(gradient) == 0:
            return
        with torch.autocast(gradient.device.type, enabled=False):  # backward may run in one
            self._add(rows, gradient)

    def _add(self, rows: Tensor | slice, gradient: Tensor) -> None:
        hidden = self.head.hidden
        if self.bias is not None:
            self.bias += gradient.sum(0)
        if self.head.takes_units(gradient.dtype):
            gradient = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[rows] = self._of_hidden(gradient)
        if self.weight is not None:
            self._add_to_weight(gradient, hidden[rows])

    def _of_hidden(self, gradient: Tensor) -> Tensor:
        hidden, weight, _ = self.head
        if gradient.dtype == weight.dtype:
            return (gradient @ weight).to(hidden.dtype)
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for block in _blocks(weight, gradient.dtype):
            total.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
        return total.to(hidden.dtype)

    def _add_to_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        if gradient.dtype == self.accumulator:
            self.weight.addmm_(gradient.t(), hidden.to(gradient.dtype))
        elif gradient.dtype == hidden.dtype == self.head.weight.dtype:  # a GPU's 16-bit product into an fp32 sum
            torch.addmm(self.weight, gradient.t(), hidden, out_dtype=self.accumulator, out=self.weight)
        else:
            hidden = hidden.to(gradient.dtype)
            for block in _blocks(self.weight, gradient.dtype):
                self.weight[block] += gradient[:, block].t() @ hidden

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(hidden, weight, bias), in the dtypes of the head's tensors."""
        given = (self.hidden, self.weight, self.bias)
        return tuple(None if g is None else g.to(x.dtype) for g, x in zip(given, self.head, strict=True))


class Recomputed(Function):
    """What a sweep over a call's chunks gives, and backward from logits that are made again.

    apply(call, sweep, temperatures, *Head). sweep.fields(call, slopes) returns the outputs, and tensors that backward
    needs; sweep.gradients(call, those, temperatures, upstream, needed) the gradients of (temperatures, *Head);
    sweep.constant says which outputs have none.
    """

    @staticmethod
    def forward(ctx, call, sweep, temperatures, *head):
        fields, saved = sweep.fields(call, slopes=ctx.needs_input_grad[2])
        ctx.call, ctx.sweep = call._replace(student=None), sweep
        ctx.save_for_backward(temperatures, *head, *saved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(fields[i] for i in sweep.constant))
        return tuple(fields)

    @staticmethod
    def backward(ctx, *upstream):
        temperatures, hidden, weight, bias, *saved = ctx.saved_tensors
        call = ctx.call._replace(student=Head(hidden, weight, bias))
        with torch.no_grad():  # a graph of the backward goes no further than `once`
            gradients = ctx.sweep.gradients(call, saved, temperatures, upstream, ctx.needs_input_grad[2:])
        anchors = zip(gradients, (temperatures, hidden, weight, bias), strict=True)
        return None, None, *(None if g is None else once(g, x) for g, x in anchors)


def chunk_size(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many rows' logits to hold at a time; columns: of all sides that are made."""
    columns = max(columns, 1)  # a rank may have none
    row_bytes = columns * dtype.itemsize
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        budget, multiple = min(_GPU_BYTES, free // 4), 128
        row_bytes += columns * 2  # the gradient in 16 bits, for the matrix units
    else:
        budget, multiple = _CPU_BYTES, 16
    return max(multiple, budget // row_bytes // multiple * multiple)


# Of what else might be passed.
_PARTS = {"hidden": ("last_hidden_state",), "weight": ("weight",), "bias": ("bias",)}


def check_head(side: str, head: Head) -> None:
    for name, tensor, dims in (("hidden", head.hidden, None), ("weight", head.weight, 2), ("bias", head.bias, 1)):
        if tensor is None and name == "bias":
            continue
        if not torch.is_tensor(tensor) or not tensor.is_floating_point():
            got = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__ + part_of(tensor, *_PARTS[name])
            raise TypeError(f"{side}_{name} must be a floating-point tensor, got {got}")
        if tensor.dim() != dims if dims else tensor.dim() == 0:
            shape = {None: "[..., H]", 2: "[V, H]", 1: "[V]"}[dims]
            raise ValueError(f"{side}_{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != head.hidden.device:
            raise ValueError(
                f"{side}_{name} must be on {side}_hidden's device {head.hidden.device}, got {tensor.device}"
            )
    if head.hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{side}_weight must be [V, {head.hidden.shape[-1]}] for {side}_hidden {tuple(head.hidden.shape)}, got "
            f"{tuple(head.weight.shape)}"
        )
    if head.bias is not None and len(head.bias) != len(head.weight):
        raise ValueError(f"{side}_bias must be [{len(head.weight)}], got {tuple(head.bias.shape)}")


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _blocks(weight: Tensor, dtype: torch.dtype):
    """Slices of a weight's rows: all at once, where nothing has to be converted."""
    size = max(len(weight), 1) if weight.dtype == dtype else _BLOCK
    return (slice(begin, begin + size) for begin in range(0, len(weight), size))
