"""fused_linear_ea_kd_loss over heads whose rows, the vocabulary, are sharded, against the same call on whole heads."""

import pytest
import torch
from processes import Collectives
from shards import LAYOUTS, ROWS, VOCAB, assert_close, gradient_twice, own_columns, positions
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from eakd_kernels import divergences as D
from eakd_kernels import fused_linear_ea_kd_loss, sharded_formulas, teacher_topk
from eakd_kernels.stats import RowStats

WIDTHS = 12, 20
MERGED = {
    "plain": {},
    "cross-entropy": {"ce_weight": 0.5, "temperature": 2.0},
    "mean weights": {"weight_norm": "mean"},
    "live weights": {"detach_weights": False, "reduction": "sum"},
    "rows": {"reduction": "none", "mask": torch.arange(ROWS) != 3},
    "nothing kept": {"mask": torch.zeros(ROWS, dtype=torch.bool)},
    "temperatures of rows": {"temperature": torch.linspace(0.5, 4, ROWS), "num_items": 5},
    "jeffreys": {"divergence": D.Jeffreys(0.9), "ce_weight": 0.3},
    "temperatures": {"temperature": (1.0, 2.0, 5.0)},
    "caps and class weights": {
        **{"student_softcap": 5.0, "teacher_logit_scale": 1.2},
        **{"teacher_class_weights": torch.linspace(0.2, 3, VOCAB)},
    },
    "cut": {"vocab_size": 40, "ce_weight": 0.5},
}
FORMULAS = {
    "reference": {"backend": "reference", "ce_weight": 0.5},
    "JSD": {"divergence": D.JSD(0.3), "ce_weight": 0.5, "temperature": (1.0, 3.0)},
    "total variation": {"divergence": D.TotalVariation(), "vocab_size": 40, "mask": torch.arange(ROWS) % 3 != 0},
    "alpha-beta": {"divergence": D.AlphaBeta(0.5, 0.7), "detach_weights": False, "weight_norm": "mean"},
    "JSD of nothing": {"divergence": D.JSD(0.5), "mask": torch.zeros(ROWS, dtype=torch.bool)},
    "hellinger": {
        **{"divergence": D.SquaredHellinger(), "student_softcap": 9.0, "reduction": "none"},
        **{"teacher_class_weights": torch.linspace(0.2, 3, VOCAB)},
    },
    "temperature that learns": {"temperature": torch.tensor(2.0, requires_grad=True)},
    "temperatures that learn": {
        **{"temperature": torch.linspace(1, 3, ROWS).requires_grad_(), "divergence": D.SkewForwardKL(0.1)},
        **{"ce_weight": 0.2},
    },
}
STANDARDIZED = {
    "standardised": {"standardize": True, "temperature": 2.0, "ce_weight": 0.5},
    "all standardised": {"standardize": "all", "detach_weights": False, "divergence": D.SkewReverseKL(0.2)},
}
DENSE = {
    **{name: (options, 1) for name, options in MERGED.items()},
    **{name: (options, 2) for name, options in FORMULAS.items()},
    **{name: (options, 3) for name, options in STANDARDIZED.items()},
}
SPARSE = {
    "bucket": ({"ce_weight": 0.5, "temperature": 2.0}, 2),
    "bucket jeffreys": ({"divergence": "jeffreys", "mask": torch.arange(ROWS) != 3}, 2),
    "renormalize": ({"tail": "renormalize", "reduction": "none"}, 2),
    "zero": ({"tail": "zero", "detach_weights": False, "vocab_size": 55}, 2),
    "nothing kept": ({"mask": torch.zeros(ROWS, dtype=torch.bool)}, 2),
    "caps": ({"student_softcap": 5.0, "teacher_temperature": 2.0, "temperature": 3.0, "divergence": D.JSD(0.3)}, 2),
    "learns": ({"temperature": torch.tensor(2.0, requires_grad=True), "ce_weight": 0.1}, 2),
    "of rows": ({"temperature": torch.linspace(1, 3, ROWS).requires_grad_(), "student_logit_scale": 0.7}, 2),
    "reference": ({"backend": "reference", "ce_weight": 0.5}, 1),
    "reference of rows": (
        {"backend": "reference", "temperature": torch.linspace(1, 3, ROWS).requires_grad_(), "tail": "zero"},
        1,
    ),
}


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student = [random(ROWS, WIDTHS[0]), random(VOCAB, WIDTHS[0]), random(VOCAB)]
    return student, [random(ROWS, WIDTHS[1]), random(VOCAB, WIDTHS[1])]


def call(student, labels, options, columns=slice(None), *, teacher=(None, None), logits=None, topk=None):
    """(loss, statistics, gradients of (hidden, weight, bias, temperature), collectives) of some columns."""
    hidden, weight, bias = student
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[columns], bias[columns])]
    temperature = options.get("temperature")
    if torch.is_tensor(temperature) and temperature.requires_grad:
        leaves.append(temperature.detach().clone().requires_grad_())
        options = {**options, "temperature": leaves[-1]}
    hidden, weight, bias = leaves[:3]
    other, head = teacher
    given = {"teacher_weight": None if head is None else head[columns], "teacher_topk": topk}
    given["teacher_logits"] = None if logits is None else logits[:, columns]
    with Collectives() as forward:
        loss, stats = fused_linear_ea_kd_loss(
            hidden, weight, other, labels=labels, student_bias=bias, chunk_rows=3, return_stats=True, **given, **options
        )
    with Collectives() as backward:
        gradients = torch.autograd.grad((loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum(), leaves)
    counts = [sum(dtype == torch.int64 for _, dtype in forward.calls), len(forward.calls), len(backward.calls)]
    return loss.detach(), stats, gradients, counts


def sharded(widths, student, labels, options, block, teacher):
    options = {**options, "process_group": dist.group.WORLD}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sharded_formulas._BLOCK, "cpu", block)
        return call(student, labels, options, own_columns(widths), **teacher)


def topk_of(teacher, tensors=4):
    """The first of what teacher_topk returns, with some padding."""
    hidden, weight = teacher
    topk = teacher_topk((hidden @ weight.T)[:, :55], 9)
    topk[0][::2, 0], topk[1][1::4, 2] = -1, -torch.inf
    return {"topk": topk[:tensors]}


# Of statistics, gradients and a temperature's gradient. Two products of matrices round a logit differently, and a sum
# of gradients in 16 bits is rounded once more.
BOUNDS = {
    torch.float64: (1e-12, 1e-12, 1e-11),
    torch.float32: (1e-6, 3e-6, 1e-5),
    torch.bfloat16: (1e-6, torch.finfo(torch.bfloat16).eps, 1e-5),
}


def check(world, layout, teacher, case, labels, block=1 << 20, dtype=torch.float32):
    options, collectives = case
    student, widths, (bound, gradient_bound, slope_bound) = make(dtype)[0], LAYOUTS[layout], BOUNDS[dtype]
    loss, stats, gradients, _ = call(student, labels, options, **teacher)
    answers = world(len(widths)).run(sharded, widths, student, labels, options, block, teacher)
    for got, its_stats, its_gradients, counts in answers:
        assert torch.equal(got, answers[0][0])
        assert_close(got, loss, 4 * bound)  # w tau^2 times the divergence, and what that is off by
        for name, field, want in zip(RowStats._fields, its_stats, stats, strict=True):
            assert (field is None) == (want is None), name
            if want is not None:
                assert_close(field, want, 4 * bound if name == "loss" else bound, name)
        # A temperature's gradient is whole on every rank.
        for got, want in zip(its_gradients[3:], gradients[3:], strict=True):
            assert_close(got, want, slope_bound, "the temperature's gradient")
        assert counts == [1, 1 + collectives, 0]
    # The hidden states' gradient comes in summands, the heads' in parts.
    hidden = sum(answer[2][0] for answer in answers)
    weight, bias = (torch.cat([answer[2][i] for answer in answers]) for i in (1, 2))
    for got, want in zip((hidden, weight, bias), gradients, strict=False):
        assert (got - want).norm() <= gradient_bound * want.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", DENSE)
def test_equals_whole_heads(case, layout, world):
    check(world, layout, {"teacher": make()[1]}, DENSE[case], positions(ROWS))


@pytest.mark.parametrize("case", DENSE)
def test_equals_whole_heads_in_fp64(case, world):
    teacher = make(torch.float64)[1]
    check(world, "4 uneven", {"teacher": teacher}, DENSE[case], positions(ROWS), dtype=torch.float64)


@pytest.mark.parametrize("case", ["cross-entropy", "caps and class weights", "JSD"])
def test_dtypes(case, world):
    check(world, "4 uneven", {"teacher": make()[1]}, DENSE[case], positions(ROWS), dtype=torch.bfloat16)


@pytest.mark.parametrize("case", ["cross-entropy", "caps and class weights", "bucket"])
def test_backends(case, world, kernels):
    options, collectives = {**DENSE, **SPARSE}[case]
    teacher = topk_of(make()[1]) if case in SPARSE else {"teacher": make()[1]}
    check(world, "2 uneven", teacher, ({**options, "backend": kernels}, collectives), positions(ROWS))


@pytest.mark.parametrize("case", ["JSD", "hellinger", "standardised"])
def test_blocks_of_a_chunk(case, world):
    """One row each, which formulas in fp64 are computed for at a time."""
    check(world, "4 uneven", {"teacher": make()[1]}, DENSE[case], positions(ROWS), block=1)


def teacher_as(form, teacher, columns=slice(None)):
    hidden, weight = teacher
    if form == "hidden states":
        return {"teacher_hidden": hidden, "teacher_weight": weight[columns]}
    logits = hidden @ weight.T
    return {"teacher_logits": logits[:, columns]} if form == "logits" else {"teacher_topk": teacher_topk(logits, 9)[:2]}


def without_columns(student, teacher, form):
    """As many rows a chunk as memory allows."""
    columns = own_columns((VOCAB, 0))
    weight, teacher = student[1][columns].clone().requires_grad_(), teacher_as(form, teacher, columns)
    loss = fused_linear_ea_kd_loss(student[0], weight, **teacher, process_group=dist.group.WORLD)
    loss.backward()
    return loss.detach(), weight.grad


@pytest.mark.parametrize("form", ["hidden states", "logits", "top k"])
def test_a_rank_without_columns(form, world):
    student, teacher = make()
    (loss, gradient), (other, nothing) = world(2).run(without_columns, student, teacher, form)
    weight = student[1].clone().requires_grad_()
    whole = fused_linear_ea_kd_loss(student[0], weight, **teacher_as(form, teacher))
    assert torch.equal(loss, other) and not len(nothing)
    assert_close(loss, whole.detach(), 4e-6)
    assert (gradient - torch.autograd.grad(whole, weight)[0]).norm() <= 3e-6 * gradient.norm()


@pytest.mark.parametrize("case", ["plain", "JSD"])
def test_teachers_as_logits(case, world):
    hidden, weight = make()[1]
    check(world, "2 uneven", {"logits": hidden @ weight.T}, DENSE[case], positions(ROWS))


@pytest.mark.parametrize("layout, dtype", [*((name, torch.float32) for name in LAYOUTS), ("4 uneven", torch.float64)])
@pytest.mark.parametrize("case", SPARSE)
def test_sparse_teachers(case, layout, dtype, world):
    teacher = topk_of(make(dtype)[1], 2 if case == "renormalize" else 4)  # its own entropy, or the whole teacher's
    check(world, layout, teacher, SPARSE[case], positions(ROWS), dtype=dtype)


# ---- behaviour ---------------------------------------------------------------------------------------------------


def behaviour(widths, student, teacher, topk, options):
    columns = own_columns(widths)
    hidden, weight, bias = student[0], student[1][columns], student[2][columns]
    teacher = {"teacher_topk": topk} if topk else {"teacher_hidden": teacher[0], "teacher_weight": teacher[1][columns]}
    options = {**options, **teacher, "process_group": dist.group.WORLD, "chunk_rows": 3}

    def loss_of(hidden, weight=weight, bias=bias, **more):
        return fused_linear_ea_kd_loss(hidden, weight, student_bias=bias, **options, **more)

    leaf = hidden.clone().requires_grad_()
    loss = loss_of(leaf)
    gradient, same = gradient_twice(loss, leaf)
    leaves = [x.clone().requires_grad_() for x in (weight, bias)]
    frozen = loss_of(hidden, *leaves)
    all_of_them = torch.autograd.grad(loss_of(leaf, *leaves), [leaf, *leaves])
    of_heads = [gradient_twice(frozen, x)[0] for x in leaves]
    temperature = torch.tensor(1.0, requires_grad=True)
    slope, same_slope = gradient_twice(loss_of(hidden, temperature=temperature), temperature)
    with torch.no_grad():
        quiet = loss_of(leaf)
    again = checkpoint(loss_of, leaf, use_reentrant=False)
    return {
        "again": same and same_slope and torch.equal(loss, loss_of(leaf)),
        "frozen": all(map(torch.equal, all_of_them, (gradient, *of_heads))),
        "without gradients": torch.equal(quiet, loss) and not quiet.requires_grad,
        "checkpointed": torch.equal(torch.autograd.grad(again, leaf)[0], gradient),
        "in the temperature alone": bool(slope != 0),
    }


@pytest.mark.parametrize("case", ["plain", "JSD", "sparse", "sparse reference"])
def test_behaviour(case, world):
    student, teacher = make()
    topk = teacher_topk(teacher[0] @ teacher[1].T, 9)[:2] if "sparse" in case else None
    options = {"JSD": {"divergence": D.JSD(0.3)}, "sparse reference": {"backend": "reference"}}.get(case, {})
    for answer in world(2).run(behaviour, LAYOUTS["2 even"], student, teacher, topk, options):
        assert all(answer.values()), answer


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that PyTorch makes while the context is open."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        for x in tree_leaves(found):
            if torch.is_tensor(x):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


def largest(width, rows, options, k):
    student = torch.randn(rows, 4, requires_grad=True), torch.randn(width, 4, requires_grad=True)
    teacher = {"teacher_hidden": torch.randn(rows, 4), "teacher_weight": torch.randn(width, 4)}
    if k is not None:
        teacher = {"teacher_topk": (torch.arange(k).expand(rows, k), torch.full((rows, k), -4.0))}
    with Largest() as seen:
        fused_linear_ea_kd_loss(*student, **teacher, chunk_rows=4, process_group=dist.group.WORLD, **options).backward()
    return seen.bytes


@pytest.mark.parametrize(
    "options, k",
    [
        *(({}, None), ({"divergence": D.JSD(0.5)}, None), ({"standardize": True}, None)),
        *(({}, 5), ({"backend": "reference"}, 5)),
    ],
    ids=str,
)
def test_logits_of_all_rows_are_never_there(options, k, world):
    width, rows = 1000, 64
    for got in world(2).run(largest, width, rows, options, k):
        assert 4 * width * 4 <= got < rows * width * 4 / 2  # a chunk's, in fp32, and what is exchanged
