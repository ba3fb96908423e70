"""The forms in which `fused_linear_ea_kd_loss` takes a teacher: what each makes of a chunk of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import row_losses
from .functional import loss_of_logits, row_fields
from .projection import Head, check_head
from .sparse_teacher import TopK, fields_of_topk, loss_of_topk, validate_student
from .sparse_validation import check_sparse_teacher
from .validation import Problem, part_of, validate


class DenseTeacher(NamedTuple):
    """Hidden states and a head, or logits. A chunk of it is logits."""

    head: Head | None
    given: Tensor | None
    has_lse = True

    @property
    def columns(self) -> int:
        """Of the memory that a chunk's logits need."""
        return 0 if self.head is None else len(self.head.weight)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.given,) if self.head is None else self.head

    @property
    def named(self) -> dict[str, Tensor | None]:
        if self.head is None:
            return {"teacher_logits": self.given}
        return dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), self.head, strict=True))

    def flat(self) -> "DenseTeacher":
        if self.head is not None:
            return self._replace(head=self.head.flat())
        return self._replace(given=self.given.flatten(0, -2) if self.given.dim() > 1 else self.given[None])

    def rows(self, chunk: Tensor | slice, out: Tensor) -> Tensor:
        return self.given[chunk] if self.head is None else self.head.logits(chunk, out)

    def validate(self, student: Tensor, labels: Tensor | None, options) -> Problem:
        """student: of the logits' shape, without their memory."""
        teacher = self.given
        if self.head is not None:
            teacher = self.head.hidden.new_empty((), dtype=student.dtype)
            teacher = teacher.expand(*self.head.hidden.shape[:-1], len(self.head.weight))
        return validate(student, teacher, labels, options, _wants_cross_entropy(labels, options))

    def loss(self, student: Tensor, rows: Tensor, labels: Tensor | None, options):
        return loss_of_logits(student, rows, labels, options)

    def fields(self, student: Tensor, rows: Tensor, labels: Tensor | None, options, labelled: bool):
        """stats.PUBLIC_FIELDS."""
        return row_fields(validate(student, rows, labels, options, labelled), options.inplace_gradient)


class SparseTeacher(NamedTuple):
    """The k likeliest columns of every row."""

    topk: TopK
    model: tuple  # sparse_teacher.check_topk_options
    columns, has_lse = 0, False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return ()

    @property
    def named(self) -> dict[str, Tensor | None]:
        return {f"teacher_topk[{i}]": x for i, x in enumerate(self.topk)}

    def flat(self) -> "SparseTeacher":
        ids, logprobs, entropy = self.topk
        entropy = None if entropy is None else entropy.reshape(-1)
        k = ids.shape[-1]
        return self._replace(topk=TopK(ids.reshape(-1, k), logprobs.reshape(-1, k), entropy))

    def rows(self, chunk: Tensor | slice, out: Tensor) -> TopK:
        return TopK(*(None if x is None else x[chunk] for x in self.topk))

    def validate(self, student: Tensor, labels: Tensor | None, options) -> Problem:
        return validate_student(student, labels, options)

    def loss(self, student: Tensor, rows: TopK, labels: Tensor | None, options):
        return loss_of_topk(student, rows, labels, self.model, options)

    def fields(self, student: Tensor, rows: TopK, labels: Tensor | None, options, labelled: bool):
        labels = labels if labelled else None
        return fields_of_topk(validate_student(student, labels, options, labelled), rows, self.model, options)


Teacher = DenseTeacher | SparseTeacher


def _wants_cross_entropy(labels: Tensor | None, options) -> bool:
    return labels is not None and row_losses.wants_cross_entropy(options)


def teacher_of(student: Head, hidden, weight, bias, logits, topk, model) -> Teacher:
    """The one form that is given. topk: (ids, logprobs), with an entropy, or with entropy and lse. model: None unless
    its options are given."""
    check_head("student", student)
    forms = {"teacher_hidden": hidden, "teacher_logits": logits, "teacher_topk": topk}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"the teacher must come in one form, got {' and '.join(given) or 'none'}: pass teacher_hidden with "
            "teacher_weight, or teacher_logits, or teacher_topk"
        )
    (form,) = given
    if form != "teacher_hidden" and not (weight is None and bias is None):
        raise ValueError(f"teacher_weight and teacher_bias go with teacher_hidden, got {form}")
    if form == "teacher_topk":
        if not (isinstance(topk, tuple | list) and 2 <= len(topk) <= 4):
            got = f"{len(topk)} tensors" if isinstance(topk, tuple | list) else type(topk).__name__
            raise TypeError(f"teacher_topk must be (ids, logprobs) or what teacher_topk() returns, got {got}")
        ids, logprobs, entropy, _ = (*topk, None, None)[:4]
        check_sparse_teacher(ids, logprobs, entropy, student.hidden)
        return SparseTeacher(TopK(ids, logprobs, entropy), model)
    if model is not None:
        raise ValueError(
            f'tail and teacher_temperature go with teacher_topk, got {form}; leave them at "bucket" and 1.0'
        )
    if form == "teacher_logits":
        _check_leading(form, logits, student)
        return DenseTeacher(None, logits)
    head = Head(hidden, weight, bias)
    check_head("teacher", head)
    _check_leading(form, hidden, student)
    for name, tensor in (("teacher_hidden", hidden), ("teacher_weight", weight), ("teacher_bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad, and the teacher gets no gradient here: pass {name}.detach()")
    return DenseTeacher(head, None)


def _check_leading(name: str, tensor, student: Head) -> None:
    if not torch.is_tensor(tensor):
        raise TypeError(f"{name} must be tensors, got {type(tensor).__name__}{part_of(tensor, 'logits')}")
    if tensor.shape[:-1] != student.hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of student_hidden, {tuple(student.hidden.shape[:-1])}, got "
            f"{tuple(tensor.shape[:-1])}"
        )
