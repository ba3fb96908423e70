"""The public functions on logits: validate -> operator -> weight -> reduce."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import row_losses
from . import weighting as weights
from .autograd import OnePass, row_statistics
from .divergences import DECOUPLED, Divergence
from .ops import WEIGHTINGS, LossRule
from .options import check_number, explicit, options_class, takes_options
from .stats import RowStats
from .validation import Problem, validate


@explicit
def ea_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor | tuple[float, ...] = 1.0,
    entropy_temperature: float = 3.0,
    weighting: str | Tensor | Callable[[RowStats], Tensor] = "ea",
    entropy_bound: float | None = None,
    detach_weights: bool = True,
    weight_norm: str = "none",
    divergence: str | Divergence = "forward_kl",
    scale_by_temperature_squared: bool = True,
    standardize: bool | str = False,
    teacher_class_weights: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    vocab_size: int | None = None,
    process_group=None,
    inplace_gradient: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Entropy-based adaptive distillation loss (EA-KD; Su et al., arXiv 2311.13621 v3, ICCV 2025).

    With p = softmax(teacher/tau), q = softmax(student/tau), and entropies H_T, H_S in nats of both softmaxes at the
    entropy temperature t, a row's loss is

        kd_weight * w * tau^2 * D(p, q) + ce_weight * CE(student, label)

    with w = (H_T + H_T H_S / H_ub)/2 and D = KL(p || q) unless `divergence` says otherwise, and rows are averaged;
    weights are never part of the mean's denominator. Loss and statistics are fp32 whatever the logits' dtype (fp64 if
    either is fp64); the gradient has the student's dtype. autocast changes nothing.

    Args:
        student_logits: [..., V], fp64, fp32, bf16 or fp16.
        teacher_logits: [..., V], any of these dtypes, without grad.
        labels: [...] int64, already shifted. Rows equal to `ignore_index` are left out of everything.
        temperature: tau > 0. A float, a 0-d tensor, or a tensor of the leading shape; tensors may require grad. A tuple
            of up to 8 floats: the sum of tau^2 D over them (MLD; Jin et al. 2023), in one read of the logits.
        entropy_temperature: t > 0, used for H_T and H_S only. 3 is the paper's vision setting; at vocabularies of
            language models it makes all weights alike, and 1 does not.
        weighting: "ea"; "teacher" (H_T, which is ER-KD); "student" (H_S); "none" (1); a tensor [...]; or a callable
            that takes RowStats (loss and weight None), and H_ub if it has a parameter entropy_bound, and returns a
            tensor [...]: one of eakd_kernels.weighting, or one's own.
        entropy_bound: H_ub in nats. None: log(V). Masked (-inf) columns are not counted: pass log of the rest.
        detach_weights: no gradient through the weights, as in the paper. False: through H_S, a callable's result or
            a weight tensor.
        weight_norm: "none" (the paper); "mean": weights scaled to mean 1 over the rows kept, 0 if they sum to 0;
            "bound": w / H_ub, which lies in [0, 1] for "ea".
        divergence: "forward_kl", "reverse_kl", "jeffreys", or an instance out of eakd_kernels.divergences.
        scale_by_temperature_squared: the factor tau^2.
        standardize: True: D of the logits less their mean, over their deviation (unbiased, plus 1e-7) in each row, both
            of which pass gradient (LS; Sun et al. 2024). "all": the entropies too. Cross-entropy never. Columns of
            -inf do not count.
        teacher_class_weights: [V], > 0: p ~ weight * p at tau, renormalised (BKD; Zhang et al. 2021). Entropies do not
            see them.
        student_logit_scale, teacher_logit_scale: factors > 0 of the logits, before all else (Cohere's logit_scale).
        student_softcap, teacher_softcap: cap > 0, then logits = cap * tanh(logits / cap) (Gemma 2). None: no cap.
        kd_weight, ce_weight: factors >= 0. Cross-entropy is at temperature 1, unweighted, from the same sweep.
        mask: [...] bool, True where the row counts; combined with labels by "and".
        ignore_index: the label of rows left out.
        reduction: "mean" over the rows kept, "sum", or "none" for [...].
        num_items: an int or 0-d tensor > 0: "mean" and "sum" then both give sum / num_items (gradient accumulation).
        vocab_size: use the first V columns only, without a copy; the others get gradient 0. For logits of different
            or padded widths.
        process_group: the last dimension is a shard of the vocabulary: [..., V_local] of both logits, contiguous in the
            order of the group's ranks, of any sizes. labels are ids of, and vocab_size, entropy_bound and
            teacher_class_weights are for, the whole vocabulary; all else is the same on every rank. Every rank gets
            the same loss, bit for bit, and that loss's gradient for its own columns. DTensors with Shard(-1) (and
            otherwise Replicate()) need no group. docs/parallel.md says what is exchanged, and which divergences
            take temporaries of the logits' size.
        inplace_gradient: the gradient takes the student logits' storage, from this call on or in backward: do not
            read the logits after the call. What saved them before it gets an error from autograd, not wrong values.
            Refused for leaves that require grad, views of such, and logits that share memory with the teacher's.
        return_stats: return (loss, RowStats), all detached.
        backend: "auto", "reference", "cpu", "triton" or "cuda". One asked for by name runs or raises.

    Returns:
        The loss, 0-d, or [...] for reduction "none"; with return_stats a pair.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says what would work.
        RuntimeError: a backend asked for by name cannot run; differentiating twice.

    -inf in the same column of both logits counts for nothing. Where only the student is -inf the divergence is +inf,
    unless the row's weight is 0. NaN or +inf in a row kept makes the loss NaN; in a row left out it changes nothing.
    """
    keywords = {name: value for name, value in locals().items() if not name.endswith(("_logits", "labels"))}
    return loss_of_logits(student_logits, teacher_logits, labels, Options(**keywords))


def loss_of_logits(student_logits, teacher_logits, labels, options, decoupled=None) -> Tensor | tuple[Tensor, RowStats]:
    """What `ea_kd_loss` returns, of checked Options."""
    wants_cross_entropy = labels is not None and row_losses.wants_cross_entropy(options)
    problem = validate(student_logits, teacher_logits, labels, options, wants_cross_entropy, decoupled)
    if _runs_in_one_pass(problem, options):
        loss, stats = _one_pass(problem, options)
    else:
        stats = _statistics(problem, options)
        loss = row_losses.reduce(stats.loss, problem, options)
        stats = stats.detach()
    return (loss, stats) if options.return_stats else loss


Options = options_class(ea_kd_loss)


@takes_options(ea_kd_loss, without=("reduction", "num_items", "return_stats", "inplace_gradient"))
def distill_stats(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **options) -> RowStats:
    """Per-row statistics of a student/teacher pair, for weightings, curricula and reductions of one's own.

    Takes the logits, labels and options of `ea_kd_loss` (see there), and raises what it raises. In one sweep over the
    two logits; nothing of size [rows, vocab] is made but the gradient, in backward.

    Returns:
        RowStats of [...] tensors, in nats. loss, divergence, student_entropy, student_lse and cross_entropy are
        differentiable in the student (loss, divergence and student_lse in `temperature` too, if it requires grad),
        and weight with detach_weights=False. Rows left out read 0.
    """
    options = Options(**options)
    return _statistics(validate(student_logits, teacher_logits, labels, options, labels is not None), options)


@takes_options(ea_kd_loss, without=("divergence",), temperature=4.0)
def ea_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    **options,
) -> Tensor | tuple[Tensor, RowStats]:
    """Entropy-weighted decoupled distillation (EA-DKD; DKD: Zhao et al., CVPR 2022; weights as in `ea_kd_loss`).

    A row with label k has the divergence alpha TCKD + beta NCKD at temperature tau:

        TCKD = p_k log(p_k/q_k) + (1 - p_k) log((1 - p_k)/(1 - q_k))        NCKD = KL(p || q) without class k, both
                                                                            renormalised

    so that KL(p || q) = TCKD + (1 - p_k) NCKD. All of it in log space: a p_k that rounds to 1 costs nothing.

    Args:
        student_logits, teacher_logits: [..., V], as for `ea_kd_loss`.
        labels: [...] int64; rows equal to `ignore_index` are left out of everything.
        alpha, beta: factors >= 0. The published beta is 8 or less, alpha 1.
        options: those of `ea_kd_loss` but for divergence. standardize="all" is what published EA-DKD with LS does.

    Returns and raises what `ea_kd_loss` does.
    """
    decoupled, options = check_ea_dkd_options(alpha=alpha, beta=beta, **options)
    if labels is None:
        raise ValueError("ea_dkd_loss needs labels, got None: its divergence treats the label's class apart")
    return loss_of_logits(student_logits, teacher_logits, labels, options, decoupled)


def check_ea_kd_options(**options):
    """The Options of these keywords; raises what `ea_kd_loss` raises for them alone."""
    return Options(**options)


def check_ea_dkd_options(*, alpha: float = 1.0, beta: float = 8.0, **options) -> tuple[tuple[int, float, float], Any]:
    """(code and parameters of DKD's divergence, Options); raises what `ea_dkd_loss` raises for the keywords alone."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        check_number(name, value, at_least=0)
    return (DECOUPLED, float(alpha), float(beta)), Options(**options)


@takes_options(
    ea_kd_loss,
    only=(
        *("entropy_temperature", "weighting", "entropy_bound", "weight_norm", "mask", "vocab_size"),
        *("student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap"),
        *("process_group", "backend"),
    ),
)
def ea_weights(student_logits: Tensor, teacher_logits: Tensor, **options) -> Tensor:
    """The weights w of `ea_kd_loss` alone, detached: for losses on features, boxes or sequences.

    Takes the logits and those options of `ea_kd_loss` that decide the weights, and raises what it raises.

    Classes are the last dimension: logits [N, C, H, W] go in as `x.movedim(1, -1)`.

    Returns:
        [...] fp32 (fp64 if a logits tensor is fp64); 0 in rows left out.
    """
    options = Options(**options)
    with torch.no_grad():
        return _statistics(validate(student_logits, teacher_logits, None, options, False), options).weight


def _runs_in_one_pass(problem: Problem, options) -> bool:
    """The gradient can be finished in forward if its scale is known there: docs/design.md, "When one pass runs"."""
    student = problem.rows.student_logits
    return (
        student.requires_grad
        and problem.backend != "reference"
        and problem.shards is None  # whose statistics are known after an exchange only
        and student.dtype != torch.float16  # a loss scale applied to a rounded gradient comes too late
        and row_losses.is_scale_known(problem, options)
    )


def _one_pass(problem: Problem, options) -> tuple[Tensor, RowStats]:
    given = torch.is_tensor(options.weighting)
    scale, denominator = row_losses.scale_of(problem, options)
    rule = LossRule(
        options.weighting.detach() if given else None,
        WEIGHTINGS["tensor" if given else options.weighting],
        problem.entropy_bound,
        weights.bound_scale(options.weight_norm, problem.entropy_bound),
        row_losses.is_scaled(options),
        float(options.kd_weight),
        float(options.ce_weight),
        scale,
        denominator,
    )
    loss, fields, _ = OnePass.apply(*problem.rows, *rule, options.inplace_gradient, problem.backend)
    *public, weight, row_loss = fields.unbind(0)
    return loss, row_losses.row_stats(problem, row_loss, weight, public)


def _statistics(problem: Problem, options) -> RowStats:
    return row_losses.finish(row_fields(problem, options.inplace_gradient), problem, options)


def row_fields(problem: Problem, inplace_gradient: bool) -> tuple[Tensor, ...]:
    """stats.PUBLIC_FIELDS of every row, differentiable as autograd.RowStatistics says."""
    if problem.shards is None:
        return row_statistics(problem.rows, inplace_gradient, problem.backend)
    from .vocab_parallel import sharded_row_statistics  # see sharding.py

    return sharded_row_statistics(problem.rows, problem.shards, inplace_gradient, problem.backend)
