"""fused_linear_ea_kd_loss against the dense call on logits that were made: values, dX, dW, db, for every option."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import interpreted
from torch.utils.checkpoint import checkpoint

from eakd_kernels import (
    FusedLinearEAKDLoss,
    ea_kd_loss,
    fused_linear_ea_kd_loss,
    teacher_topk,
    topk_ea_kd_loss,
    weighting,
)
from eakd_kernels import divergences as d

ROWS, WIDTHS, VOCAB = (3, 7), (16, 24), 50
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3}  # of a norm; one rounding, for 16 bits


def tensors(dtype=torch.float32, rows=ROWS, vocab_size=VOCAB):
    """Student's hidden states, weight and bias, which require grad, and the teacher's."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student = [random(*rows, WIDTHS[0]), random(vocab_size, WIDTHS[0]), random(vocab_size)]
    teacher = [random(*rows, WIDTHS[1]), random(vocab_size, WIDTHS[1]), random(vocab_size)]
    return [x.requires_grad_() for x in student], teacher


def project(hidden, weight, bias):
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.nn.functional.linear(hidden.to(wide), weight.to(wide), bias.to(wide))


def labels_with_gaps():
    labels = torch.arange(21).reshape(ROWS)
    labels[0, 2], labels[2] = -100, -100
    return labels


LABELS, MASK = labels_with_gaps(), (torch.arange(21) % 3 > 0).reshape(ROWS)
PER_ROW = torch.linspace(1, 3, 21).reshape(ROWS)
OPTIONS = {
    "plain": {},
    "labels": dict(labels=LABELS, ce_weight=0.3),
    "mask": dict(mask=MASK),
    "nothing kept": dict(mask=torch.zeros(ROWS, dtype=torch.bool)),
    "reduction none": dict(reduction="none", mask=MASK),
    "sum, num_items": dict(reduction="sum", num_items=7),
    "num_items tensor": dict(num_items=torch.tensor(9)),
    "mean weights": dict(weight_norm="mean", labels=LABELS),
    "bound": dict(weight_norm="bound", entropy_bound=3.0),
    "callable": dict(weighting=weighting.focal, mask=MASK),
    "weights": dict(weighting=PER_ROW, mask=MASK),
    "live": dict(detach_weights=False),
    "temperature of rows": dict(temperature=PER_ROW, mask=MASK),
    "learnt temperature": dict(temperature=torch.tensor(2.0, requires_grad=True), mask=MASK),
    "learnt temperature of rows": dict(temperature=PER_ROW.clone().requires_grad_(), labels=LABELS),
    "temperatures": dict(temperature=(1.0, 2.0)),
    "reverse KL": dict(divergence="reverse_kl"),
    "JSD": dict(divergence=d.JSD(0.3)),
    "standardised": dict(standardize=True, mask=MASK),
    "class weights": dict(teacher_class_weights=torch.linspace(0.5, 2, VOCAB)),
    "caps and scales": dict(student_softcap=5.0, teacher_softcap=6.0, student_logit_scale=0.5, teacher_logit_scale=2.0),
    "vocab_size": dict(vocab_size=VOCAB - 7),
    "statistics": dict(return_stats=True, labels=LABELS),
}

ON_EVERY_BACKEND = ("plain", "labels", "mask", "mean weights", "learnt temperature of rows", "standardised")


def loss_and_gradients(function, inputs, **options):
    """Of a scalar in which every row's loss has a factor of its own."""
    temperature = options.get("temperature")
    if torch.is_tensor(temperature) and temperature.requires_grad:
        options["temperature"] = temperature.detach().requires_grad_()
        inputs = [*inputs, options["temperature"]]
    loss = function(**options)
    loss, stats = loss if options.get("return_stats") else (loss, ())
    scalar = (loss * torch.linspace(1, 2, loss.numel()).reshape(loss.shape)).sum()
    return [loss.detach(), *stats, *torch.autograd.grad(scalar, inputs)]


def assert_close(got, wanted, tolerance):
    for value, right in zip(got, wanted, strict=True):
        assert (value is None) == (right is None)
        if value is not None:
            assert value.dtype == right.dtype
            assert (value.double() - right.double()).norm() <= tolerance * right.double().norm()


def both(dtype, option, backend="auto", form="hidden", **how):
    student, teacher = tensors(dtype)
    options = dict(OPTIONS[option], backend=backend)
    dense = loss_and_gradients(
        lambda **options: ea_kd_loss(project(*student), project(*teacher), **options), student, **options
    )
    given = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True))
    if form == "logits":
        given = dict(teacher_logits=project(*teacher))
    hidden, weight, bias = student
    fused = loss_and_gradients(
        lambda **options: fused_linear_ea_kd_loss(hidden, weight, student_bias=bias, **given, **how, **options),
        student,
        **options,
    )
    return fused, dense


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equals_the_dense_call(dtype, option, recompute, backend):
    slow = interpreted(backend) or (backend == "cuda" and not torch.cuda.is_available())
    if slow and (dtype != torch.float32 or option not in ON_EVERY_BACKEND):
        pytest.skip("chunks are made alike for all backends, and an interpreter or emulator is slow")
    if dtype == torch.float64 and backend not in ("cpu", "reference"):
        pytest.skip("no fp64 there")
    assert_close(*both(dtype, option, backend, chunk_rows=4, recompute=recompute), TOLERANCES[dtype])


@pytest.mark.parametrize("option", ["plain", "labels", "mask"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 21, 1000, None])
def test_chunks_of_any_size_and_teachers_as_logits(chunk_rows, option):
    assert_close(*both(torch.float32, option, form="logits", chunk_rows=chunk_rows), 3e-6)


SPARSE = ["plain", "labels", "mask", "callable", "live", "mean weights", "learnt temperature of rows", "statistics"]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("option", SPARSE)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
def test_sparse_teachers(tail, option, recompute):
    (hidden, weight, bias), teacher = tensors()
    ids, logprobs, entropy, lse = teacher_topk(project(*teacher), 8)
    how = dict(tail=tail, teacher_temperature=1.5, **OPTIONS[option])
    wanted = loss_and_gradients(
        lambda **options: topk_ea_kd_loss(
            project(hidden, weight, bias), ids, logprobs, teacher_entropy=entropy, **options
        ),
        [hidden, weight, bias],
        **how,
    )
    got = loss_and_gradients(
        lambda **options: fused_linear_ea_kd_loss(
            hidden,
            weight,
            teacher_topk=(ids, logprobs, entropy, lse),
            student_bias=bias,
            chunk_rows=4,
            recompute=recompute,
            **options,
        ),
        [hidden, weight, bias],
        **how,
    )
    assert_close(got, wanted, 3e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_heads_and_tied_weights(recompute):
    (hidden, weight, bias), teacher = tensors()
    teacher = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True))

    def gradients(**frozen):
        given = {name: x.detach() if frozen.get(name) else x for name, x in (("x", hidden), ("w", weight), ("b", bias))}
        loss = fused_linear_ea_kd_loss(given["x"], given["w"], student_bias=given["b"], recompute=recompute, **teacher)
        return torch.autograd.grad(loss, (hidden, weight, bias), allow_unused=True)

    all_of_them = gradients()
    for name, place in (("x", 0), ("w", 1), ("b", 2)):
        some = gradients(**{name: True})
        assert some[place] is None
        assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(some, all_of_them, strict=True)) if i != place)

    embedding = torch.randn(VOCAB, WIDTHS[0], requires_grad=True)
    states = embedding[torch.arange(21).reshape(ROWS)]
    tied = fused_linear_ea_kd_loss(states, embedding, recompute=recompute, **teacher)
    dense = ea_kd_loss(states @ embedding.T, project(*teacher.values()))
    wanted = torch.autograd.grad(dense, embedding, retain_graph=True)  # both go through `states`
    assert_close(torch.autograd.grad(tied, embedding), wanted, 3e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_retained_graphs_scales_and_second_derivatives(recompute):
    (hidden, weight, _), (other, head, _) = tensors()
    loss = fused_linear_ea_kd_loss(hidden, weight, other, head, recompute=recompute)
    once = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    assert_close(once, [3 * x for x in again], 3e-6)
    (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()
    loss = fused_linear_ea_kd_loss(hidden, weight, other, head, recompute=recompute)
    loss *= 3
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(torch.autograd.grad(loss, (hidden, weight)), once, 3e-6)


@pytest.mark.parametrize("name", ["teacher_weight", "teacher_topk[0]", "labels", "temperature"])
def test_what_backward_reads_again_must_not_change(name):
    (hidden, weight, _), (other, head, _) = tensors()
    temperature, topk = torch.full(ROWS, 2.0), teacher_topk(other @ head.T, 4)[:2]
    given = dict(teacher_topk=topk) if "topk" in name else dict(teacher_hidden=other, teacher_weight=head)
    labels = LABELS.clone()
    changed = {"teacher_weight": head, "teacher_topk[0]": topk[0], "labels": labels, "temperature": temperature}[name]
    for recompute in (False, True):
        how = dict(labels=labels, ce_weight=0.5, temperature=temperature, recompute=recompute)
        loss = fused_linear_ea_kd_loss(hidden, weight, **given, **how)
        changed.mul_(1)
        if recompute:
            with pytest.raises(RuntimeError, match=rf"{re.escape(name)} was modified in place"):
                loss.backward()
        else:
            loss.backward()


def test_without_gradients_nothing_is_kept():
    (hidden, weight, _), (other, head, _) = tensors()
    with torch.no_grad():
        loss, stats = fused_linear_ea_kd_loss(hidden, weight, other, head, return_stats=True)
    assert not loss.requires_grad and stats.weight.shape == ROWS
    dense = ea_kd_loss(hidden @ weight.T, other @ head.T)
    assert torch.allclose(loss, dense)
    assert fused_linear_ea_kd_loss(hidden[:0], weight, other[:0], head) == 0


def test_logits_are_not_rounded_to_16_bits():
    """bf16 hidden states and weights: the loss is that of their exact product."""
    student, teacher = tensors(torch.bfloat16)
    hidden, weight, bias = student
    given = dict(zip(("teacher_hidden", "teacher_weight", "teacher_bias"), teacher, strict=True))
    loss = fused_linear_ea_kd_loss(hidden, weight, student_bias=bias, **given)
    exact = ea_kd_loss(*(project(*(x.detach().double() for x in side)) for side in (student, teacher)))
    assert abs(loss - exact) <= 4e-6 * exact
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_linear_ea_kd_loss(hidden, weight, student_bias=bias, **given), loss)


def test_sums_in_fp32_or_in_the_weights_dtype():
    """A weight's gradient over 64 chunks: once rounded, or 64 times."""
    (hidden, weight, _), (other, head, _) = tensors(torch.bfloat16, rows=(64,))
    exact = torch.autograd.grad(
        ea_kd_loss(*(x.float() @ w.float().T for x, w in ((hidden, weight), (other, head)))), weight
    )[0].double()
    off = {}
    for accumulate_in_fp32 in (True, False):
        loss = fused_linear_ea_kd_loss(hidden, weight, other, head, chunk_rows=1, accumulate_in_fp32=accumulate_in_fp32)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.dtype == torch.bfloat16
        off[accumulate_in_fp32] = (gradient.double() - exact).norm() / exact.norm()
    assert off[True] < 2.5e-3 < off[False] < 4e-2


MIXED = [  # hidden states, weight, the teacher's weight
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float64, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float64),
]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulate_in_fp32", [True, False])
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
def test_mixed_dtypes(dtypes, accumulate_in_fp32, recompute):
    (hidden, weight, _), (other, head, _) = tensors()
    hidden, weight, head = (
        x.detach().to(dtype).requires_grad_(x.requires_grad)
        for x, dtype in zip((hidden, weight, head), dtypes, strict=True)
    )
    how = dict(mask=MASK, chunk_rows=4, recompute=recompute, accumulate_in_fp32=accumulate_in_fp32)
    loss = fused_linear_ea_kd_loss(hidden, weight, other, head, **how)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    dense = ea_kd_loss(hidden.to(wide) @ weight.to(wide).T, other.to(wide) @ head.to(wide).T, mask=MASK)
    assert loss.dtype == wide
    got, wanted = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, dense))
    assert_close(got, wanted, 2e-2 if torch.bfloat16 in dtypes else 3e-6)


def test_fp16_gradients_survive_a_loss_scale():
    (hidden, weight, _), (other, head, _) = tensors(torch.float16)
    loss = fused_linear_ea_kd_loss(hidden, weight, other, head, kd_weight=1e-6) * 2.0**16
    gradients = torch.autograd.grad(loss, (hidden, weight))
    dense = ea_kd_loss(hidden.float() @ weight.float().T, other.float() @ head.float().T, kd_weight=1e-6) * 2.0**16
    assert_close(gradients, torch.autograd.grad(dense, (hidden, weight)), 2e-3)
    hidden, weight, bias = hidden.float(), weight.float(), torch.zeros(VOCAB, dtype=torch.float16, requires_grad=True)
    loss = fused_linear_ea_kd_loss(hidden, weight, other, head, student_bias=bias, kd_weight=1e-9) * 2.0**24
    dense = ea_kd_loss(hidden @ weight.T + bias, other.float() @ head.float().T, kd_weight=1e-9) * 2.0**24
    assert_close(torch.autograd.grad(loss, [bias]), torch.autograd.grad(dense, [bias]), 2e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_and_checkpointed(recompute):
    """torch.compile goes around it; a checkpoint runs it again."""
    (hidden, weight, _), (other, head, _) = tensors()

    def loss(hidden, weight):
        return fused_linear_ea_kd_loss(2 * hidden, weight, other, head, recompute=recompute)

    wanted = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.autograd.grad(torch.compile(loss)(hidden, weight), (hidden, weight))
    again = torch.autograd.grad(checkpoint(loss, hidden, weight, use_reentrant=False), (hidden, weight))
    assert_close(compiled, wanted, 1e-6)
    assert_close(again, wanted, 1e-6)


def test_fullgraph_says_what_would_work():
    (hidden, weight, _), (other, head, _) = tensors()
    compiled = torch.compile(fused_linear_ea_kd_loss, fullgraph=True, backend="eager")
    with pytest.raises(
        RuntimeError, match=r"fused_linear_ea_kd_loss runs eagerly, between two graphs.*fullgraph=False"
    ):
        compiled(hidden, weight, other, head)


def test_module_keeps_options():
    (hidden, weight, _), (other, head, _) = tensors()
    criterion = FusedLinearEAKDLoss(chunk_rows=4, temperature=2.0)
    expected = ea_kd_loss(hidden @ weight.T, other @ head.T, temperature=2.0)
    assert torch.allclose(criterion(hidden, weight, other, head), expected)
    assert "chunk_rows=4" in repr(criterion)
    with pytest.raises(TypeError, match="did you mean 'temperature'"):
        FusedLinearEAKDLoss(temprature=2.0)


X, W = torch.zeros(2, 3, 4), torch.zeros(9, 4)
BAD = [
    (dict(), ValueError, "one form, got none"),
    (dict(teacher_hidden=X, teacher_weight=W, teacher_logits=torch.zeros(2, 3, 9)), ValueError, "one form, got"),
    (dict(teacher_hidden=X, teacher_weight=torch.nn.Linear(4, 9)), TypeError, r"teacher_weight.*Linear; pass \.weight"),
    (dict(teacher_hidden=SimpleNamespace(last_hidden_state=X)), TypeError, r"teacher_hidden.*pass \.last_hidden_state"),
    (dict(teacher_logits=SimpleNamespace(logits=X)), TypeError, r"teacher_logits.*; pass \.logits"),
    (dict(teacher_hidden=X), TypeError, "teacher_weight must be a floating-point tensor, got NoneType"),
    (dict(teacher_hidden=X, teacher_weight=torch.zeros(9, 5)), ValueError, r"teacher_weight must be \[V, 4\]"),
    (dict(teacher_hidden=X, teacher_weight=torch.zeros(8, 4)), ValueError, "vocab_size=8"),
    (dict(teacher_hidden=X[:1], teacher_weight=W), ValueError, r"leading shape of student_hidden, \(2, 3\)"),
    (dict(teacher_hidden=X, teacher_weight=W.clone().requires_grad_()), ValueError, r"teacher_weight.detach\(\)"),
    (dict(teacher_logits=torch.zeros(2, 3, 9), teacher_bias=W[:, 0]), ValueError, "go with teacher_hidden"),
    (dict(teacher_hidden=X, teacher_weight=W, student_bias=torch.zeros(8)), ValueError, r"student_bias must be \[9\]"),
    (dict(teacher_topk=(X.long(),)), TypeError, r"\(ids, logprobs\).*got 1 tensors"),
    (dict(teacher_topk=(X.long(), X), standardize=True), ValueError, "sparse teacher"),
    (dict(teacher_topk=(X.long(), X), tail="none"), ValueError, "tail"),
    (dict(teacher_topk=(X.long(), X.transpose(0, 1))), ValueError, r"teacher_logprobs must be .*\(2, 3\)"),
    (dict(teacher_topk=(X.long(), X[..., :2])), ValueError, r"same shape, got \(2, 3, 4\) and \(2, 3, 2\)"),
    (dict(teacher_topk=(X.long(), None)), TypeError, "teacher_logprobs must be a tensor, got NoneType"),
    (dict(teacher_topk=(X.long(), X, X[..., 0].flatten())), ValueError, r"teacher_entropy.*\(2, 3\)"),
    (dict(teacher_hidden=X, teacher_weight=W, teacher_temperature=2.0), ValueError, "go with teacher_topk, got"),
    (dict(teacher_logits=torch.zeros(2, 3, 9), tail="zero"), ValueError, "go with teacher_topk, got teacher_logits"),
    (
        dict(teacher_hidden=X, teacher_weight=W, teacher_bias=torch.zeros(9, requires_grad=True)),
        ValueError,
        r"teacher_bias.detach\(\)",
    ),
    (dict(teacher_hidden=X, teacher_weight=W, chunk_rows=0), ValueError, "chunk_rows must be an int >= 1"),
    (dict(teacher_hidden=X, teacher_weight=W, chunk_rows=True), ValueError, "chunk_rows must be an int >= 1"),
    (dict(teacher_hidden=X, teacher_weight=W, recompute="yes"), TypeError, "recompute"),
    (dict(teacher_hidden=X, teacher_weight=W, inplace_gradient=True), TypeError, "inplace_gradient"),
    (dict(teacher_hidden=X, teacher_weight=W, mask=torch.ones(3, dtype=torch.bool)), ValueError, "mask"),
    (dict(teacher_hidden=X, teacher_weight=W, labels=torch.full((2, 3), 9), ce_weight=1.0), ValueError, "labels"),
]


@pytest.mark.parametrize("given, error, words", BAD, ids=range(len(BAD)))
def test_bad_input(given, error, words):
    with pytest.raises(error, match=words):
        fused_linear_ea_kd_loss(X, W, **given)


MEASURE = """
import torch
from eakd_kernels import fused_linear_ea_kd_loss
torch.set_num_threads(1)
H, V, N = 32, 49152, {rows}
x, w = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
y, head = torch.randn(N, H), torch.randn(V, H)
fused_linear_ea_kd_loss(x, w, y, head, recompute={recompute}).backward()
print(__import__("resource").getrusage(__import__("resource").RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_does_not_grow_with_rows(recompute):
    """512 rows more are 100 MB more of logits, and must not be there."""
    peak = [
        int(subprocess.check_output([sys.executable, "-c", MEASURE.format(rows=rows, recompute=recompute)]))
        for rows in (512, 1024)
    ]
    assert peak[1] - peak[0] < 16 * 1024  # in KB
