"""What is averaged over rows. p is the teacher, q the student, both at temperature tau."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardKL:
    """KL(p || q) = sum_j p_j (log p_j - log q_j), in nats (Hinton et al. 2015)."""


BY_NAME = {"forward_kl": ForwardKL()}
