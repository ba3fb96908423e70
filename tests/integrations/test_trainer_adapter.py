"""The mixin for transformers' Trainer: gradients of the eager formula, however a step is cut up."""

from types import SimpleNamespace

import pytest
import torch
from host_models import LENGTH, VOCAB, batch, ea_rows, qwen2, rows, shifted
from torch import nn

from eakd_kernels import ea_kd_loss
from eakd_kernels.integrations.transformers import EAKDTrainerMixin

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hosts]'")
from trainers import CE_WEIGHT, Recorder, logged, train_share, trainer_of


def formula(student, teacher, data, ce_weight=CE_WEIGHT):
    """(loss, norm of its gradient) over all rows at once."""
    inputs = batch(data)
    labels = shifted(inputs.pop("labels"))
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits
    loss = ea_rows(student(**inputs).logits, teacher_logits, labels, ce_weight).mean()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    return loss.item(), torch.stack([g.norm() for g in gradients]).norm().item()


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_gradient_does_not_depend_on_accumulation(accumulation, tmp_path):
    student, teacher, data = qwen2(0), qwen2(1, width=48), rows(16)
    loss, norm = formula(student, teacher, data)
    trainer = trainer_of(
        *(tmp_path, student, teacher, data),
        per_device_train_batch_size=len(data) // accumulation,
        gradient_accumulation_steps=accumulation,
        loss_options={"ce_weight": CE_WEIGHT},
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([loss], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([norm], rel=1e-5)


def test_two_processes_train_as_one(tmp_path, world):
    answers = world(2).run(train_share, str(tmp_path), True, 2)
    parameters, losses, norms, _ = train_share(str(tmp_path), True, 4)
    for got, loss, norm, seen in answers:
        assert len(seen) == 4 and all(len(ids) == 2 for ids, _ in seen)
        assert loss == pytest.approx(losses, rel=1e-5)
        assert norm == pytest.approx(norms, rel=1e-4)
        for mine, wanted in zip(got, parameters, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_processes_that_count_for_themselves(tmp_path, world):
    """average_tokens_across_devices=False: a mean of the ranks' means, each over its own tokens of the step."""
    answers = world(2).run(train_share, str(tmp_path), False, 2)
    student, teacher, data = qwen2(0), qwen2(1), rows(8)
    total = 0.0
    for *_, seen in answers:
        ids = torch.cat([ids for ids, step in seen if step == 0])
        own = [row for row in data if (row["input_ids"] == ids).all(-1).any()]
        assert len(own) == 4
        inputs = batch(own)
        labels = shifted(inputs.pop("labels"))
        rows_lost = ea_rows(student(**inputs).logits, teacher(**inputs).logits.detach(), labels, CE_WEIGHT)
        total = total + rows_lost.mean() / 2
    gradients = torch.autograd.grad(total, list(student.parameters()))
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    for _, losses, norms, _ in answers:
        assert losses[0] == pytest.approx(total.item(), rel=1e-5)
        assert norms[0] == pytest.approx(norm, rel=1e-4)


def test_evaluation(tmp_path):
    student, teacher, data = qwen2(0), qwen2(1), rows(10)
    recorder = Recorder()
    trainer = trainer_of(
        *(tmp_path, student, teacher, data),
        loss_options={"ce_weight": CE_WEIGHT},
        eval_dataset=data,
        per_device_eval_batch_size=10,
        compute_metrics=lambda prediction: {"seen": float((prediction.label_ids != -100).sum())},
        recorder=recorder,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(formula(student, teacher, data)[0], rel=1e-5)
    labels = batch(data)["labels"]
    assert metrics["eval_seen"] == (labels != -100).sum()
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (10, LENGTH, VOCAB)
    with torch.no_grad():
        logits = student(**{k: v for k, v in batch(data).items() if k != "labels"}).logits
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits, rtol=1e-4, atol=1e-5)
    assert (torch.from_numpy(predicted.label_ids) == labels).all()
    assert not recorder.calls  # which is for training


def test_recorder(tmp_path):
    data, recorder = rows(6), Recorder()
    student, teacher = qwen2(0), qwen2(1)
    per_step = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer_of(tmp_path, student, teacher, data, recorder=recorder, **per_step).train()
    assert [step for *_, step in recorder.calls] == [0, 0, 1, 1]
    stats, ids, labels, _ = recorder.calls[0]
    own = batch([row for i in ids for row in data if torch.equal(row["input_ids"], i)])
    assert torch.equal(labels, shifted(own["labels"]))
    assert stats.weight.shape == ids.shape == (3, LENGTH) and not stats.weight.requires_grad
    assert not stats.weight[labels == -100].any() and (stats.weight[labels != -100] > 0).all()


def test_what_is_no_teacher(tmp_path):
    with pytest.raises(TypeError, match="teacher must be a model, got str"):
        trainer_of(tmp_path, qwen2(0), "gpt2", rows(4))


def test_order_of_bases():
    from transformers import Trainer

    with pytest.raises(TypeError, match="must have EAKDTrainerMixin in front"):
        type("Reversed", (Trainer, EAKDTrainerMixin), {})
    own = type("Own", (EAKDTrainerMixin,), {})
    type("Derived", (own, Trainer), {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_precision(dtype, tmp_path):
    """Under bf16=True accelerate hands the student's logits over in fp32; the teacher computes in bf16."""
    student, teacher, data = qwen2(0), qwen2(1).to(dtype), rows(4)
    trainer = trainer_of(tmp_path, student, teacher, data, bf16=True)
    given = []
    trainer.distillation_loss.register_forward_pre_hook(lambda module, arguments: given.append(arguments))
    trainer.train()
    ((student_logits, teacher_logits, labels),) = given
    assert (student_logits.dtype, teacher_logits.dtype) == (torch.float32, torch.bfloat16)
    wanted = ea_rows(student_logits, teacher_logits.float(), labels).mean().item()
    assert logged(trainer, "loss") == pytest.approx([wanted], rel=1e-5)
    assert 0 < logged(trainer, "grad_norm")[0] < float("inf")


def test_the_teacher_is_left_alone(tmp_path):
    teacher, data = qwen2(1).train(), rows(4)
    before = [p.detach().clone() for p in teacher.parameters()]
    trainer = trainer_of(tmp_path, qwen2(0), teacher, data)
    trainer.train()
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(p, was) for p, was in zip(teacher.parameters(), before, strict=True))


def test_a_teacher_that_is_placed_already(tmp_path, monkeypatch):
    """By device_map, where `.to` would raise; and its key-value cache is not for here."""
    from transformers import Trainer

    moved = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, device: moved.append(model))
    student, teacher, placed = qwen2(0), qwen2(1), qwen2(2)
    placed.hf_device_map = {"": "cpu"}
    for model in (teacher, placed):
        trainer_of(tmp_path, student, model, rows(2))
        assert not model.config.use_cache
    assert teacher in moved and placed not in moved


def test_padded_vocabularies_are_for_the_caller_to_cut(tmp_path):
    student, wide, data = qwen2(0), qwen2(1, vocab_size=VOCAB + 8), rows(4)
    with pytest.raises(ValueError, match=f"pass vocab_size={VOCAB}"):
        trainer_of(tmp_path, student, wide, data).train()
    trainer = trainer_of(tmp_path, student, wide, data, loss_options={"vocab_size": VOCAB})
    inputs = batch(data)
    loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    labels = shifted(inputs.pop("labels"))
    with torch.no_grad():
        cut = wide(**inputs).logits[..., :VOCAB]
    torch.testing.assert_close(loss, ea_rows(outputs.logits, cut, labels).mean(), rtol=1e-5, atol=0)


# ---- what comes in a batch ---------------------------------------------------------------------------------------


class Plain(nn.Module):
    """No model of transformers, so that Trainer knows nothing of its loss; keeps the labels that it was given."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.labels = labels
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_plain_module(accumulation, tmp_path):
    """Trainer counts the tokens that the loss uses, also where it knows no loss of the model's."""
    student, teacher, data = Plain(0), Plain(1), rows(8)
    loss, norm = formula(student, teacher, data)
    trainer = trainer_of(
        *(tmp_path, student, teacher, data),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        loss_options={"ce_weight": CE_WEIGHT},
    )
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([loss], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([norm], rel=1e-5)


def test_models_see_no_labels(tmp_path):
    student, teacher = Plain(0), Plain(1)
    trainer = trainer_of(tmp_path, student, teacher, rows(2))
    inputs = {**batch(rows(2)), "skip_logits": True, "shift_labels": shifted(batch(rows(2))["labels"])}
    names = set(inputs)
    trainer.compute_loss(student, inputs)
    assert student.labels is teacher.labels is None
    assert set(inputs) == names  # prediction_step reads it afterwards


def test_labels_that_come_shifted(tmp_path):
    student, teacher = Plain(0), Plain(1)
    trainer = trainer_of(tmp_path, student, teacher, rows(2))
    inputs = batch(rows(2))
    loss = trainer.compute_loss(student, inputs)
    already = {"input_ids": inputs["input_ids"], "shift_labels": shifted(inputs["labels"])}
    assert torch.equal(trainer.compute_loss(student, already), loss)


def test_labels_that_are_not_to_be_shifted(tmp_path):
    student, teacher, data = Plain(0), Plain(1), rows(4)
    options = {"entropy_temperature": 3.0, "weight_norm": "none", "temperature": 2.0}
    trainer = trainer_of(tmp_path, student, teacher, data, shift_labels=False, loss_options=options)
    inputs = batch(data)
    logits, teacher_logits = (model(inputs["input_ids"]).logits for model in (student, teacher))
    wanted = ea_kd_loss(logits, teacher_logits.detach(), inputs["labels"], **options)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([wanted.item()], rel=1e-6)


def test_a_batch_without_labels(tmp_path):
    student = Plain(0)
    trainer = trainer_of(tmp_path, student, Plain(1), rows(2))
    with pytest.raises(ValueError, match="the batch has no labels, only input_ids, attention_mask"):
        trainer.compute_loss(student, {k: v for k, v in batch(rows(2)).items() if k != "labels"})


def test_a_step_without_any_label(tmp_path):
    student, data = Plain(0), [{**row, "labels": torch.full((LENGTH,), -100)} for row in rows(2)]
    trainer = trainer_of(tmp_path, student, Plain(1), data)
    trainer.train()
    assert logged(trainer, "loss") == [0] and logged(trainer, "grad_norm") == [0]


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor=0.1 is not supported"),
        ({"compute_loss_func": print}, ValueError, "compute_loss_func and EAKDTrainerMixin both are the loss"),
        ({"loss_options": {"num_items": 3}}, TypeError, "num_items is for the host to decide, got num_items=3"),
        ({"loss_options": {"ce_wieght": 3}}, TypeError, "^loss_options of DistillationTrainer got .* 'ce_weight'"),
    ],
)
def test_refused(given, error, words, tmp_path):
    with pytest.raises(error, match=words):
        trainer_of(tmp_path, qwen2(0), qwen2(1), rows(2), **given)


def test_data_parallel_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, Plain(0), Plain(1), rows(2))
    trainer.args = SimpleNamespace(n_gpu=2)
    with pytest.raises(ValueError, match=r"nn\.DataParallel is not supported"):
        trainer._refuse_what_would_be_ignored()


def test_a_trainer_that_counts_otherwise_is_refused(tmp_path, monkeypatch):
    from transformers import Trainer

    class Other(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self._loss_shifts_labels

    monkeypatch.setattr("transformers.Trainer", Other)
    with pytest.raises(RuntimeError, match=r"Trainer of transformers \S+ has no _loss_shifts_labels"):
        trainer_of(tmp_path, Plain(0), Plain(1), rows(2))


def test_a_trainer_that_changed_is_refused(tmp_path, monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, inputs, num_items=None: None)
    with pytest.raises(RuntimeError, match=r"Trainer of transformers \S+ has compute_loss\(self, model, inputs, num_"):
        trainer_of(tmp_path, qwen2(0), qwen2(1), rows(2))
