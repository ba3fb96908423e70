"""The eager formula, the error rule and the logits that the tests share."""

import math

import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def interpreted(backend):
    """Whether its kernels run, slowly, in Triton's interpreter."""
    return backend == "triton" and not torch.cuda.is_available()


def takes_fp64(backend):
    return backend in ("reference", "cpu")


def takes_pair(backend, student_dtype, teacher_dtype):
    """The CUDA kernels are compiled for equal dtypes and for a student in fp32."""
    if torch.float64 in (student_dtype, teacher_dtype):
        return takes_fp64(backend)
    return backend != "cuda" or student_dtype in (teacher_dtype, torch.float32)


def widest(backend):
    """The dtype in which a backend is most exact."""
    return torch.float64 if takes_fp64(backend) else torch.float32


def make_logits(*shape, dtype=torch.float32, scale=3.0, seed=0, offset=0.0):
    """A (student, teacher) pair, the same on every device; the student requires grad."""
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    student, teacher = (torch.randn(*shape, **draw) * scale for _ in range(2))
    device = torch.get_default_device()
    return (student + offset).to(device, dtype).requires_grad_(), (teacher - offset).to(device, dtype)


def _entropy(log_p):
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)


def eager(student, teacher, labels=None, *, tau=1.0, t=3.0, weighting="ea", bound=None, detach=True, ce_weight=0.0):
    """Row losses and statistics as one writes them in PyTorch, in the dtype of the arguments."""
    log_p, log_q = (teacher / tau).log_softmax(-1), (student / tau).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q).masked_fill(log_p == -torch.inf, 0)).sum(-1)
    teacher_entropy = _entropy((teacher / t).log_softmax(-1))
    student_entropy = _entropy((student / t).log_softmax(-1))
    bound = math.log(student.shape[-1]) if bound is None else bound
    weight = {
        "ea": lambda: 0.5 * teacher_entropy * (1 + student_entropy / bound),
        "teacher": lambda: teacher_entropy,
        "student": lambda: student_entropy,
        "none": lambda: torch.ones_like(kl),
    }[weighting]()
    weight = weight.detach() if detach else weight
    loss = weight * tau**2 * kl
    out = {
        "divergence": kl,
        "teacher_entropy": teacher_entropy,
        "student_entropy": student_entropy,
        "teacher_lse": (teacher / tau).logsumexp(-1),
        "student_lse": (student / tau).logsumexp(-1),
        "weight": weight,
    }
    if labels is not None:
        picked = student.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        out["cross_entropy"] = -picked
        loss = loss + ce_weight * -picked
    out["loss"] = loss
    return out


def leaf(tensor, dtype):
    return tensor.detach().to(dtype).requires_grad_()


def assert_same_on(backend, got, want):
    """Bit for bit where the order of summation does not depend on how rows lie; on a GPU it does."""
    if backend in ("reference", "cpu"):
        assert torch.equal(got, want)
    else:
        info = torch.finfo(got.dtype)
        torch.testing.assert_close(got, want, rtol=max(4e-6, info.eps), atol=1e-7)


def assert_within_error_rule(got, exact, baseline, vocab_size, factor=None):
    """A value of every row, fp32 against fp64: at most twice what eager fp32 is off by, and 4e-6 of itself.

    max |got - exact| <= min(2 max |baseline - exact| + 2^-22 max(1, log V), 4e-6 max(1, |exact|)), over rows

    factor: [rows], for a value that is a statistic times this: the rule is the statistic's.
    """
    if factor is not None:
        factor = factor.detach().double().clamp(min=1)
        got, exact, baseline = (value.detach().double() / factor for value in (got, exact, baseline))
    exact = exact.detach().double()
    error = (got.detach().double() - exact).abs()
    rounding = max(2.0**-22 * max(1.0, math.log(vocab_size)), 2.0**-23 * exact.abs().max())  # or a step of fp32
    allowed = 2 * (baseline.detach().double() - exact).abs().max() + rounding
    worst = int(error.argmax())
    where = f"row {worst}: {got.flatten()[worst].item()} for {exact.flatten()[worst].item()}"
    assert error.max() <= allowed, f"off by {error.max():.3g}, allowed {allowed:.3g}; {where}"
    relative = (error / exact.abs().clamp(min=1)).max()
    assert relative <= 4e-6, f"off by {relative:.3g} of itself, allowed 4e-6; {where}"


def assert_gradient_within_rounding(got, exact, baseline, terms=0.0):
    """A gradient: twice eager fp32's error plus, for a narrower dtype, one rounding of its own.

    baseline: the fp32 gradient of the eager formula on the same rounded inputs, before any rounding to got's dtype.
    terms: the size of what a gradient q_j (log(q_j/p_j) - D) is a difference of; fp32 has their steps.
    """
    exact, baseline = exact.detach().double(), baseline.detach().double()
    error = (got.detach().double() - exact).abs()
    allowed = 2 * (baseline - exact).abs().max() + 2.0**-22 * exact.abs().max() + 2.0**-23 * terms
    if got.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(got.dtype)
        allowed = allowed + 0.5 * info.eps * (exact.abs() + allowed) + 0.5 * info.smallest_normal * info.eps
    excess = (error - allowed).max()
    assert excess <= 0, (
        f"off by {error.max():.3g}, which is {excess:.3g} too much (largest entry {exact.abs().max():.3g})"
    )
