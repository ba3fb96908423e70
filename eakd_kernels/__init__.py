"""Fused kernels for entropy-based adaptive knowledge distillation (EA-KD, arXiv 2311.13621)."""

from . import divergences, weighting
from .dispatch import available_backends
from .functional import distill_stats, ea_dkd_loss, ea_kd_loss, ea_weights
from .linear import fused_linear_ea_kd_loss
from .modules import EADKDLoss, EAKDLoss, FusedLinearEAKDLoss, TopKEAKDLoss
from .sparse_teacher import teacher_topk, topk_ea_kd_loss
from .stats import RowStats
from .tokens import token_entropy, token_logprob_entropy

__version__ = "0.1.0"

__all__ = [
    "EADKDLoss",
    "EAKDLoss",
    "FusedLinearEAKDLoss",
    "RowStats",
    "TopKEAKDLoss",
    "available_backends",
    "distill_stats",
    "divergences",
    "ea_dkd_loss",
    "ea_kd_loss",
    "ea_weights",
    "fused_linear_ea_kd_loss",
    "teacher_topk",
    "token_entropy",
    "token_logprob_entropy",
    "topk_ea_kd_loss",
    "weighting",
]
