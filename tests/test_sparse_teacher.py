"""A teacher of k columns: golden vectors, its definition in probabilities, and the whole teacher where k = V."""

import itertools
import math
import pickle
import re
from pathlib import Path

import pytest
import torch
from golden import CASES, check, check_loss_and_gradient, load, of_kind
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

from eakd_kernels import TopKEAKDLoss, divergences, ea_kd_loss, sparse_teacher, teacher_topk, topk_ea_kd_loss

TAILS = ["bucket", "renormalize", "zero"]
PLAIN = {"weighting": "none", "scale_by_temperature_squared": False}
DIVERGENCES = ["forward_kl", "reverse_kl", "jeffreys", divergences.JSD(0.3)]
# The others have no mass to compare with outside of the ids.
MODELS = [("renormalize", "forward_kl"), ("zero", "forward_kl"), *(("bucket", d) for d in DIVERGENCES)]
models = pytest.mark.parametrize("tail, divergence", MODELS, ids=[f"{tail}-{d}" for tail, d in MODELS])


def by_probabilities(student, ids, logprobs, *, tail, divergence="forward_kl", tau=1.0, generated=1.0):
    """Row divergences from probabilities in fp64, column by column: slow, and nothing is done in the log domain."""
    q_all, rows = (student.double() / tau).softmax(-1), []
    for q, chosen, logp in zip(q_all, ids, logprobs.double(), strict=True):
        given = (chosen >= 0) & (logp > -torch.inf)
        chosen, v = chosen[given].long(), logp[given].exp()
        power, rest = v ** (generated / tau), (1 - v.sum()) ** (generated / tau)
        p = power / (power.sum() + (0 if tail == "renormalize" else rest))
        named = q[chosen]
        others = torch.ones_like(q, dtype=torch.bool)
        others[chosen] = False
        if tail == "bucket":
            p, named = torch.cat([p, (1 - p.sum())[None]]), torch.cat([named, q[others].sum()[None]])
        kind = divergences.BY_NAME[divergence] if isinstance(divergence, str) else divergence
        rows.append(kind.columns(p.log(), named.log()).sum())
    return torch.stack(rows)


def sparse_problem(rows=6, vocab_size=70, k=9, dtype=torch.float64, seed=0, scale=3.0):
    student, teacher = make_logits(rows, vocab_size, dtype=dtype, seed=seed, scale=scale)
    ids, logprobs, entropy, _ = teacher_topk(teacher.double() if student.device.type == "cpu" else teacher, k)
    return student, teacher, ids, logprobs, entropy


@pytest.mark.parametrize("name", of_kind("sparse_kl"))
def test_published(name, backend):
    """DistillKit; its "zero" renormalises the teacher over the k."""
    data, params = load(name), CASES[name]["params"]
    student = leaf(data["student"], widest(backend))
    options = {
        "tail": {"ZERO": "renormalize", "SYMMETRIC_UNIFORM": "bucket"}[params["missing"]],
        "teacher_temperature": params["target_generation_temperature"],
        "temperature": params["tau"],
        "mask": data["mask"].bool(),
        "num_items": params["num_items_in_batch"],
        "weighting": "none",
        "return_stats": True,
        "backend": backend,
    }
    loss, stats = topk_ea_kd_loss(student, data["target_ids"], data["target_logprobs"], **options)
    check_loss_and_gradient(name, loss, student, data)
    check(stats.loss, data["rows"], 1e-11, 1e-11)


@models
@pytest.mark.parametrize("tau, generated", [(1.0, 1.0), (2.0, 1.0), (1.5, 3.0)])
def test_definition(tail, divergence, tau, generated, backend):
    student, _, ids, logprobs, _ = sparse_problem()
    given = {"tail": tail, "divergence": divergence}
    inputs = [leaf(student, widest(backend)), student.detach().requires_grad_()]
    got = topk_ea_kd_loss(
        inputs[0],
        ids.int(),
        logprobs,
        temperature=tau,
        teacher_temperature=generated,
        reduction="none",
        backend=backend,
        **given,
        **PLAIN,
    )
    want = by_probabilities(inputs[1], ids, logprobs, tau=tau, generated=generated, **given)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if takes_fp64(backend) else {"rtol": 4e-6, "atol": 4e-6}
    torch.testing.assert_close(got.double(), want, **tolerance)
    upstream = torch.linspace(-1, 2, len(got))
    gradients = [
        torch.autograd.grad((rows * upstream).sum(), z)[0] for rows, z in zip((got, want), inputs, strict=True)
    ]
    torch.testing.assert_close(gradients[0].double(), gradients[1], **tolerance)


@models
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_all_columns_are_the_whole_teacher(tail, divergence, tau, backend):
    dtype = widest(backend)
    student, teacher = make_logits(5, 40, dtype=dtype)
    labels = torch.tensor([3, -100, 7, 0, 39])
    options = {"temperature": tau, "ce_weight": 0.3, "divergence": divergence, "return_stats": True, "backend": backend}
    ids, logprobs, entropy, lse = teacher_topk(teacher, 40, entropy_temperature=2.0)
    loss, stats = topk_ea_kd_loss(student, ids, logprobs, labels, tail=tail, entropy_temperature=2.0, **options)
    dense, dense_stats = ea_kd_loss(student, teacher, labels, entropy_temperature=2.0, **options)
    torch.testing.assert_close(loss, dense, rtol=4e-6, atol=1e-6)
    for name in ("loss", "weight", "divergence", "teacher_entropy", "student_entropy", "student_lse", "cross_entropy"):
        torch.testing.assert_close(getattr(stats, name), getattr(dense_stats, name), rtol=4e-6, atol=1e-6)
    assert stats.teacher_lse is None
    torch.testing.assert_close(torch.where(labels == -100, 0.0, entropy), stats.teacher_entropy, rtol=4e-6, atol=1e-6)
    torch.testing.assert_close(lse[[0, 2, 3, 4]], (teacher[[0, 2, 3, 4]]).logsumexp(-1), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x, student)[0] for x in (loss, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_bucket_is_never_more_than_the_whole(divergence, fp64_backend):
    """Data processing: merging outcomes brings distributions closer, and never further apart."""
    student, teacher = make_logits(6, 70, dtype=torch.float64)
    options = {"divergence": divergence, "reduction": "none", "backend": fp64_backend, **PLAIN}
    values = [topk_ea_kd_loss(student, *teacher_topk(teacher, k)[:2], **options) for k in (1, 4, 16)]
    values.append(ea_kd_loss(student, teacher, **options))
    for less, more in itertools.pairwise(values):
        assert (less <= more + 1e-12).all()
    same = topk_ea_kd_loss(teacher, *teacher_topk(teacher, 4)[:2], **options)
    torch.testing.assert_close(same, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-13)


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


def test_a_teacher_that_is_sure(backend):
    """Its rest is below what fp32 can say, yet not nothing: the reverse KL stays finite."""
    student, *_ = make_logits(3, 50)
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    logprobs = torch.tensor([[0.0, -30.0], [0.0, -torch.inf], [1e-7, -15.0]])
    for divergence in DIVERGENCES:
        loss = topk_ea_kd_loss(student, ids, logprobs, divergence=divergence, backend=backend, **PLAIN)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all()
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_padding_is_as_if_it_were_not_there(tail, backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    padded_ids = torch.cat([torch.full_like(ids[:, :2], -1), ids, torch.full_like(ids[:, :1], 3)], -1)
    padded = torch.nn.functional.pad(logprobs, (2, 1), value=-0.5)
    padded[:, -1] = -torch.inf
    options = {"tail": tail, "ce_weight": 0.5, "detach_weights": False, "backend": backend}
    labels = torch.randint(0, 70, (6,))
    results = []
    for given in ((ids, logprobs), (padded_ids, padded)):
        loss, stats = topk_ea_kd_loss(student, *given, labels, return_stats=True, **options)
        results.append((loss, stats.teacher_entropy, torch.autograd.grad(loss, student)[0]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_of_padding_says_nothing(tail, backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    ids[2] = -1
    rows = topk_ea_kd_loss(student, ids, logprobs, tail=tail, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert rows[2].abs() < 1e-6 and gradient[2].abs().max() < 1e-6
    assert (rows[[0, 1, 3, 4, 5]] != 0).all()
    labels = torch.arange(6)
    hard = topk_ea_kd_loss(student, ids, logprobs, labels, tail=tail, kd_weight=0.0, ce_weight=1.0, backend=backend)
    want = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(hard, want, rtol=4e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (hard, want)), rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("tail", TAILS)
def test_temperatures(tail, backend):
    """One per row, a 0-d tensor, and what they get as a gradient."""
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    student = student.detach()
    taus = torch.linspace(0.7, 3.0, 6, dtype=torch.float64).requires_grad_()
    options = {"tail": tail, "weighting": "none", "reduction": "none", "backend": backend}
    rows = topk_ea_kd_loss(student, ids, logprobs, temperature=taus, **options)
    want = torch.stack(
        [
            tau**2 * by_probabilities(student[i : i + 1], ids[i : i + 1], logprobs[i : i + 1], tail=tail, tau=tau)[0]
            for i, tau in enumerate(taus)
        ]
    )
    tolerance = 1e-10 if takes_fp64(backend) else 1e-5
    torch.testing.assert_close(rows.double(), want, rtol=tolerance, atol=tolerance)
    gradients = [torch.autograd.grad(x.sum(), taus)[0] for x in (rows, want)]
    torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=10 * tolerance)
    one = torch.tensor(2.0, requires_grad=True)
    loss = topk_ea_kd_loss(student, ids, logprobs, temperature=one, **options).sum()
    same = topk_ea_kd_loss(student, ids, logprobs, temperature=2.0, **options).sum()
    torch.testing.assert_close(loss, same)
    assert torch.autograd.grad(loss, one)[0].isfinite()


def test_entropy_of_each_tail(backend):
    student, teacher, ids, logprobs, exact = sparse_problem(dtype=widest(backend))
    v, t = logprobs.double().exp(), 3.0
    power, rest = v ** (1 / t), (1 - v.sum(-1, keepdim=True)) ** (1 / t)
    total = power.sum(-1, keepdim=True) + rest
    minus = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    want = {
        "bucket": minus(torch.cat([power, rest], -1) / total),
        "renormalize": minus(power / power.sum(-1, keepdim=True)),
        "zero": minus(power / total),
    }
    for tail, entropy in want.items():
        _, stats = topk_ea_kd_loss(student, ids, logprobs, tail=tail, return_stats=True, backend=backend)
        torch.testing.assert_close(stats.teacher_entropy.double(), entropy, rtol=4e-6, atol=1e-6)
        assert (stats.teacher_entropy < exact).all()
    options = {"return_stats": True, "backend": backend}
    _, stats = topk_ea_kd_loss(student, ids, logprobs, teacher_entropy=exact, **options)
    _, dense = ea_kd_loss(student, teacher, **options)
    torch.testing.assert_close(stats.weight, dense.weight, rtol=4e-6, atol=1e-6)


def test_weights_and_reductions(backend):
    student, _, ids, logprobs, exact = sparse_problem(dtype=widest(backend))
    options = {"teacher_entropy": exact, "backend": backend}
    rows = topk_ea_kd_loss(student, ids, logprobs, reduction="none", **options)
    weightings = [
        lambda s: 0.5 * s.teacher_entropy * (1 + s.student_entropy / math.log(70)),
        topk_ea_kd_loss(student, ids, logprobs, return_stats=True, **options)[1].weight,
    ]
    for weighting in weightings:
        again = topk_ea_kd_loss(student, ids, logprobs, reduction="none", weighting=weighting, **options)
        torch.testing.assert_close(again, rows)
    for reduction, factor in (("mean", 1 / 6), ("sum", 1.0)):
        loss = topk_ea_kd_loss(student, ids, logprobs, reduction=reduction, **options)
        torch.testing.assert_close(loss, factor * rows.sum())
    torch.testing.assert_close(topk_ea_kd_loss(student, ids, logprobs, num_items=9, **options), rows.sum() / 9)
    bound = topk_ea_kd_loss(student, ids, logprobs, weight_norm="bound", **options)
    torch.testing.assert_close(bound, rows.mean() / math.log(70))
    _, stats = topk_ea_kd_loss(student, ids, logprobs, weight_norm="mean", return_stats=True, **options)
    torch.testing.assert_close(stats.weight.mean(), torch.ones((), dtype=stats.weight.dtype))


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


def test_compile_teacher_topk():
    _, teacher = make_logits(4, 60)
    compiled = torch.compile(teacher_topk, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(teacher, 5), teacher_topk(teacher, 5), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=widest(backend))
    loss_of = lambda z: topk_ea_kd_loss(z, ids, logprobs, backend=backend)  # noqa: E731
    (want,) = torch.autograd.grad(loss_of(student), student)
    checkpoint(loss_of, student, use_reentrant=reentrant).backward()
    assert torch.equal(student.grad, want)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_teacher_topk(dtype, temperature):
    _, logits = make_logits(4, 3, 300, dtype=dtype, offset=200.0)
    ids, logprobs, entropy, lse = teacher_topk(logits, 5, temperature=temperature, entropy_temperature=2.0)
    exact = (logits.double() / temperature).log_softmax(-1)
    want, _ = exact.sort(-1, descending=True)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(logprobs.double(), want[..., :5], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(exact.gather(-1, ids), want[..., :5])
    torch.testing.assert_close(lse.double(), (logits.double() / temperature).logsumexp(-1), rtol=tolerance, atol=0)
    p = (logits.double() / 2).softmax(-1)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=tolerance, atol=tolerance)
    assert ids.dtype == torch.int64
    assert logprobs.dtype == entropy.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)


def test_a_teacher_out_of_inference_mode(backend):
    student, teacher = make_logits(4, 60, dtype=widest(backend))
    with torch.inference_mode():
        ids, logprobs, entropy, _ = teacher_topk(teacher * 1, 7)
    for given in ({}, {"teacher_entropy": entropy, "detach_weights": False}):
        loss = topk_ea_kd_loss(student, ids, logprobs, backend=backend, **given)
        assert torch.autograd.grad(loss, student)[0].any()


def test_module():
    student, _, ids, logprobs, entropy = sparse_problem(dtype=torch.float32)
    module = TopKEAKDLoss(tail="renormalize", teacher_temperature=2.0, weight_norm="bound")
    options = {"tail": "renormalize", "teacher_temperature": 2.0, "weight_norm": "bound", "teacher_entropy": entropy}
    want = topk_ea_kd_loss(student, ids, logprobs, **options)
    assert torch.equal(module(student, ids, logprobs, teacher_entropy=entropy), want)
    assert torch.equal(pickle.loads(pickle.dumps(module))(student, ids, logprobs, teacher_entropy=entropy), want)
    assert repr(module) == "TopKEAKDLoss(tail='renormalize', teacher_temperature=2.0, weight_norm='bound')"
    with pytest.raises(ValueError, match="tail"):
        TopKEAKDLoss(tail="none")


Z, Y = make_logits(2, 3, 10)
IDS, LOGPROBS, _, _ = teacher_topk(Y, 4)
TWICE = IDS.clone()
TWICE[1, 2, 3] = TWICE[1, 2, 0]


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"student_logits": Z.detach().long()}, TypeError, "student_logits.*int64"),
        ({"student_logits": Z.tolist()}, TypeError, "student_logits.*list"),
        ({"teacher_ids": IDS[..., :3]}, ValueError, r"same shape.*\(2, 3, 3\).*\(2, 3, 4\)"),
        ({"teacher_ids": IDS[0]}, ValueError, r"teacher_ids.*\(2, 3\).*got \(3, 4\)"),
        ({"teacher_ids": IDS.float()}, TypeError, "teacher_ids.*float32"),
        ({"teacher_ids": IDS.tolist()}, TypeError, "teacher_ids.*list"),
        ({"teacher_ids": IDS + 10}, ValueError, "teacher_ids must be below 10"),
        ({"teacher_ids": IDS, "vocab_size": 5}, ValueError, "teacher_ids must be below 5"),
        ({"teacher_ids": TWICE}, ValueError, f"got {int(TWICE[1, 2, 0])} twice"),
        ({"teacher_ids": IDS.to("meta")}, ValueError, "teacher_ids.*meta"),
        ({"teacher_logprobs": IDS}, TypeError, "teacher_logprobs.*int64"),
        ({"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, ValueError, r"teacher_logprobs\.detach\(\)"),
        ({"teacher_entropy": LOGPROBS}, ValueError, r"teacher_entropy.*\(2, 3\)"),
        ({"teacher_entropy": 1.0}, TypeError, "teacher_entropy.*float"),
        ({"tail": "drop"}, ValueError, "tail.*bucket.*drop"),
        ({"tail": None}, TypeError, "tail.*None"),
        ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature.*> 0"),
        ({"temperature": (1.0, 2.0)}, ValueError, "temperature.*several"),
        ({"tail": "zero", "divergence": "reverse_kl"}, ValueError, 'reverse_kl.*needs tail="bucket"'),
        ({"tail": "renormalize", "divergence": divergences.JSD(0.5)}, ValueError, 'JSD.*needs tail="bucket"'),
        ({"standardize": True}, ValueError, "standardize does not go with a sparse teacher.*False"),
        ({"teacher_class_weights": torch.ones(10)}, ValueError, "teacher_class_weights.*sparse"),
        ({"teacher_softcap": 30.0}, ValueError, "teacher_softcap.*capped already"),
        ({"teacher_logit_scale": 0.5}, ValueError, "teacher_logit_scale.*scaled already"),
        ({"process_group": object()}, NotImplementedError, "process_group"),
        ({"inplace_gradient": True}, ValueError, "inplace_gradient.*leaf"),
        ({"ce_weight": 1.0}, ValueError, "ce_weight.*needs labels"),
        ({"tails": "zero"}, TypeError, "tails.*did you mean 'tail'"),
    ],
)
def test_bad_input(given, error, words):
    with pytest.raises(error, match=words):
        topk_ea_kd_loss(**{"student_logits": Z, "teacher_ids": IDS, "teacher_logprobs": LOGPROBS, **given})


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ids_on_a_gpu_are_checked_where_that_is_asked_for(monkeypatch):
    given = [x.to("cuda") for x in (Z.detach(), TWICE, LOGPROBS)]
    assert topk_ea_kd_loss(*given).isfinite()
    monkeypatch.setenv("EAKD_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="twice"):
        topk_ea_kd_loss(*given)


def test_autocast_changes_nothing(backend):
    student, _, ids, logprobs, _ = sparse_problem(dtype=torch.float32)
    results = []
    for enabled in (False, True):
        with torch.autocast(student.device.type, torch.bfloat16, enabled=enabled):
            loss = topk_ea_kd_loss(student, ids, logprobs, detach_weights=False, backend=backend)
            results.append((loss, torch.autograd.grad(loss, student)[0]))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"k": 0}, ValueError, r"k must be in 1\.\.10.*0"),
        ({"k": 11}, ValueError, "k must be.*11"),
        ({"k": 2.0}, TypeError, "k must be an int.*float"),
        ({"temperature": 0.0}, ValueError, "temperature.*> 0"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature"),
        ({"entropy_temperature": -1.0}, ValueError, "entropy_temperature"),
        ({"process_group": object()}, NotImplementedError, "process_group"),
    ],
)
def test_teacher_topk_refuses(given, error, words):
    with pytest.raises(error, match=words):
        teacher_topk(**{"logits": Y, "k": 4, **given})


def test_page():
    """docs/sparse.md."""
    page = (Path(__file__).parents[1] / "docs" / "sparse.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/sparse.md", "exec"), {})


def test_every_divergence_on_the_bucket(fp64_backend):
    student, _, ids, logprobs, _ = sparse_problem()
    for divergence in (
        divergences.SkewForwardKL(0.1),
        divergences.TotalVariation(),
        divergences.SquaredHellinger(),
        divergences.AlphaBeta(0.2, 0.7),
    ):
        got = topk_ea_kd_loss(
            student, ids, logprobs, divergence=divergence, reduction="none", backend=fp64_backend, **PLAIN
        )
        torch.testing.assert_close(got, by_probabilities(student, ids, logprobs, tail="bucket", divergence=divergence))
