"""What every entry computes, as one writes it in PyTorch, at tau = t = 1: one softmax of each model serves everything.

Mean over the rows of [rows, vocab] logits. The same functions in fp64 are what entries are checked against.
"""

import torch

from .. import methods


def kl(student, teacher, labels=None):
    return methods.kl(teacher.log_softmax(-1), student.log_softmax(-1)).mean()


def cross_entropy(student, teacher, labels=None):
    """KL(p || q) + H(p): another loss than the KL divergence, with the same gradient."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def ea_kd(student, teacher, labels=None):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (ea_weights(log_p, log_q) * methods.kl(log_p, log_q)).mean()


@torch.no_grad()
def ea_weights(log_p, log_q):
    """[rows], of log-probabilities."""
    return methods.ea_weight(methods.entropy(log_p), methods.entropy(log_q), log_q.shape[-1])


def in_fp32(formula):
    """On logits that are taken to fp32, as everybody does who has compared bf16's result with it."""
    return lambda student, teacher, labels=None: formula(student.float(), teacher.float())


def in_fp64(formula):
    """On the same logits, taken to fp64."""
    return lambda student, teacher, labels=None: formula(student.double(), teacher.double())


FORMULAS = {"none": kl, "ea": ea_kd}  # by their weights
NAMES = {kl: "KL", cross_entropy: "cross-entropy", ea_kd: "EA-KD"}
