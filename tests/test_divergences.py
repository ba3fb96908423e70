"""Every divergence on every backend: against 50 digits where fp32 is strained, and against fp64 under every option."""

import math

import pytest
import torch
from exact import divergence_and_gradient
from support import (
    assert_gradient_within_rounding,
    assert_within_error_rule,
    interpreted,
    leaf,
    make_logits,
)

from eakd_kernels import distill_stats, ea_dkd_loss, ea_kd_loss
from eakd_kernels import divergences as d

DIVERGENCES = [
    d.ForwardKL(),
    d.ReverseKL(),
    d.Jeffreys(0.3),
    d.JSD(0.5),
    d.JSD(0.1),
    d.SkewForwardKL(0.1),
    d.SkewForwardKL(0.9),
    d.SkewReverseKL(0.1),
    d.SkewReverseKL(0.0),
    d.TotalVariation(),
    d.AlphaBeta(0.2, 0.7),
    d.AlphaBeta(0.02, 0.05),
    d.AlphaBeta(0.3, -0.1),
    d.AlphaBeta(0.0, 0.6),
    d.AlphaBeta(0.6, 0.0),
    d.AlphaBeta(0.1, -0.1),
    d.AlphaBeta(0.0, 0.0),
    d.AlphaBeta(1.5, 0.5),
    d.SquaredHellinger(),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COLUMNS = 24


def strained_rows():
    """Names of rows -> (student, teacher) [1, V], which bf16 and fp16 hold exactly."""
    student, teacher = make_logits(1, COLUMNS, dtype=torch.float64)
    student, teacher = (x.detach().to(torch.bfloat16).double() for x in (student, teacher))
    sign = 1 - 2 * (torch.arange(COLUMNS) % 2).double()
    step = torch.zeros(1, COLUMNS, dtype=torch.float64)
    step[0, ::5] = 2.0**-6
    one_hot = torch.zeros(1, COLUMNS, dtype=torch.float64)
    one_hot[0, 3] = 200
    masked = torch.zeros(1, COLUMNS, dtype=torch.float64)
    masked[0, [0, 7, COLUMNS - 1]] = -torch.inf
    near = (teacher * 16).round() / 16
    return {
        "ordinary": (student, teacher),
        "saturated at 30": (30 * sign[None], -30 * sign.roll(5)[None]),
        "saturated at 300": (300 * sign.roll(1)[None] - 128 * step, 300 * sign[None] - 2 * (sign < 0)),
        "saturated alike": (300 * sign[None] - 128 * step, 300 * sign[None]),
        "near-identical": (near.clamp(-3.5, 3.5) + step, near.clamp(-3.5, 3.5)),
        "identical": (near, near),
        "one-hot teacher": (student, one_hot),
        "one-hot student": (one_hot, teacher),
        "uniform": (torch.full_like(teacher, 5.0), torch.full_like(teacher, -2.0)),
        "masked": (student + masked, teacher + masked),
    }


def on_device(*tensors):
    return [tensor.to(torch.get_default_device()) for tensor in tensors]


def bare(student, teacher, divergence, backend, **options):
    """(D, its gradient) at temperature 1."""
    stats = distill_stats(student, teacher, divergence=divergence, backend=backend, **options)
    return stats.divergence, torch.autograd.grad(stats.divergence.sum(), student)[0]


def check_strained(names, got, exact, plain, size, there, rounding=0.0):
    """The error rule for rows of very different size: all errors relative to max(1, |D|), eager's worst over all rows.

    got, exact, plain: [N] or [N, V]; size: [N], what D is; there: rows that are looked at. rounding: of a gradient's
    dtype.
    """
    size = size.abs().clamp(min=1).reshape(-1, *[1] * (got.dim() - 1))
    eager = ((plain.double() - exact).abs() / size)[there & plain.reshape(len(plain), -1).isfinite().all(-1)].max()
    allowed = min(2 * eager + 2.0**-22 * math.log(COLUMNS), 4e-6)
    excess = (got.double() - exact).abs() - (allowed * size + rounding * (exact.abs() + allowed * size))
    worst = excess.reshape(len(got), -1).amax(-1)
    for name, off, looked_at in zip(names, worst.tolist(), there.tolist(), strict=True):
        assert off <= 0 or not looked_at, f"{name}: {off:.3g} more than {allowed:.3g} of max(1, |D|)"


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_strained_rows_to_fifty_digits(divergence, kernels):
    with torch.device("cpu"):
        torch.manual_seed(0)
        rows = strained_rows()
    student, teacher = on_device(*(torch.cat(side) for side in zip(*rows.values(), strict=True)))
    value, gradient = divergence_and_gradient(divergence, student, teacher)
    for dtype in DTYPES:
        assert torch.equal(student.to(dtype).double(), student), "no row may be rounded"
        z, y = leaf(student, dtype), teacher.to(dtype)
        got, got_gradient = bare(z, y, divergence, kernels)
        plain, plain_gradient = bare(leaf(z, torch.float32), y.float(), divergence, "reference")
        there = value.abs() < torch.finfo(torch.float32).max / 100  # negative powers of next to nothing are not
        assert (got[~there] > 1e30).all()
        if isinstance(divergence, d.AlphaBeta) and sum(divergence.parameters()) == 0:
            # Every column counts alike, and log p = -866 log 2 has steps of 6e-5 in fp32.
            there &= torch.tensor(["300" not in name and "alike" not in name for name in rows], device=there.device)
        check_strained([*rows], got, value, plain, value, there)
        rounding = 0.0 if dtype == torch.float32 else 0.5 * torch.finfo(dtype).eps
        there &= gradient.abs().amax(-1) < torch.finfo(dtype).max / 2
        check_strained([*rows], got_gradient, gradient, plain_gradient, value, there, rounding)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_fp64_to_fifty_digits(divergence, fp64_backend):
    student, teacher = make_logits(3, COLUMNS, dtype=torch.float64)
    value, gradient = divergence_and_gradient(divergence, student, teacher)
    got, got_gradient = bare(student, teacher, divergence, fp64_backend)
    # The reference has the sums as they are defined, which cancel for small powers.
    small = 1e-11 if divergence == d.AlphaBeta(0.02, 0.05) and fp64_backend == "reference" else 0.0
    torch.testing.assert_close(got, value, rtol=1e-12, atol=max(1e-13, small))
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-10, atol=max(1e-13, small))


OPTIONS = {
    "plain": {},
    "live weights": {"detach_weights": False},
    "temperatures": {"temperature": (2.0, 3.0, 4.0, 5.0, 6.0)},
    "incommensurate": {"temperature": (1.3, 2.9)},
    "standardised": {"standardize": True},
    "standardised, live": {"standardize": True, "detach_weights": False},
    "all standardised, live": {"standardize": "all", "detach_weights": False, "temperature": 2.0},
    "capped": {"student_softcap": 4.0, "teacher_softcap": 5.0},
    "scaled": {"student_logit_scale": 0.5, "teacher_logit_scale": 0.25},
    "unscaled loss": {"temperature": (1.0, 4.0), "scale_by_temperature_squared": False},
}


def call(divergence, student, teacher, labels, backend, **options):
    if divergence == "DKD":
        return ea_dkd_loss(
            student, teacher, labels, alpha=0.7, beta=2.0, backend=backend, **{"temperature": 1.0, **options}
        )
    return ea_kd_loss(student, teacher, labels, divergence=divergence, backend=backend, **options)


def options_of(option, rows, vocab_size):
    """OPTIONS, and those that are tensors."""
    with torch.device(torch.get_default_device() or "cpu"):
        tensors = {
            "class weights": {"teacher_class_weights": torch.linspace(0.2, 3.0, vocab_size).roll(7)},
            "a temperature for every row": {"temperature": torch.linspace(0.7, 3.0, rows), "standardize": True},
        }
    return tensors[option] if option in tensors else OPTIONS[option]


@pytest.mark.parametrize("option", [*OPTIONS, "class weights", "a temperature for every row"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES[:4], d.SkewForwardKL(0.1), d.AlphaBeta(0.2, 0.7), "DKD"], ids=str)
def test_options(divergence, option, kernels):
    """In fp32 to the error rule, with and without one pass, and with the mask, labels and padding of a real batch."""
    vocab_size, rows = 301 if interpreted(kernels) else 2503, 8  # enough to know what eager is off by
    student, teacher = make_logits(rows, vocab_size + 3)
    labels = torch.arange(rows, device=student.device) * 7
    labels[1] = -100
    options = {**options_of(option, rows, vocab_size), "ce_weight": 0.3, "vocab_size": vocab_size}

    def run(dtype, backend, **more):
        z = leaf(student, dtype)
        loss, stats = call(divergence, z, teacher.to(dtype), labels, backend, return_stats=True, **options, **more)
        return stats, torch.autograd.grad(loss.sum(), z)[0]

    exact, exact_gradient = run(torch.float64, "reference")
    plain, plain_gradient = run(torch.float32, "reference")
    # D is a sum of divergences with these factors, and each of them is held to the rule.
    temperatures = options.get("temperature", 1.0)
    scaled = isinstance(temperatures, tuple) and options.get("scale_by_temperature_squared", True)
    parts = torch.tensor(2.7 if divergence == "DKD" else 1.0) * (sum(tau**2 for tau in temperatures) if scaled else 1)
    for more in ({}, {"reduction": "none"}):
        stats, gradient = run(torch.float32, kernels, **more)
        tau_squared = 1.0 if isinstance(temperatures, tuple) else temperatures**2
        factors = {"divergence": parts, "loss": parts * exact.weight * tau_squared}
        for field in exact._fields:
            got, want, base = (getattr(s, field) for s in (stats, exact, plain))
            assert (got is None) == (want is None), field
            if got is not None:
                assert_within_error_rule(got, want, base, vocab_size, factors.get(field))
        scale = 1 / (rows - 1) if not more else 1.0
        wanted = [g.double() * scale * (rows - 1) for g in (exact_gradient, plain_gradient)]
        assert_gradient_within_rounding(gradient, *wanted, terms=scale * exact.loss.max().item())
        assert not gradient[1].any() and not gradient[:, vocab_size:].any()


@pytest.mark.parametrize("divergence", [d.ReverseKL(), d.JSD(0.3), "DKD"], ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 37), (4, 4128)], ids=str)
def test_gradient_in_place_and_strided_logits(shape, divergence, kernels):
    student, teacher = make_logits(*shape)
    labels = torch.arange(student[..., 0].numel(), device=student.device).reshape(shape[:-1])
    (want,) = torch.autograd.grad(call(divergence, student, teacher, labels, kernels), student)
    over = student * 1
    loss = call(divergence, over, teacher, labels, kernels, inplace_gradient=True)
    (got,) = torch.autograd.grad(loss, over)
    assert got.data_ptr() == over.data_ptr()
    assert torch.equal(got, want)
    apart = torch.empty(*shape[:-1], 2 * shape[-1] + 1, device=student.device)[..., 1::2].copy_(student.detach())
    loss = call(divergence, apart.requires_grad_(), teacher.mT.contiguous().mT, labels, kernels)
    torch.testing.assert_close(torch.autograd.grad(loss, apart)[0], want, rtol=4e-6, atol=3e-7)


@pytest.mark.parametrize("standardize", [False, True, "all"], ids=str)
@pytest.mark.parametrize("live", [False, True], ids=["detached", "live"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, "DKD"], ids=str)
def test_gradcheck(divergence, live, standardize, fp64_backend):
    student, teacher = make_logits(3, 6, dtype=torch.float64, scale=1.0)
    labels = torch.tensor([0, 5, 2])
    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    options = {"detach_weights": not live, "standardize": standardize}

    def loss(z, tau):
        return call(divergence, z, teacher, labels, fp64_backend, temperature=tau, reduction="none", **options)

    # Detached weights are constants of the loss, and no numerical difference may see them move.
    weights = None
    if not live:
        with torch.no_grad():
            weights = call(divergence, student, teacher, labels, fp64_backend, return_stats=True, **options)[1].weight
        options["weighting"] = weights
    assert torch.autograd.gradcheck(loss, (student, temperature))


# but for powers of nothing that are negative
OF_MASKED = [x for x in DIVERGENCES if not isinstance(x, d.AlphaBeta) or min(x.parameters()) > 0]


@pytest.mark.parametrize("divergence", OF_MASKED, ids=str)
def test_masked_sides(divergence, backend):
    """-inf on one side alone: what the formula tends to, and no NaN in it."""
    student, teacher = make_logits(2, 16)
    with torch.no_grad():
        student[0, 3], teacher[1, 5] = -torch.inf, -torch.inf
    wide = torch.float64
    want = distill_stats(leaf(student, wide), teacher.to(wide), divergence=divergence, backend="reference").divergence
    got, gradient = bare(student, teacher, divergence, backend)
    assert not got.isnan().any() and torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    torch.testing.assert_close(got[finite].double(), want[finite], rtol=4e-6, atol=1e-6)
    assert gradient[finite].isfinite().all()
    for options in ({"student_softcap": 20.0, "teacher_softcap": 20.0}, {"standardize": True}):
        _, gradient = bare(student, teacher, divergence, backend, **options)
        assert gradient[finite].isfinite().all(), options
    silent = ea_kd_loss(student, teacher, divergence=divergence, weighting=torch.zeros(2), backend=backend)
    assert silent == 0 and not torch.autograd.grad(silent, student)[0].any()


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "DKD"], ids=str)
def test_nan_wins_and_rows_left_out_do_not_count(divergence, backend):
    student, teacher = make_logits(3, 16)
    labels = torch.tensor([1, -100, 2])
    with torch.no_grad():
        student[0, 3], student[1, 2], teacher[1, 4] = torch.nan, torch.nan, torch.inf
    loss, stats = call(divergence, student, teacher, labels, backend, return_stats=True, weighting="none")
    assert loss.isnan() and stats.divergence[0].isnan() and stats.divergence[2].isfinite()
    (gradient,) = torch.autograd.grad(stats.loss.sum() if stats.loss.requires_grad else loss, student)
    assert not gradient[1].any() and gradient[2].isfinite().all()


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "DKD"], ids=str)
def test_fully_masked_and_single_columns(divergence, backend):
    student, teacher = make_logits(2, 5)
    with torch.no_grad():
        student[0], teacher[0] = -torch.inf, -torch.inf
    labels = torch.tensor([1, 1])
    loss, stats = call(divergence, student, teacher, labels, backend, return_stats=True)
    assert stats.loss[0] == 0 and loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, student)
    assert not gradient[0].any() and gradient[1].isfinite().all()
    student, teacher = make_logits(3, 1)
    loss = call(divergence, student, teacher, torch.zeros(3, dtype=torch.int64), backend)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


def test_limits_are_where_continuity_puts_them(fp64_backend):
    """AlphaBeta tends to its limits, and to the KLs."""
    student, teacher = make_logits(2, 30, dtype=torch.float64)
    value = lambda a, b: distill_stats(student, teacher, divergence=d.AlphaBeta(a, b), backend=fp64_backend).divergence  # noqa: E731
    for a, b in [(0.0, 0.6), (0.6, 0.0), (0.4, -0.4), (0.0, 0.0)]:
        torch.testing.assert_close(value(a + 1e-5, b + 1e-5), value(a, b), rtol=3e-3, atol=0)
    for (a, b), same in {(1, 0): d.ForwardKL(), (0, 1): d.ReverseKL()}.items():
        torch.testing.assert_close(value(a, b), distill_stats(student, teacher, divergence=same).divergence)


def test_generalized_jsd_has_the_kls_at_its_ends():
    assert d.generalized_jsd(0) == d.ForwardKL() and d.generalized_jsd(1.0) == d.ReverseKL()
    assert d.generalized_jsd(0.3) == d.JSD(0.3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: d.JSD(0), r"JSD: beta must be a number > 0 and < 1, got 0; ForwardKL\(\) and ReverseKL\(\)"),
        (lambda: d.JSD(1.0), "generalized_jsd"),
        (lambda: d.generalized_jsd(1.5), "generalized_jsd: beta must be a number >= 0 and <= 1, got 1.5"),
        (lambda: d.SkewForwardKL(-0.1), "SkewForwardKL: alpha must be a number >= 0 and < 1, got -0.1"),
        (lambda: d.SkewReverseKL(True), "SkewReverseKL: alpha"),
        (lambda: d.Jeffreys(math.nan), "Jeffreys: reverse_weight"),
        (lambda: d.AlphaBeta(math.inf, 1), "AlphaBeta: alpha"),
        (lambda: d.AlphaBeta(0.5, "1"), "AlphaBeta: beta"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
