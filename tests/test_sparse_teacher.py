"""A teacher of k columns: golden vectors, its definition in probabilities, and the whole teacher where k = V."""

import itertools
import math
import pickle

import pytest
import torch
from golden import CASES, check, check_loss_and_gradient, load, of_kind
from sparse_problems import DIVERGENCES, PLAIN, TAILS, by_probabilities, models, sparse_problem
from support import FLOATS, leaf, make_logits, takes_fp64, widest

from eakd_kernels import TopKEAKDLoss, divergences, ea_kd_loss, teacher_topk, topk_ea_kd_loss


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


def test_compile_teacher_topk():
    _, teacher = make_logits(4, 60)
    compiled = torch.compile(teacher_topk, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(teacher, 5), teacher_topk(teacher, 5), strict=True):
        torch.testing.assert_close(got, want)


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


def test_teacher_topk_of_a_row_without_mass():
    """It is padding."""
    _, logprobs, entropy, lse = teacher_topk(torch.full((2, 10), -torch.inf), 3)
    assert (logprobs == -torch.inf).all() and not entropy.any() and not lse.any()


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


@pytest.mark.parametrize("tail", TAILS)
def test_fully_masked_vocabulary(tail, backend):
    student = torch.full((2, 20), -torch.inf, requires_grad=True)
    ids, logprobs, entropy, _ = teacher_topk(student.detach(), 4)
    for given in (entropy, None):
        loss, stats = topk_ea_kd_loss(
            student,
            ids,
            logprobs,
            teacher_entropy=given,
            tail=tail,
            weighting="none",
            return_stats=True,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss == 0 and not stats.divergence.any() and not stats.teacher_entropy.any() and not gradient.any()


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
        ({"teacher_logprobs": Y.gather(-1, IDS)}, ValueError, "teacher_logprobs.*log-probabilities.*log_softmax"),
        ({"teacher_logprobs": LOGPROBS.exp()}, ValueError, "teacher_logprobs.*teacher_topk's"),
        ({"teacher_logprobs": torch.full_like(LOGPROBS, -1.0)}, ValueError, "teacher_logprobs.*sum to 1.472"),
        ({"labels": torch.ones(2, 3)}, TypeError, "labels.*float32.*teacher_entropy="),
        ({"teacher_entropy": LOGPROBS}, ValueError, r"teacher_entropy.*\(2, 3\)"),
        ({"teacher_entropy": 1.0}, TypeError, "teacher_entropy.*float"),
        ({"teacher_entropy": torch.ones(2, 3, requires_grad=True)}, ValueError, r"teacher_entropy\.detach\(\)"),
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
        ({"process_group": object()}, TypeError, "process_group.*object"),
        ({"inplace_gradient": True}, ValueError, "inplace_gradient.*leaf"),
        ({"ce_weight": 1.0}, ValueError, "ce_weight.*needs labels"),
        ({"tails": "zero"}, TypeError, "tails.*did you mean 'tail'"),
    ],
)
def test_bad_input(given, error, words):
    with pytest.raises(error, match=words):
        topk_ea_kd_loss(**{"student_logits": Z, "teacher_ids": IDS, "teacher_logprobs": LOGPROBS, **given})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounded_logprobs_are_logprobs(dtype):
    """Those of a uniform teacher are all rounded in the same direction."""
    student = torch.zeros(4, 3000)
    sure = torch.zeros(4, 3000)
    sure[:, 0] = 40
    for teacher in (torch.zeros(4, 3000), sure, make_logits(4, 3000)[1]):
        ids, logprobs, _, _ = teacher_topk(teacher, 3000)
        assert topk_ea_kd_loss(student, ids, logprobs.to(dtype)).isfinite()


def test_padding_and_rows_left_out_may_hold_anything():
    logprobs, ids = LOGPROBS.clone(), IDS.clone()
    logprobs[0, 0], ids[0, 1], logprobs[0, 1] = 7.0, -1, 7.0
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[0, 0] = False
    assert topk_ea_kd_loss(Z, ids, logprobs, mask=keep).isfinite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ids_on_a_gpu_are_checked_where_that_is_asked_for(monkeypatch):
    given = [x.to("cuda") for x in (Z.detach(), TWICE, LOGPROBS)]
    assert topk_ea_kd_loss(*given).isfinite()
    monkeypatch.setenv("EAKD_CHECK_IDS", "1")
    with pytest.raises(ValueError, match="twice"):
        topk_ea_kd_loss(*given)


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"k": 0}, ValueError, r"k must be in 1\.\.10.*0"),
        ({"k": 11}, ValueError, "k must be.*11"),
        ({"k": 2.0}, TypeError, "k must be an int.*float"),
        ({"temperature": 0.0}, ValueError, "temperature.*> 0"),
        ({"temperature": torch.tensor(1.0)}, TypeError, "temperature"),
        ({"entropy_temperature": -1.0}, ValueError, "entropy_temperature"),
        ({"process_group": object()}, TypeError, "process_group.*object"),
    ],
)
def test_teacher_topk_refuses(given, error, words):
    with pytest.raises(error, match=words):
        teacher_topk(**{"logits": Y, "k": 4, **given})


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
