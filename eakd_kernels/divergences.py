"""What is averaged over rows. p is the teacher, q the student, both at temperature tau; all values are in nats.

A divergence is a frozen dataclass whose `columns(log_p, log_q)` says what every column adds to it: the definition of
its value and, through PyTorch, of its gradient. The kernels have the same formulas, each with its derivative, in
csrc/divergence.h and backends/triton/divergence.py, and know them by `code` and two parameters.

A column without mass on either side adds nothing. Where only one side has none, the formula's limit counts, which may
be +inf: so it is for KL(p || q) where q = 0 < p.
"""

import math
import numbers
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Divergence:
    """A sum over columns, D(p, q) = sum_j columns_j."""

    code: ClassVar[int]  # csrc/divergence.h
    arity: ClassVar[int] = 1  # how many parameters it has

    def parameters(self) -> tuple[float, float]:
        """What the kernels get beside the code."""
        return (*map(float, astuple(self)), 0.0, 0.0)[:2]

    def kernel(self) -> tuple[int, float, float]:
        return self.code, *self.parameters()

    def columns(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError

    def _check(self, name: str, wanted: str, holds, hint: str = "") -> None:
        value = getattr(self, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (number and holds(value)):
            raise ValueError(f"{type(self).__name__}: {name} must be a number {wanted}, got {value!r}{hint}")


class _Unbounded(torch.autograd.Function):
    """0, with a gradient of NaN in `mass` where something flows back: what infinite * d mass comes to."""

    @staticmethod
    def forward(ctx, mass: Tensor, infinite: Tensor) -> Tensor:
        ctx.save_for_backward(infinite)
        return torch.zeros_like(mass)

    @staticmethod
    def backward(ctx, gradient):
        (infinite,) = ctx.saved_tensors
        return torch.where(infinite & (gradient != 0), torch.nan, 0.0).to(gradient.dtype), None


def _times(mass: Tensor, x: Tensor) -> Tensor:
    """mass * x, and 0 where there is no mass, whatever x is. Where x is infinite, nothing flows back of nothing."""
    infinite = x.isinf() & (mass > 0)
    return torch.where(infinite, mass.detach(), mass) * torch.where(mass == 0, 0.0, x) + _Unbounded.apply(
        mass, infinite
    )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(log_p.exp(), log_p - log_q)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) q), in log space: the sum itself would lose small columns."""
    if weight == 0:
        return log_q
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


@dataclass(frozen=True)
class Jeffreys(Divergence):
    """(1 - r) KL(p || q) + r KL(q || p), r = reverse_weight in 0..1 (Jeffreys 1946; r = 0.9 in DistiLLM)."""

    reverse_weight: float = 0.5
    code: ClassVar[int] = 0

    def __post_init__(self):
        self._check("reverse_weight", "in 0..1", lambda r: 0 <= r <= 1)

    def parameters(self):
        return 1.0 - self.reverse_weight, float(self.reverse_weight)

    def columns(self, log_p, log_q):
        forward, reverse = self.parameters()
        # A part that is not asked for may be infinite.
        parts = [(forward, log_p, log_q), (reverse, log_q, log_p)]
        return sum(weight * _kl(a, b) for weight, a, b in parts if weight != 0)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum_j p_j (log p_j - log q_j) (Hinton et al. 2015)."""

    code: ClassVar[int] = Jeffreys.code

    def parameters(self):
        return 1.0, 0.0

    def columns(self, log_p, log_q):
        return _kl(log_p, log_q)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum_j q_j (log q_j - log p_j) (MiniLLM, Gu et al. 2024, as a loss of every position)."""

    code: ClassVar[int] = Jeffreys.code

    def parameters(self):
        return 0.0, 1.0

    def columns(self, log_p, log_q):
        return _kl(log_q, log_p)


class Mixture(Divergence):
    """Of the sides and a mixture m of them; the kernels get both weights, neither less than it is in double."""

    def parameters(self):
        (weight,) = map(float, astuple(self))
        return weight, 1 - weight


@dataclass(frozen=True)
class JSD(Mixture):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (Lin 1991).

    It tends to 0 with beta or 1 - beta. GKD's convention, which jumps to the KLs there, is `generalized_jsd`.
    """

    beta: float = 0.5
    code: ClassVar[int] = 1

    def __post_init__(self):
        hint = "; ForwardKL() and ReverseKL() are what generalized_jsd(0) and generalized_jsd(1) mean"
        self._check("beta", "> 0 and < 1", lambda beta: 0 < beta < 1, hint)

    def columns(self, log_p, log_q):
        log_m = _log_mixture(log_p, log_q, self.beta)
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)


@dataclass(frozen=True)
class SkewForwardKL(Mixture):
    """KL(p || alpha p + (1 - alpha) q), 0 <= alpha < 1 (DistiLLM, Ko et al. 2024; alpha = 0.1 there)."""

    alpha: float = 0.1
    code: ClassVar[int] = 2

    def __post_init__(self):
        self._check("alpha", ">= 0 and < 1", lambda alpha: 0 <= alpha < 1)

    def kernel(self):
        return super().kernel() if self.alpha > 0 else ForwardKL().kernel()

    def columns(self, log_p, log_q):
        return _kl(log_p, _log_mixture(log_p, log_q, self.alpha))


@dataclass(frozen=True)
class SkewReverseKL(Mixture):
    """KL(q || alpha q + (1 - alpha) p), 0 <= alpha < 1 (DistiLLM, Ko et al. 2024; alpha = 0.1 there)."""

    alpha: float = 0.1
    code: ClassVar[int] = 3

    def __post_init__(self):
        self._check("alpha", ">= 0 and < 1", lambda alpha: 0 <= alpha < 1)

    def kernel(self):
        return super().kernel() if self.alpha > 0 else ReverseKL().kernel()

    def columns(self, log_p, log_q):
        return _kl(log_q, _log_mixture(log_q, log_p, self.alpha))


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """sum_j |p_j - q_j| / 2. Its gradient takes sign(0) = 0."""

    code: ClassVar[int] = 4
    arity: ClassVar[int] = 0

    def columns(self, log_p, log_q):
        return 0.5 * (log_p.exp() - log_q.exp()).abs()


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-1/(a b) sum_j [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], any real a = alpha, b = beta (Cichocki et al. 2011;
    ABKD, Wang et al. 2025).

    Where a, b or a + b is 0 it is the limit, which the formula tends to; published code has a factor 1/b there where
    continuity needs 1/b^2. AlphaBeta(1, 0) is KL(p || q), (0, 1) is KL(q || p), (1/2, 1/2) four times the squared
    Hellinger distance. With a negative power, or a + b = 0, columns of little mass count much.
    """

    alpha: float
    beta: float
    code: ClassVar[int] = 5
    arity: ClassVar[int] = 2

    def __post_init__(self):
        for name in ("alpha", "beta"):
            self._check(name, "that is finite", math.isfinite)

    def columns(self, log_p, log_q):
        a, b = float(self.alpha), float(self.beta)
        s = a + b
        if a == 0 and b == 0:
            return 0.5 * (log_q - log_p) ** 2
        if a == 0:
            return (_times((b * log_q).exp(), b * (log_q - log_p)) - (b * log_q).exp() + (b * log_p).exp()) / b**2
        if b == 0:
            return (_times((a * log_p).exp(), a * (log_p - log_q)) - (a * log_p).exp() + (a * log_q).exp()) / a**2
        if s == 0:
            return (a * (log_q - log_p) + (a * (log_p - log_q)).exp() - 1) / a**2
        cross = (a * log_p).exp() * (b * log_q).exp()
        return -(cross - a / s * (s * log_p).exp() - b / s * (s * log_q).exp()) / (a * b)


@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """1 - sum_j sqrt(p_j q_j) = sum_j (sqrt(p_j) - sqrt(q_j))^2 / 2 (Hellinger 1909)."""

    code: ClassVar[int] = 6
    arity: ClassVar[int] = 0

    def columns(self, log_p, log_q):
        return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()) ** 2


def generalized_jsd(beta: float) -> Divergence:
    """GKD's generalised Jensen-Shannon divergence (Agarwal et al. 2024): ForwardKL() at 0, ReverseKL() at 1, else JSD.

    Those two are no limits of JSD, which tends to 0 there.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"generalized_jsd: beta must be a number >= 0 and <= 1, got {beta!r}")
    if beta in (0, 1):
        return ReverseKL() if beta else ForwardKL()
    return JSD(beta)


BY_NAME = {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jeffreys": Jeffreys()}
_KINDS = (Jeffreys, JSD, SkewForwardKL, SkewReverseKL, TotalVariation, AlphaBeta, SquaredHellinger)
ALL = (ForwardKL, ReverseKL, *_KINDS)
BY_CODE = {kind.code: kind for kind in _KINDS}
DECOUPLED = 16  # the code of functional.ea_dkd_loss: alpha TCKD + beta NCKD, which is no sum over columns


def of_code(code: int, first: float, second: float) -> Divergence:
    """The divergence that the kernels know by these."""
    if code == Jeffreys.code:
        return ForwardKL() if second == 0 else ReverseKL() if first == 0 else Jeffreys(second)
    kind = BY_CODE[code]
    return kind(*(first, second)[: kind.arity])
