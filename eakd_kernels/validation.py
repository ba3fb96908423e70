"""Checks of the tensors of one call, before any work is done, and what the call works on as a result."""

import math
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import dispatch, divergences
from .ops import STANDARDIZE, Recipe, Rows, statistics_dtype

if TYPE_CHECKING:
    from .sharding import Shards

_LOGIT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    rows: Rows  # with shards: the columns of this rank, but labels of the whole vocabulary
    entropy_bound: float  # H_ub
    backend: str
    labelled: bool  # cross-entropy is computed
    temperatures: int  # how many the divergence sums over
    shards: "Shards | None" = None  # None: the rows are whole


def validate(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, options, wants_cross_entropy: bool, decoupled=None
) -> Problem:
    """teacher: None where it has no logits; the rows' teacher is the student itself then.
    decoupled: (code, parameters) of a divergence that options cannot name, and that needs labels.

    Raises ValueError or TypeError naming the argument, what it got and what would work."""
    if options.inplace_gradient:
        _check_no_leaf(student)
    alone, teacher = teacher is None, _own_teacher(student) if teacher is None else teacher
    student, teacher, shards = _local(student, teacher, options)
    vocab_size = shards.vocab_size if shards is not None else _columns_used(student, teacher, options.vocab_size)
    leading = student.shape[:-1]
    check_per_row("labels", labels, leading, student, "int64")
    check_per_row("mask", options.mask, leading, student, "bool")
    if torch.is_tensor(options.weighting):
        check_per_row("weighting", options.weighting, leading, student, "floating-point")
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
    if class_bias is not None and shards is not None:
        class_bias = class_bias[shards.columns]
    labels, temperatures = ordinary(labels), ordinary(temperatures)
    keep = ordinary(_rows_kept(labels, options))
    wants_labels = wants_cross_entropy or decoupled is not None
    _check_values(labels, keep, temperatures, options, vocab_size)
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
        vocab_size if shards is None else shards.columns.stop - shards.columns.start,
        [] if class_bias is None and recipe == Recipe(temperatures=recipe.temperatures) else recipe.flat(),
        class_bias,
    )
    bound = math.log(vocab_size) if options.entropy_bound is None else float(options.entropy_bound)
    return Problem(rows, bound, backend, rows.labels is not None, len(recipe.temperatures), shards)


def _local(student, teacher, options) -> "tuple[Tensor, Tensor, Shards | None]":
    """The logits, checked; of sharded ones this rank's columns, and who has the others."""
    group = options.process_group
    if group is None and not (_is_dtensor(student) or _is_dtensor(teacher)):
        _check_logits(student, teacher)
        return student, teacher, None
    from . import sharding

    student, teacher, group, widths = sharding.local_parts(student, teacher, group)
    _check_logits(student, teacher, least_columns=1 if group is None else 0)
    shards = None if group is None else sharding.agree(group, widths, student, teacher, options.vocab_size)
    return student, teacher, shards


def _is_dtensor(tensor) -> bool:
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it, which takes long
    return module is not None and isinstance(tensor, module.DTensor)


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
    check_device("teacher_class_weights", weights, student)
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = weights.aminmax()
        # Exponents are about the largest logit without its weight, and the sums of a row must not vanish with it.
        if not (largest < torch.inf and smallest > 1e-30 * largest):
            raise ValueError(
                "teacher_class_weights must be finite, > 0 and within a factor of 1e30 of each other, got "
                f"{smallest.item():g} to {largest.item():g}; for a class that does not count, set its logits to -inf"
            )
    bias = ordinary(weights).to(statistics_dtype(student, teacher)).log()
    return bias - bias.amax()


def _own_teacher(student) -> Tensor:
    return student.detach() if torch.is_tensor(student) else student


def _check_logits(student, teacher, least_columns=1) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not torch.is_tensor(logits):
            raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}{part_of(logits, 'logits')}")
        if logits.dtype not in _LOGIT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {logits.dtype}")
        if logits.dim() == 0 or logits.shape[-1] < least_columns:
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
    check_device("teacher_logits", teacher, student)


def _columns_used(student, teacher, vocab_size) -> int:
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


def check_device(name, tensor, student) -> None:
    if tensor.device != student.device:
        raise ValueError(f"{name} must be on student_logits' device {student.device}, got {tensor.device}")


def part_of(value, *names: str) -> str:
    """For a message about what is no tensor: the part of a module, or of a model's output, that is one."""
    for name in names:
        if torch.is_tensor(getattr(value, name, None)):
            return f"; pass .{name}"
        if isinstance(value, dict) and torch.is_tensor(value.get(name)):
            return f'; pass ["{name}"]'
    return ""


def check_per_row(name, tensor, leading, student, kind) -> None:
    if tensor is None:
        return
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be a tensor ({kind}), got {type(tensor).__name__}")
    if tensor.shape != leading:
        one_hot = name == "labels" and tensor.shape[:-1] == leading and tensor.shape[-1:].numel() > 1
        raise ValueError(
            f"{name} must have the logits' leading shape {tuple(leading)}, got {tuple(tensor.shape)}"
            + ("; labels.argmax(-1) makes class indices of one-hot rows" if one_hot else "")
        )
    right = tensor.is_floating_point() if kind == "floating-point" else tensor.dtype == getattr(torch, kind, None)
    if not right:
        cast = {"bool": ".bool()", "int64": ".long()"}.get(kind, ".float()")
        meant = "int64 class indices" if name == "labels" else kind
        raise TypeError(f"{name} must be {meant}, got {tensor.dtype}; {name}{cast} makes it so")
    check_device(name, tensor, student)


def _check_temperature(temperature, leading, student) -> Tensor | None:
    if not torch.is_tensor(temperature):
        return None
    if temperature.dim() > 0 and temperature.shape != leading:
        raise ValueError(
            f"temperature must be a float, a 0-d tensor or a tensor of the logits' leading shape {tuple(leading)}, "
            f"got shape {tuple(temperature.shape)}"
            + ("; .squeeze() makes it 0-d" if temperature.numel() == 1 else "; a tuple of floats sums over them")
        )
    check_device("temperature", temperature, student)
    return temperature


def ordinary(tensor: Tensor | None) -> Tensor | None:
    """A tensor [rows] that autograd can save: what torch.inference_mode() made, it cannot."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def _check_no_leaf(student) -> None:
    if not torch.is_tensor(student):
        return
    eager = not torch.compiler.is_compiling()  # which cannot ask what is a view of what
    base = student._base if eager and student._is_view() else student
    if base.requires_grad and base.is_leaf:
        raise ValueError(
            "inplace_gradient=True overwrites student_logits with their gradient, which a leaf that requires grad, or "
            "a view of one, cannot allow; pass a computed tensor, or inplace_gradient=False"
        )


def _check_inplace(student, teacher) -> None:
    if teacher is not None and not torch.compiler.is_compiling() and torch._C._is_alias_of(student, teacher):
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
            raise ValueError(
                f"labels must be in 0..{vocab_size - 1} or ignore_index={options.ignore_index} in every row kept, got "
                + _first(labels, wrong, keep)
            )
    if temperatures is not None and temperatures.device.type == "cpu":
        values = temperatures.detach()
        wrong = ~((values > 0) & values.isfinite())
        if some(wrong):
            raise ValueError(f"temperature must be finite and > 0 in every row kept, got {_first(values, wrong, keep)}")
    items = options.num_items
    if torch.is_tensor(items) and items.device.type == "cpu" and not items > 0:
        raise ValueError(f"num_items must be > 0, got {items.item()}")


def _first(values: Tensor, wrong: Tensor, keep: Tensor | None) -> str:
    """The first wrong value in a row kept, and the row."""
    if keep is not None and wrong.shape == keep.shape:
        wrong = wrong & keep
    row = tuple(wrong.nonzero()[0].tolist())
    return f"{values[row].item()}" + (f" in row {row if len(row) > 1 else row[0]}" if row else "")
