"""Entropy and log-probability of one model's tokens, for policy gradients and on-policy distillation.

The operators run with the model as its own teacher, whose divergence nobody looks at: one sweep over the logits in
forward, one that writes the gradient in backward, and nothing else of their size.
"""

from torch import Tensor

from .functional import Options, ea_kd_loss, row_fields
from .options import check_number, takes_options
from .stats import PUBLIC_FIELDS
from .validation import validate

_TAKEN = ("mask", "vocab_size", "process_group", "inplace_gradient", "backend")


@takes_options(ea_kd_loss, only=_TAKEN)
def token_entropy(logits: Tensor, *, temperature: float = 1.0, **options) -> Tensor:
    """H = -sum_j p_j log p_j in nats, of p = softmax(logits / temperature).

    Differentiable in the logits z: dH/dz_j = -p_j (log p_j + H) / temperature.

    Args:
        logits: [..., V], fp64, fp32, bf16 or fp16.
        temperature: a number > 0.
        options: mask, vocab_size, process_group, inplace_gradient and backend, as for `ea_kd_loss`.

    Returns:
        [...] fp32 (fp64 of fp64 logits); 0 in rows left out by mask. Columns of -inf count for nothing.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says what would work.
        RuntimeError: a backend asked for by name cannot run; differentiating twice.
    """
    check_number("temperature", temperature, above=0)
    return _fields(logits, None, temperature=temperature, entropy_temperature=temperature, **options)["student_entropy"]


@takes_options(ea_kd_loss, only=("ignore_index", *_TAKEN))
def token_logprob_entropy(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    """(log p_id, H) of p = softmax(logits / temperature), in nats, from one sweep; H as in `token_entropy`.

    Differentiable in the logits z: d log p_id / dz_j = (1[j = id] - p_j) / temperature. Both gradients are written in
    one sweep, if both flow.

    Args:
        logits: [..., V], fp64, fp32, bf16 or fp16. Those of position j predict token j + 1, which is the one to give.
        ids: [...] int64, in 0..V-1. Rows equal to `ignore_index` are left out.
        temperature: a number > 0.
        options: ignore_index, mask, vocab_size, process_group, inplace_gradient and backend, as for `ea_kd_loss`. With
            process_group, ids are those of the whole vocabulary.

    Returns:
        Two tensors [...], fp32 (fp64 of fp64 logits); 0 in rows left out. log p_id is -inf where the logit is.

    Raises what `token_entropy` does.
    """
    check_number("temperature", temperature, above=0)
    if temperature != 1:  # the operators have the label's log-probability at temperature 1
        options |= {"student_logit_scale": 1 / temperature, "teacher_logit_scale": 1 / temperature}
    fields = _fields(logits, ids, entropy_temperature=1.0, **options)
    return -fields["cross_entropy"], fields["student_entropy"]


def _fields(logits: Tensor, ids: Tensor | None, **options) -> dict[str, Tensor]:
    options = Options(**options)
    try:
        problem = validate(logits, None, ids, options, ids is not None)
    except (TypeError, ValueError) as error:
        message = str(error).replace("student_logits", "logits").replace("labels", "ids")
        raise type(error)(message) from None
    return dict(zip(PUBLIC_FIELDS, row_fields(problem, options.inplace_gradient), strict=True))
