"""Other packages' losses on logits, where they can be imported. None weights by entropy: all are the plain KL, tau = 1.

liger kl    log_softmax in PyTorch, then Liger's kl_div kernels
liger jsd   the same, then Liger's generalized JSD at beta = 0, a kernel known to be slow; no goal is set against it
trl         GKDTrainer.generalized_jsd_loss at beta = 0, plain PyTorch

They take bf16 logits in two ways. In fp32, as the eager formula does, their result is as right as ours; goals are set
against that. "in bf16" their log-probabilities stay in bf16: fewer bytes, and two digits of the loss and the gradient.
"""

import os
from collections.abc import Callable
from importlib import metadata

import torch
import torch.nn.functional as F

from .check import FP32_TOLERANCE, Loss, Provider, in_a_line

# Log-probabilities in bf16 are off by up to 1/64 between -4 and -8, and by 1/16 beyond -16: as much, relatively, are
# the probabilities that the gradient is made of.
BF16_TOLERANCE = 2**-4


def kl_divergence(student, teacher, labels):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def liger_kl() -> Callable[[torch.dtype | None], Loss]:
    from liger_kernel.transformers import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda dtype: (
        lambda student, teacher, labels: divergence(
            student.log_softmax(-1, dtype=dtype), teacher.log_softmax(-1, dtype=dtype)
        )
    )


def liger_jsd() -> Callable[[torch.dtype | None], Loss]:
    from liger_kernel.transformers import LigerJSD

    divergence = LigerJSD(beta=0.0)
    return lambda dtype: (
        lambda student, teacher, labels: divergence(
            student.log_softmax(-1, dtype=dtype), teacher.log_softmax(-1, dtype=dtype)
        )
    )


def trl() -> Callable[[torch.dtype | None], Loss]:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    divergence = GKDTrainer.generalized_jsd_loss  # "batchmean" divides by the size of the first dimension
    return lambda dtype: (
        lambda student, teacher, labels: divergence(
            student.to(dtype or student.dtype), teacher.to(dtype or teacher.dtype), beta=0, reduction="batchmean"
        )
    )


# By name: the package, and what loads its loss.
RIVALS = {"liger kl": ("liger_kernel", liger_kl), "liger jsd": ("liger_kernel", liger_jsd), "trl": ("trl", trl)}


def rivals(dtype: str) -> dict[str, Provider | str]:
    """By name; a sentence instead where a package is not there."""
    found = {}
    for name, (package, load) in RIVALS.items():
        try:
            in_dtype = load()
        except Exception as error:  # a package that breaks when it is imported is not there either
            found[name] = f"not importable: {in_a_line(error)}"
            continue
        version = version_of(package)
        found[name] = Provider(in_dtype(torch.float32), kl_divergence, "KL", FP32_TOLERANCE, version)
        if dtype != "fp32" and name != "liger jsd":
            found[f"{name} in {dtype}"] = Provider(in_dtype(None), kl_divergence, "KL", BF16_TOLERANCE, version)
    return found


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
