"""The criterion for NVIDIA ModelOpt, beside its own and through its distillation mode."""

import types

import pytest
import torch
from host_models import VOCAB, batch, ea_rows, qwen2, rows, shifted
from support import make_logits

from eakd_kernels.integrations import modelopt as adapter

losses = pytest.importorskip(
    "modelopt.torch.distill.losses", reason="modelopt is not installed: pip install '.[hosts]'"
)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_modelopt(temperature):
    student, teacher = make_logits(2, 5, 37, dtype=torch.float64)
    ours = adapter.LogitsEAKDLoss(weighting="none", temperature=temperature)(student, teacher)
    theirs = losses.LogitsDistillationLoss(temperature, reduction="none")(student, teacher)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_it_computes_in_the_dtype_of_the_logits():
    student, teacher = make_logits(2, 5, 37, dtype=torch.bfloat16)
    assert losses.LogitsDistillationLoss(reduction="none")(student, teacher).dtype == torch.bfloat16
    assert adapter.LogitsEAKDLoss()(student, teacher).dtype == torch.float32


def test_its_mean_divides_by_the_vocabulary_too():
    student, teacher = make_logits(2, 5, 37, dtype=torch.float64)
    ours = adapter.LogitsEAKDLoss(weighting="none", reduction="mean")(student, teacher)
    torch.testing.assert_close(ours, 37 * losses.LogitsDistillationLoss(reduction="mean")(student, teacher))


def test_distillation_mode():
    import modelopt.torch.distill as mtd

    student, teacher, inputs = qwen2(0), qwen2(1, width=48), batch(rows(4))
    labels = shifted(inputs.pop("labels"))
    wanted = ea_rows(student(**inputs).logits, teacher(**inputs).logits.detach(), labels).mean()
    parameters = list(student.parameters())
    expected = torch.autograd.grad(wanted, parameters)
    criterion = {("lm_head", "lm_head"): adapter.LogitsEAKDLoss()}
    model = mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion})])
    model.train()
    model(**inputs)
    kept = labels != -100
    loss = model.compute_kd_loss(loss_reduction_fn=lambda rows_lost: (rows_lost * kept).sum() / kept.sum())
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_kd_trainer(tmp_path):
    """ModelOpt's Trainer for transformers, whose criterion is an attribute."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    student, teacher, data = qwen2(0), qwen2(1, width=48), rows(4)
    inputs = batch(data)
    labels = shifted(inputs.pop("labels"))
    wanted = ea_rows(student(**inputs).logits, teacher(**inputs).logits.detach(), labels).mean()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = KDTrainer(student, arguments, train_dataset=data, distill_args={"teacher_model": teacher})
    trainer._kd_criterion = adapter.LogitsEAKDLoss()
    assert trainer.train().training_loss == pytest.approx(wanted.item(), rel=1e-5)


def test_outputs_of_models():
    """As in output-only distillation, criterion=LogitsEAKDLoss(), whose layers are the models."""
    student, teacher = make_logits(2, 5, VOCAB)
    outputs = (types.SimpleNamespace(logits=logits) for logits in (student, teacher))
    loss = adapter.LogitsEAKDLoss()
    assert torch.equal(loss(*outputs), loss(student, teacher))


def test_its_name_is_one_that_balancers_know():
    assert "Logits" in adapter.LogitsEAKDLoss.__name__


@pytest.mark.parametrize("given", [{"ce_weight": 0.1}, {"mask": None}, {"num_items": 3}])
def test_what_belongs_to_labels_is_refused(given):
    with pytest.raises(TypeError, match="is for the host to decide"):
        adapter.LogitsEAKDLoss(**given)


def test_a_wrong_name_is_told_of_the_criterion():
    with pytest.raises(
        TypeError, match=r"^LogitsEAKDLoss\(\) got an unknown keyword 'tempature'; did you mean 'temper"
    ):
        adapter.LogitsEAKDLoss(tempature=2.0)


def test_a_criterion_that_is_called_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(losses.LogitsDistillationLoss, "forward", lambda self, logits_s, logits_t, labels: None)
    with pytest.raises(
        RuntimeError, match=r"LogitsDistillationLoss of nvidia-modelopt \S+ has forward\(self, logits_s"
    ):
        adapter.LogitsEAKDLoss()
