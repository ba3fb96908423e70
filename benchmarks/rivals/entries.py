"""Who takes part, and in which ways: with and without weights, and on logits of 16 bits as they are and in fp32."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import eakd_kernels

from ..check import FP32_TOLERANCE, TOLERANCE, Provider
from ..providers import refusal
from . import hidden
from .cases import HiddenCase, LogitsCase
from .formulas import FORMULAS, NAMES, ea_kd, ea_weights, in_fp32
from .packages import NARROW_TOLERANCES, RIVALS, Loaded, Rival, load, provider_of

ONE_NUMBER = "cannot be weighted: returns one number"
COMPILED = ("compile", "liger chunked")  # providers that torch.compile is called for


class Entry(NamedTuple):
    provider: str  # this package's are called "eakd <backend>"
    weights: str = "none"  # or "ea"
    logits: str = ""  # of 16 bits: "as is", or "fp32": taken there before the package sees them

    def __str__(self):
        return ", ".join(filter(None, (self.provider, {"ea": "weighted"}.get(self.weights), self.logits)))


Entries = dict[Entry, Provider | str]  # or why it does not take part


def entries(case: LogitsCase | HiddenCase) -> Entries:
    torch.compiler.reset()  # one case's compilations are neither reused by the next nor counted against its limit
    return hidden_entries(case) if isinstance(case, HiddenCase) else logits_entries(case)


def logits_entries(case: LogitsCase) -> Entries:
    found = {}
    for weights, formula in FORMULAS.items():
        eager = in_fp32(formula)
        in_pytorch = {"eager": eager}
        if case.family != "errors":  # it is off by what eager is off by, and takes long to compile
            in_pytorch["compile"] = torch.compile(eager, dynamic=False)
        for name, loss in in_pytorch.items():
            found[Entry(name, weights)] = Provider(loss, formula, NAMES[formula], FP32_TOLERANCE)
        for backend, loss in _ours(case, partial(ours, weights=weights)):
            found[Entry(f"eakd {backend}", weights)] = Provider(loss, formula, NAMES[formula], TOLERANCE)
    return found | _of_rivals(RIVALS, case, ways)


def ways(name: str, rival: Rival, loaded: Loaded, dtype: str) -> Entries:
    """Of a rival on logits: as they are and, unless it casts by itself or they are in fp32 anyway, taken to fp32."""
    found, ways = {}, [("", None, FP32_TOLERANCE)]
    if dtype != "fp32" and not rival.casts:
        ways = [("as is", None, NARROW_TOLERANCES[dtype]), ("fp32", torch.float32, FP32_TOLERANCE)]
    for logits, cast, tolerance in ways:
        found[Entry(name, "none", logits)] = provider_of(rival, partial(mean_of, loaded.mean, cast), tolerance)
        weighted = ONE_NUMBER
        if loaded.of_rows:
            weighted = provider_of(rival, partial(weighted_mean, loaded.of_rows, cast), tolerance, ea_kd)
        found[Entry(name, "ea", logits)] = weighted
    return found


def mean_of(divergence: Callable, dtype: torch.dtype | None, student, teacher, labels=None) -> Tensor:
    return divergence(student, teacher, dtype)


def weighted_mean(divergence: Callable, dtype: torch.dtype | None, student, teacher, labels=None) -> Tensor:
    """The weights are made beside the package, in fp32: it shares its softmaxes with nobody."""
    with torch.no_grad():
        log_p, log_q = (logits.log_softmax(-1, dtype=torch.float32) for logits in (teacher, student))
        weights = ea_weights(log_p, log_q)
        del log_p, log_q
    return (weights * divergence(student, teacher, dtype)).mean()


def ours(student, teacher, labels=None, *, weights: str, backend: str) -> Tensor:
    return eakd_kernels.ea_kd_loss(student, teacher, entropy_temperature=1.0, weighting=weights, backend=backend)


def hidden_entries(case: HiddenCase) -> Entries:
    found = {}
    for weights, formula in FORMULAS.items():
        dense, name = partial(hidden.dense, in_fp32(formula)), NAMES[formula]
        for provider, loss in (("eager", dense), ("compile", torch.compile(dense, dynamic=False))):
            found[Entry(provider, weights)] = Provider(loss, formula, name, hidden_tolerance(case.dtype, False))
        for backend, loss in _ours(case, partial(hidden.ours, weights=weights)):
            found[Entry(f"eakd {backend}", weights)] = Provider(loss, formula, name, hidden_tolerance(case.dtype, True))
    return found | _of_rivals(hidden.RIVALS, case, hidden_ways)


def hidden_ways(name: str, rival: Rival, loaded: hidden.Loaded, dtype: str) -> Entries:
    tolerance = hidden_tolerance(dtype, rival.casts)
    weighted = ONE_NUMBER
    if loaded.weighted:
        weighted = provider_of(rival, loaded.weighted, tolerance, ea_kd)
    return {Entry(name): provider_of(rival, loaded.mean, tolerance), Entry(name, "ea"): weighted}


def hidden_tolerance(dtype: str, in_fp32: bool) -> float:
    """Products of 16-bit matrices give logits in 16 bits, or in fp32. Their gradients are rounded in either case."""
    if dtype == "fp32":
        return FP32_TOLERANCE
    return 2**-7 if in_fp32 else NARROW_TOLERANCES[dtype]


def _of_rivals(known: dict[str, Rival], case: LogitsCase | HiddenCase, ways: Callable[..., Entries]) -> Entries:
    found = {}
    for name, rival in known.items():
        if rival.on_gpus_only and case.device == "cpu":
            found[Entry(name)] = rival.on_gpus_only
        elif isinstance(loaded := load(rival), str):
            found[Entry(name)] = loaded
        else:
            found |= ways(name, rival, loaded, case.dtype)
    return found


def _ours(case: LogitsCase | HiddenCase, loss: Callable) -> Iterator[tuple[str, Callable]]:
    """A loss for every backend that is there to be fast."""
    for backend in eakd_kernels.available_backends():
        if backend != "reference" and refusal(backend, case) is None:
            yield backend, partial(loss, backend=backend)
