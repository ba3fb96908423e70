"""The loss functions of mdistiller, and of the EA-KD repository that is made of it, by their published names.

    from eakd_kernels.integrations.mdistiller import kd_loss, dkd_loss

in the place of those in mdistiller/distillers/KD.py and DKD.py. Published functions of these names disagree about the
arguments behind the temperature, so these go by keyword here. Published entropies have 1e-10 inside the logarithm, and
are about C * 1e-10 smaller.
"""

from collections.abc import Callable

from torch import Tensor

from ..functional import ea_dkd_loss, ea_kd_loss
from ..options import check_keywords, keyword_names


def kd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float,
    *,
    logit_stand: bool = False,
    EA: bool = True,
    t: float = 3.0,
    H_ub: float | None = None,
    **options,
) -> Tensor:
    """`ea_kd_loss` as `kd_loss` of the EA-KD repository (and of mdistiller, logit-standardization-KD: EA=False).

    Args:
        logits_student, logits_teacher: [N, C], or [N, C, ...]: classes are the second dimension.
        temperature: tau.
        logit_stand: the divergence of standardised logits; the entropies stay those of the logits as they are.
        EA: the weights of EA-KD.
        t: the entropies' temperature.
        H_ub: the entropies' bound in nats. None: log(C). Published code passes 100 for CIFAR, and log(1000) for
            ImageNet; a tensor on a GPU makes the CPU wait for it.
        options: further ones of `ea_kd_loss`.
    """
    _check(options, ea_kd_loss, kd_loss)
    own = {"standardize": logit_stand, **_weights(EA, t, H_ub)}
    classes_last = (logits.movedim(1, -1) for logits in (logits_student, logits_teacher))
    return ea_kd_loss(*classes_last, temperature=temperature, **own, **options)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    *,
    EA: bool = True,
    t: float = 3.0,
    H_ub: float | None = None,
    LS: bool = False,
    **options,
) -> Tensor:
    """`ea_dkd_loss` as `dkd_loss` of the EA-KD repository (and of mdistiller: EA=False).

    Args:
        logits_student, logits_teacher: [N, C].
        target: [N] int64.
        alpha, beta: factors of TCKD and NCKD.
        temperature, EA, t, H_ub: as for `kd_loss`. t is 3 in the published function, whatever is configured.
        LS: standardised logits, in the entropies too.
        options: further ones of `ea_dkd_loss`.
    """
    _check(options, ea_dkd_loss, dkd_loss)
    own = {"standardize": "all" if LS else False, **_weights(EA, t, H_ub)}
    return ea_dkd_loss(
        logits_student, logits_teacher, target, alpha=alpha, beta=beta, temperature=temperature, **own, **options
    )


def _check(options: dict, source: Callable, called: Callable) -> None:
    """An unknown name is told of the function that was called."""
    if options:
        check_keywords(options, (*keyword_names(called), *keyword_names(source)), f"{called.__name__}()")


def _weights(EA: bool, t: float, H_ub: float | None) -> dict:
    bound = None if H_ub is None else float(H_ub)
    return {"weighting": "ea" if EA else "none", "entropy_temperature": t, "entropy_bound": bound}
