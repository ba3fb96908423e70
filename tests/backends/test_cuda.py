"""What is particular to the CUDA kernels: which one runs, and that each of them can; on a GPU, large vocabularies."""

import ctypes

import pytest
import torch
from support import assert_gradient_within_rounding, assert_within_error_rule, make_logits

from eakd_kernels import available_backends, divergences, ea_kd_loss
from eakd_kernels.backends import cuda

EMULATED = cuda.EMULATOR is not None
UNAVAILABLE = available_backends()["cuda"]
on_gpu = pytest.mark.skipif(EMULATED or UNAVAILABLE is not None, reason="needs a GPU")
emulated = pytest.mark.skipif(not EMULATED, reason="needs the emulator: make emulator")
runs = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
pytestmark = [] if EMULATED or UNAVAILABLE else [pytest.mark.gpu]

LIBRARY = ctypes.CDLL(cuda.EMULATOR) if EMULATED else None
PLANS = ["small", "resident", "resident:2", "resident:8", "ring", "ring:2", "ring:8", "stream", "stream:4"]
RECIPE = {
    "divergence": divergences.JSD(0.3),
    "temperature": (1.0, 2.0, 4.0),
    "teacher_softcap": 20.0,
    "scale_by_temperature_squared": False,
}


@pytest.fixture(autouse=True)
def _device():
    torch.set_default_device("cpu" if EMULATED or UNAVAILABLE else "cuda")
    yield
    torch.set_default_device(None)


def supports(plan):
    return EMULATED or ":" not in plan or torch.cuda.get_device_capability() >= (9, 0)


def loss_and_gradient(student, teacher, labels=None, backend="cuda", **options):
    student = student.detach().requires_grad_()
    loss, stats = ea_kd_loss(student, teacher, labels, backend=backend, return_stats=True, **options)
    return stats, torch.autograd.grad(loss, student)[0]


# ---- every kernel ------------------------------------------------------------------------------------------------


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_every_kernel(plan, dtype, monkeypatch):
    """The same rows through each of them; on a GPU these are what compute-sanitizer watches."""
    if not supports(plan):
        pytest.skip("clusters need compute capability 9.0")
    vocab_size = 1000 if plan == "small" else 2056
    student, teacher = make_logits(6, vocab_size, dtype=dtype)
    options = {"labels": torch.arange(6), "ce_weight": 0.5, "mask": torch.tensor([1, 1, 0, 1, 1, 1]).bool()}
    monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
    stats, gradient = loss_and_gradient(student, teacher, **options)
    exact, baseline = (
        loss_and_gradient(student.to(wide), teacher.to(wide), backend="reference", **options)
        for wide in (torch.float64, torch.float32)
    )
    for field in ("divergence", "teacher_entropy", "student_entropy", "student_lse", "cross_entropy", "weight"):
        values = (getattr(each, field) for each in (stats, exact[0], baseline[0]))
        assert_within_error_rule(*values, vocab_size)
    assert_gradient_within_rounding(gradient, exact[1], baseline[1])


@runs
@pytest.mark.parametrize("options", [{}, RECIPE], ids=["plain", "recipe"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_every_time(plan, options, monkeypatch):
    """On the emulator too where threads run in another order."""
    if not supports(plan):
        pytest.skip("clusters need compute capability 9.0")
    student, teacher = make_logits(3, 900 if plan == "small" else 5003)
    monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
    results = []
    for seed in (0, 2**64 - 1, 7, 8):
        if EMULATED:
            LIBRARY.eakd_emulator_schedule(ctypes.c_uint64(seed))
        results.append(loss_and_gradient(student, teacher, **options))
    if EMULATED:
        LIBRARY.eakd_emulator_schedule(ctypes.c_uint64(0))
    for stats, gradient in results[1:]:
        assert torch.equal(gradient, results[0][1])
        assert torch.equal(stats.loss, results[0][0].loss)


@emulated
@pytest.mark.parametrize("rows, classes", [(64, 100), (512, 1000), (64, 1000)])
def test_launches_of_a_step(rows, classes):
    """Loss and gradient are one kernel, the sum over rows another, the upstream gradient the third."""
    student, teacher = make_logits(rows, classes)
    before = LIBRARY.eakd_emulator_launches()
    ea_kd_loss(student, teacher, temperature=4.0, backend="cuda").backward()
    assert LIBRARY.eakd_emulator_launches() - before <= 3


@emulated
@pytest.mark.parametrize("vocab_size", [100, 3000, 30000])
def test_a_gpu_without_clusters(vocab_size):
    student, teacher = make_logits(2, vocab_size, dtype=torch.bfloat16)
    want = loss_and_gradient(student, teacher, backend="reference")[1]
    LIBRARY.eakd_emulator_device(80, 2)
    try:
        gradient = loss_and_gradient(student, teacher)[1]
    finally:
        LIBRARY.eakd_emulator_device(90, 2)
    torch.testing.assert_close(gradient, want, rtol=2**-7, atol=1e-9)


@runs
@pytest.mark.parametrize("plan", ["stream", "ring:1"])
@pytest.mark.parametrize("vocab_size", [3, 5])
def test_rows_without_a_vector(plan, vocab_size, monkeypatch):
    """Far from zero, where a centre of 0 leaves nothing."""
    if not supports(plan):
        pytest.skip("bulk copies need compute capability 9.0")
    student, teacher = (x - 500 for x in make_logits(4, vocab_size, dtype=torch.bfloat16, offset=-500.0))
    student = (student + 500).detach()
    monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
    got = loss_and_gradient(student, teacher)
    want = loss_and_gradient(student.double(), teacher.double(), backend="reference")
    torch.testing.assert_close(got[0].divergence.double(), want[0].divergence, rtol=4e-6, atol=1e-6)
    torch.testing.assert_close(got[1].double(), want[1], rtol=2**-8, atol=1e-6)


@emulated
@pytest.mark.parametrize("length, alike", [(7, True), (6, False)])
def test_rows_of_one_stride_beside_rows_of_two(length, alike, monkeypatch):
    """A teacher cut to the student's length. The ring is for rows that begin alike within a vector of 8 columns."""
    student = make_logits(2, 5, 2052, dtype=torch.bfloat16)[0].detach()
    teacher = make_logits(2, length, 2052, dtype=torch.bfloat16, seed=1)[1][:, :5]
    monkeypatch.setenv("EAKD_CUDA_PLAN", "ring:2")
    if not alike:
        with pytest.raises(RuntimeError, match="cannot take rows"):
            loss_and_gradient(student, teacher)
        monkeypatch.setenv("EAKD_CUDA_PLAN", "stream:2")
    got = loss_and_gradient(student, teacher)[1]
    want = loss_and_gradient(student.float(), teacher.float(), backend="reference")[1]
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=1e-9)


# ---- recipes -----------------------------------------------------------------------------------------------------


def assert_recipe_is_right(student, teacher, **options):
    stats, gradient = loss_and_gradient(student, teacher, **RECIPE, **options)
    exact, baseline = (
        loss_and_gradient(student.to(wide), teacher.to(wide), backend="reference", **RECIPE, **options)
        for wide in (torch.float64, torch.float32)
    )
    values = (each.divergence for each in (stats, exact[0], baseline[0]))
    assert_within_error_rule(*values, student.shape[-1])
    assert_gradient_within_rounding(gradient, exact[1], baseline[1])


@runs
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recipes_whatever_the_plan(plan, dtype, monkeypatch):
    """Names of kernels that are not for recipes, or that cannot take such rows, do not stop them."""
    monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
    assert_recipe_is_right(*make_logits(6, 3001, dtype=dtype), mask=torch.tensor([1, 1, 0, 1, 1, 1]).bool())


@emulated
@pytest.mark.parametrize("vocab_size", [100, 30_000])
def test_recipes_without_clusters(vocab_size):
    LIBRARY.eakd_emulator_device(80, 2)
    try:
        assert_recipe_is_right(*make_logits(4, vocab_size))
    finally:
        LIBRARY.eakd_emulator_device(90, 2)


@emulated
def test_launches_of_a_recipe():
    student, teacher = make_logits(8, 1000)
    before = LIBRARY.eakd_emulator_launches()
    ea_kd_loss(student, teacher, backend="cuda", **RECIPE).backward()
    assert LIBRARY.eakd_emulator_launches() - before <= 3


@runs
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_no_gradient_where_both_agree(divergence, standardize):
    """Exactly, also where all logits are equal and standardisation multiplies by 10^7."""
    student = torch.cat((make_logits(3, 1003)[0].detach(), torch.zeros(1, 1003)))
    options = {"divergence": divergence, "standardize": standardize, "teacher_class_weights": torch.ones(1003)}
    gradient = loss_and_gradient(student, student.clone(), **options)[1]
    assert gradient.abs().max() <= (1e-8 if standardize else 0)
    assert gradient[-1].abs().max() == 0


# ---- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vocab_size, dtype, kernel, cluster",
    [
        (100, torch.float32, "small", 1),
        (1000, torch.bfloat16, "small", 1),
        (5000, torch.bfloat16, "resident", 1),
        (32000, torch.bfloat16, "ring", 2),
        (50257, torch.bfloat16, "ring", 4),
        (128256, torch.bfloat16, "ring", 8),
        (151936, torch.bfloat16, "ring", 8),
        (262144, torch.bfloat16, "ring", 16),
        (262144, torch.float32, "stream", 8),
    ],
)
def test_plans_of_an_h100(vocab_size, dtype, kernel, cluster):
    plan = cuda.launch_plan(8192, vocab_size, dtype)
    assert (plan["kernel"], plan["cluster"]) == (kernel, cluster)
    if kernel == "ring":
        assert plan["stages"] >= 3 and plan["shared_bytes"] <= 232448
        assert plan["slice"] * plan["width"] * cluster >= vocab_size - plan["width"]


def test_plans_of_other_devices_and_rows():
    assert cuda.launch_plan(8192, 128256, capability=80, processors=108)["kernel"] == "stream"
    assert cuda.launch_plan(8192, 128256, aligned=False)["width"] == 1
    assert cuda.launch_plan(8192, 128256, torch.float32, torch.bfloat16)["kernel"] in ("resident", "stream")
    assert cuda.launch_plan(8192, 128256, operation="row_statistics")["kernel"] == "stream"
    assert cuda.launch_plan(0, 128256)["blocks"] == 0
    few, many = cuda.launch_plan(4, 128256), cuda.launch_plan(8192, 128256)
    assert few["cluster"] >= 8 and many["blocks"] <= 132
    assert cuda.launch_plan(8192, 151936, plan="resident:8")["threads"] == 256


@pytest.mark.parametrize(
    "plan, words",
    [
        ("nonsense", "small, resident, ring and stream"),
        ("ring:3", "1, 2, 4, 8 or 16"),
        ("small", "cannot take rows of"),
    ],
)
def test_bad_plans(plan, words, monkeypatch):
    with pytest.raises(ValueError, match=words):
        cuda.launch_plan(8, 5000, plan=plan)
    if UNAVAILABLE is None:
        monkeypatch.setenv("EAKD_CUDA_PLAN", plan)
        with pytest.raises(RuntimeError, match=words):
            ea_kd_loss(*make_logits(2, 5000), backend="cuda")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"operation": "backward"}, r"operation.*one_pass.*backward"),
        ({"dtype": torch.float16}, "fp16 students.*row_statistics"),
        ({"teacher_dtype": torch.float32}, "no kernel takes dtype torch.bfloat16 with teacher_dtype torch.float32"),
        ({"rows": -1}, "rows must be at least 0"),
        ({"vocab_size": 0}, "vocab_size at least 1"),
    ],
)
def test_bad_questions(given, words):
    with pytest.raises(ValueError, match=words):
        cuda.launch_plan(**{"rows": 8, "vocab_size": 5000, **given})


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("vocab_size", [128_256, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_vocabularies(vocab_size, dtype):
    """Rows enough that every cluster walks along several."""
    student, teacher = make_logits(300, vocab_size, dtype=dtype)
    stats, gradient = loss_and_gradient(student, teacher)
    want, baseline = (
        loss_and_gradient(student.to(wide), teacher.to(wide), backend="reference")
        for wide in (torch.float64, torch.float32)
    )
    assert_within_error_rule(stats.divergence, want[0].divergence, baseline[0].divergence, vocab_size)
    assert_gradient_within_rounding(gradient, want[1], baseline[1])
