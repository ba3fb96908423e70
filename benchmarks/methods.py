"""Methods beyond KL(p || q): the formula as one writes it in PyTorch, and the options that make it of this package."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eakd_kernels import divergences


class Method(NamedTuple):
    divergence: Callable[[Tensor, Tensor], Tensor]  # of log p and log q [rows, vocab]: [rows]
    options: dict = {}  # noqa: RUF012
    temperatures: tuple[float, ...] = ()  # summed over, in the place of a case's one


def entropy(log_probabilities):
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def ea_weight(teacher_entropy, student_entropy, vocab_size):
    return (teacher_entropy + teacher_entropy * student_entropy / math.log(vocab_size)) / 2


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def mixture(log_p, log_q, weight):
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log(1 - weight))


def jsd(log_p, log_q, beta=0.5):
    log_m = mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def alpha_beta(log_p, log_q, a=0.2, b=0.7):
    s = a + b
    powers = (a * log_p + b * log_q).exp() - a / s * (s * log_p).exp() - b / s * (s * log_q).exp()
    return -powers.sum(-1) / (a * b)


METHODS = {
    "KL": Method(kl),
    "reverse KL": Method(lambda p, q: kl(q, p), {"divergence": "reverse_kl"}),
    "Jeffreys": Method(lambda p, q: 0.5 * kl(p, q) + 0.5 * kl(q, p), {"divergence": "jeffreys"}),
    "JSD": Method(jsd, {"divergence": divergences.JSD(0.5)}),
    "skew KL": Method(lambda p, q: kl(p, mixture(p, q, 0.1)), {"divergence": divergences.SkewForwardKL(0.1)}),
    "skew reverse KL": Method(lambda p, q: kl(q, mixture(q, p, 0.1)), {"divergence": divergences.SkewReverseKL(0.1)}),
    "total variation": Method(
        lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(-1), {"divergence": divergences.TotalVariation()}
    ),
    "AlphaBeta": Method(alpha_beta, {"divergence": divergences.AlphaBeta(0.2, 0.7)}),
    "MLD": Method(kl, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0)),
}
