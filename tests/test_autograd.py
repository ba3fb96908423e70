"""What autograd users rely on: retained graphs, double backward, gradients in place, checkpointing, hooks."""

import gc
import weakref

import pytest
import torch
from support import make_logits, widest
from torch.utils.checkpoint import checkpoint

from eakd_kernels import autograd, distill_stats, ea_kd_loss, ops

PATHS = [{}, {"reduction": "none"}, {"detach_weights": False}, {"weight_norm": "mean"}]


def loss_of(student, teacher, backend, **options):
    return ea_kd_loss(student, teacher, backend=backend, **options).sum()


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_retain_graph(options, backend):
    student, teacher = make_logits(4, 60)
    loss = 3 * loss_of(student, teacher, backend, **options)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    (last,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second) and torch.equal(first, last)
    assert len({first.data_ptr(), second.data_ptr(), last.data_ptr()}) == 3
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_a_loss_modified_in_place(options, backend):
    student, teacher = make_logits(4, 60)
    (want,) = torch.autograd.grad(loss_of(student, teacher, backend, **options) / 4, student)
    loss = loss_of(student, teacher, backend, **options)
    loss /= 4
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_double_backward_raises(options, backend):
    student, teacher = make_logits(4, 60)
    (gradient,) = torch.autograd.grad(loss_of(student, teacher, backend, **options), student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(gradient.pow(2).sum(), student)


def test_double_backward_in_the_temperature_raises(kernels):
    student, teacher = make_logits(4, 60)
    temperature = torch.tensor(2.0, requires_grad=True)
    loss = loss_of(student, teacher, kernels, temperature=temperature, scale_by_temperature_squared=False)
    (gradient,) = torch.autograd.grad(loss, temperature, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(gradient, temperature)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_gradient_in_place(options, backend):
    leaf, teacher = make_logits(4, 6, 60)
    (want,) = torch.autograd.grad(loss_of(leaf, teacher, backend, **options), leaf)
    student = leaf * 1
    loss = loss_of(student, teacher, backend, inplace_gradient=True, **options)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.data_ptr() == student.data_ptr()
    torch.testing.assert_close(gradient, want)


def test_gradient_in_place_with_every_term(backend):
    leaf, teacher = make_logits(4, 5000)
    labels = torch.randint(0, 5000, (4,))
    options = {"temperature": 2.0, "ce_weight": 0.5, "detach_weights": False, "reduction": "none"}
    (want,) = torch.autograd.grad(loss_of(leaf, teacher, backend, labels=labels, **options), leaf)
    student = leaf * 1
    loss = loss_of(student, teacher, backend, labels=labels, inplace_gradient=True, **options)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], want)


def test_gradient_in_place_of_strided_logits(kernels):
    leaf, teacher = make_logits(4, 6, 60)
    (want,) = torch.autograd.grad(loss_of(leaf[:, 1:], teacher[:, 1:], kernels), leaf)
    whole = leaf * 1
    loss_of(whole[:, 1:], teacher[:, 1:], kernels, inplace_gradient=True).backward()
    assert torch.equal(leaf.grad, want)
    assert torch.equal(whole.detach()[:, 1:], want[:, 1:]) and torch.equal(whole.detach()[:, 0], leaf.detach()[:, 0])
    strided = (leaf * 1).reshape(2, 2, 3, 2, 60).permute(3, 0, 2, 1, 4)
    with pytest.raises(ValueError, match="at most two strides"):
        loss_of(strided, teacher.reshape(2, 2, 3, 2, 60).permute(3, 0, 2, 1, 4), kernels, inplace_gradient=True)


@pytest.mark.parametrize("options", PATHS, ids=str)
def test_whoever_saved_the_logits_gets_an_error(options, kernels):
    leaf, teacher = make_logits(4, 60)
    student = leaf.exp()  # saves its result
    loss = loss_of(student, teacher, kernels, inplace_gradient=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_is_made_where_none_is_wanted(kernels, monkeypatch):
    student, teacher = make_logits(4, 60)
    monkeypatch.setattr(ops, "one_pass", lambda *a: pytest.fail("a gradient was computed"))
    monkeypatch.setattr(ops, "row_gradient", lambda *a: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert not ea_kd_loss(student, teacher, backend=kernels).requires_grad
    assert not ea_kd_loss(student.detach(), teacher, backend=kernels).requires_grad


def test_one_pass_holds_no_logits(kernels):
    student, teacher = make_logits(4, 60)
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in (student, teacher)]
    logits = student * 1
    alive.append(weakref.ref(logits.untyped_storage()))
    loss = ea_kd_loss(logits, teacher, backend=kernels)
    del logits, teacher
    gc.collect()
    assert alive[0]() is not None and alive[1]() is None and alive[2]() is None
    loss.backward()
    assert student.grad.any()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", PATHS, ids=str)
def test_activation_checkpointing(reentrant, options, backend):
    student, teacher = make_logits(4, 60)
    loss_of(student, teacher, backend, **options).backward()
    want, student.grad = student.grad, None
    checkpoint(lambda z: loss_of(z, teacher, backend, **options), student, use_reentrant=reentrant).backward()
    assert torch.equal(student.grad, want)


def test_statistics_used_twice(backend):
    """Two losses off one call of distill_stats give the sum of their gradients."""
    student, teacher = make_logits(4, 60, dtype=widest(backend))
    stats = distill_stats(student, teacher, backend=backend)
    together = torch.autograd.grad(stats.divergence.sum() + stats.student_entropy.sum(), student, retain_graph=True)[0]
    apart = [
        torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (stats.divergence, stats.student_entropy)
    ]
    torch.testing.assert_close(together, sum(apart))


def test_public_functions_compose(kernels):
    """autograd.RowStatistics is the operator that other losses can be built on."""
    student, teacher = make_logits(4, 60, dtype=widest(kernels))
    rows = ops.Rows(student, teacher, None, None, None, 2.0, 3.0, 60)
    divergence, teacher_entropy, *_ = autograd.RowStatistics.apply(*rows, False, kernels)
    stats = distill_stats(student, teacher, temperature=2.0, backend=kernels)
    assert torch.equal(divergence, stats.divergence) and torch.equal(teacher_entropy, stats.teacher_entropy)


def test_functorch_works_or_says_why_not(backend):
    student, teacher = make_logits(4, 60)
    try:
        gradient = torch.func.grad(lambda z: ea_kd_loss(z, teacher, backend=backend))(student.detach())
    except RuntimeError as error:
        assert "setup_context" in str(error)
    else:
        (want,) = torch.autograd.grad(ea_kd_loss(student, teacher, backend=backend), student)
        torch.testing.assert_close(gradient, want)
