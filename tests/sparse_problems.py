"""Sparse teachers that the tests share, and their losses by definition."""

import pytest
import torch
from support import make_logits

from eakd_kernels import divergences, teacher_topk

TAILS = ["bucket", "renormalize", "zero"]
PLAIN = {"weighting": "none", "scale_by_temperature_squared": False}
DIVERGENCES = ["forward_kl", "reverse_kl", "jeffreys", divergences.JSD(0.3)]
# The others have no mass to compare with outside of the ids.
MODELS = [("renormalize", "forward_kl"), ("zero", "forward_kl"), *(("bucket", d) for d in DIVERGENCES)]
models = pytest.mark.parametrize("tail, divergence", MODELS, ids=[f"{tail}-{d}" for tail, d in MODELS])


def by_probabilities(student, ids, logprobs, *, tail, divergence="forward_kl", tau=1.0, generated=1.0):
    """Row divergences from probabilities in fp64, column by column: slow, and nothing is done in the log domain."""
    q_all, rows = (student.double() / tau).softmax(-1), []
    for q, chosen, logp in zip(q_all, ids, logprobs.double(), strict=True):
        given = (chosen >= 0) & (logp > -torch.inf)
        chosen, v = chosen[given].long(), logp[given].exp()
        power, rest = v ** (generated / tau), (1 - v.sum()) ** (generated / tau)
        p = power / (power.sum() + (0 if tail == "renormalize" else rest))
        named = q[chosen]
        others = torch.ones_like(q, dtype=torch.bool)
        others[chosen] = False
        if tail == "bucket":
            p, named = torch.cat([p, (1 - p.sum())[None]]), torch.cat([named, q[others].sum()[None]])
        kind = divergences.BY_NAME[divergence] if isinstance(divergence, str) else divergence
        rows.append(kind.columns(p.log(), named.log()).sum())
    return torch.stack(rows)


def sparse_problem(rows=6, vocab_size=70, k=9, dtype=torch.float64, seed=0, scale=3.0):
    """Logits [rows, vocab_size] of student and teacher; of the teacher in fp64: ids, logprobs [rows, k], entropy."""
    student, teacher = make_logits(rows, vocab_size, dtype=dtype, seed=seed, scale=scale)
    ids, logprobs, entropy, _ = teacher_topk(teacher.double(), k)
    return student, teacher, ids, logprobs, entropy
