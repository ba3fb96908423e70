"""TRL's losses and ours with weighting="none" are one; with EA weights ours is the eager formula."""

import math
import types

import pytest
import torch
from golden import CASES, FP32_TOLERANCE, check_loss_and_gradient, inputs, load, of_kind
from support import eager, make_logits, widest
from torch import distributed as dist

from eakd_kernels.integrations import hosts
from eakd_kernels.integrations import trl as adapter

ABSENT = "trl is not installed: pip install '.[hosts]'"
BETAS = [0.0, 0.3, 1.0]


def problem(dtype=torch.float64, vocab_size=37):
    student, teacher = make_logits(2, 5, vocab_size, dtype=dtype)
    labels = torch.randint(0, vocab_size, (2, 5))
    labels[0, :2] = labels[1, 4] = -100
    return student, teacher, labels


def gkd_trainer():
    return pytest.importorskip("trl.experimental.gkd", reason=ABSENT).GKDTrainer


def assert_same(ours, theirs, student, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


# ---- GKDTrainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", of_kind("gjsd"))
def test_golden_vectors(name, backend):
    """What TRL's function returned, without TRL."""
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    loss = adapter.gkd_loss(weighting="none", backend=backend)(
        *(student, teacher, data["labels"]),
        beta=params["beta"],
        temperature=params["tau"],
        reduction=params["reduction"],
        num_items_in_batch=params["num_items_in_batch"],
    )
    check_loss_and_gradient(name, loss, student, data)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    "division",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11), "reduction": "mean"},
        {"num_items_in_batch": torch.tensor(5.5), "reduction": "none"},
    ],
    ids=str,
)
def test_equals_trl(division, labelled, beta):
    student, teacher, labels = problem()
    arguments = (student, teacher, labels if labelled else None)
    options = {"beta": beta, "temperature": 1.7, **division}
    ours = adapter.gkd_loss(weighting="none")(*arguments, **options)
    assert_same(ours, gkd_trainer().generalized_jsd_loss(*arguments, **options), student)


def test_equals_trl_in_a_batch_without_labels():
    student, teacher, labels = problem()
    labels = torch.full_like(labels, -100)
    loss = adapter.gkd_loss()(student, teacher, labels)
    assert loss == 0 == gkd_trainer().generalized_jsd_loss(student, teacher, labels)
    assert not torch.autograd.grad(loss, student)[0].any()
    assert adapter.gkd_loss()(student, teacher, labels, num_items_in_batch=torch.tensor(0)) == 0


def test_bf16_is_nearer_to_fp64_than_trl():
    """TRL computes in the logits' dtype, this in fp32: both against fp64 of the same rounded logits."""
    student, teacher, labels = problem(torch.bfloat16, vocab_size=2000)
    loss_of = gkd_trainer().generalized_jsd_loss
    exact = loss_of(student.double(), teacher.double(), labels)
    theirs = loss_of(student, teacher, labels)
    ours = adapter.gkd_loss(weighting="none")(student, teacher, labels)
    assert (ours - exact).abs() <= FP32_TOLERANCE * exact < (theirs - exact).abs()


@pytest.mark.parametrize("beta", BETAS)
def test_ea_weights(beta, backend):
    student, teacher, labels = problem(widest(backend))
    loss = adapter.gkd_loss(ce_weight=0.1, backend=backend)(student, teacher, labels, beta=beta)
    out = eager(student, teacher, labels, t=1.0)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    mixed = beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)
    divergence = {0.0: out["divergence"], 1.0: (log_q.exp() * (log_q - log_p)).sum(-1)}.get(beta, mixed)
    wanted = (out["weight"] / math.log(student.shape[-1]) * divergence + 0.1 * out["cross_entropy"])[labels != -100]
    assert_same(loss, wanted.mean(), student, tolerance=1e-9 if student.dtype == torch.float64 else 1e-5)


def test_tau_squared_is_for_who_asks():
    student, teacher, labels = problem()
    plain, scaled = (
        adapter.gkd_loss(**options)(student, teacher, labels, temperature=2.0)
        for options in ({}, {"scale_by_temperature_squared": True})
    )
    torch.testing.assert_close(scaled, 4 * plain)


def test_elementwise_is_refused():
    student, teacher, labels = problem()
    with pytest.raises(ValueError, match="reduction='none' is for every column of every row in TRL"):
        adapter.gkd_loss()(student, teacher, labels, reduction="none")


@pytest.mark.parametrize("given", [{"temperature": 2.0}, {"divergence": "reverse_kl"}, {"reduction": "sum"}])
@pytest.mark.parametrize("factory", [adapter.gkd_loss, adapter.distillation_loss])
def test_what_trl_decides_is_refused(factory, given):
    with pytest.raises(TypeError, match="is for the host to decide"):
        factory(**given)


@pytest.mark.parametrize("name, config", [("gkd_loss", "GKDConfig"), ("distillation_loss", "DistillationConfig")])
def test_beta_is_the_trainers(name, config):
    """Neither the loss nor the patch has one: TRL passes its own with every call."""
    wanted = rf"^{name}\(\): beta is for the host to decide, got beta=0\.3; set {config}\(beta=\.\.\.\)"
    with pytest.raises(TypeError, match=wanted):
        getattr(adapter, name)(beta=0.3)
    with pytest.raises(TypeError, match=rf"set {config}\(beta="):
        getattr(adapter, name)(divergence="reverse_kl")


@pytest.mark.parametrize("patch", ["patch_gkd", "patch_distillation"])
def test_errors_name_the_patch(patch):
    gkd_trainer()
    with pytest.raises(TypeError, match=rf"^{patch}\(\): beta is for the host to decide"):
        getattr(adapter, patch)(beta=0.3)
    with pytest.raises(TypeError, match=rf"^{patch}\(\) got an unknown keyword 'wieghting'; did you mean 'weighting'"):
        getattr(adapter, patch)(wieghting="none")


def test_gold_takes_other_arguments():
    """It passes probabilities through a function of the same name, and so is not patched."""
    gold = pytest.importorskip("trl.experimental.gold", reason=ABSENT)
    with pytest.raises(RuntimeError, match="logits_are_probs=False"):
        hosts.expect(gold.GOLDTrainer, "generalized_jsd_loss", adapter.gkd_loss(), "trl")


def test_a_second_patch_takes_the_place_of_the_first():
    trainer = gkd_trainer()
    original = vars(trainer)["generalized_jsd_loss"]
    first, second = adapter.patch_gkd(), adapter.patch_gkd(ce_weight=0.1)
    second.undo()
    assert vars(trainer)["generalized_jsd_loss"] is original
    first.undo()
    assert vars(trainer)["generalized_jsd_loss"] is original


def test_patch_and_undo():
    trainer = gkd_trainer()
    before = vars(trainer)["generalized_jsd_loss"]
    student, teacher, labels = problem()
    theirs = trainer.generalized_jsd_loss(student, teacher, labels)
    patch = adapter.patch_gkd(weighting="teacher")
    assert vars(trainer)["generalized_jsd_loss"] is not before
    assert not torch.allclose(trainer.generalized_jsd_loss(student, teacher, labels), theirs)
    patch.undo()
    assert vars(trainer)["generalized_jsd_loss"] is before
    with pytest.raises(KeyError), adapter.patch_gkd():
        assert vars(trainer)["generalized_jsd_loss"] is not before
        raise KeyError
    assert vars(trainer)["generalized_jsd_loss"] is before


# ---- DistillationTrainer -----------------------------------------------------------------------------------------


def distillation_trainer():
    return pytest.importorskip("trl.trainer.distillation_trainer", reason=ABSENT)


def heads(dtype=torch.float32, vocab_size=53):
    """(student's hidden states, teacher's, student's head, teacher's), completion_mask and biases."""
    draws = [torch.randn(*shape).to(dtype) for shape in ((2, 6, 8), (2, 6, 12), (vocab_size, 8), (vocab_size, 12))]
    hidden, teacher_hidden, weight, teacher_weight = draws
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    biases = [torch.randn(vocab_size).to(dtype) for _ in range(2)]
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), biases[0].requires_grad_()]
    return (hidden, teacher_hidden, weight, teacher_weight, mask), leaves, biases


OF_LOGITS = [
    {},
    {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    {"student_final_logit_softcapping": 3.0, "teacher_final_logit_softcapping": 5.0, "student_logit_scale": 1.5},
]


def assert_same_distillation(loss_of, arguments, leaves, biases, tolerance, **options):
    given = {"student_lm_head_bias": biases[0], "teacher_lm_head_bias": biases[1], **options} if biases else options
    ours, theirs = loss_of(*arguments, **given), distillation_trainer()._chunked_divergence_loss(*arguments, **given)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)
    leaves = leaves if biases else leaves[:2]
    gradients = [torch.autograd.grad(out[0], leaves) for out in (ours, theirs)]
    for mine, wanted in zip(*gradients, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("of_logits", OF_LOGITS, ids=["plain", "scales", "caps"])
@pytest.mark.parametrize("biased", [True, False])
def test_equals_trl_from_hidden_states(biased, of_logits, beta):
    arguments, leaves, biases = heads()
    loss_of = adapter.distillation_loss(weighting="none", entropy_temperature=1.3)
    options = {"beta": beta, "temperature": 1.3, **of_logits}
    assert_same_distillation(loss_of, arguments, leaves, biased and biases, 2e-6, **options)


@pytest.mark.parametrize("count", [None, 20, torch.tensor(7.5)])
def test_the_divisor_from_hidden_states(count):
    arguments, leaves, _ = heads()
    loss_of = adapter.distillation_loss(weighting="none")
    assert_same_distillation(loss_of, arguments, leaves, None, 2e-6, beta=0.5, num_items_in_batch=count)


def test_no_completion_at_all():
    (*states, mask), leaves, _ = heads()
    loss_of = adapter.distillation_loss(weighting="none")
    assert_same_distillation(loss_of, (*states, torch.zeros_like(mask)), leaves, None, 0.0, beta=1.0)


def test_autocast():
    """Hidden states in fp32, as accelerate hands them over, multiplied in bf16 into fp32 logits."""
    arguments, leaves, _ = heads()
    loss_of = adapter.distillation_loss(weighting="none")
    in_fp32 = loss_of(*arguments, beta=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (f(*arguments, beta=0.0) for f in (loss_of, distillation_trainer()._chunked_divergence_loss))
    assert (in_fp32[0] - theirs[0]).abs() > 1e-4 * theirs[0]
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=2e-6, atol=0)
    gradients = [torch.autograd.grad(out[0], leaves[:2]) for out in (ours, theirs)]
    for mine, wanted in zip(*gradients, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - wanted).norm() <= 2**-7 * wanted.norm()  # TRL's gradient of the logits is rounded to bf16


def test_a_head_wider_than_its_hidden_states():
    """bf16 hidden states and an fp32 head are multiplied in bf16, as in TRL."""
    (hidden, teacher_hidden, *rest), _, _ = heads()
    arguments = (hidden.detach().bfloat16(), teacher_hidden.bfloat16(), *rest)
    loss_of = adapter.distillation_loss(weighting="none")
    ours, theirs = (f(*arguments, beta=1.0)[0] for f in (loss_of, distillation_trainer()._chunked_divergence_loss))
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def sharded_heads(states, mask):
    """(loss, gradient of the student's whole head) where ranks have rows of both heads, as under FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, teacher_hidden, *weights = states
    weight, teacher_weight = (distribute_tensor(weight, mesh, [Shard(0)]) for weight in weights)
    weight.requires_grad_()
    loss, _, _ = adapter.distillation_loss()(hidden, teacher_hidden, weight, teacher_weight, mask, beta=0.5)
    loss.backward()
    return loss.detach(), weight.grad.full_tensor()


def test_heads_that_are_sharded(world):
    (*states, mask), leaves, _ = heads()
    answers = world(2).run(sharded_heads, [state.detach() for state in states], mask)
    loss, _, _ = adapter.distillation_loss()(*states, mask, beta=0.5)
    wanted = torch.autograd.grad(loss, leaves[1])[0]
    for got, gradient in answers:
        torch.testing.assert_close(got, loss.detach())
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ea_weights_from_hidden_states(beta):
    arguments, leaves, _ = heads(torch.float64)
    hidden, teacher_hidden, weight, teacher_weight, mask = arguments
    loss, entropy_sum, count = adapter.distillation_loss()(*arguments, beta=beta)
    student, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    out, kept = eager(student, teacher, t=1.0), mask == 1
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1) if beta else out["divergence"]
    wanted = (out["weight"] / math.log(weight.shape[0]) * divergence)[kept].mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(entropy_sum, out["student_entropy"][kept].sum().detach())
    assert count == 9
    for mine, theirs in zip(*(torch.autograd.grad(x, leaves[:2]) for x in (loss, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_teacher_whose_head_is_not_frozen():
    arguments, leaves, _ = heads()
    arguments[3].requires_grad_()
    loss, _, _ = adapter.distillation_loss()(*arguments, beta=0.5)
    loss.backward()
    assert arguments[3].grad is None and leaves[1].grad is not None


def test_patch_of_the_distillation_trainer():
    module = distillation_trainer()
    before = module._chunked_divergence_loss
    with adapter.patch_distillation(chunk_rows=4):
        assert module._chunked_divergence_loss is not before
    assert module._chunked_divergence_loss is before


# ---- a TRL that changed ------------------------------------------------------------------------------------------


def test_a_changed_loss_is_refused(monkeypatch):
    class GKDTrainer:
        @staticmethod
        def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=0.9):
            pass

    before = GKDTrainer.generalized_jsd_loss
    monkeypatch.setattr(adapter, "load", lambda *_: types.SimpleNamespace(GKDTrainer=GKDTrainer))
    with pytest.raises(
        RuntimeError, match=rf"GKDTrainer of trl .*temperature=0\.9\), where.*trl {hosts.WRITTEN_FOR['trl']}"
    ):
        adapter.patch_gkd()
    assert GKDTrainer.generalized_jsd_loss is before

    fake = types.ModuleType("trl.trainer.distillation_trainer")
    monkeypatch.setattr(adapter, "load", lambda *_: fake)
    with pytest.raises(RuntimeError, match="has no function _chunked_divergence_loss"):
        adapter.patch_distillation()
