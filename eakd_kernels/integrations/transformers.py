"""A teacher for transformers' Trainer."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..modules import EAKDLoss
from ..report import TrainingRecord, row_gradient_norms
from ..stats import RowStats
from .hosts import changed, expect, items, load, loss_module

_DECIDED = ("ignore_index", "mask", "num_items", "reduction", "return_stats")
# What Trainer puts beside a model's inputs. With labels a model would compute a loss of its own.
_NOT_FOR_MODELS = ("labels", "shift_labels", "num_items_in_batch", "skip_logits")


class EAKDTrainerMixin:
    """`ea_kd_loss` as the loss of a transformers.Trainer, or of a class derived from it:

        class DistillationTrainer(EAKDTrainerMixin, Trainer):
            pass

        DistillationTrainer(model, args, teacher=teacher, loss_options={"ce_weight": 0.1}, train_dataset=...)

    The loss is the sum over the tokens with a label, divided by their number in all micro-batches of a step, and on all
    ranks unless `average_tokens_across_devices` is False: as Trainer counts them. So gradients depend neither on
    gradient_accumulation_steps nor on the number of ranks. Logits are not sliced; labels are shifted and padded.

    Args:
        teacher: a model with the student's inputs and vocabulary. It is set to eval mode, moved to the device, and run
            without gradients, in the precision of `args` (bf16=True, ...) or of its own weights if that is lower.
        loss_options: those of `ea_kd_loss`, but for ignore_index, mask, num_items, reduction and return_stats. Without
            them: EA weights at entropy_temperature=1.0 with weight_norm="bound", and no cross-entropy. Padded
            vocabularies need vocab_size.
        shift_labels: logits at position j predict label j + 1. False: label j, as of classifiers, whose images want
            other options too, and of encoder-decoder models, whose batches then need decoder_input_ids. Labels that
            come shifted, as batch["shift_labels"], are never shifted.
        report: a path, where the training page of eakd_kernels.report is written when training ends, of the rows of
            all ranks, with the share of the gradient that each tenth of them had.
        recorder: in its place an object of one's own, of which `add(stats, input_ids, labels, step=global_step)` is
            called for every micro-batch of training: see `record`.
        everything else: Trainer's.

    Raises:
        RuntimeError: Trainer is not as in the transformers that this was written for.
        ValueError: `args` or arguments ask for what this loss would ignore; a batch has no labels.

    Not for nn.DataParallel. A teacher that does not fit on a device is for its owner to shard before.
    """

    # Trainer's own rule: `compute_loss` has divided by the micro-batches' number of tokens where Trainer counted them.
    loss_is_scaled_for_ga = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        in_front = cls.__mro__[: cls.__mro__.index(EAKDTrainerMixin)]
        if any(hasattr(base, "compute_loss") and not issubclass(base, EAKDTrainerMixin) for base in in_front):
            raise TypeError(f"the bases of {cls.__name__} must have EAKDTrainerMixin in front of the trainer")

    def __init__(self, *args, teacher, loss_options=None, shift_labels=True, report=None, recorder=None, **kwargs):
        trainer = load("transformers", "transformers").Trainer
        expect(trainer, "compute_loss", EAKDTrainerMixin.compute_loss, "transformers")
        expect(trainer, "get_tp_size", lambda self: None, "transformers")
        if not isinstance(teacher, torch.nn.Module):
            raise TypeError(f"teacher must be a model, got {type(teacher).__name__}; load it with from_pretrained")
        super().__init__(*args, **kwargs)
        self._refuse_what_would_be_ignored()
        if not hasattr(self, "_loss_shifts_labels"):
            raise changed("transformers", "Trainer", "no _loss_shifts_labels", "that, to count the tokens of the loss")
        self.model_accepts_loss_kwargs = True  # or Trainer would not count tokens
        self._loss_shifts_labels = self.shift_labels = shift_labels  # and it counts those of shifted labels
        caller = f"loss_options of {type(self).__name__}"
        self.distillation_loss = loss_module(EAKDLoss, caller, loss_options or {}, _DECIDED).to(self.args.device)
        if report is not None and recorder is not None:
            raise ValueError("report and recorder were both given: a report has a recorder of its own")
        self._loss_options = loss_options or {}
        self.recorder, self._finds_bound = recorder, report is not None
        if report is not None:
            from .training_report import SavedReport

            saved = SavedReport(report, self.processing_class if shift_labels else None)
            self.recorder = saved.record
            self.add_callback(saved)
        self.teacher = teacher.eval().requires_grad_(False)
        if getattr(teacher, "hf_device_map", None) is None:
            self._move_model_to_device(teacher, self.args.device)
        if hasattr(teacher, "config"):
            teacher.config.use_cache = False  # of keys and values, which nobody reads

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = self._labels(inputs)
        features = {name: value for name, value in inputs.items() if name not in _NOT_FOR_MODELS}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher(**features).logits
        outputs = model(**features)
        is_recorded = self.recorder is not None and model.training
        loss = self.distillation_loss(
            outputs.logits,
            teacher_logits.to(outputs.logits.device),
            labels,
            num_items=self._items(num_items_in_batch),
            return_stats=is_recorded,
        )
        if is_recorded:
            loss, stats = loss
            self.record(stats, inputs, labels, outputs.logits)
        return (loss, outputs) if return_outputs else loss

    def record(self, stats: RowStats, inputs: dict, labels: Tensor, logits: Tensor) -> None:
        """Called for every micro-batch of training if there is a recorder. stats: [...] as the logits, detached, 0 in
        rows left out; labels: as the loss has them, shifted, -100 in rows left out."""
        if self._finds_bound:
            self.recorder.bound, self._finds_bound = self._entropy_bound(logits.shape[-1]), False
        # Contexts are for tokens that follow each other: not for classes, and not those of an encoder.
        ids = inputs.get("input_ids") if self.shift_labels or "shift_labels" in inputs else None
        add = partial(self.recorder.add, stats, ids, labels, step=self.state.global_step)
        if isinstance(self.recorder, TrainingRecord) and logits.requires_grad:
            self._add_with_gradient(add, logits)
        else:
            add()

    def _entropy_bound(self, width: int) -> float | None:
        options = self._loss_options
        bound = options.get("entropy_bound")
        return (math.log(options.get("vocab_size") or width) if bound is None else bound) or None

    def _add_with_gradient(self, add, logits: Tensor) -> None:
        def once(gradient):
            hook.remove()
            scaler = self.accelerator.scaler  # of fp16
            add(gradient_norms=row_gradient_norms(gradient) / (1.0 if scaler is None else scaler.get_scale()))

        hook = logits.register_hook(once)

    def _labels(self, inputs: dict) -> Tensor:
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"the batch has no labels, only {', '.join(inputs)}: they say which tokens count (-100: not); "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes some, for one"
            )
        return pad(labels[..., 1:], (0, 1), value=-100) if self.shift_labels else labels

    def _items(self, count):
        """What to divide by, so that the average over ranks that Trainer's backward takes is the sum."""
        if count is None or not self.args.average_tokens_across_devices:
            return items(count)
        return items(count) / (self.accelerator.num_processes // self.get_tp_size())

    def _refuse_what_would_be_ignored(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError("nn.DataParallel is not supported: start a process for every GPU, as torchrun does")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func and EAKDTrainerMixin both are the loss: leave one out")
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor} is not supported: leave it at 0, and "
                "override compute_loss to add such a loss"
            )
