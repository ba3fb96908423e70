"""TRL's trainers train with the patched losses: tiny random models, a tokenizer made here."""

import pytest
import torch
from host_models import ea_rows, qwen2, tokenizer

from eakd_kernels.integrations.transformers import EAKDTrainerMixin
from eakd_kernels.integrations.trl import gkd_loss, patch_distillation, patch_gkd

pytest.importorskip("trl", reason="trl is not installed: pip install '.[hosts]'")
TOKENS = 512
TEXTS = ["Assignment statements are used to bind names", "A function call is an expression", "Sets are unordered"]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer(TOKENS)


def arguments(folder, **more):
    return {
        **{"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd"},
        **{"gradient_accumulation_steps": 2, "learning_rate": 0.1, "logging_steps": 1, "save_strategy": "no"},
        **{"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
        **{"dataloader_pin_memory": False, "seed": 5, **more},
    }


def gkd(folder, bpe, **more):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    turns = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": TEXTS[i % 3]}]}
        for i in range(8)
    ]
    student, teacher = qwen2(0, TOKENS), qwen2(1, TOKENS, width=48)
    config = GKDConfig(**arguments(folder, lmbda=0.0, max_length=48, beta=0.5, **more))
    trainer = GKDTrainer(student, teacher, config, train_dataset=Dataset.from_list(turns), processing_class=bpe)
    return trained(trainer, student)


def distillation(folder, bpe, **more):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    student, teacher = qwen2(0, TOKENS), qwen2(1, TOKENS, width=48)
    config = DistillationConfig(**arguments(folder, max_completion_length=8, beta=0.5, **more))
    prompts = Dataset.from_dict({"prompt": [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]})
    trainer = DistillationTrainer(student, teacher, config, train_dataset=prompts, processing_class=bpe)
    return trained(trainer, student)


def test_what_the_gkd_trainer_passes(bpe, tmp_path, monkeypatch):
    """Views of the logits, labels as many, and no temperature: that of its configuration is for sampling."""
    from trl.experimental.gkd import GKDTrainer

    calls, loss_of = [], gkd_loss()
    monkeypatch.setattr(
        GKDTrainer, "generalized_jsd_loss", staticmethod(lambda **given: calls.append(given) or loss_of(**given))
    )
    gkd(tmp_path, bpe, temperature=2.0)
    for given in calls:
        assert set(given) == {"student_logits", "teacher_logits", "labels", "beta", "num_items_in_batch"}
        assert given["student_logits"]._is_view() and given["student_logits"].shape[:-1] == given["labels"].shape


def trained(trainer, student):
    before = [p.detach().clone() for p in student.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logs) == 2
    moved = [p.detach() - was for p, was in zip(student.parameters(), before, strict=True)]
    return logs, torch.cat([way.flatten() for way in moved])


def test_sft_trainer_with_the_mixin(bpe, tmp_path):
    """A Trainer of TRL that has a loss of its own, which the mixin comes before."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Distillation(EAKDTrainerMixin, SFTTrainer):
        pass

    student, teacher = qwen2(0, TOKENS), qwen2(1, TOKENS, width=48)
    config = SFTConfig(**arguments(tmp_path, max_length=24, per_device_train_batch_size=3, max_steps=1))
    data = Dataset.from_dict({"text": TEXTS * 2})
    trainer = Distillation(student, config, train_dataset=data, processing_class=bpe, teacher=teacher)
    seen = []
    trainer.distillation_loss.register_forward_pre_hook(lambda module, given: seen.append(given))
    trainer.train()
    lost = torch.cat([ea_rows(*given) for given in seen])
    logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(seen) == 2 and logs[0]["loss"] == pytest.approx(lost.mean().item(), rel=1e-5)


@pytest.mark.parametrize("train, patch", [(gkd, patch_gkd), (distillation, patch_distillation)])
def test_trains(train, patch, bpe, tmp_path):
    logs, way = train(tmp_path, bpe)
    with patch(weighting="none"):
        plain_logs, plain_way = train(tmp_path, bpe)
    for theirs, ours in zip(logs, plain_logs, strict=True):
        for name in ("loss", "grad_norm", *(["entropy"] if "entropy" in theirs else [])):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
    assert (plain_way - way).norm() <= 1e-4 * way.norm()
    with patch():
        weighted_logs, weighted_way = train(tmp_path, bpe)
    assert 0 < weighted_logs[0]["loss"] < logs[0]["loss"]  # weights lie in [0, 1]
    assert weighted_way.isfinite().all() and (weighted_way - way).norm() > 0.1 * way.norm()
