"""The judge itself: closed forms that need no other implementation."""

import math

import torch

from eakd_kernels import distill_stats, ea_kd_loss

REFERENCE = {"backend": "reference", "temperature": 2.0, "entropy_temperature": 3.0}


def test_two_columns():
    """softmax([x, 0]) = sigmoid(x): everything is a binary entropy or divergence."""
    x, y = 1.3, -0.4
    student, teacher = (torch.tensor([[v, 0.0]], dtype=torch.float64) for v in (x, y))
    stats = distill_stats(student, teacher, torch.tensor([0]), **REFERENCE)

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    def entropy(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    p, q = sigmoid(y / 2), sigmoid(x / 2)
    divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    teacher_entropy, student_entropy = entropy(sigmoid(y / 3)), entropy(sigmoid(x / 3))
    weight = teacher_entropy * (1 + student_entropy / math.log(2)) / 2
    want = {
        "divergence": divergence,
        "teacher_entropy": teacher_entropy,
        "student_entropy": student_entropy,
        "weight": weight,
        "loss": weight * 4 * divergence,
        "student_lse": math.log(math.exp(x / 2) + 1),
        "teacher_lse": math.log(math.exp(y / 2) + 1),
        "cross_entropy": -math.log(sigmoid(x)),
    }
    for name, value in want.items():
        assert math.isclose(getattr(stats, name).item(), value, rel_tol=1e-13), name


def test_uniform_teacher():
    """KL(uniform || q) = -log C - mean log q."""
    student = torch.randn(3, 10, dtype=torch.float64)
    stats = distill_stats(student, torch.zeros_like(student), **REFERENCE)
    want = -math.log(10) - (student / 2).log_softmax(-1).mean(-1)
    torch.testing.assert_close(stats.divergence, want)
    torch.testing.assert_close(stats.teacher_entropy, torch.full((3,), math.log(10), dtype=torch.float64))


def test_one_hot_teacher():
    """KL(onehot || q) = -log q_k, and a weight of 0."""
    student = torch.randn(3, 10, dtype=torch.float64)
    teacher = torch.full_like(student, -math.inf)
    teacher[:, 4] = 1.0
    stats = distill_stats(student, teacher, **REFERENCE)
    torch.testing.assert_close(stats.divergence, -(student / 2).log_softmax(-1)[:, 4])
    assert not stats.weight.any() and not stats.loss.any()


def test_closed_form_gradient():
    """d(w tau^2 KL)/dz = w tau (q - p), w detached."""
    student = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 10, dtype=torch.float64)
    loss = ea_kd_loss(student, teacher, reduction="sum", **REFERENCE)
    weight = distill_stats(student, teacher, **REFERENCE).weight
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], weight[:, None] * 2 * (q - p).detach())
