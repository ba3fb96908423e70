"""The training page of a transformers.Trainer, written when it has trained."""

import logging
import os
import pickle
from pathlib import Path

from torch import distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..report import TrainingRecord

_log = logging.getLogger(__name__)


class SavedReport(TrainerCallback):
    """A record of this rank's rows, kept in checkpoints too, and a page of all ranks' when training ends."""

    def __init__(self, path, tokenizer):
        if not isinstance(path, str | os.PathLike) or Path(path).is_dir():
            raise ValueError(f"report must be the path of the page to write, such as 'training.html', got {path!r}")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.record = TrainingRecord(decode=tokenizer if hasattr(tokenizer, "decode") else None)

    def on_save(self, args, state, control, **kwargs):
        self._in_checkpoint(args, state).write_bytes(pickle.dumps(self.record))

    def on_train_begin(self, args, state, control, **kwargs):
        """A training that is resumed goes on with its checkpoint's record."""
        if state.global_step == 0 or self.record.steps.cells():
            return
        saved = self._in_checkpoint(args, state)
        if not saved.exists():
            _log.warning("the report begins at step %d: %s is not there", state.global_step, saved)
            return
        record = pickle.loads(saved.read_bytes())
        record.decode = self.record.decode
        # In place: the trainer has it.
        self.record.__dict__.update(record.__dict__)

    def _in_checkpoint(self, args, state) -> Path:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        return folder / f"training_record_{args.process_index}.pickle"

    def on_train_end(self, args, state, control, **kwargs):
        record = self._of_all_ranks()
        if not state.is_world_process_zero:
            return
        if not record.steps.cells():
            _log.warning("no report is written to %s: no row was trained on", self.path)
            return
        try:
            record.save(self.path)
        except Exception:  # a page that cannot be written must not cost the training
            _log.exception("the report was not written to %s", self.path)

    def _of_all_ranks(self) -> TrainingRecord | None:
        """On the first rank. A copy there: the record goes on if training does."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.record
        records = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.record, records)
        if records is None:
            return None
        bound = next((record.bound for record in records if record.bound), None)
        for record in records:
            record.bound = bound  # a rank that had no batch does not know it
        whole = records[0].merge(*records[1:])
        whole.decode = self.record.decode
        return whole
