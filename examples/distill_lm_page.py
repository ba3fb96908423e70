"""What distill_lm.py shows of its weights: a page of a passage, before and after training, and one of the training."""

import math
from pathlib import Path

import torch
from distill_lm_models import IGNORED, LOSS_OPTIONS, logits_of
from torch import Tensor, nn

from eakd_kernels.report import Passage, TrainingRecord, View, render, rows_from_logits


def new_record(tokenizer, vocabulary: int) -> TrainingRecord:
    return TrainingRecord(decode=tokenizer, bound=math.log(vocabulary), ignore_index=IGNORED)


def write_pages(folder: Path, record: TrainingRecord, students, teacher, tokenizer, ids: Tensor) -> None:
    """tokens.html, of what `token_page` takes, and training.html."""
    tokens, training = folder / "tokens.html", folder / "training.html"
    tokens.write_text(token_page(students, teacher, tokenizer, ids), encoding="utf-8")
    record.save(
        training,
        title="How EA-KD weighed a training",
        introduction="Every token that the demo's student was trained on: how unsure both models were of it, what "
        "it weighed, and how far apart the two were.",
    )
    print(f"Tokens by weight: {tokens}\nThe training in distributions: {training}")


@torch.no_grad()
def token_page(students: dict[str, nn.Module], teacher: nn.Module, tokenizer, ids: Tensor) -> str:
    """HTML that shows how the tokens ids [T] weigh with each of the students."""

    def decode(token: int) -> str:
        return tokenizer.decode([token])

    options = {name: LOSS_OPTIONS[name] for name in ("entropy_temperature", "weight_norm")}
    expected = logits_of(teacher, ids[None])[0]
    views = (
        View(label, rows_from_logits(logits_of(student, ids[None])[0], expected, ids, decode, **options))
        for label, student in students.items()
    )
    return render(
        Passage(tuple(map(decode, ids.tolist())), tuple(views)),
        title="What EA-KD weighs",
        introduction="A passage held out from training, each token shaded by its weight w in the distillation loss, as "
        "a fraction of its upper bound. Tokens weigh most where the teacher is unsure what comes next, and the more so "
        "while the student is, too.",
    )
