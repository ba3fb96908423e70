"""The training page of a transformers.Trainer, written when it has trained."""

import logging
from pathlib import Path

from torch import distributed as dist
from transformers import TrainerCallback

from ..report import TrainingRecord


class SavedReport(TrainerCallback):
    """A record of this rank's rows, and a page of all ranks' when training ends."""

    def __init__(self, path, tokenizer, bound: float | None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)  # an error after training would come late
        self.record = TrainingRecord(decode=tokenizer if hasattr(tokenizer, "decode") else None, bound=bound)

    def on_train_end(self, args, state, control, **kwargs):
        record = self._of_all_ranks()
        if not state.is_world_process_zero:
            return
        if record.steps.cells():
            record.save(self.path)
        else:
            logging.getLogger(__name__).warning("no report is written to %s: no row was trained on", self.path)

    def _of_all_ranks(self) -> TrainingRecord | None:
        """On the first rank. A copy there: the record goes on if training does."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.record
        records = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.record, records)
        if records is None:
            return None
        whole = records[0].merge(*records[1:])
        whole.decode = self.record.decode
        return whole
