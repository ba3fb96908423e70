"""Checks of the tensors of one call, before any work is done, and what the call works on as a result."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, divergences, env
from .ops import STANDARDIZE, Recipe, Rows, statistics_dtype

_LOGIT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    rows: Rows
    entropy_bound: float  # H_ub
    backend: str
    labelled: bool  # cross-entropy is computed
    temperatures: int  # how many the divergence sums over


def validate(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, options, wants_cross_entropy: bool, decoupled=None
) -> Problem:
    """teacher: None where it has no logits; the rows' teacher is the student itself then.
    decoupled: (code, parameters) of a divergence that options cannot name, and that needs labels.

    Raises ValueError or TypeError naming the argument, what it got and what would work."""
    alone, teacher = teacher is None, _own_teacher(student) if teacher is None else teacher
    vocab_size = _check_logits(student, teacher, options.vocab_size)
    leading = student.shape[:-1]
    _check_per_row("labels", labels, leading, student, "int64")
    _check_per_row("mask", options.mask, leading, student, "bool")
    if torch.is_tensor(options.weighting):
        _check_per_row("weighting", options.weighting, leading, student, "floating-point")
    if torch.is_tensor(options.num_items) and options.num_items.is_complex():
        raise TypeError(f"num_items must be a real number, got {options.num_items.dtype}")
    temperatures = _check_temperature(options.temperature, leading, student)
    if temperatures is not None:
        # Once, before it branches: the terms of its gradient cancel, and are not to be rounded apart.
        temperatures = temperatures.to(statistics_dtype(student, teacher))
    if options.ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight={options.ce_weight} needs labels, got None; pass labels or ce_weight=0")
    if options.inplace_gradient:
        _check_inplace(student, None if alone else teacher)
    class_bias = _class_bias(options.teacher_class_weights, vocab_size, student, teacher)
    labels, temperatures = ordinary(labels), ordinary(temperatures)
    keep = ordinary(_rows_kept(labels, options))
    wants_labels = wants_cross_entropy or decoupled is not None
    _check_values(labels if wants_labels else None, keep, temperatures, options, vocab_size)
    backend = dispatch.resolve(options.backend, student.device.type, student.dtype, teacher.dtype)
    if temperatures is not None and keep is not None and temperatures.shape == leading:
        temperatures = torch.where(keep, temperatures, 1.0)  # a row left out may hold anything
    recipe = _recipe(options, decoupled)
    rows = Rows(
        student,
        teacher.detach(),
        labels if wants_labels else None,
        keep,
        temperatures,
        recipe.temperatures[0],
        float(options.entropy_temperature),
        vocab_size,
        [] if class_bias is None and recipe == Recipe(temperatures=recipe.temperatures) else recipe.flat(),
        class_bias,
    )
    bound = math.log(vocab_size) if options.entropy_bound is None else float(options.entropy_bound)
    return Problem(rows, bound, backend, rows.labels is not None, len(recipe.temperatures))


def _recipe(options, decoupled) -> Recipe:
    divergence = options.divergence
    if isinstance(divergence, str):
        divergence = divergences.BY_NAME[divergence]
    temperatures, factors = options.temperatures, (1.0,)
    if temperatures is None:
        temperatures = (1.0 if torch.is_tensor(options.temperature) else float(options.temperature),)
    else:
        factors = tuple(tau * tau if options.scale_by_temperature_squared else 1.0 for tau in temperatures)
    return Recipe(
        *(decoupled or divergence.kernel()),
        STANDARDIZE[options.standardize],
        float(options.student_logit_scale),
        float(options.teacher_logit_scale),
        float(options.student_softcap or 0),
        float(options.teacher_softcap or 0),
        temperatures,
        factors,
    )


def _class_bias(weights, vocab_size, student, teacher) -> Tensor | None:
    """log of the weights, the largest 0, so that no exponent grows beyond the logits'."""
    if weights is None:
        return None
    if not torch.is_tensor(weights) or not weights.is_floating_point():
        got = weights.dtype if torch.is_tensor(weights) else type(weights).__name__
        raise TypeError(f"teacher_class_weights must be a floating-point tensor, got {got}")
    if weights.shape != (vocab_size,):
        raise ValueError(f"teacher_class_weights must have shape ({vocab_size},), got {tuple(weights.shape)}")
    if weights.requires_grad:
        raise ValueError("teacher_class_weights requires grad, and gets no gradient here: pass its .detach()")
    _check_device("teacher_class_weights", weights, student)
    on_cpu = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not bool(((weights > 0) & weights.isfinite()).all()):
        raise ValueError("teacher_class_weights must be finite and > 0; a class without weight is one of -inf logits")
    bias = ordinary(weights).to(statistics_dtype(student, teacher)).log()
    return bias - bias.amax()


def _own_teacher(student) -> Tensor:
    return student.detach() if torch.is_tensor(student) else student


def _check_logits(student, teacher, vocab_size) -> int:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not torch.is_tensor(logits):
            raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
        if logits.dtype not in _LOGIT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {logits.dtype}")
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name} must be [..., vocab] with at least one column, got {tuple(logits.shape)}")
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits requires grad, and the teacher gets no gradient here: pass teacher_logits.detach(), "
            "or run the teacher under torch.no_grad()"
        )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same leading shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_device("teacher_logits", teacher, student)
    narrower = min(student.shape[-1], teacher.shape[-1])
    if vocab_size is None:
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"student_logits have {student.shape[-1]} columns and teacher_logits {teacher.shape[-1]}: if the "
                f"wider ones are padding, pass vocab_size={narrower} (or the tokenizer's size if that is smaller)"
            )
        return student.shape[-1]
    if not 1 <= vocab_size <= narrower:
        raise ValueError(f"vocab_size must be in 1..{narrower}, the columns that both logits have, got {vocab_size}")
    return vocab_size


def _check_device(name, tensor, student) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on student_logits' device {student.device}, got {tensor.device}")


def _check_per_row(name, tensor, leading, student, kind) -> None:
    if tensor is None:
        return
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a tensor ({kind}), got {type(tensor).__name__}")
    right = tensor.is_floating_point() if kind == "floating-point" else tensor.dtype == getattr(torch, kind, None)
    if not right:
        raise TypeError(f"{name} must be {kind}, got {tensor.dtype}")
    if tensor.shape != leading:
        raise ValueError(f"{name} must have the logits' leading shape {tuple(leading)}, got {tuple(tensor.shape)}")
    _check_device(name, tensor, student)


def _check_temperature(temperature, leading, student) -> Tensor | None:
    if not torch.is_tensor(temperature):
        return None
    if temperature.dim() > 0 and temperature.shape != leading:
        raise ValueError(
            f"temperature must be a float, a 0-d tensor or a tensor of the logits' leading shape {tuple(leading)}, "
            f"got shape {tuple(temperature.shape)}"
        )
    _check_device("temperature", temperature, student)
    return temperature


def ordinary(tensor: Tensor | None) -> Tensor | None:
    """A tensor [rows] that autograd can save: what torch.inference_mode() made, it cannot."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def _check_inplace(student, teacher) -> None:
    eager = not torch.compiler.is_compiling()  # which cannot ask what is a view of what
    base = student._base if eager and student._is_view() else student
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            "inplace_gradient=True overwrites student_logits with their gradient, which a leaf that requires grad, or "
            "a view of one, cannot allow; pass a computed tensor, or inplace_gradient=False"
        )
    if eager and teacher is not None and torch._C._is_alias_of(student, teacher):
        raise ValueError(
            "inplace_gradient=True needs student_logits that share no memory with teacher_logits: the gradient would "
            "overwrite the teacher; pass teacher_logits.clone(), or inplace_gradient=False"
        )
    spans = sorted((stride, size) for stride, size in zip(student.stride(), student.shape, strict=True) if size > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            raise ValueError("inplace_gradient=True needs student_logits whose elements do not share memory (expand)")
        reach = stride * size
    if len(spans) > 1 and student.numel() > 0 and not _has_two_leading_strides(student):
        raise ValueError(
            "inplace_gradient=True needs student_logits whose leading dimensions have at most two strides, got "
            f"strides {student.stride()}"
        )


def _has_two_leading_strides(logits) -> bool:
    """As csrc/cpu/ops.cpp, view_rows."""
    strides, reach = 0, None
    for size, stride in reversed(list(zip(logits.shape[:-1], logits.stride()[:-1], strict=True))):
        if size > 1:
            strides += stride != reach
            reach = stride * size
    return strides <= 2


def _rows_kept(labels, options) -> Tensor | None:
    if labels is None:
        return options.mask
    labelled = labels != options.ignore_index
    return labelled if options.mask is None else labelled & options.mask


def _check_values(labels, keep, temperatures, options, vocab_size) -> None:
    """Values inside tensors, where looking at them costs no synchronisation and no graph break."""
    if torch.compiler.is_compiling():
        return

    def some(wrong: Tensor) -> bool:
        return bool((wrong & keep if keep is not None and wrong.shape == keep.shape else wrong).any())

    if labels is not None and labels.device.type == "cpu":
        wrong = (labels < 0) | (labels >= vocab_size)
        if some(wrong):
            example = labels[wrong if keep is None else wrong & keep][0].item()
            raise ValueError(
                f"labels must be in 0..{vocab_size - 1} or ignore_index={options.ignore_index} where cross-entropy "
                f"is computed, got {example}"
            )
    if temperatures is not None and temperatures.device.type == "cpu":
        values = temperatures.detach()
        if some(~((values > 0) & values.isfinite())):
            raise ValueError(
                f"temperature must be finite and > 0 in every row kept, got {values.flatten()[:8].tolist()}"
            )
    items = options.num_items
    if torch.is_tensor(items) and items.device.type == "cpu" and not items > 0:
        raise ValueError(f"num_items must be > 0, got {items.item()}")


def check_sparse_teacher(ids, logprobs, entropy, student) -> None:
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if not torch.is_tensor(tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape[:-1] != student.shape[:-1] or tensor.dim() == 0 or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must be [..., k] with student_logits' leading shape {tuple(student.shape[:-1])} and k >= 1, "
                f"got {tuple(tensor.shape)}"
            )
        _check_device(name, tensor, student)
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"teacher_ids and teacher_logprobs must have the same shape, got {tuple(ids.shape)} and "
            f"{tuple(logprobs.shape)}"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher_ids must be int64 or int32, got {ids.dtype}")
    if not logprobs.is_floating_point():
        raise TypeError(f"teacher_logprobs must be floating-point, got {logprobs.dtype}")
    if logprobs.requires_grad:
        raise ValueError(
            "teacher_logprobs requires grad, and the teacher gets no gradient here: pass teacher_logprobs.detach()"
        )
    _check_per_row("teacher_entropy", entropy, student.shape[:-1], student, "floating-point")


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
