"""nn.Modules: keep options, call functional."""

import torch
from torch import Tensor, nn

from .functional import check_ea_dkd_options, check_ea_kd_options, ea_dkd_loss, ea_kd_loss
from .linear import check_fused_linear_options, fused_linear_ea_kd_loss
from .options import check_keywords, keyword_names, takes_options
from .sparse_teacher import check_topk_options, topk_ea_kd_loss
from .stats import RowStats


class _Loss(nn.Module):
    """Keeps the keywords of `function`, which `check` accepts, and those of a call take their place."""

    function: staticmethod
    check: staticmethod

    def __init__(self, **options):
        super().__init__()
        self.check(**options)
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

    def _loss(self, *arguments, **options):
        check_keywords(options, keyword_names(self.function), f"{type(self).__name__}()")
        kept = {**self._constants, **self._parameters, **self._buffers, **self._modules}
        return self.function(*arguments, **{**kept, **options})

    def extra_repr(self) -> str:
        tensors = {
            name: f"<{tuple(x.shape)}>" for kept in (self._parameters, self._buffers) for name, x in kept.items()
        }
        shown = {name: repr(value) for name, value in self._constants.items()} | tensors
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class EAKDLoss(_Loss):
    """`ea_kd_loss` with its options kept: `EAKDLoss(temperature=4.0)(student_logits, teacher_logits, labels)`.

    Takes the options of `ea_kd_loss`, and checks them when it is made. Those that differ from call to call (mask,
    num_items, ...) can be given to the call, where they replace the module's. Tensors move with `.to(device)`; a
    `temperature` that is an nn.Parameter is a parameter of the module (CTKD), a `weighting` that is an nn.Module a
    submodule.
    """

    function, check = staticmethod(ea_kd_loss), staticmethod(check_ea_kd_options)

    @takes_options(ea_kd_loss)
    def __init__(self, **options):
        super().__init__(**options)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **options
    ) -> Tensor | tuple[Tensor, RowStats]:
        return self._loss(student_logits, teacher_logits, labels, **options)


class EADKDLoss(_Loss):
    """`ea_dkd_loss` with its options kept: `EADKDLoss(beta=2.0)(student_logits, teacher_logits, labels)`.

    Takes alpha, beta and the other options of `ea_dkd_loss`, as `EAKDLoss` takes those of `ea_kd_loss`.
    """

    function, check = staticmethod(ea_dkd_loss), staticmethod(check_ea_dkd_options)

    @takes_options(ea_dkd_loss)
    def __init__(self, **options):
        super().__init__(**options)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **options
    ) -> Tensor | tuple[Tensor, RowStats]:
        return self._loss(student_logits, teacher_logits, labels, **options)


class FusedLinearEAKDLoss(_Loss):
    """`fused_linear_ea_kd_loss` with its options kept:

        criterion = FusedLinearEAKDLoss(entropy_temperature=1.0)
        criterion(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight.detach(), labels)

    Takes chunk_rows, recompute, accumulate_in_fp32 and the other options, as `EAKDLoss` takes those of `ea_kd_loss`.
    The heads stay where they are: the module has no weights.
    """

    function, check = staticmethod(fused_linear_ea_kd_loss), staticmethod(check_fused_linear_options)

    @takes_options(fused_linear_ea_kd_loss, without=("teacher_logits", "teacher_topk", "student_bias", "teacher_bias"))
    def __init__(self, **options):
        super().__init__(**options)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, RowStats]:
        return self._loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **options)


class TopKEAKDLoss(_Loss):
    """`topk_ea_kd_loss` with its options kept: `TopKEAKDLoss(tail="bucket")(student_logits, ids, logprobs, labels)`.

    Takes tail, teacher_temperature and the other options of `topk_ea_kd_loss`, as `EAKDLoss` takes those of
    `ea_kd_loss`; teacher_entropy belongs to a call.
    """

    function, check = staticmethod(topk_ea_kd_loss), staticmethod(check_topk_options)

    @takes_options(topk_ea_kd_loss)
    def __init__(self, **options):
        super().__init__(**options)

    def forward(
        self,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        labels: Tensor | None = None,
        **options,
    ) -> Tensor | tuple[Tensor, RowStats]:
        return self._loss(student_logits, teacher_ids, teacher_logprobs, labels, **options)
