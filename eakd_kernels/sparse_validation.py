"""Checks of a sparse teacher's tensors."""

import torch

from . import env
from .validation import check_device, check_per_row


def check_sparse_teacher(ids, logprobs, entropy, student) -> None:
    """student: any tensor [..., columns] of the student's."""
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if not torch.is_tensor(tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape[:-1] != student.shape[:-1] or tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [..., k] with student_logits' leading shape {tuple(student.shape[:-1])} and k >= 1, "
                f"got {tuple(tensor.shape)}"
            )
        check_device(name, tensor, student)
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"teacher_ids and teacher_logprobs must have the same shape, got {tuple(ids.shape)} and "
            f"{tuple(logprobs.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_ids must be int64 or int32, got {ids.dtype}")
    if not logprobs.is_floating_point():
        raise TypeError(f"teacher_logprobs must be floating-point, got {logprobs.dtype}")
    check_per_row("teacher_entropy", entropy, student.shape[:-1], student, "floating-point")
    for name, tensor in (("teacher_logprobs", logprobs), ("teacher_entropy", entropy)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, and the teacher gets no gradient here: pass {name}.detach()")


def check_ids(ids, given, beyond, vocab_size) -> None:
    """Values, where looking at them costs no synchronisation and no graph break, or is asked for."""
    if torch.compiler.is_compiling() or not (ids.device.type == "cpu" or env.check_ids()):
        return
    if beyond.any():
        raise ValueError(
            f"teacher_ids must be below {vocab_size}, the columns in use, got {ids[beyond][0].item()}; negative ones "
            "are padding"
        )
    # Padding gets numbers of its own, so that it equals nothing.
    unique = -1 - torch.arange(ids.shape[-1], device=ids.device)
    ordered = torch.where(given, ids.to(torch.int64), unique).sort(-1).values
    twice = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
    if len(twice) > 0:
        raise ValueError(f"teacher_ids must not name a column twice in a row, got {twice[0].item()} twice")
