"""torch.compile: one graph, the same numbers, and no compilation for another number of rows."""

import pytest
import torch
from support import make_logits
from torch._dynamo.testing import CompileCounterWithBackend

from eakd_kernels import EAKDLoss, distill_stats, divergences, ea_dkd_loss, ea_kd_loss

OPTIONS = {
    "one pass": {},
    "every term": {"ce_weight": 0.5, "temperature": 2.0},
    "rows": {"reduction": "none"},
    "live weights": {"detach_weights": False},
    "mean weights": {"weight_norm": "mean"},
    "callable": {"weighting": lambda stats: 1 / (1 + stats.teacher_entropy)},
    "in place": {"inplace_gradient": True},
    "mixture": {"divergence": divergences.JSD(0.3), "temperature": (2.0, 3.0), "teacher_softcap": 30.0},
    "standardised": {"divergence": "reverse_kl", "standardize": True, "reduction": "none"},
    "class weights": {"teacher_class_weights": torch.linspace(0.5, 2, 50)},
    "decoupled": {"alpha": 1.0, "beta": 2.0},
}


def loss_of(student, teacher, labels, **options):
    loss = ea_dkd_loss if "alpha" in options else ea_kd_loss
    return loss(student, teacher, labels, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_compile_fullgraph(options, backend):
    student, teacher = make_logits(2, 3, 50)
    labels = torch.tensor([[1, 2, -100], [4, 5, 6]])

    options = {name: x.to(student.device) if torch.is_tensor(x) else x for name, x in options.items()}

    def step(z, y, k):
        return loss_of(z * 1, y, k, backend=backend, **options).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(student, teacher, labels), step(student, teacher, labels)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(3 * loss, student)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_compile_inductor(backend):
    student, teacher = make_logits(2, 3, 50)
    compiled = torch.compile(lambda z, y: ea_kd_loss(z * 2, y, temperature=2.0, backend=backend), fullgraph=True)
    loss = compiled(student, teacher)
    want = ea_kd_loss(student * 2, teacher, temperature=2.0, backend=backend)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(want, student)[0])


def test_compile_module_and_statistics(backend):
    student, teacher = make_logits(2, 3, 50)
    module = torch.compile(EAKDLoss(backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(module(student, teacher), ea_kd_loss(student, teacher, backend=backend))
    compiled = torch.compile(distill_stats, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(student, teacher, backend=backend), distill_stats(student, teacher, backend=backend), strict=True
    ):
        assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"ce_weight": 0.5}, {"alpha": 1.0, "temperature": (2.0, 4.0)}], ids=str
)
def test_compile_dynamic_rows(options, backend):
    counter = CompileCounterWithBackend("aot_eager")

    def step(z, y, k):
        return loss_of(z, y, k, backend=backend, **options).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 8, 17, 64):
        student, teacher = make_logits(rows, 50)
        labels = torch.randint(0, 50, (rows,))
        torch.testing.assert_close(compiled(student, teacher, labels), step(student, teacher, labels))
    assert counter.frame_count <= 2


def test_compile_learnable_temperature(backend):
    student, teacher = make_logits(2, 3, 50)
    temperature = torch.tensor(2.0, requires_grad=True)

    def step(z, tau):
        return ea_kd_loss(z, teacher, temperature=tau, backend=backend)

    inputs = (student, temperature)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(step(*inputs), inputs))
