"""Temperatures at which fp32 runs out of exponents, on every backend with kernels."""

import pytest
import torch
from support import make_logits

from eakd_kernels import distill_stats, ea_kd_loss


def test_cross_entropy_at_high_temperatures(kernels):
    """What has room at tau and t, 128 octaves at temperature 1, has none there."""
    student, teacher = torch.zeros(1, 4096), torch.zeros(1, 4096)
    student[0, 3000], student[0, 3001] = 88.0, 87.7
    for tau in (15.9, 20.0):
        options = {"labels": torch.tensor([3001]), "temperature": tau, "entropy_temperature": tau, "backend": kernels}
        stats = distill_stats(student, teacher, **options)
        want = student.double().logsumexp(-1) - 87.7
        torch.testing.assert_close(stats.cross_entropy.double(), want, rtol=0, atol=4e-6)
        loss = ea_kd_loss(student.requires_grad_(), teacher, ce_weight=1.0, **options)
        assert torch.autograd.grad(loss, student)[0].abs().max() < 10


@pytest.mark.parametrize("tau, t, offset", [(3e-4, 9e-4, 7e5), (2e-4, 3.0, 7e5), (1e-4, 3.0, 4e5), (1e-5, 3.0, 3e4)])
def test_low_temperatures_far_from_zero(tau, t, offset, kernels):
    """Exponents so large that their rounding alone is whole octaves."""
    student, teacher = (x.detach() for x in make_logits(2, 5000, scale=2.0, offset=0.0))
    student, teacher = student + offset, teacher + offset
    options = {"temperature": tau, "entropy_temperature": t}
    stats = distill_stats(student, teacher, backend=kernels, **options)
    want = distill_stats(student.double(), teacher.double(), backend="reference", **options)
    torch.testing.assert_close(stats.divergence.double(), want.divergence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.teacher_entropy.double(), want.teacher_entropy, rtol=1e-5, atol=1e-5)
