"""Divergences and their gradients to 50 digits, from their definitions in probabilities."""

import functools

import mpmath as mp
import torch

from eakd_kernels import divergences as d

_STEP = mp.mpf(10) ** -20


def _softmax(logits):
    largest = max(logits)
    powers = [mp.exp(x - largest) for x in logits]  # exp(-inf) = 0
    return [power / mp.fsum(powers) for power in powers]


def _kl(p, q):
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return mp.inf
    return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def _mixture(p, q, weight):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def _alpha_beta(p, q, a, b):
    pairs, s = list(zip(p, q, strict=True)), a + b
    if a == 0 and b == 0:
        return mp.fsum((mp.log(y) - mp.log(x)) ** 2 for x, y in pairs) / 2
    if a == 0:
        return mp.fsum(y**b * b * (mp.log(y) - mp.log(x)) - y**b + x**b for x, y in pairs) / b**2
    if b == 0:
        return mp.fsum(x**a * a * (mp.log(x) - mp.log(y)) - x**a + y**a for x, y in pairs) / a**2
    if s == 0:
        return mp.fsum(a * (mp.log(y) - mp.log(x)) + (x / y) ** a - 1 for x, y in pairs) / a**2
    return -mp.fsum(x**a * y**b - a / s * x**s - b / s * y**s for x, y in pairs) / (a * b)


def _value(divergence, p, q):
    if isinstance(divergence, d.ForwardKL):
        return _kl(p, q)
    if isinstance(divergence, d.ReverseKL):
        return _kl(q, p)
    parameters = [mp.mpf(x) for x in divergence.parameters()]
    first, second = parameters
    if isinstance(divergence, d.Jeffreys):
        return first * _kl(p, q) + second * _kl(q, p)
    if isinstance(divergence, d.JSD):
        m = _mixture(p, q, first)
        return first * _kl(p, m) + (1 - first) * _kl(q, m)
    if isinstance(divergence, d.SkewForwardKL):
        return _kl(p, _mixture(p, q, first))
    if isinstance(divergence, d.SkewReverseKL):
        return _kl(q, _mixture(q, p, first))
    if isinstance(divergence, d.TotalVariation):
        return mp.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    if isinstance(divergence, d.SquaredHellinger):
        return 1 - mp.fsum(mp.sqrt(a * b) for a, b in zip(p, q, strict=True))
    return _alpha_beta(p, q, first, second)


@functools.cache
def _row(divergence, student, teacher):
    """(D, its gradient in the student) of one row; columns that are -inf on both sides are left out."""
    with mp.workdps(60):
        there = [i for i, pair in enumerate(zip(student, teacher, strict=True)) if max(pair) > -mp.inf]
        p = _softmax([mp.mpf(teacher[i]) for i in there])
        z = [mp.mpf(student[i]) for i in there]

        def at(i, step):
            return _value(divergence, p, _softmax([x + step if j == i else x for j, x in enumerate(z)]))

        gradient = [0.0] * len(student)
        for j, i in enumerate(there):
            gradient[i] = float((at(j, _STEP) - at(j, -_STEP)) / (2 * _STEP))
        return float(_value(divergence, p, _softmax(z))), gradient


def divergence_and_gradient(divergence, student, teacher):
    """fp64 tensors, rounded from 50 digits, of logits [N, V] that fp64 holds exactly."""
    rows = [
        _row(divergence, tuple(z.tolist()), tuple(y.tolist()))
        for z, y in zip(student.detach().double(), teacher.double(), strict=True)
    ]
    device = student.device
    return tuple(torch.tensor(part, dtype=torch.float64, device=device) for part in zip(*rows, strict=True))
