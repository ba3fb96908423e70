"""Distillation from a teacher of whom the k likeliest tokens are known, and making such a teacher."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import divergences, ops
from .functional import Options, ea_kd_loss
from .options import check_number, takes_options
from .row_losses import finish, reduce, wants_cross_entropy
from .sparse_rows import Columns, StudentRow, owners, student_fields, student_row
from .sparse_validation import check_ids, check_labels, check_logprobs, check_sparse_teacher
from .stats import RowStats
from .validation import Problem, ordinary, validate

TAILS = ("bucket", "renormalize", "zero")
# A rest of this mass or less may be rounding, where the student has no columns left for it.
_ROUNDING = 2.0**-20
# What a dense teacher has and a sparse one has not: the value that leaves it alone, and why no other will do.
_DENSE_ONLY = {
    "standardize": (False, "the mean and the deviation of the teacher's logits need all of them"),
    "teacher_class_weights": (None, "they renormalise over the whole vocabulary; weight the teacher before topk"),
    "teacher_softcap": (None, "log-probabilities are of logits that are capped already"),
    "teacher_logit_scale": (1.0, "log-probabilities are of logits that are scaled already"),
}


@takes_options(ea_kd_loss)
def topk_ea_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_entropy: Tensor | None = None,
    tail: str = "bucket",
    teacher_temperature: float = 1.0,
    **options,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""`ea_kd_loss` with a teacher of whom k columns a row are known: stored, sent, or out of an inference server.

    With v_j = exp(logprob_j), their sum s, a = teacher_temperature / temperature, and Z = sum_K v_j^a + (1 - s)^a, the
    teacher is

        "bucket"        P_j = v_j^a / Z and one outcome more, the rest, P_r = (1 - s)^a / Z
        "renormalize"   P_j = v_j^a / sum_K v_j^a: nothing outside of the k
        "zero"          P_j = v_j^a / Z, which is v_j at a = 1: the bucket without its rest's term, no distribution

    and the student q = softmax(student/tau) over the *whole* vocabulary, for "bucket" with 1 - sum_K q_j as its rest:

        D = sum_K P_j (log P_j - log q_j)  [+ P_r (log P_r - log q_r)]        dD/dz_j = ((sum P) q_j - P_j)/tau in K

    "zero" may be negative. "bucket" is KL(p || q) of the whole teacher but for how it is spread over the rest, so at
    teacher_temperature = temperature never more than that; at another temperature (1 - s)^a is not what the rest comes
    to. docs/sparse.md measures all three, and DistillKit's names for them.

    Args:
        student_logits: [..., V], fp64, fp32, bf16 or fp16.
        teacher_ids: [..., k] int64 or int32, in 0..V-1, none twice in a row; a negative one is padding.
        teacher_logprobs: [..., k] floating point, without grad: log-probabilities in nats, over the whole vocabulary,
            of softmax(teacher / teacher_temperature). -inf is padding. The rest's mass is 1 - s, at
            least 1.5e-8 (2.8e-17 of fp64) unless the ids are the whole vocabulary: a < 1 magnifies what it is off by.
        labels: [...] int64, as for `ea_kd_loss`.
        teacher_entropy: [...] floating point, H_T in nats at entropy_temperature, as `teacher_topk` gives it. None: of
            the tail's outcomes, with teacher_temperature / entropy_temperature for a. That is too small, by the entropy
            within the rest for "bucket"; docs/sparse.md says how much.
        tail: "bucket", "renormalize" or "zero".
        teacher_temperature: that of teacher_logprobs, > 0.
        options: those of `ea_kd_loss`. Of `divergence`, "bucket" takes all, on its k + 1 outcomes, the others
            "forward_kl" alone. `temperature` is no tuple, and standardize, teacher_class_weights, teacher_softcap and
            teacher_logit_scale stay as they are. teacher_lse in RowStats is None. With `process_group`, or a DTensor,
            student_logits are this rank's shard, ids and labels those of the whole vocabulary, and everything but
            the logits is the same on every rank.

    Returns and raises what `ea_kd_loss` does, and

        ValueError: an option that a sparse teacher cannot have; ids that are not below V, or twice in a row;
            teacher_logprobs above 0, or whose probabilities sum to more than 1, by more than rounding. On a GPU, and
            under torch.compile, values are not looked at; EAKD_CHECK_IDS=1 looks at those on a GPU, and waits for it.
            Unseen, an id from V on makes its row NaN, and one that is there twice counts twice.

    One sweep over the student, for "bucket" a second over a copy of a few rows at a time without their ids' columns
    (1 - sum_K q_j has no digits left where the student is sure), and the gradient in backward.
    """
    model, options = check_topk_options(
        teacher_entropy=teacher_entropy, tail=tail, teacher_temperature=teacher_temperature, **options
    )
    return loss_of_topk(student_logits, TopK(teacher_ids, teacher_logprobs, teacher_entropy), labels, model, options)


class TopK(NamedTuple):
    """What is known of a teacher."""

    ids: Tensor  # [..., k]
    logprobs: Tensor  # [..., k]
    entropy: Tensor | None  # [...]


def loss_of_topk(student_logits, teacher: TopK, labels, model, options) -> Tensor | tuple[Tensor, RowStats]:
    """What `topk_ea_kd_loss` returns, of checked options."""
    check_labels(labels, teacher.ids)
    problem = validate_student(student_logits, labels, options)
    stats = finish(fields_of_topk(problem, teacher, model, options), problem, options)
    loss = reduce(stats.loss, problem, options)
    return (loss, stats.detach()) if options.return_stats else loss


class _Model(NamedTuple):
    tail: str
    temperature: float


def check_topk_options(*, teacher_entropy=None, tail="bucket", teacher_temperature=1.0, **options):
    """(tail and teacher temperature, Options); raises what `topk_ea_kd_loss` raises for the keywords alone."""
    if not (isinstance(tail, str) and tail in TAILS):
        raise (ValueError if isinstance(tail, str) else TypeError)(f"tail must be one of {TAILS}, got {tail!r}")
    check_number("teacher_temperature", teacher_temperature, above=0)
    options = Options(**options)
    for name, (value, why) in _DENSE_ONLY.items():
        given = getattr(options, name)
        if given is not value and given != value:
            raise ValueError(f"{name} does not go with a sparse teacher: {why}; leave it at {value}")
    if options.temperatures is not None:
        raise ValueError("temperature must be one for a sparse teacher, got several; add up one call for each")
    if tail != "bucket" and _divergence(options).kernel() != divergences.ForwardKL().kernel():
        raise ValueError(
            f'divergence={options.divergence!r} needs tail="bucket": with tail="{tail}" the teacher has no mass '
            'outside of its ids to compare with; "forward_kl" needs none'
        )
    return _Model(tail, float(teacher_temperature)), options


def _divergence(options) -> divergences.Divergence:
    given = options.divergence
    return divergences.BY_NAME[given] if isinstance(given, str) else given


def validate_student(student_logits, labels, options, labelled: bool = False) -> Problem:
    """With the student as its own teacher, whose divergence nobody looks at."""
    own = replace(
        options,
        divergence="forward_kl",
        teacher_logit_scale=options.student_logit_scale,
        teacher_softcap=options.student_softcap,
    )
    return validate(
        student_logits, None, labels, own, labels is not None and (labelled or wants_cross_entropy(options))
    )


class _TeacherRows(NamedTuple):
    columns: Columns
    logprobs: Tensor  # [..., k] fp64, -inf for padding
    complete: Tensor  # [..., 1] bool: the ids are the whole vocabulary
    smallest_rest: float
    entropy: Tensor | None  # if given


def _teacher_rows(teacher: TopK, problem: Problem) -> _TeacherRows:
    rows, (ids, logprobs, entropy) = problem.rows, teacher
    vocab_size = rows.vocab_size if problem.shards is None else problem.shards.vocab_size
    check_sparse_teacher(ids, logprobs, entropy, rows.student_logits)
    given = (ids >= 0) & (logprobs != -torch.inf)
    if rows.keep is not None:
        given = given & rows.keep[..., None]
    beyond = given & (ids >= vocab_size)
    check_ids(ids, given, beyond, vocab_size)
    member = given & ~beyond
    safe = torch.where(member, ids, 0).to(torch.int64)
    columns = Columns(member, safe.gather(-1, owners(member)), torch.where(member, safe, vocab_size))
    # Small tensors, in which 1 - s is to have what digits it can.
    wide = torch.where(given, torch.where(beyond, torch.nan, logprobs.double()), -torch.inf)
    check_logprobs(wide, logprobs.dtype)
    return _TeacherRows(
        columns,
        wide,
        member.sum(-1, keepdim=True) == vocab_size,
        torch.finfo(torch.promote_types(logprobs.dtype, torch.float32)).eps / 8,
        ordinary(entropy),
    )


def fields_of_topk(problem: Problem, given: TopK, model: _Model, options, row_of=None) -> tuple[Tensor | None, ...]:
    """stats.PUBLIC_FIELDS. row_of(problem, columns, wants_rest, inplace): a StudentRow; None: of problem's logits."""
    rows, teacher = problem.rows, _teacher_rows(given, problem)
    bucket = model.tail == "bucket"
    student = (row_of or _student_row)(problem, teacher.columns, bucket, options.inplace_gradient)
    tau = rows.temperature if rows.temperatures is None else rows.temperatures.double()[..., None]
    log_q, empty = student.log_q, teacher.complete
    if bucket:
        log_rest = student.log_rest[..., None]
        log_q, empty = torch.cat([log_q, log_rest], -1), empty | (log_rest.detach() == -torch.inf)
    log_p = _log_p(teacher, model, model.temperature / tau, empty).to(log_q.dtype)
    divergence = _summed(_divergence(options), log_p, log_q)
    entropy = teacher.entropy
    if entropy is None:
        entropy = _entropy(_log_p(teacher, model, model.temperature / rows.entropy_temperature, empty))
    entropy = entropy.to(log_q.dtype)
    if rows.keep is not None:
        divergence, entropy = (torch.where(rows.keep, field, 0.0) for field in (divergence, entropy))
    return divergence, entropy, student.entropy, None, student.lse, student.cross_entropy


def _student_row(problem: Problem, columns: Columns, wants_rest: bool, inplace: bool) -> StudentRow:
    rows, shards, backend = problem.rows, problem.shards, problem.backend
    if shards is None:
        return student_row(rows, columns, wants_rest, inplace, backend)
    from .sparse_shards import sharded_student_row  # see sharding.py

    return sharded_student_row(rows, columns, shards, wants_rest, inplace, backend)


def _log_p(teacher: _TeacherRows, model: _Model, exponent: float | Tensor, empty: Tensor) -> Tensor:
    """log P of the k outcomes, and of the rest behind them for "bucket". empty [..., 1]: there are no columns in it."""
    masked = teacher.logprobs == -torch.inf
    powers = torch.where(masked, -torch.inf, teacher.logprobs.masked_fill(masked, 0) * exponent)
    if model.tail == "renormalize":
        return _log_softmax(powers)
    rest = -_logsumexp(teacher.logprobs).expm1()
    unnamed = masked.all(-1, keepdim=True)  # with an empty rest, a vocabulary that is masked throughout
    nothing = teacher.complete | (empty & ((rest <= _ROUNDING) | unnamed))
    log_rest = torch.where(nothing, 0.0, rest.clamp(min=teacher.smallest_rest).log())
    log_rest = torch.where(nothing, -torch.inf, log_rest * exponent)
    log_p = _log_softmax(torch.cat([powers, log_rest], -1))
    return log_p if model.tail == "bucket" else log_p[..., :-1]


def _logsumexp(x: Tensor) -> Tensor:
    return torch.logsumexp(x, -1, keepdim=True)


def _log_softmax(x: Tensor) -> Tensor:
    """-inf throughout where x is."""
    nothing = (x == -torch.inf).all(-1, keepdim=True)
    return torch.where(nothing, -torch.inf, torch.where(nothing, 0.0, x).log_softmax(-1))


def _summed(divergence: divergences.Divergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Over outcomes in which a side has mass."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    columns = divergence.columns(*(torch.where(neither, 0.0, x) for x in (log_p, log_q)))
    return torch.where(neither, 0.0, columns).sum(-1)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)


@torch.no_grad()
def teacher_topk(
    logits: Tensor, k: int, *, temperature: float = 1.0, entropy_temperature: float = 3.0, process_group=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `topk_ea_kd_loss` needs of a teacher, from its logits: the k likeliest columns and the exact entropy.

    Args:
        logits: [..., V], fp64, fp32, bf16 or fp16. Of a padded vocabulary pass logits[..., :V], which is no copy.
        k: in 1..V.
        temperature: of logprobs and lse, > 0; give it to the loss as teacher_temperature.
        entropy_temperature: of the entropy, > 0; the loss's own must be the same.
        process_group: logits are this rank's shard of the vocabulary, as for `ea_kd_loss`; k and ids are of all of it,
            and of equal logits the lower rank's come first. DTensors need no group.

    Returns:
        (ids, logprobs, entropy, lse), detached: ids [..., k] int64 and logprobs [..., k], the likeliest first, with
        logprob_j = logits_j / temperature - lse; entropy [...] in nats; lse [...], logsumexp(logits / temperature). All
        but ids fp32 (fp64 of fp64 logits).

    Raises:
        TypeError, ValueError: an argument is not as above.

    One sweep over the logits beside torch.topk's own.
    """
    check_number("temperature", temperature, above=0)
    options = Options(temperature=temperature, entropy_temperature=entropy_temperature, process_group=process_group)
    problem = validate(logits, None, None, options, False)
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an int, got {type(k).__name__} {k!r}")
    shards, backend = problem.shards, problem.backend
    columns = logits.shape[-1] if shards is None else shards.vocab_size
    if not 1 <= k <= columns:
        raise ValueError(f"k must be in 1..{columns}, the columns of logits, got {k}")
    rows = problem.rows._replace(student_logits=problem.rows.teacher_logits)
    if shards is not None:
        from .sparse_shards import sharded_topk  # see sharding.py

        return sharded_topk(rows, k, shards, backend)
    largest, ids = rows.student_logits.topk(k, dim=-1)
    if backend == "reference":
        from .backends import reference

        _, entropy, _, lse, _, _ = reference.statistics(rows)
        return ids, largest.to(lse.dtype) / temperature - lse[..., None], entropy, lse
    statistics = ops.row_statistics(*rows, False, backend)
    member = torch.ones_like(ids, dtype=torch.bool)
    entropy, lse, _, logprobs, _ = student_fields(rows, member, largest, statistics, None)
    return ids, logprobs, entropy, lse
