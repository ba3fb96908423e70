"""`ea_kd_loss` in torchdistill's registry; importing this module puts it there, as configurations do:

dependencies:
  - name: 'eakd_kernels.integrations.torchdistill'
...
      criterion:
        key: 'EAKDLoss'
        kwargs: {student_module_path: 'fc', student_module_io: 'output', teacher_module_path: 'fc',
                 teacher_module_io: 'output', temperature: 4.0, kd_weight: 0.9, ce_weight: 0.1}
"""

from torch import Tensor, nn

from .. import modules
from .hosts import expect, load

_registry = load("torchdistill.losses.registry", "torchdistill")
_mid_level = load("torchdistill.losses.mid_level", "torchdistill")


class EAKDLoss(nn.Module):
    """`ea_kd_loss` between two modules' inputs or outputs, as torchdistill's KDLoss takes them.

    Args:
        student_module_path, student_module_io, teacher_module_path, teacher_module_io: where the logits [N, C], or
            [N, C, ...], are: path of a module, and "input" or "output".
        options: those of `ea_kd_loss`, with its defaults. KDLoss's alpha and beta are ce_weight and kd_weight here;
            targets are looked at if ce_weight or ignore_index is given.
    """

    def __init__(self, student_module_path, student_module_io, teacher_module_path, teacher_module_io, **options):
        super().__init__()
        self.student_place = student_module_path, student_module_io
        self.teacher_place = teacher_module_path, teacher_module_io
        self.uses_targets = bool(options.get("ce_weight")) or "ignore_index" in options
        self.loss = modules.EAKDLoss(**options)

    def forward(self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs) -> Tensor:
        student, teacher = (
            io_dict[path][io].movedim(1, -1)
            for io_dict, (path, io) in ((student_io_dict, self.student_place), (teacher_io_dict, self.teacher_place))
        )
        return self.loss(student, teacher, targets if self.uses_targets else None)


expect(_mid_level.KDLoss, "forward", EAKDLoss.forward, "torchdistill")
_registry.register_mid_level_loss(EAKDLoss)
