"""Who competes: the formula as one writes it in PyTorch, the same through torch.compile, this package, and rivals."""

from functools import partial

import torch
import torch.nn.functional as F

import eakd_kernels
from eakd_kernels.dispatch import resolve

from .cases import CE_WEIGHT, DTYPES, Case
from .check import FP32_TOLERANCE, TOLERANCE, Provider
from .methods import METHODS, ea_weight, entropy
from .rivals.packages import plain_rivals


def providers(case: Case, reference: bool = False) -> dict[str, Provider | str]:
    """By name, or why it does not take part; this package's are called "eakd <backend>". `reference`: that one too."""
    torch.compiler.reset()  # one case's compilations are neither reused by the next nor counted against its limit
    temperatures = {"tau": case.temperature, "t": case.entropy_temperature, "method": METHODS[case.method]}
    formula = partial(ea_kd, **temperatures)
    plain = partial(eager, **temperatures)
    in_pytorch = {"eager": plain, "compile": torch.compile(plain, dynamic=False)}
    found = {name: Provider(loss, formula, tolerance=FP32_TOLERANCE) for name, loss in in_pytorch.items()}
    for backend in eakd_kernels.available_backends():
        reason = refusal(backend, case)
        if reason is None and (reference or backend != "reference"):
            tolerance = FP32_TOLERANCE if backend == "reference" else TOLERANCE
            loss = partial(ours, backend=backend, **temperatures)
            found[f"eakd {backend}"] = Provider(loss, formula, tolerance=tolerance)
        elif reason and case.device == "cuda" and backend in ("triton", "cuda"):
            found[f"eakd {backend}"] = reason
    if METHODS[case.method].temperatures and case.device == "cpu":
        alone = temperatures | {"tau": METHODS[case.method].temperatures[0], "method": METHODS["KL"]}
        found["one temperature"] = Provider(partial(ours, backend="cpu", **alone), partial(ea_kd, **alone))
    if case.device == "cuda" and case.temperature == 1 and case.operation != "labels" and case.method == "KL":
        found |= plain_rivals(case.dtype)
    return found


def eager(student, teacher, labels, tau, t, method=METHODS["KL"]):
    """Logits go to fp32, as everybody does who has compared bf16's result with it."""
    return ea_kd(student.float(), teacher.float(), labels, tau, t, method)


def ea_kd(student, teacher, labels, tau, t, method=METHODS["KL"]):
    divergence = sum(
        tau**2 * method.divergence((teacher / tau).log_softmax(-1), (student / tau).log_softmax(-1))
        for tau in method.temperatures or (tau,)
    )
    teacher_entropy = entropy((teacher / t).log_softmax(-1))
    with torch.no_grad():
        student_entropy = entropy((student / t).log_softmax(-1))
    weight = ea_weight(teacher_entropy, student_entropy, student.shape[-1])
    loss = (weight * divergence).mean()
    return loss if labels is None else loss + CE_WEIGHT * F.cross_entropy(student, labels)


def ours(student, teacher, labels, tau, t, backend, method=METHODS["KL"]):
    return eakd_kernels.ea_kd_loss(
        student,
        teacher,
        labels,
        temperature=method.temperatures or tau,
        entropy_temperature=t,
        ce_weight=0.0 if labels is None else CE_WEIGHT,
        backend=backend,
        **method.options,
    )


def refusal(backend: str, case: Case) -> str | None:
    """Why a backend does not take a case."""
    if backend == "triton" and case.device == "cpu":
        return "an interpreter on a CPU, which is not there to be fast"
    if backend == "cuda" and case.device == "cpu":
        return "an emulator on a CPU, which is not there to be fast"
    dtype = DTYPES[case.dtype]
    try:
        resolve(backend, case.device, dtype, dtype)
    except RuntimeError as error:
        return str(error).split("; usable here")[0]
    return None
