"""Who has which columns of logits that are sharded over a process group, and the exchange of numbers of rows.

Imported where logits are sharded only: DTensor and the compiler take longer to import than torch itself.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard


class Shards(NamedTuple):
    """A vocabulary in contiguous parts, one for each rank of a process group, in the order of ranks."""

    group: dist.ProcessGroup
    rank: int  # this process, within the group
    widths: tuple[int, ...]  # columns of every rank's logits
    vocab_size: int  # columns used: the first ones of all ranks together

    @property
    def columns(self) -> slice:
        """This rank's columns that are used, as the whole vocabulary numbers them."""
        first = sum(self.widths[: self.rank])
        return slice(min(first, self.vocab_size), min(first + self.widths[self.rank], self.vocab_size))

    def owners(self, labels: Tensor) -> Tensor:
        """The rank that has each label's column, -1 for a label that is no column."""
        owner = sum((labels >= end).long() for end in accumulate(self.widths))
        return torch.where((labels >= 0) & (labels < self.vocab_size), owner, -1)

    def own_labels(self, labels: Tensor) -> Tensor:
        """Labels as this rank numbers its columns; -1, which no kernel takes for a column, where another has it."""
        columns = self.columns
        here = (labels >= columns.start) & (labels < columns.stop)
        return torch.where(here, labels - columns.start, -1)

    def gather(self, values: Tensor) -> Tensor:
        """[ranks, *values.shape]: the values of every rank, which have one shape, in one collective."""
        return _gather(values, self.group, len(self.widths))


def _gather(values: Tensor, group, ranks: int) -> Tensor:
    gathered = values.new_empty((ranks, *values.shape))
    dist.all_gather([*gathered.unbind(0)], values.contiguous(), group=group)
    return gathered


def local_parts(student, teacher, group) -> tuple[Tensor, Tensor, dist.ProcessGroup | None, tuple[int, ...] | None]:
    """(student, teacher, group, widths) of this rank's parts of DTensors; widths: of the parts of all ranks.

    A group of None: the logits are whole. Logits that are no DTensors come back as they are, without widths.
    """
    if not (isinstance(student, DTensor) or isinstance(teacher, DTensor)):
        return student, teacher, None if dist.get_world_size(group) == 1 else group, None
    if not (isinstance(student, DTensor) and isinstance(teacher, DTensor)):
        raise TypeError(
            "student_logits and teacher_logits must both be DTensors or both be ordinary tensors, got "
            f"{type(student).__name__} and {type(teacher).__name__}; DTensor.from_local makes one of a shard"
        )
    if group is not None:
        raise ValueError("process_group must be None for DTensors, whose device mesh says who has which columns")
    if student.device_mesh != teacher.device_mesh or student.placements != teacher.placements:
        raise ValueError(
            "student_logits and teacher_logits must be sharded alike, got "
            f"{student.placements} and {teacher.placements}; "
            "teacher_logits.redistribute(student_logits.device_mesh, student_logits.placements) would work"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student_logits have {student.shape[-1]} columns and teacher_logits {teacher.shape[-1]}: their shards "
            "would not hold the same columns; pad the narrower ones and pass vocab_size"
        )
    dimension = _vocabulary_dimension(student)
    if dimension is None:
        return student.to_local(), teacher.to_local(), None, None
    group, ranks = student.device_mesh.get_group(dimension), student.device_mesh.size(dimension)
    if ranks == 1:
        return student.to_local(), teacher.to_local(), None, None
    chunk = -(-student.shape[-1] // ranks)
    widths = tuple(min(max(student.shape[-1] - rank * chunk, 0), chunk) for rank in range(ranks))
    return student.to_local(), teacher.to_local(), group, widths


def _vocabulary_dimension(logits) -> int | None:
    """The dimension of its device mesh over which a DTensor's last dimension is sharded; None: it is whole."""
    found = None
    for dimension, placement in enumerate(logits.placements):
        if placement.is_replicate():
            continue
        # Not a subclass of Shard either, which would lay the columns out in another order.
        plain = type(placement) is Shard and placement.dim % logits.dim() == logits.dim() - 1
        if not plain or found is not None:
            raise ValueError(
                "DTensor logits must be Replicate() in every mesh dimension but one, and Shard(-1) there, got "
                f"{logits.placements}; pass student_logits.to_local() with process_group= for other layouts of rows"
            )
        found = dimension
    return found


RUNS_EAGERLY = "what process_group is given to runs eagerly, between two graphs: torch.compile needs fullgraph=False"


@torch.compiler.disable(reason=RUNS_EAGERLY)
def agree(group, widths: tuple[int, ...] | None, student: Tensor, teacher: Tensor, vocab_size) -> Shards:
    """The layout of the vocabulary, as all ranks of the group see it.

    widths: known already, as of a DTensor; otherwise the ranks tell each other, which waits for their devices.
    Raises ValueError on every rank where shards do not fit together.
    """
    if widths is None:
        own = [student.shape[-1], teacher.shape[-1], student.shape[:-1].numel()]
        sizes = _gather(torch.tensor(own, device=student.device), group, dist.get_world_size(group)).tolist()
        widths, teachers, rows = (tuple(column) for column in zip(*sizes, strict=True))
        if widths != teachers:
            raise ValueError(
                f"the shards of student_logits have {widths} columns and those of teacher_logits {teachers} on the "
                "ranks of process_group: they must hold the same columns; pad both alike and pass vocab_size"
            )
        if len(set(rows)) > 1:
            raise ValueError(f"every rank of process_group must pass the same rows, got {rows} of them")
    columns = sum(widths)
    if columns == 0:
        raise ValueError("the logits have no columns on any rank of process_group")
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size must be in 1..{columns}, the columns of all ranks together, got {vocab_size}")
    return Shards(group, dist.get_rank(group), widths, columns if vocab_size is None else vocab_size)
