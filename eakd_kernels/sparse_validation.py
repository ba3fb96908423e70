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


def check_labels(labels, ids) -> None:
    """labels stand where an entropy of the teacher might be expected."""
    if not (torch.is_tensor(labels) and torch.is_tensor(ids)):
        return
    if labels.is_floating_point() and labels.shape == ids.shape[:-1]:
        raise TypeError(
            f"labels must be int64 class indices, got {labels.dtype}; the teacher's entropy is a keyword: "
            "teacher_entropy="
        )


def _are_looked_at(values) -> bool:
    """Whether that costs no synchronisation and no graph break, or is asked for."""
    return not torch.compiler.is_compiling() and (values.device.type == "cpu" or env.check_ids())


def check_logprobs(logprobs, dtype) -> None:
    """logprobs: [..., k] fp64, -inf where there is none; dtype: of those that were given."""
    if not _are_looked_at(logprobs) or logprobs.numel() == 0:
        return
    rounding = 4 * torch.finfo(dtype).eps
    largest, most = logprobs.amax(), logprobs.exp().sum(-1).amax()
    if largest > 1e-3 + rounding:
        got = f"{largest:.4g}"
    elif most > 1 + 1e-2 + rounding:
        got = f"a row whose probabilities sum to {most:.4g}"
    else:
        return
    raise ValueError(
        f"teacher_logprobs must be log-probabilities over the whole vocabulary, got {got}: pass log_softmax of the "
        "logits, or teacher_topk's"
    )


def check_ids(ids, given, beyond, vocab_size) -> None:
    if not _are_looked_at(ids):
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
