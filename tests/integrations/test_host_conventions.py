"""What losses that have no adapter mean, in our options: docs/hosts.md."""

import pytest
import torch

from eakd_kernels import fused_linear_ea_kd_loss
from eakd_kernels.divergences import generalized_jsd


def hidden_states(vocab_size=40):
    shapes = ((9, 8), (vocab_size, 8), (9, 12), (vocab_size, 12))
    student, weight, teacher, teacher_weight = (torch.randn(*shape) for shape in shapes)
    labels = torch.randint(0, vocab_size, (9,))
    labels[[2, 5]] = -100
    return student.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight, labels


def liger():
    return pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel is not installed: pip install '.[hosts]'"
    )


def test_liger_computes_in_the_dtype_of_its_logits():
    """Its error in bf16 beside ours, against fp64 of the same hidden states and heads."""
    (*states, labels), options = (
        hidden_states(vocab_size=4000),
        {"divergence": generalized_jsd(0.5), "weighting": "none"},
    )
    states = [state.detach().bfloat16() for state in states]
    exact = fused_linear_ea_kd_loss(*(state.double() for state in states), labels, **options)
    ours = fused_linear_ea_kd_loss(*states, labels, **options)
    theirs = liger().LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)(
        *states, labels
    )
    assert (ours - exact).abs() <= 4e-6 * exact < 1e-4 * exact < (theirs - exact).abs()


def test_liger_pads_the_students_logits_with_zero():
    """Where the teacher's vocabulary is wider. Columns of logit 0 have mass, and `vocab_size` cuts both instead."""
    student, weight, teacher, teacher_weight, labels = hidden_states()
    wide = torch.cat([teacher_weight, torch.randn(3, 12)])
    theirs = liger().LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False)
    padded = torch.cat([weight, torch.zeros(3, 8)])
    options = {"divergence": generalized_jsd(0.5), "weighting": "none"}
    given = theirs(student, weight, teacher, wide, labels)
    torch.testing.assert_close(given, fused_linear_ea_kd_loss(student, padded, teacher, wide, labels, **options))
    cut = fused_linear_ea_kd_loss(student, weight, teacher, wide, labels, vocab_size=40, **options)
    torch.testing.assert_close(
        cut, fused_linear_ea_kd_loss(student, weight, teacher, teacher_weight, labels, **options)
    )


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_liger_jsd(beta):
    """No factor tau^2; means over the labels; half of each term unless told otherwise; hard labels at temperature 1."""
    states = hidden_states()
    theirs = liger().LigerFusedLinearJSDLoss(beta=beta, temperature=2.0, compiled=False)(*states)
    ours = fused_linear_ea_kd_loss(
        *states,
        divergence=generalized_jsd(beta),
        temperature=2.0,
        scale_by_temperature_squared=False,
        weighting="none",
        kd_weight=0.5,
        ce_weight=0.5,
    )
    torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=0)
    for mine, wanted in zip(*(torch.autograd.grad(x, states[:2]) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
