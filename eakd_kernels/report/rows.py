"""The rows of a batch that count, on the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..stats import RowStats

QUANTITIES = ("teacher_entropy", "student_entropy", "weight", "divergence")


class Rows(NamedTuple):
    """values: [4, n] fp32, QUANTITIES of n rows; norms: [n] fp32, of their gradients; places: [n], which of the batch's
    rows they are. tokens: what each of the batch's rows predicts, negative where nobody knows; ids: [sequences, L],
    what each of them has in its place."""

    step: int
    values: Tensor
    norms: Tensor | None
    places: Tensor
    tokens: Tensor | None
    ids: Tensor | None

    def finite(self) -> Tensor:
        """[n]: everything known of the row is."""
        finite = self.values.isfinite().all(0)
        return finite if self.norms is None else finite & self.norms.isfinite()

    def token(self, i: int) -> int | None:
        token = -1 if self.tokens is None else int(self.tokens[self.places[i]])
        return None if token < 0 else token

    def context(self, i: int, length: int) -> tuple[int, ...]:
        """Up to `length` ids, the last one in row i's own place: what precedes the token that it predicts."""
        if self.ids is None:
            return ()
        sequence, position = divmod(int(self.places[i]), self.ids.shape[1])
        return tuple(self.ids[sequence, max(0, position + 1 - length) : position + 1].tolist())


def rows_of(
    stats: RowStats,
    input_ids: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    gradient_norms: Tensor | None,
    *,
    ignore_index: int,
    step: int,
) -> Rows:
    """Of all tensors at once: on a GPU this copies, and so waits, a single time."""
    _check(stats, input_ids=input_ids, labels=labels, mask=mask, gradient_norms=gradient_norms)
    columns = _columns(stats, input_ids, labels, mask, gradient_norms, ignore_index)
    host = dict(zip(columns, torch.stack([*columns.values()]).cpu(), strict=True))
    places = host["keep"].nonzero()[:, 0]
    kept = {name: host[name][places].view(torch.float32) for name in (*QUANTITIES, "norms") if name in host}
    norms = kept.pop("norms", None)
    ids = host["ids"].view(-1, input_ids.shape[-1]) if len(places) > 0 and "ids" in host else None
    return Rows(step, torch.stack([*kept.values()]), norms, places, host.get("tokens"), ids)


def _columns(stats, input_ids, labels, mask, gradient_norms, ignore_index) -> dict[str, Tensor]:
    """All on the device, flattened, and as int32: bits of floats among them."""
    keep = torch.ones_like(stats.weight, dtype=torch.bool) if mask is None else mask
    if labels is not None:
        keep = keep & (labels != ignore_index)
    floats = {name: getattr(stats, name) for name in QUANTITIES} | {"norms": gradient_norms}
    integers = {"keep": keep, "tokens": _predicted(input_ids, labels), "ids": input_ids}
    columns = {name: x.detach().float().view(torch.int32) for name, x in floats.items() if x is not None}
    columns |= {name: x.to(torch.int32) for name, x in integers.items() if x is not None}
    return {name: x.reshape(-1) for name, x in columns.items()}


def _predicted(input_ids: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Labels; without them the next of the ids, which a sequence's last row does not have."""
    if labels is not None or input_ids is None:
        return labels
    following = input_ids.roll(-1, -1)
    following[..., -1:] = -1
    return following


def _check(stats: RowStats, **others: Tensor | None) -> None:
    if not isinstance(stats, RowStats):
        raise TypeError(
            f"stats must be RowStats, got {type(stats).__name__}; ea_kd_loss(..., return_stats=True) returns a pair of "
            "which they are the second, and distill_stats returns them alone"
        )
    if stats.weight is None:
        raise ValueError("stats.weight is None, as it is inside of a weighting; pass what the loss returns")
    shape, device = tuple(stats.weight.shape), stats.weight.device
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not torch.is_tensor(tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if name == "input_ids" and tensor.dim() == 0:
            raise ValueError("input_ids must be [..., L], got a 0-d tensor")
        if tuple(tensor.shape) != shape:
            advice = "; leave it out where a row is not the place of a token" if name == "input_ids" else ""
            raise ValueError(f"{name} must have the statistics' shape {shape}, got {tuple(tensor.shape)}{advice}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, as the statistics are, got {tensor.device}")
        kinds = {"mask": "bool", "gradient_norms": "floating-point"}
        if _kind(tensor) != kinds.get(name, "integer"):
            raise TypeError(f"{name} must be a tensor of {kinds.get(name, 'integer')} dtype, got {tensor.dtype}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating-point"
    return "bool" if tensor.dtype == torch.bool else "integer"
