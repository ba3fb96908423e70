"""A student's row beside a sparse teacher: its gradient to the last rounding, in place, in blocks, and compiled."""

import pytest
import torch
from sparse_problems import PLAIN, TAILS, by_probabilities, models, sparse_problem
from support import (
    FLOATS,
    assert_gradient_within_rounding,
    assert_within_error_rule,
    interpreted,
    leaf,
    make_logits,
    takes_fp64,
    widest,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from eakd_kernels import ea_kd_loss, sparse_teacher, teacher_topk, topk_ea_kd_loss


@models
def test_gradcheck(tail, divergence, fp64_backend):
    """With a gradient into every statistic: capped logits, padding, a row left out, live weights, temperatures."""
    student, _, ids, logprobs, _ = sparse_problem(rows=3, vocab_size=8, k=3)
    labels = torch.tensor([1, -100, int(ids[2, 0])])
    ids[0, 2] = -1
    temperature = torch.tensor([1.5, 2.0, 0.7], dtype=torch.float64, requires_grad=True)

    def rows(z, tau):
        return topk_ea_kd_loss(
            z * 1,
            ids,
            logprobs,
            labels,
            tail=tail,
            divergence=divergence,
            temperature=tau,
            ce_weight=0.3,
            weighting=lambda s: 1 + s.student_entropy + 0.1 * s.student_lse**2 + s.cross_entropy,
            detach_weights=False,
            student_softcap=5.0,
            student_logit_scale=1.3,
            reduction="none",
            backend=fp64_backend,
        )

    torch.autograd.gradcheck(rows, (student, temperature), fast_mode=False)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_narrower_dtypes_within_the_error_rule(tail, dtype, kernels):
    """Rounded once at the ids too, where the dense part is as large as what the teacher takes off it."""
    student, _, ids, logprobs, entropy = sparse_problem(rows=8, vocab_size=300, k=16)
    rounded, results = student.detach().to(dtype), []
    for z, backend in (
        (leaf(rounded, dtype), kernels),
        (leaf(rounded, torch.float64), "reference"),
        (leaf(rounded, torch.float32), "reference"),
    ):
        options = {"tail": tail, "teacher_entropy": entropy, "reduction": "none", "temperature": 2.0}
        loss, stats = topk_ea_kd_loss(z, ids, logprobs, return_stats=True, backend=backend, **options)
        results.append((loss, stats, torch.autograd.grad(loss.sum(), z)[0]))
    (loss, stats, got), (exact_loss, exact, want), (_, baseline, eager) = results
    for name in ("divergence", "teacher_entropy", "student_entropy", "weight"):
        assert_within_error_rule(*(getattr(s, name) for s in (stats, exact, baseline)), 300)
    assert_within_error_rule(loss, exact_loss, baseline.loss, 300, 4 * exact.weight)
    assert got.dtype == dtype
    assert_gradient_within_rounding(got, want, eager)


def sure(gap, backend):
    """Losses of every row and their gradients, ours and exact, of a student whose ids are `gap` nats ahead."""
    dtype = widest(backend)
    student, _, ids, logprobs, _ = sparse_problem(rows=4, vocab_size=60, k=4)
    student = (student.detach().float() + gap * torch.zeros(4, 60).scatter(-1, ids, 1.0)).to(dtype)
    inputs = [leaf(student, dtype), leaf(student, torch.float64)]
    got = topk_ea_kd_loss(inputs[0], ids, logprobs, reduction="none", backend=backend, **PLAIN)
    want = by_probabilities(inputs[1], ids, logprobs, tail="bucket")
    gradients = [torch.autograd.grad(rows.sum(), z)[0] for rows, z in zip((got, want), inputs, strict=True)]
    return (got.double(), want), (gradients[0].double(), gradients[1])


@pytest.mark.parametrize("gap", [5.0, 15.0, 50.0])
def test_a_student_that_is_sure(gap, backend):
    """The rest's mass is e^-50, and 1 - sum q nothing in fp32: value and gradient stay exact."""
    values, gradients = sure(gap, backend)
    torch.testing.assert_close(*values, rtol=4e-6 if not takes_fp64(backend) else 1e-11, atol=0)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-6)


def test_a_rest_beyond_the_range_of_the_dtype(backend):
    """The value stays exact; what the columns of the rest get fades, and stays finite."""
    values, gradients = sure(100.0, backend)
    torch.testing.assert_close(*values, rtol=4e-6 if not takes_fp64(backend) else 1e-11, atol=0)
    assert gradients[0].isfinite().all() and (gradients[0].abs() <= gradients[1].abs() + 1e-6).all()


def test_a_rest_of_nothing(backend):
    """A vocabulary of which all but the ids is masked, and a student without any column left for a teacher's mass."""
    student, teacher, *_ = sparse_problem(dtype=widest(backend))
    hidden = torch.arange(70) >= 9
    ids, logprobs, *_ = teacher_topk(teacher.masked_fill(hidden, -torch.inf), 9)
    masked = student.detach().masked_fill(hidden, -torch.inf).requires_grad_()
    loss = topk_ea_kd_loss(masked, ids, logprobs, backend=backend, **PLAIN)
    dense = ea_kd_loss(masked[:, :9], teacher[:, :9], backend=backend, **PLAIN)
    torch.testing.assert_close(loss, dense, rtol=4e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, masked)[0] for x in (loss, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    loss = topk_ea_kd_loss(masked, ids, logprobs - 0.1, backend=backend, **PLAIN)
    assert loss == torch.inf
    assert topk_ea_kd_loss(masked, ids, logprobs - 0.1, weighting=torch.zeros(6), backend=backend) == 0


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_left_out(tail, inplace, backend):
    student, _, ids, logprobs, entropy = sparse_problem(dtype=widest(backend))
    mask = torch.tensor([True, False, True, True, False, True])
    labels = torch.tensor([1, 2, -100, 4, 5, int(ids[5, 1])])
    kept = mask & (labels != -100)
    with torch.no_grad():
        student[~kept], logprobs[~kept], entropy[~kept], ids[~kept] = torch.nan, torch.nan, torch.nan, 10**6
    options = {"tail": tail, "ce_weight": 0.5, "teacher_entropy": entropy, "backend": backend, "detach_weights": False}
    logits = student * 1 if inplace else student
    loss = topk_ea_kd_loss(logits, ids, logprobs, labels, mask=mask, inplace_gradient=inplace, **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    if inplace:
        assert gradient.data_ptr() == logits.data_ptr()
    part = leaf(student[kept], student.dtype)
    want = topk_ea_kd_loss(
        part, ids[kept], logprobs[kept], labels[kept], **{**options, "teacher_entropy": entropy[kept]}
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient[kept], torch.autograd.grad(want, part)[0])
    assert not gradient[~kept].any()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_gradient_in_place(dtype, divergence, kernels):
    """The operator sees one tensor as student, teacher and gradient."""
    vocab_size = 300 if interpreted(kernels) else 5000
    for shape in ((5,), (2, 3)):
        student, teacher = make_logits(*shape, vocab_size, dtype=dtype)
        ids, logprobs, *_ = teacher_topk(teacher, 8)
        labels = torch.randint(0, vocab_size, shape)
        options = {"ce_weight": 0.5, "detach_weights": False, "divergence": divergence, "backend": kernels}
        loss = topk_ea_kd_loss(student, ids, logprobs, labels, **options)
        (want,) = torch.autograd.grad(loss, student)
        logits = student * 1
        loss = topk_ea_kd_loss(logits, ids, logprobs, labels, inplace_gradient=True, **options)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.data_ptr() == logits.data_ptr()
        assert torch.equal(gradient, want)


def test_whoever_saved_the_logits_gets_an_error(kernels):
    student, _, ids, logprobs, _ = sparse_problem(dtype=torch.float32)
    logits = student.exp()
    loss = topk_ea_kd_loss(logits, ids, logprobs, inplace_gradient=True, backend=kernels)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_and_wider_logits(backend):
    """[B, L, V] without the last position, whose leading dimensions cannot be one, and a padded vocabulary."""
    student, teacher = make_logits(3, 5, 64, dtype=widest(backend))
    part = student[:, :-1]
    ids, logprobs, *_ = teacher_topk(teacher[:, :-1, :50], 6)
    loss = topk_ea_kd_loss(part, ids, logprobs, vocab_size=50, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    flat = leaf(part[..., :50].reshape(-1, 50), student.dtype)
    want = topk_ea_kd_loss(flat, ids.flatten(0, 1), logprobs.flatten(0, 1), backend=backend)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient[:, :-1, :50].reshape(-1, 50), torch.autograd.grad(want, flat)[0])
    assert not gradient[..., 50:].any() and not gradient[:, -1].any()


def test_one_row_and_none(backend):
    student, teacher = make_logits(20, dtype=widest(backend))
    ids, logprobs, entropy, lse = teacher_topk(teacher, 4)
    assert ids.shape == logprobs.shape == (4,) and entropy.shape == lse.shape == ()
    loss = topk_ea_kd_loss(student, ids, logprobs, backend=backend)
    want = topk_ea_kd_loss(student[None], ids[None], logprobs[None], backend=backend)
    torch.testing.assert_close(loss, want)
    nothing = torch.zeros(0, 20, dtype=student.dtype, requires_grad=True)
    loss = topk_ea_kd_loss(nothing, ids[None][:0], logprobs[None][:0], backend=backend)
    assert loss == 0 and torch.autograd.grad(loss, nothing)[0].shape == (0, 20)


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_of_the_vocabulary_is_kept(tail, kernels):
    """Between forward and backward: the caller's tensors, 9 bytes for each id, and statistics."""
    rows, k = 8, 16
    student, teacher = make_logits(rows, 5000)
    ids, logprobs, *_ = teacher_topk(teacher, k)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        topk_ea_kd_loss(student, ids, logprobs, tail=tail, detach_weights=False, backend=kernels)
    storages.pop(student.untyped_storage().data_ptr())
    assert sum(storages.values()) <= rows * (200 + 64 * (k + 1))


def test_many_blocks_of_rows(kernels, monkeypatch):
    """The rest's sweep copies a few rows at a time."""
    from eakd_kernels import ops

    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(kernels))
    temperature = torch.linspace(0.5, 2, 6)
    mask = torch.arange(6) != 3
    options = {"temperature": temperature, "mask": mask, "reduction": "none", "backend": kernels}
    want = topk_ea_kd_loss(student, ids, logprobs, **options)
    monkeypatch.setitem(ops._BLOCK_BYTES, student.device.type, 2 * 128 * student.element_size())
    assert torch.equal(topk_ea_kd_loss(student, ids, logprobs, **options), want)


def test_a_loss_scale_comes_before_the_rounding(backend):
    """fp16, where the dense part overflows at the ids before they are written over."""
    student, _, ids, logprobs, _ = sparse_problem(dtype=torch.float32)
    ahead = student.detach() + torch.zeros(6, 70).scatter(-1, ids, 12.0)
    half, wide = leaf(ahead, torch.float16), leaf(ahead.half(), torch.float32)
    scale = 2.0**12
    (got,) = torch.autograd.grad(scale * topk_ea_kd_loss(half, ids, logprobs, backend=backend), half)
    (want,) = torch.autograd.grad(scale * topk_ea_kd_loss(wide, ids, logprobs, backend="reference"), wide)
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=1e-4 * scale * 1e-3)


def test_retain_graph_and_double_backward(backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    loss = topk_ea_kd_loss(student, ids, logprobs, backend=backend)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(gradient.pow(2).sum(), student)


@pytest.mark.parametrize("options", [{}, {"tail": "zero", "ce_weight": 0.5}, {"inplace_gradient": True}], ids=str)
def test_compile(options, backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=torch.float32)
    logprobs, labels = logprobs.float(), torch.randint(0, 70, (6,))

    def step(z, k):
        return topk_ea_kd_loss(z * 1, ids, logprobs, k, backend=backend, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(student, labels), step(student, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(2 * loss, student)[0] for loss in (got, want)))


def test_compile_dynamic_rows(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(topk_ea_kd_loss, fullgraph=True, dynamic=True, backend=counter)
    for rows in (2, 3, 8):
        student, _, ids, logprobs, _ = sparse_problem(rows, dtype=torch.float32)
        given = (student, ids, logprobs.float(), torch.randint(0, 70, (rows,)))
        got, want = (loss(*given, ce_weight=0.5, backend=backend) for loss in (compiled, topk_ea_kd_loss))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (got, want)))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    loss_of = lambda z: topk_ea_kd_loss(z, ids, logprobs, backend=backend)  # noqa: E731
    (want,) = torch.autograd.grad(loss_of(student), student)
    checkpoint(loss_of, student, use_reentrant=reentrant).backward()
    assert torch.equal(student.grad, want)


def test_ids_that_nobody_checked(backend, monkeypatch):
    """As on a GPU, or under torch.compile: a row with an id beyond the vocabulary is NaN, and the others are not."""
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    options = {"reduction": "none", "backend": backend}
    want = topk_ea_kd_loss(student, ids, logprobs, **options)
    monkeypatch.setattr(sparse_teacher, "check_ids", lambda *arguments: None)
    ids[1, 3] = 10**9
    rows = topk_ea_kd_loss(student, ids, logprobs, **options)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    others = torch.arange(6) != 1
    assert rows[1].isnan() and gradient[1].isnan().any()
    torch.testing.assert_close(rows[others], want[others])
    assert gradient[others].isfinite().all()


def test_autocast_changes_nothing(backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast(student.device.type, torch.bfloat16, enabled=enabled):
            loss = topk_ea_kd_loss(student, ids, logprobs, detach_weights=False, backend=backend)
            results.append((loss, torch.autograd.grad(loss, student)[0]))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)
