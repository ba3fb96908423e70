"""More than 2^31 elements, where 32-bit offsets wrap."""

import math

import torch
from support import interpreted

from eakd_kernels import ea_kd_loss, ops


def test_offsets_past_2_31(kernels):
    """Two rows 2^31 elements apart, in memory that is never touched in between; the gradient is written in place."""
    vocab_size, far = 5000, 2**31 + 8
    picked, row = (x.to(torch.bfloat16) for x in torch.randn(2, 2, vocab_size))
    student, teacher = (torch.empty_strided((2, vocab_size), (far, 1), dtype=torch.bfloat16) for _ in range(2))
    student.copy_(picked)
    teacher.copy_(row)
    picked.requires_grad_()
    want = ea_kd_loss(picked, row, reduction="sum", backend=kernels)
    ops_rows = ops.Rows(student, teacher, None, None, None, 1.0, 3.0, vocab_size)
    rule = ops.LossRule(None, ops.WEIGHTINGS["ea"], math.log(vocab_size), 1.0, True, 1.0, 0.0, 1.0, None)
    loss, _ = ops.one_pass_(*ops_rows, *rule, kernels)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(student, torch.autograd.grad(want, picked)[0], rtol=2**-7, atol=1e-9)


def test_more_rows_than_a_grid_dimension_holds(kernels):
    rows = 700 if interpreted(kernels) else 70_000  # the interpreter has no grid, and needs half a minute for it
    student = torch.randn(rows, 3, requires_grad=True)
    teacher = torch.randn(rows, 3)
    loss = ea_kd_loss(student, teacher, backend=kernels)
    want = ea_kd_loss(student, teacher, backend="reference")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(want, student))
