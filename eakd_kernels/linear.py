"""The public function on hidden states and output heads; linear_chunks.py computes it.

That is imported by a first call: what torch.compile must not trace can be marked only by importing the compiler, which
takes longer than torch.
"""

from torch import Tensor

from .functional import Options, ea_kd_loss
from .linear_teachers import teacher_of
from .options import takes_options
from .projection import Head
from .sparse_teacher import check_topk_options
from .stats import RowStats


@takes_options(ea_kd_loss, without=("inplace_gradient",))
def fused_linear_ea_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, ...] | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    recompute: bool = False,
    accumulate_in_fp32: bool = True,
    tail: str = "bucket",
    teacher_temperature: float = 1.0,
    **options,
) -> Tensor | tuple[Tensor, RowStats]:
    """`ea_kd_loss` of logits = hidden @ weight.T + bias, of which only `chunk_rows` rows exist at a time.

    Args:
        student_hidden: [..., H], fp64, fp32, bf16 or fp16.
        student_weight: [V, H], the output head, tied to the embedding or not. Frozen, no gradient of it is made.
        teacher_hidden, teacher_weight: [..., H_T] and [V, H_T], without grad; H_T need not be H.
        labels: [...], as for `ea_kd_loss`.
        teacher_logits: [..., V], in the place of teacher_hidden and teacher_weight.
        teacher_topk: (ids [..., k], logprobs [..., k]) or (ids, logprobs, entropy [...]), or what `teacher_topk`
            returns, in their place; with `tail` and `teacher_temperature` as for `topk_ea_kd_loss`.
        student_bias, teacher_bias: [V].
        chunk_rows: rows whose logits are held at a time, in fp32. None: what 48 MB hold on a CPU, and on a GPU a
            quarter of the free memory, at most 2 GB.
        recompute: make the logits again in backward, instead of keeping finished gradients of hidden states and weight
            until then. Always so for fp16, whose loss scale would come too late, and where one pass cannot run.
        accumulate_in_fp32: sum the weight's gradient over chunks in fp32. False: in the weight's dtype.
        options: those of `ea_kd_loss`, on the logits. With process_group, student_weight, teacher_weight (or
            teacher_logits) and the biases are this rank's part of the vocabulary; hidden states, and teacher_topk with
            its ids of the whole vocabulary, are whole on every rank. It always recomputes. The gradient of
            student_hidden is then this rank's summand, as a column-parallel layer's: sum it over the group.

    Logits are fp32 (fp64 if a tensor is fp64): 16-bit hidden states and weights are multiplied into fp32, and nothing
    is rounded before the softmax. Rows left out are not projected; on a GPU counting the others waits for it. autocast
    changes nothing.

    Returns:
        What `ea_kd_loss` returns, differentiable in student_hidden, student_weight, student_bias and temperature.

    Raises:
        TypeError, ValueError: an argument is not as above; the message says what would work.
        RuntimeError: a backend asked for by name cannot run; differentiating twice.
    """
    model, options = check_fused_linear_options(
        chunk_rows=chunk_rows,
        recompute=recompute,
        accumulate_in_fp32=accumulate_in_fp32,
        teacher_topk=teacher_topk,
        tail=tail,
        teacher_temperature=teacher_temperature,
        **options,
    )
    student = Head(student_hidden, student_weight, student_bias)
    teacher = teacher_of(student, teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_topk, model)
    from .linear_chunks import run

    return run(student, teacher, labels, options, chunk_rows, recompute, accumulate_in_fp32)


def check_fused_linear_options(
    *,
    chunk_rows=None,
    recompute=False,
    accumulate_in_fp32=True,
    teacher_topk=None,
    tail="bucket",
    teacher_temperature=1.0,
    **options,
):
    """(a sparse teacher's model or None, Options); raises what `fused_linear_ea_kd_loss` raises for these alone."""
    for name, flag in (("recompute", recompute), ("accumulate_in_fp32", accumulate_in_fp32)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if chunk_rows is not None and not (type(chunk_rows) is int and chunk_rows >= 1):
        raise ValueError(f"chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    if teacher_topk is not None or tail != "bucket" or teacher_temperature != 1.0:
        return check_topk_options(tail=tail, teacher_temperature=teacher_temperature, **options)
    return None, Options(**options)
