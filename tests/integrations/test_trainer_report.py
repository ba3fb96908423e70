"""report=: the training page of EAKDTrainerMixin."""

import re
from types import SimpleNamespace

import pytest
import torch
from host_models import batch, ea_rows, qwen2, rows, shifted

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hosts]'")
from trainers import Recorder, train_share, trainer_of


def rows_of(page):
    """How many rows a training page says that it is of."""
    return int(re.search(r"Rows</dt>\s*<dd>([\d,]+)", page).group(1).replace(",", ""))


def test_report(tmp_path):
    """With the share of the gradient that backward brought, and the tokenizer's text."""
    data, path = rows(6), tmp_path / "new/folder/training.html"
    words = SimpleNamespace(decode=lambda token: f"word{token}")
    per_step = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = trainer_of(tmp_path, qwen2(0), qwen2(1), data, report=path, processing_class=words, **per_step)
    trainer.train()
    page = path.read_text()
    trained_on = 2 * (shifted(batch(data)["labels"]) != -100).sum()
    assert rows_of(page) == trained_on
    assert "word" in page and "gradient norm" in page
    assert sum(phase.norms for phase in trainer.recorder.phases.cells()) == trained_on
    # of the first step, by the student as it was
    inputs = batch(data)
    labels = shifted(inputs.pop("labels"))
    student, teacher = (qwen2(seed)(**inputs).logits.detach().double() for seed in (0, 1))
    ea_rows(student.requires_grad_(), teacher, labels).mean().backward()
    first = trainer.recorder.phases.cells()[0]
    assert float(first.sums[3].sum()) == pytest.approx(student.grad.norm(dim=-1).sum().item(), rel=1e-4)


def test_report_of_all_ranks(tmp_path, world):
    path = tmp_path / "training.html"
    world(2).run(train_share, str(tmp_path), True, 2, str(path))
    assert rows_of(path.read_text()) == 2 * (shifted(batch(rows(8))["labels"]) != -100).sum()


@pytest.mark.parametrize("kept", [True, False])
def test_report_of_a_resumed_training(tmp_path, kept, caplog):
    """The whole training's, if its checkpoint has the record; or else it says from where on."""
    data, path = rows(4), tmp_path / "training.html"
    settings = {"save_strategy": "steps", "save_steps": 1, "report": path}
    trainer_of(tmp_path, qwen2(0), qwen2(1), data, max_steps=2, **settings).train()
    record = tmp_path / "checkpoint-2/training_record_0.pickle"
    if not kept:
        record.unlink()
    trainer_of(tmp_path, qwen2(0), qwen2(1), data, max_steps=3, **settings).train(resume_from_checkpoint=True)
    count = (shifted(batch(data)["labels"]) != -100).sum()
    assert rows_of(path.read_text()) == (3 if kept else 1) * count
    assert ("the report begins at step 2" in caplog.text) is not kept


def test_report_and_recorder(tmp_path):
    with pytest.raises(ValueError, match="report and recorder were both given"):
        trainer_of(tmp_path, qwen2(0), qwen2(1), rows(4), report=tmp_path / "page.html", recorder=Recorder())


def test_report_of_nothing(tmp_path, caplog):
    """Training that had no row still ends well."""
    data = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows(4)]
    trainer_of(tmp_path, qwen2(0), qwen2(1), data, report=tmp_path / "page.html").train()
    assert "no report is written" in caplog.text and not (tmp_path / "page.html").exists()


def test_report_of_a_classifier(tmp_path):
    """Its ids are in another shape than its rows, and its bound is that of the classes."""
    transformers = pytest.importorskip("transformers")

    def classifier(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=96, num_labels=4, **sizes))

    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 4)} for i, row in enumerate(rows(8))]
    given = {"report": tmp_path / "page.html", "shift_labels": False, "processing_class": SimpleNamespace(decode=str)}
    trainer = trainer_of(tmp_path, classifier(0), classifier(1), data, **given)
    trainer.train()
    assert rows_of(given["report"].read_text()) == 8
    assert trainer.recorder.bound == pytest.approx(torch.tensor(4.0).log().item())


def test_every_row_counts_once(tmp_path):
    """However often gradients flow through the logits, or not at all."""
    data = rows(4)
    count = int((shifted(batch(data)["labels"]) != -100).sum())
    student = qwen2(0)
    trainer = trainer_of(tmp_path, student, qwen2(1), data, report=tmp_path / "page.html")
    loss = trainer.compute_loss(student.train(), batch(data))
    loss.backward(retain_graph=True)
    loss.backward()
    with torch.no_grad():
        trainer.compute_loss(student, batch(data))
    phases = trainer.recorder.phases.cells()
    assert sum(int(phase.sums[0].sum()) for phase in phases) == 2 * count
    assert sum(phase.norms for phase in phases) == count


def test_a_page_that_fails_does_not_cost_the_training(tmp_path, monkeypatch, caplog):
    trainer = trainer_of(tmp_path, qwen2(0), qwen2(1), rows(4), report=tmp_path / "page.html")
    monkeypatch.setattr(type(trainer.recorder), "save", lambda *arguments: 1 / 0)
    trainer.train()
    assert "the report was not written" in caplog.text


@pytest.mark.parametrize("path", [True, "."])
def test_what_is_no_path(tmp_path, path):
    with pytest.raises(ValueError, match="report must be the path"):
        trainer_of(tmp_path, qwen2(0), qwen2(1), rows(4), report=path)
