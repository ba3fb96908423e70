"""nn.Modules: keep options, call functional."""

import torch
from torch import Tensor, nn

from .functional import Options, ea_kd_loss
from .options import check_keywords, keyword_names, takes_options
from .stats import RowStats


class EAKDLoss(nn.Module):
    """`ea_kd_loss` with its options kept: `EAKDLoss(temperature=4.0)(student_logits, teacher_logits, labels)`.

    Takes the options of `ea_kd_loss`, and checks them when it is made. Those that differ from call to call (mask,
    num_items, ...) can be given to the call, where they replace the module's. Tensors move with `.to(device)`; a
    `temperature` that is an nn.Parameter is a parameter of the module (CTKD), a `weighting` that is an nn.Module a
    submodule.
    """

    @takes_options(ea_kd_loss)
    def __init__(self, **options):
        super().__init__()
        Options(**options)
        self._constants = {}
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, nn.Module):  # a weighting that learns
                self.add_module(name, value)
            elif torch.is_tensor(value) and name != "num_items" and not value.requires_grad:
                self.register_buffer(name, value, persistent=False)
            else:
                self._constants[name] = value

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **options
    ) -> Tensor | tuple[Tensor, RowStats]:
        check_keywords(options, keyword_names(ea_kd_loss), f"{type(self).__name__}()")
        kept = {**self._constants, **self._parameters, **self._buffers, **self._modules}
        return ea_kd_loss(student_logits, teacher_logits, labels, **{**kept, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._constants.items())
