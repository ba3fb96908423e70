"""Invariants of the loss over random problems (hypothesis)."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import interpreted, make_logits, widest

from eakd_kernels import distill_stats, ea_kd_loss

TEMPERATURES = st.sampled_from([0.5, 1.0, 1.7, 2.0, 3.0, 4.0, 10.0])
problems = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 5),
        "vocab_size": st.one_of(st.integers(2, 70), st.integers(2000, 2100), st.integers(4090, 4110)),
        "scale": st.sampled_from([1e-3, 1.0, 5.0, 30.0]),
        "seed": st.integers(0, 2**31 - 1),
        "tau": TEMPERATURES,
        "t": TEMPERATURES,
    }
)


class Problem:
    def __init__(self, backend, rows, vocab_size, scale, seed, tau, t):
        pair = make_logits(rows, vocab_size, scale=scale, seed=seed, dtype=widest(backend))
        self.student, self.teacher = pair
        self.tau = tau
        self.options = {"temperature": tau, "entropy_temperature": t, "backend": backend}

    def stats(self, student=None, teacher=None, **options):
        student = self.student if student is None else student
        return distill_stats(student, self.teacher if teacher is None else teacher, **{**self.options, **options})

    def gradient(self, student=None, teacher=None):
        z = (self.student if student is None else student).detach().requires_grad_()
        loss = ea_kd_loss(z, self.teacher if teacher is None else teacher, **self.options)
        return torch.autograd.grad(loss, z)[0]


# Logits of 120 at tau = 0.5 are rounded by 2e-5 in fp32, and so may be whatever depends on them.
TOLERANCE = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-4)}
TINY = {torch.float64: 1e-12, torch.float32: 4e-6}


def assert_same(got, want, factor=1.0):
    """factor: what multiplies a divergence in it."""
    rtol, atol = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol * max(1.0, factor))


def assert_same_stats(got, want, tau, without=()):
    for name, field in want._asdict().items():
        if field is not None and name not in without:
            factor = tau**2 * want.weight.max().item() if name == "loss" else 1.0
            assert_same(getattr(got, name), field, factor)


def for_every_problem(check):
    def test(backend):
        slow = {"max_examples": 6, "phases": [Phase.explicit, Phase.reuse, Phase.generate]}  # shrinking takes minutes

        @settings(deadline=None, **(slow if interpreted(backend) else {"max_examples": 40}))
        @given(problem=problems)
        def run(problem):
            check(Problem(backend, **problem))

        run()

    return test


@for_every_problem
def test_shifts_change_nothing_but_lse(p):
    shifted = p.stats(p.student.detach() + 7.5, p.teacher - 11.25)
    assert_same_stats(shifted, p.stats(), p.tau, without=("student_lse", "teacher_lse"))
    assert_same(shifted.student_lse, p.stats().student_lse + 7.5 / p.options["temperature"])
    assert_same(p.gradient(p.student.detach() + 7.5, p.teacher - 11.25), p.gradient())


@for_every_problem
def test_order_of_the_vocabulary_does_not_matter(p):
    order = torch.arange(p.student.shape[-1]).flip(0).roll(len(p.student))
    assert_same_stats(p.stats(p.student[:, order], p.teacher[:, order]), p.stats(), p.tau)
    assert_same(p.gradient(p.student[:, order], p.teacher[:, order]), p.gradient()[:, order])


@for_every_problem
def test_a_student_that_is_the_teacher(p):
    stats = p.stats(p.teacher)
    assert stats.divergence.abs().max() <= TINY[stats.loss.dtype]
    assert p.gradient(p.teacher).abs().max() <= TINY[stats.loss.dtype]
    assert_same(stats.student_entropy, stats.teacher_entropy)


@for_every_problem
def test_gradient_rows_sum_to_zero(p):
    gradient = p.gradient()
    assert (
        gradient.sum(-1).abs().max() <= TINY[gradient.dtype] * max(1, gradient.abs().max().item()) * gradient.shape[-1]
    )


@for_every_problem
def test_bounds(p):
    stats, log_v = p.stats(), math.log(p.student.shape[-1])
    tiny = TINY[stats.loss.dtype]
    for entropy in (stats.teacher_entropy, stats.student_entropy):
        assert (entropy >= -tiny).all() and (entropy <= log_v + tiny).all()
    assert (stats.divergence >= -tiny).all()
    assert (stats.weight >= stats.teacher_entropy / 2 - tiny).all()
    assert (stats.weight <= stats.teacher_entropy + tiny).all()


@for_every_problem
def test_masked_columns_change_nothing(p):
    pad = torch.full((len(p.student), 3), -torch.inf, dtype=p.student.dtype)
    bound = {"entropy_bound": math.log(p.student.shape[-1])}
    padded = p.stats(torch.cat([pad, p.student], -1), torch.cat([pad, p.teacher], -1), **bound)
    assert_same_stats(padded, p.stats(**bound), p.tau)


@for_every_problem
def test_rows_are_independent(p):
    """Permuting the weights relative to the rows changes the loss as it should: no outer product."""
    weights = torch.linspace(0, 1, len(p.student), dtype=p.student.dtype)
    stats = p.stats(weighting="none")
    loss = ea_kd_loss(p.student, p.teacher, weighting=weights, reduction="none", **p.options)
    assert_same(loss, weights * stats.loss)


def test_uniform_rows_weigh_log_v(backend):
    flat = torch.zeros(3, 100, dtype=widest(backend))
    stats = distill_stats(flat, flat + 5, backend=backend)
    assert_same(stats.weight, torch.full((3,), math.log(100), dtype=widest(backend)))


def test_hot_entropies_are_uniform(backend):
    student, teacher = make_logits(3, 100, dtype=widest(backend))
    stats = distill_stats(student, teacher, entropy_temperature=1e6, backend=backend)
    assert_same(stats.teacher_entropy, torch.full((3,), math.log(100), dtype=widest(backend)))


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
def test_shared_exponentials_equal_separate_ones(tau, kernels):
    """tau = t takes one exponential for both temperatures; a t next to it takes two."""
    student, teacher = make_logits(3, 5000, dtype=torch.float32)
    one, two = (
        distill_stats(student, teacher, temperature=tau, entropy_temperature=t, backend=kernels)
        for t in (tau, tau * (1 + 2.0**-30))
    )
    for got, want in zip(one, two, strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
