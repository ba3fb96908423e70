"""Trainers of transformers with the mixin, in one process or as one of two."""

import os

from host_models import qwen2, rows
from torch import distributed as dist

from eakd_kernels.integrations.transformers import EAKDTrainerMixin

CE_WEIGHT = 0.1


def trainer_of(folder, student, teacher, data, **given):
    """given: arguments of the mixin; all others are TrainingArguments'."""
    from transformers import Trainer, TrainingArguments

    own = (
        "loss_options",
        "recorder",
        "report",
        "processing_class",
        "shift_labels",
        "eval_dataset",
        "compute_loss_func",
        "compute_metrics",
    )
    settings = {
        **{"per_device_train_batch_size": len(data), "max_steps": 1, "optim": "sgd", "learning_rate": 0.5},
        **{"lr_scheduler_type": "constant", "max_grad_norm": 1e9, "logging_steps": 1, "save_strategy": "no"},
        **{"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False},
        **{name: value for name, value in given.items() if name not in own},
    }
    kind = type("DistillationTrainer", (EAKDTrainerMixin, Trainer), {})
    return kind(
        student,
        TrainingArguments(str(folder), **settings),
        train_dataset=data,
        teacher=teacher,
        **{name: value for name, value in given.items() if name in own},
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recorder:
    def __init__(self):
        self.calls = []

    def add(self, stats, input_ids, labels, *, step):
        self.calls.append((stats, input_ids, labels, step))


def train_share(folder, average, per_device, report=None):
    """Two steps of SGD over the same 8 rows; parameters, logs, and the rows that this process saw."""
    recorder, rank = Recorder(), dist.get_rank() if dist.is_initialized() else None
    if rank is not None:  # as torchrun sets them
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        os.environ.update({name: str(value) for name, value in ranks.items()})
    try:
        trainer = trainer_of(
            *(f"{folder}/{rank}", qwen2(0), qwen2(1), rows(8)),
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=2,
            max_steps=2,
            average_tokens_across_devices=average,
            loss_options={"ce_weight": CE_WEIGHT},
            **({"recorder": recorder} if report is None else {"report": report}),
        )
        trainer.train()
    finally:
        if rank is not None:
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
            for name in ranks:
                del os.environ[name]
    parameters = [p.detach().clone() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
    seen = [(ids, step) for _, ids, _, step in recorder.calls]
    return parameters, logged(trainer, "loss"), logged(trainer, "grad_norm"), seen
