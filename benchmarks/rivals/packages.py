"""Other packages' losses on logits, called as they are published: KL(p || q) at tau = 1. None weights by entropy.

A rival gives the mean over rows and, where it tells rows apart, a loss for each, which weights can go onto. It takes
16-bit logits as they come, or in fp32: then its result is as right as ours. As they come, log-probabilities stay in 16
bits: fewer bytes, and two digits of the loss and the gradient.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..check import FP32_TOLERANCE, Loss, Provider, in_a_line
from .formulas import NAMES, cross_entropy, kl

# Log-probabilities in bf16 are off by up to 1/64 between -4 and -8, and by 1/16 beyond -16: as much, relatively, are
# the probabilities that the gradient is made of. fp16 has three bits more.
NARROW_TOLERANCES = {"bf16": 2**-4, "fp16": 2**-7}

# Of student and teacher [rows, vocab] and the dtype they are taken to first, None: that they have.
Divergence = Callable[[Tensor, Tensor, torch.dtype | None], Tensor]


class Loaded(NamedTuple):
    mean: Divergence  # over rows
    of_rows: Divergence | None = None  # [rows]; None: the package returns one number


class Rival(NamedTuple):
    package: str  # as it is installed
    calls: str  # what of it, for readers
    load: Callable[[], Loaded]
    formula: Loss = kl
    casts: bool = False  # takes logits to fp32 by itself
    on_gpus_only: str = ""  # the reason


def trl() -> Loaded:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    # "batchmean" divides by the size of the first dimension, "none" gives every element.
    return _in_dtype(partial(GKDTrainer.generalized_jsd_loss, beta=0))


def modelopt() -> Loaded:
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    return _in_dtype(lambda student, teacher, reduction: LogitsDistillationLoss(1.0, reduction)(student, teacher))


def torchdistill() -> Loaded:
    from torchdistill.losses.mid_level import KDLoss

    def divergence(student, teacher, reduction):
        criterion = KDLoss("head", "output", "head", "output", temperature=1.0, beta=1.0, reduction=reduction)
        return criterion({"head": {"output": student}}, {"head": {"output": teacher}})

    return _in_dtype(divergence)


def torchtune() -> Loaded:
    criterion = _torchtune_losses().ForwardKLLoss()

    def mean(student, teacher, dtype):
        return criterion(_in(student, dtype), _in(teacher, dtype), student.new_zeros(len(student), dtype=torch.long))

    return Loaded(mean)


def torchtune_chunked() -> Loaded:
    criterion = _torchtune_losses().ForwardKLWithChunkedOutputLoss()

    def mean(student, teacher, dtype):
        """It is given chunks, as torchtune's models make them. `chunk` puts their gradients together, once."""
        size = criterion.num_output_chunks
        chunks = ([_in(chunk, dtype)[None] for chunk in logits.chunk(size)] for logits in (student, teacher))
        return criterion(*chunks, student.new_zeros(1, len(student), dtype=torch.long))

    return Loaded(mean)


def _torchtune_losses():
    """The file of its losses, which needs torch alone: importing the package breaks on newer versions of torchao."""
    package = importlib.util.find_spec("torchtune")
    if package is None:
        raise ModuleNotFoundError("No module named 'torchtune'")
    path = Path(package.submodule_search_locations[0], "modules", "loss", "kd_losses.py")
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def liger_kl() -> Loaded:
    from liger_kernel.transformers import LigerKLDIVLoss

    return _of_log_probabilities(
        lambda log_q, log_p, reduction: LigerKLDIVLoss(reduction=reduction, log_target=True)(log_q, log_p)
    )


def liger_jsd() -> Loaded:
    from liger_kernel.transformers import LigerJSD

    divergence = LigerJSD(beta=0.0)
    return Loaded(_of_log_probabilities(lambda log_q, log_p, reduction: divergence(log_q, log_p)).mean)


def _in_dtype(divergence: Callable) -> Loaded:
    """Of divergence(student, teacher, reduction=...) on logits."""

    def reduced(student, teacher, dtype, reduction):
        return divergence(_in(student, dtype), _in(teacher, dtype), reduction=reduction)

    return _reduced(reduced)


def _of_log_probabilities(divergence: Callable) -> Loaded:
    def reduced(student, teacher, dtype, reduction):
        return divergence(student.log_softmax(-1, dtype=dtype), teacher.log_softmax(-1, dtype=dtype), reduction)

    return _reduced(reduced)


def _reduced(divergence: Callable) -> Loaded:
    def of_rows(student, teacher, dtype):
        values = divergence(student, teacher, dtype, "none")
        return values if values.dim() == 1 else values.sum(-1)

    return Loaded(partial(divergence, reduction="batchmean"), of_rows)


def _in(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    return logits if dtype is None else logits.to(dtype)


NEEDS_TRITON = "a Triton kernel: needs a GPU"
RIVALS = {
    "trl": Rival("trl", "`GKDTrainer.generalized_jsd_loss(beta=0)`", trl),
    "modelopt": Rival("nvidia-modelopt", "`LogitsDistillationLoss`", modelopt),
    "torchdistill": Rival("torchdistill", "`KDLoss`", torchdistill),
    "torchtune": Rival("torchtune", "`ForwardKLLoss`", torchtune, cross_entropy, True),
    "torchtune chunked": Rival("torchtune", "`ForwardKLWithChunkedOutputLoss`", torchtune_chunked, cross_entropy, True),
    "liger kl": Rival("liger-kernel", "`LigerKLDIVLoss` after `log_softmax`", liger_kl, on_gpus_only=NEEDS_TRITON),
    "liger jsd": Rival("liger-kernel", "`LigerJSD(beta=0)` after `log_softmax`", liger_jsd, on_gpus_only=NEEDS_TRITON),
}

# Those that goals are set against on a GPU, beside one whose kernel is known to be slow.
WITH_GOALS = ("liger kl", "liger jsd", "trl")


def load(rival: Rival) -> Loaded | str:
    """Or why it is not there."""
    try:
        return rival.load()
    except Exception as error:  # a package that breaks when it is imported is not there either
        return f"not importable: {in_a_line(error)}"


def plain_rivals(dtype: str) -> dict[str, Provider | str]:
    """Those of benchmarks/cases.py's goals by name, without weights; a sentence instead where a package is missing."""
    found = {}
    for name in WITH_GOALS:
        rival = RIVALS[name]
        loaded = load(rival)
        if isinstance(loaded, str):
            found[name] = loaded
            continue
        found[name] = provider_of(rival, partial(_mean, loaded, torch.float32), FP32_TOLERANCE)
        if dtype != "fp32" and name != "liger jsd":
            found[f"{name} in {dtype}"] = provider_of(rival, partial(_mean, loaded, None), NARROW_TOLERANCES[dtype])
    return found


def provider_of(rival: Rival, loss: Loss, tolerance: float, formula: Loss | None = None) -> Provider:
    formula = formula or rival.formula
    return Provider(loss, formula, NAMES[formula], tolerance, version_of(rival.package))


def _mean(loaded: Loaded, dtype: torch.dtype | None, student, teacher, labels=None) -> Tensor:
    return loaded.mean(student, teacher, dtype)


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
