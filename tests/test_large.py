"""More than 2^31 elements, where 32-bit offsets wrap."""

import pytest
import torch

from eakd_kernels import ea_kd_loss


@pytest.mark.slow
def test_offsets_past_2_31(kernels):
    """A bf16 student of 4.3 GB whose last rows alone differ; the teacher is one row, broadcast."""
    vocab_size, rows = 151_936, 14_140
    assert rows * vocab_size > 2**31
    row, teacher = torch.randn(2, vocab_size).to(torch.bfloat16)
    student = torch.zeros(rows, vocab_size, dtype=torch.bfloat16)
    student[-2:] = row
    teacher = teacher.expand(rows, vocab_size)
    keep = torch.zeros(rows, dtype=torch.bool)
    keep[[0, -1]] = True
    leaf = student.requires_grad_()
    whole = leaf * 1
    loss = ea_kd_loss(whole, teacher, mask=keep, reduction="sum", inplace_gradient=True, backend=kernels)
    picked = leaf[[0, -1]].detach().requires_grad_()
    want = ea_kd_loss(picked, teacher[[0, -1]], reduction="sum", backend=kernels)
    assert torch.equal(loss, want)
    (gradient,) = torch.autograd.grad(want, picked)
    # Two rows alone are shared out by segments, whose exponentials are computed twice: the last bit may differ.
    torch.testing.assert_close(whole.detach()[[0, -1]], gradient, rtol=2**-7, atol=1e-9)
    assert not whole.detach()[[1, -2]].any()


def test_more_rows_than_a_grid_dimension_holds(kernels):
    student = torch.randn(70_000, 3, requires_grad=True)
    teacher = torch.randn(70_000, 3)
    loss = ea_kd_loss(student, teacher, backend=kernels)
    want = ea_kd_loss(student, teacher, backend="reference")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))
