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


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_liger_jsd(beta):
    """No factor tau^2; means over the labels; half of each term unless told otherwise; hard labels at temperature 1."""
    liger = pytest.importorskip(
        "liger_kernel.chunked_loss", reason="liger-kernel is not installed: pip install 'eakd_kernels[hosts]'"
    )
    states = hidden_states()
    theirs = liger.LigerFusedLinearJSDLoss(beta=beta, temperature=2.0, compiled=False)(*states)
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
