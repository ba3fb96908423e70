"""Ready-made weightings: closed forms, composition in a loss, live gradients, means over sequences."""

import math
from functools import partial

import pytest
import torch
from support import eager, leaf, make_logits, takes_fp64, widest

from eakd_kernels import RowStats, distill_stats, ea_kd_loss, ea_weights, weighting

BOUND = math.log(50)
# What a loss takes, by the formula in (H_T, H_S) that it stands for.
COMPOSED = {
    "confidence": (
        partial(weighting.confidence, entropy_bound=BOUND),
        lambda teacher, student: 1 - teacher / BOUND,
    ),
    "entropy gap": (
        partial(weighting.entropy_gap, entropy_bound=BOUND),
        lambda teacher, student: (teacher - student).abs() / BOUND,
    ),
    "focal": (
        partial(weighting.focal, entropy_bound=BOUND, gamma=1.5),
        lambda teacher, student: (student / BOUND) ** 1.5,
    ),
    "EA-KD behind a gate": (
        lambda s: weighting.ea(s, BOUND) * weighting.threshold(s, teacher_entropy=3.0),
        lambda teacher, student: 0.5 * teacher * (1 + student / BOUND) * (teacher > 3),
    ),
    "mean over sequences": (
        lambda s: weighting.sequence_mean(weighting.student(s, BOUND)),
        lambda teacher, student: student.mean(-1, keepdim=True).expand(student.shape),
    ),
}
# sequence lengths, some of them 0
LENGTHS = {"whole": [4, 3, 5], "empty ones": [0, 2, 0, 0, 7, 0], "one row each": [1] * 6, "one": [9]}


def statistics(teacher_entropy, student_entropy, **fields):
    teacher_entropy, student_entropy = (
        torch.as_tensor(x, dtype=torch.float64) for x in (teacher_entropy, student_entropy)
    )
    other = dict.fromkeys(RowStats._fields) | {"divergence": torch.ones_like(teacher_entropy)} | fields
    return RowStats(**other | {"teacher_entropy": teacher_entropy, "student_entropy": student_entropy})


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0, dtype=dtype)


def mean_by_sequence(weights, lengths, keep=None):
    """As a loop: [rows], the rows behind the last sequence in none."""
    keep = torch.ones_like(weights, dtype=torch.bool) if keep is None else keep
    out, start = torch.zeros_like(weights), 0
    for length in lengths:
        rows = slice(start, start + length)
        if keep[rows].any():
            out[rows] = torch.where(keep[rows], weights[rows][keep[rows]].mean(), 0.0)
        start += length
    return out


def test_closed_forms():
    stats = statistics([0.0, 1.0, 4.0, 3.0], [4.0, 2.0, 4.0, 0.0])
    values = {
        weighting.confidence: [1, 0.75, 0, 0.25],
        weighting.entropy_gap: [1, 0.25, 0, 0.75],
        weighting.focal: [1, 0.25, 1, 0],
        partial(weighting.focal, gamma=0.5): [1, math.sqrt(0.5), 1, 0],
        partial(weighting.focal, gamma=0): [1, 1, 1, 1],
    }
    for function, want in values.items():
        torch.testing.assert_close(function(stats, 4.0), torch.tensor(want, dtype=torch.float64))


def test_a_vocabulary_of_one_has_a_certain_teacher_and_student():
    stats = statistics([0.0, 0.0], [0.0, 0.0])
    assert weighting.confidence(stats, 0.0).tolist() == [1, 1]
    assert not weighting.entropy_gap(stats, 0.0).any() and not weighting.focal(stats, 0.0).any()


def test_confidence_is_never_negative():
    """A uniform row's entropy may round above log V, and a weight below 0 would push the student away."""
    assert weighting.confidence(statistics([1.0 + 1e-7], [0.0]), 1.0).item() == 0


def test_focal_has_a_finite_slope_where_the_student_is_certain(backend):
    student, teacher = make_logits(3, 50, dtype=widest(backend))
    one_hot = torch.cat([student.detach()[:, :1] + 1e4, student.detach()[:, 1:]], -1).requires_grad_()
    mask = torch.tensor([True, False, True])
    focal = partial(weighting.focal, entropy_bound=BOUND, gamma=0.5)
    loss = ea_kd_loss(one_hot, teacher, weighting=focal, detach_weights=False, mask=mask, backend=backend)
    assert torch.autograd.grad(loss, one_hot)[0].isfinite().all()


def test_focal_refuses_a_gamma_that_would_blow_up():
    with pytest.raises(ValueError, match=r"gamma.*-1"):
        weighting.focal(statistics([1.0], [1.0]), 4.0, gamma=-1)


def test_threshold():
    stats = statistics([0.5, 0.8, 0.9, 2.0], [0.4, 0.8, 1.0, 3.0])
    eopd = weighting.threshold(stats, teacher_entropy=0.8)
    assert eopd.tolist() == [0, 0, 1, 1] and eopd.dtype == torch.float64
    assert weighting.threshold(stats, teacher_entropy=0.8, above=0.0, below=1.0).tolist() == [1, 1, 0, 0]
    forward = weighting.threshold(stats, teacher_entropy=stats.student_entropy, above=3, below=1)
    reverse = weighting.threshold(stats, student_entropy=stats.teacher_entropy, above=3, below=1)
    assert forward.tolist() == [3, 1, 1, 1] and reverse.tolist() == [1, 1, 3, 3]
    assert weighting.threshold(stats, teacher_entropy=0.6, student_entropy=torch.tensor(0.9)).tolist() == [0, 0, 1, 1]
    assert weighting.threshold(stats, divergence=0.9, teacher_entropy=1.0).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "limits, error, message",
    [
        ({}, ValueError, "teacher_entropy=0.8"),
        ({"entropy": 0.8}, TypeError, "'entropy'.*teacher_entropy"),
        ({"count": 0.8}, TypeError, "'count'"),  # which tuples have
        ({"cross_entropy": 0.8}, ValueError, "cross_entropy.*labels"),
        ({"teacher_entropy": torch.ones(1, 3)}, ValueError, r"teacher_entropy.*\(3,\).*\(1, 3\)"),
    ],
)
def test_threshold_errors(limits, error, message):
    with pytest.raises(error, match=message):
        weighting.threshold(statistics([1.0] * 3, [1.0] * 3), **limits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_mean_over_packed_sequences(lengths, masked, dtype):
    weights = torch.rand(sum(lengths), dtype=torch.float64)
    keep = torch.rand(len(weights)) > 0.5 if masked else None
    got = weighting.sequence_mean(weights, mask=keep, cu_seqlens=offsets(lengths, dtype))
    torch.testing.assert_close(got, mean_by_sequence(weights, lengths, keep))
    packed = weighting.sequence_mean(
        weights[None], mask=None if keep is None else keep[None], cu_seqlens=offsets(lengths)
    )
    assert torch.equal(packed, got[None])


def test_packed_and_padded_sequences_agree():
    lengths = torch.tensor([3, 0, 6, 1])
    mask = torch.arange(6) < lengths[:, None]
    weights = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    padded = weighting.sequence_mean(weights, mask=mask)
    packed = weighting.sequence_mean(weights[mask], cu_seqlens=offsets(lengths.tolist()))
    torch.testing.assert_close(packed, padded[mask])
    assert not padded[~mask].any()
    rows = weighting.sequence_mean(weights, mask=mask, cu_seqlens=offsets([6, 6, 6, 6]))
    torch.testing.assert_close(rows, padded)
    upstream = torch.rand(4, 6, dtype=torch.float64)
    gradients = [torch.autograd.grad((upstream * x).sum(), weights)[0] for x in (padded, rows)]
    torch.testing.assert_close(*gradients)


def test_rows_in_no_sequence_get_nothing():
    weights = torch.ones(6)
    assert weighting.sequence_mean(weights, cu_seqlens=torch.tensor([1, 3, 4])).tolist() == [0, 1, 1, 1, 0, 0]
    assert not weighting.sequence_mean(weights, cu_seqlens=torch.tensor([0])).any()


def test_no_rows_kept_and_no_rows():
    weights = torch.rand(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for sequences in ({}, {"cu_seqlens": offsets([3, 3])}):
        means = weighting.sequence_mean(weights, mask=nothing, **sequences)
        with torch.autograd.set_detect_anomaly(True):
            assert not means.any() and not torch.autograd.grad(means.sum(), weights)[0].any()
    assert weighting.sequence_mean(torch.rand(0), cu_seqlens=offsets([0, 0])).shape == (0,)
    assert weighting.sequence_mean(torch.rand(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_what_rows_left_out_and_other_sequences_hold_stays_there(packed):
    weights = torch.tensor([[1.0, torch.nan, 3.0], [torch.inf, 1.0, 1.0], [2.0, 2.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, True], [True, True, True]])
    means = weighting.sequence_mean(weights, mask=mask, cu_seqlens=offsets([3, 3, 3]) if packed else None)
    assert means.tolist() == [[2, 0, 2], [torch.inf] * 3, [3, 3, 3]]
    (gradient,) = torch.autograd.grad(means[0].sum(), weights)
    assert gradient.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_a_mean_over_many_rows_is_rounded_once():
    weights = torch.rand(1 << 17)
    means = weighting.sequence_mean(weights, cu_seqlens=offsets([1, (1 << 17) - 1]))
    torch.testing.assert_close(means[1], weights[1:].double().mean().float(), rtol=2**-23, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_made_in_inference_mode(packed):
    with torch.inference_mode():
        mask, cu_seqlens = torch.tensor([True, False, True]), offsets([3]) if packed else None
    weights = torch.ones(3, requires_grad=True)
    weighting.sequence_mean(weights, mask=mask, cu_seqlens=cu_seqlens)[0].backward()
    assert weights.grad.tolist() == [0.5, 0, 0.5]


def test_gradients_of_sequence_means():
    weights = torch.rand(9, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, False, True, True, True, False, True, True, True])
    for cu_seqlens in (None, offsets([3, 0, 5])):
        mean = partial(weighting.sequence_mean, mask=keep, cu_seqlens=cu_seqlens)
        assert torch.autograd.gradcheck(lambda w, mean=mean: mean(w), weights)
        assert torch.autograd.gradgradcheck(lambda w, mean=mean: mean(w) ** 2, weights)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"weights": statistics([1.0], [1.0])}, TypeError, "weights.*RowStats"),
        ({"weights": torch.ones(2, 3, dtype=torch.long)}, TypeError, "weights.*int64"),
        ({"weights": torch.ones(())}, ValueError, "weights.*0-d"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask.*bool.*float32"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask.*\(2, 3\).*\(2,\)"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, ValueError, "mask.*cpu.*meta"),
        ({"cu_seqlens": [0, 3, 6]}, TypeError, "cu_seqlens.*int32.*list"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens.*int32.*float32"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"cu_seqlens.*\[S \+ 1\].*\(1, 2\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.long)}, ValueError, r"cu_seqlens.*\(0,\)"),
        ({"cu_seqlens": torch.tensor([0, 7])}, ValueError, r"cu_seqlens.*6 rows.*\[0, 7\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, r"cu_seqlens.*decrease.*\[0, 4, 2, 6\]"),
        ({"cu_seqlens": torch.tensor([-1, 6])}, ValueError, r"cu_seqlens.*\[-1, 6\]"),
    ],
)
def test_sequence_mean_errors(options, error, message):
    with pytest.raises(error, match=message):
        weighting.sequence_mean(**{"weights": torch.ones(2, 3), **options})


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", COMPOSED)
def test_in_a_loss(name, detach, backend):
    ours, formula = COMPOSED[name]
    student, teacher = make_logits(2, 3, 50, dtype=widest(backend))
    options = {"weighting": ours, "detach_weights": detach, "temperature": 2.0, "backend": backend}
    loss = ea_kd_loss(student, teacher, **options)
    z = leaf(student, student.dtype)
    rows = eager(z, teacher, tau=2.0, weighting="none")
    weight = formula(rows["teacher_entropy"], rows["student_entropy"])
    want = ((weight.detach() if detach else weight) * rows["loss"]).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(want, z)[0])
    weights = ea_weights(student, teacher, weighting=ours, backend=backend)
    torch.testing.assert_close(weights, weight.detach())


@pytest.mark.parametrize("name", COMPOSED)
def test_gradcheck_of_live_weights(name, backend):
    if not takes_fp64(backend):
        pytest.skip("needs fp64")
    student, teacher = make_logits(2, 3, 9, dtype=torch.float64)
    options = {"weighting": COMPOSED[name][0], "detach_weights": False, "backend": backend}
    assert torch.autograd.gradcheck(lambda z: ea_kd_loss(z, teacher, **options), student)


def test_sequence_means_over_the_rows_that_a_loss_keeps(backend):
    student, teacher = make_logits(2, 4, 50, dtype=widest(backend))
    labels = torch.tensor([[-100, 3, 4, -100], [1, 2, 3, 4]])
    mean = partial(weighting.sequence_mean, mask=labels != -100)
    stats = distill_stats(student, teacher, labels, weighting=lambda s: mean(weighting.ea(s, BOUND)), backend=backend)
    token = ea_weights(student, teacher, mask=labels != -100, backend=backend)
    torch.testing.assert_close(stats.weight[0], torch.where(labels[0] != -100, token[0].sum() / 2, 0.0))
    torch.testing.assert_close(stats.weight[1], token[1].mean().expand(4))


def test_compile_of_every_weighting(backend):
    student, teacher = make_logits(6, 50)
    cu_seqlens = offsets([2, 0, 3], torch.int32)
    mask = torch.tensor([True, True, False, True, True, True])

    def everything(s):
        gate = weighting.threshold(s, teacher_entropy=s.student_entropy, above=3, below=1)
        weights = weighting.focal(s, BOUND) + weighting.confidence(s, BOUND) + weighting.entropy_gap(s, BOUND)
        return weighting.sequence_mean(gate * weights, mask=mask, cu_seqlens=cu_seqlens)

    def step(z, y):
        return ea_kd_loss(z, y, weighting=everything, detach_weights=False, backend=backend)

    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(student, teacher), step(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (got, want)))


def test_compile_of_a_weighting_that_is_defined_inside():
    def step(z, y, scale):
        def bounded(stats, entropy_bound):
            return scale * stats.student_entropy / entropy_bound

        loss = ea_kd_loss(z, y, weighting=bounded, detach_weights=False)
        return loss + ea_kd_loss(z, y, weighting=lambda stats: scale * stats.teacher_entropy)

    student, teacher = make_logits(6, 50)
    given = (student, teacher, torch.tensor(1.5))
    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(*given), step(*given)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (got, want)))


@pytest.mark.parametrize(
    "read, error, message",
    [
        (lambda s: s.loss * 2, TypeError, "weighting read.*NoneType.*no loss, weight, cross_entropy"),
        (lambda s: s.weight.exp(), AttributeError, "weighting read.*exp.*no loss, weight"),
        (lambda s: torch.log(s.cross_entropy), TypeError, "weighting read.*cross_entropy needs labels"),
        (lambda s: s.loss, ValueError, "weighting returned NoneType.*no loss"),
        (lambda s: s.divergence.nosuch, AttributeError, "^'Tensor' object has no attribute 'nosuch'$"),
        (lambda s: s.divergence + "1", TypeError, "^(?!weighting)"),
    ],
)
def test_a_callable_that_reads_what_is_not_there(read, error, message):
    with pytest.raises(error, match=message):
        ea_kd_loss(torch.randn(6, 10), torch.randn(6, 10), weighting=read)


def test_a_callable_gets_what_it_asks_for():
    """H_ub where it has a parameter for it, and cross-entropy wherever there are labels."""
    z, y, labels = torch.randn(6, 10), torch.randn(6, 10), torch.randint(0, 9, (6,))
    bound = math.log(9)
    plain = ea_kd_loss(z, y, vocab_size=9)
    assert torch.equal(ea_kd_loss(z, y, vocab_size=9, weighting=weighting.ea), plain)
    sharp = partial(weighting.focal, gamma=1.0)
    expected = ea_kd_loss(z, y, vocab_size=9, weighting=lambda s: weighting.focal(s, bound, gamma=1.0))
    assert torch.equal(ea_kd_loss(z, y, vocab_size=9, weighting=sharp), expected)
    given = partial(weighting.confidence, entropy_bound=2.0)
    expected = ea_kd_loss(z, y, weighting=lambda s: weighting.confidence(s, 2.0))
    assert torch.equal(ea_kd_loss(z, y, weighting=given), expected)

    class Learned(torch.nn.Module):
        def forward(self, stats, entropy_bound):
            return stats.student_entropy / entropy_bound

    loss = ea_kd_loss(z, y, vocab_size=9, weighting=Learned())
    assert torch.allclose(loss, ea_kd_loss(z, y, vocab_size=9, weighting="student", weight_norm="bound"))
    assert ea_kd_loss(z, y, labels, weighting=lambda s: s.cross_entropy).isfinite()
