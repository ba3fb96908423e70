"""Losses for recipes: NeMo Automodel's and torchtune's published numbers, and chunks of a sequence."""

import pytest
import torch
from golden import CASES, check, check_loss_and_gradient, inputs, load, of_kind
from host_models import ea_rows
from support import make_logits, widest
from torch import distributed as dist

from eakd_kernels import divergences, ea_kd_loss
from eakd_kernels.integrations.recipes import ChunkedKDLoss, KDLoss

TORCHTUNE = of_kind("tt_*")


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("automodel")])
def test_automodel(name, backend):
    data, params = load(name), CASES[name]["params"]
    student, teacher = inputs(data, backend)
    loss_of = KDLoss(
        params["ignore_index"], params["tau"], chunk_size=params["chunk_size"], weighting="none", backend=backend
    )
    loss = loss_of(student, teacher, data["labels"], params["num_batch_labels"])
    check_loss_and_gradient(name, loss, student, data)


@pytest.mark.parametrize("name", TORCHTUNE)
def test_torchtune(name, backend):
    """Its forward parts are cross-entropies, larger by H_T: another value, the same gradient."""
    data, params, tolerance = load(name), CASES[name]["params"], CASES[name]["tolerance"]
    student, teacher = inputs(data, backend)
    kind = CASES[name]["kind"]
    ratio = params.get("sym_kd_ratio", 1.0 if "Forward" in kind else 0.0)
    options = {"divergence": divergences.Jeffreys(1 - ratio), "weighting": "none", "backend": backend}
    kept = data["labels"] != -100
    count = None if params["normalize"] else 1
    loss = KDLoss(**options)(student, teacher, data["labels"], count)
    log_p = data["teacher"].double().log_softmax(-1)[kept]
    missing = ratio * -(log_p.exp() * log_p).sum() / (kept.sum() if count is None else 1)
    check(
        loss + missing, data["loss"], tolerance["loss_rtol"], tolerance["loss_atol"], fp32=loss.dtype == torch.float32
    )
    (gradient,) = torch.autograd.grad(loss, student)
    check(gradient, data["grad_student"], tolerance["grad_rtol"], tolerance["grad_atol"])


def problem(dtype=torch.float64, length=11, vocab_size=23):
    student, teacher = make_logits(3, length, vocab_size, dtype=dtype)
    labels = torch.randint(0, vocab_size, (3, length))
    labels[0, :6] = labels[2, 3:] = -100
    return student, teacher, labels


def test_ea_weights():
    student, teacher, labels = problem()
    wanted = ea_rows(student, teacher, labels)
    torch.testing.assert_close(KDLoss()(student, teacher, labels), wanted.mean())
    torch.testing.assert_close(KDLoss()(student, teacher, labels, 100), wanted.sum() / 100)


def test_labels_of_another_shape():
    """torchtune flattens the logits, and not always the labels."""
    student, teacher, labels = problem()
    flat = (student.flatten(0, 1), teacher.flatten(0, 1))
    wanted = KDLoss()(student, teacher, labels)
    assert torch.equal(KDLoss()(*flat, labels), wanted) and torch.equal(KDLoss()(*flat, labels.flatten()), wanted)


@pytest.mark.parametrize("count", [None, 40, torch.tensor(40)])
@pytest.mark.parametrize("split", [torch.chunk, torch.tensor_split])
def test_chunks(split, count, backend):
    student, teacher, labels = problem(widest(backend))
    labels[labels == -100] = -1
    options = {"temperature": 2.0, "ignore_index": -1, "ce_weight": 0.1, "backend": backend}
    wanted = KDLoss(**options)(student, teacher, labels, count)
    chunks = [split(logits, 4, 1) for logits in (student, teacher)]
    assert len({chunk.shape[1] for chunk in chunks[0]}) == 2
    loss_of = ChunkedKDLoss(num_output_chunks=4, **options)
    assert loss_of.num_output_chunks == 4 and loss_of.ignore_index == -1
    loss = loss_of(*chunks, labels, count)
    torch.testing.assert_close(loss, wanted)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)])
def test_without_any_label_the_loss_is_zero_with_a_graph(count):
    student, teacher, labels = problem()
    labels = torch.full_like(labels, -1)
    chunks = [logits.chunk(4, 1) for logits in (student, teacher)]
    losses = [
        KDLoss(ignore_index=-1)(student, teacher, labels, count),
        ChunkedKDLoss(4, ignore_index=-1)(*chunks, labels, count),
    ]
    for loss in losses:
        assert loss == 0
        assert not torch.autograd.grad(loss, student)[0].any()


def sharded(student, teacher, labels):
    columns = slice(0, 9) if dist.get_rank() == 0 else slice(9, None)
    own = student[..., columns].clone().requires_grad_()
    loss = KDLoss(tp_group=dist.group.WORLD)(own, teacher[..., columns].clone(), labels)
    loss.backward()
    return loss.detach(), own.grad


def test_sharded_vocabularies(world):
    student, teacher, labels = problem()
    answers = world(2).run(sharded, student.detach(), teacher, labels)
    loss = KDLoss()(student, teacher, labels)
    loss.backward()
    for got, _ in answers:
        torch.testing.assert_close(got, loss.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in answers], -1), student.grad)


def test_chunks_that_do_not_cover_the_labels():
    student, teacher, labels = problem()
    with pytest.raises(RuntimeError, match="split_with_sizes expects split_sizes to sum"):
        ChunkedKDLoss(2)([student[:, :4]], [teacher[:, :4]], labels)


@pytest.mark.parametrize("kind", [KDLoss, ChunkedKDLoss])
def test_a_wrong_name_is_told_of_what_the_recipe_names(kind):
    with pytest.raises(
        TypeError, match=rf"^{kind.__name__}\(\) got an unknown keyword 'tempature'; did you mean 'temper"
    ):
        kind(tempature=2.0)


def test_bf16_logits_are_not_rounded_again():
    student, teacher, labels = problem(torch.bfloat16)
    exact = ea_kd_loss(*(student.double(), teacher.double(), labels), entropy_temperature=1.0, weight_norm="bound")
    torch.testing.assert_close(KDLoss(fp32_upcast=False)(student, teacher, labels).double(), exact, rtol=4e-6, atol=0)
