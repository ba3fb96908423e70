"""What is particular to the Triton kernels: tiles and alignments, rows shared by programs, rounding, launches."""

import math

import pytest
import torch
from support import interpreted, make_logits

from eakd_kernels import available_backends, divergences, ea_kd_loss, ops
from eakd_kernels.stats import STATISTICS

if (reason := available_backends()["triton"]) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from eakd_kernels.backends import triton as kernels
from eakd_kernels.backends.triton import launch
from eakd_kernels.backends.triton.arithmetic import rounded
from eakd_kernels.backends.triton.tiles import COLUMNS, STRIDED, VECTORS, WINDOW, in_tile, number, unspecialised

pytestmark = [] if interpreted("triton") else [pytest.mark.gpu]
needs_gpu = pytest.mark.skipif(interpreted("triton"), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _on_the_gpu():
    torch.set_default_device("cpu" if interpreted("triton") else "cuda")
    yield
    torch.set_default_device(None)


def rows_of(student, teacher, labels=None, tau=2.0, t=3.0, vocab_size=None, recipe=(), class_bias=None):
    vocab_size = vocab_size or student.shape[-1]
    return ops.Rows(student, teacher, labels, None, None, tau, t, vocab_size, list(recipe), class_bias)


def form_of(student, teacher):
    return launch.Plan(rows_of(student, teacher), "statistics").tile.FORM


def rule_for(vocab_size, ce_weight=0.0):
    return ops.LossRule(None, ops.WEIGHTINGS["ea"], math.log(vocab_size), 1.0, True, 1.0, ce_weight, 1.0, None)


def alone(tensor, offset=0, pad=0):
    """The rows in memory of their own, `offset` elements behind a 16-byte boundary and `pad` apart; NaN around them."""
    rows, columns = tensor.shape
    buffer = torch.full((offset + rows * (columns + pad) + 32,), torch.nan, dtype=tensor.dtype)
    view = buffer[offset:].as_strided((rows, columns), (columns + pad, 1))
    return view.copy_(tensor)


# ---- how rows lie ------------------------------------------------------------------------------------------------

ALIGNMENTS = {
    "aligned": ({}, {}, VECTORS),
    "both off by one": ({"offset": 1}, {"offset": 1}, WINDOW),
    "padded apart": ({"pad": 8}, {"pad": 16}, VECTORS),
    "padded by an odd number, alike": ({"pad": 3}, {"pad": 11}, WINDOW),
    "student off": ({"offset": 3}, {}, COLUMNS),
    "padded unlike": ({"pad": 1}, {"pad": 2}, COLUMNS),
}


@pytest.mark.parametrize("vocab_size", [96, 4803], ids=str)
@pytest.mark.parametrize("student_at, teacher_at, form", ALIGNMENTS.values(), ids=ALIGNMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignments(vocab_size, student_at, teacher_at, form, dtype):
    """Whatever lies around the rows, NaN here, is neither used nor overwritten."""
    student, teacher = (x.detach() for x in make_logits(2, vocab_size, dtype=dtype))
    z, y = alone(student, **student_at), alone(teacher, **teacher_at)
    if vocab_size % 8 == 0:
        assert form_of(z, y) == form.value
    labels, rule = torch.tensor([0, vocab_size - 1]), rule_for(vocab_size, 0.3)
    want = kernels.one_pass(rows_of(student, teacher, labels), rule, exact := torch.empty_like(student))
    got = kernels.one_pass(rows_of(z, y, labels), rule, gradient := alone(student, **student_at))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, exact, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-8)
    statistics = kernels.row_statistics(rows_of(z, y, labels), False)
    torch.testing.assert_close(statistics[:6], want[1][:6])


@pytest.mark.parametrize("vocab_size, width", [(90, 90), (90, 96), (4801, 4801), (4801, 4864), (9000, 9000)])
@pytest.mark.parametrize("offset", range(0, 9, 2))
def test_nothing_is_written_outside_the_gradient(vocab_size, width, offset):
    """Canaries before, between and behind the rows."""
    student, teacher = (x.detach() for x in make_logits(3, width))
    rows = rows_of(student, teacher, torch.tensor([0, vocab_size - 1, 5]), vocab_size=vocab_size)
    buffer = torch.full((offset + 3 * (width + 5) + 64,), 7.0)
    gradient = buffer[offset + 16 :].as_strided((3, width), (width + 5, 1))
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside[offset + 16 :].as_strided((3, width), (width + 5, 1)).fill_(True)
    statistics = kernels.row_statistics(rows, False)
    for write in (
        lambda: kernels.row_gradient(rows, statistics, (torch.ones(3), None, None, torch.ones(3)), gradient),
        lambda: kernels.one_pass(rows, rule_for(vocab_size, 0.3), gradient),
    ):
        buffer.fill_(7.0)
        write()
        assert (buffer[~inside] == 7).all()
        assert gradient[:, :vocab_size].any() and (gradient != 7).all() and not gradient[:, vocab_size:].any()


def test_classes_first():
    """[N, C, H, W] without a copy: the columns of a row are H * W apart."""
    student, teacher = (x.detach().movedim(1, -1) for x in make_logits(2, 19, 4, 5))
    assert form_of(student, teacher) == STRIDED.value
    want = kernels.row_statistics(rows_of(student.contiguous(), teacher.contiguous()), False)
    torch.testing.assert_close(kernels.row_statistics(rows_of(student, teacher), False), want)


@pytest.mark.parametrize("columns, width", [(100, 4), (10, 2), (96, 8), (97, 2)])
def test_whole_rows_take_the_longest_vectors_that_fit(columns, width):
    """100 classes in bf16 are vectors of 8 bytes."""
    student, teacher = (x.detach() for x in make_logits(4, columns, dtype=torch.bfloat16))
    tile = launch.Plan(rows_of(student, teacher), "statistics").tile
    expected = (width, VECTORS.value if columns % 2 == 0 else WINDOW.value)
    assert expected == (tile.WIDTH, tile.FORM)


def test_layout_finds_two_strides():
    assert launch.layout((4, 6, 50), (300, 50, 1)) == (24, 50, 1, 50, 0, 1)
    assert launch.layout((4, 5, 50), (300, 50, 1)) == (20, 50, 5, 300, 50, 1)
    assert launch.layout((2, 1, 3, 50), (0, 7, 50, 1)) == (6, 50, 3, 0, 50, 1)
    assert launch.layout((50,), (1,)) == (1, 50, 1, 0, 0, 1)
    assert launch.layout((2, 3, 4, 50), (1000, 10, 100, 1)) is None


# ---- guards ------------------------------------------------------------------------------------------------------

MASKED = {
    "one column": slice(17, 18),
    "the first tile": slice(0, 2048),
    "the last tile": slice(4096, None),
    "a lane": slice(2048, 2056),
    "all but one": slice(1, None),
}


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e29, -1e31], ids=str)
@pytest.mark.parametrize("columns", MASKED.values(), ids=MASKED)
def test_masked_logits_of_any_size(low, columns):
    """The first sweep does without guards; what it cannot take, it must notice."""
    student, teacher = make_logits(2, 5003)
    z, y = student.detach().clone(), teacher.clone()
    z[0, columns] = y[0, columns] = low
    keep = torch.ones(5003, dtype=torch.bool)
    keep[columns] = False
    options = {"entropy_bound": 8.5, "temperature": 2.0, "backend": "triton"}
    loss, stats = ea_kd_loss(z.requires_grad_(), y, return_stats=True, **options)
    (gradient,) = torch.autograd.grad(loss, z)
    narrow = z.detach()[:1, keep].requires_grad_()
    want = ea_kd_loss(narrow, y[:1, keep], **options)
    torch.testing.assert_close(stats.loss[:1], want.detach()[None])
    torch.testing.assert_close(2 * gradient[:1, keep], torch.autograd.grad(want, narrow)[0], rtol=1e-5, atol=1e-8)
    assert not gradient[0, ~keep].any() and gradient[1].all()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e30, -1e29, -1e20], ids=str)
def test_rows_of_nothing_but_small_logits(low):
    """They are ordinary logits: such a row is uniform."""
    z = torch.full((2, 5003), low, requires_grad=True)
    loss, stats = ea_kd_loss(z, z.detach(), return_stats=True, backend="triton")
    torch.testing.assert_close(stats.teacher_entropy, torch.full((2,), math.log(5003)))
    assert loss.abs() < 1e-5 and torch.autograd.grad(loss, z)[0].isfinite().all()


# ---- rows shared by programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, vocab_size", [(1, 4097), (2, 30_001), (3, 16_384)])
@pytest.mark.parametrize("inplace", [False, True])
def test_shared_rows_equal_whole_ones(rows, vocab_size, inplace, monkeypatch):
    """In place the label's logit is overwritten while other programs are still to merge."""
    student, teacher = (x.detach() for x in make_logits(rows, vocab_size))
    student[0, 3000:] = teacher[0, 3000:] = -torch.inf  # parts of nothing
    labels, rule = torch.arange(rows), rule_for(vocab_size, 0.3)

    def everything():
        z = student.clone()
        problem = rows_of(z, teacher, labels)
        statistics = kernels.row_statistics(problem, True)
        loss, fields = kernels.one_pass(problem, rule, gradient := z if inplace else torch.empty_like(z))
        return statistics, loss, fields, gradient

    shared = everything()
    assert launch.Plan(rows_of(student, teacher), "statistics").splits > 1
    monkeypatch.setattr(launch, "processors", lambda device: 0)
    assert launch.Plan(rows_of(student, teacher), "statistics").splits == 1
    for got, want in zip(shared, everything(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
    monkeypatch.undo()
    assert all(torch.equal(got, again) for got, again in zip(shared, everything(), strict=True))


@pytest.mark.parametrize("rows, columns", [(1, 2**31), (1, 10_000), (7, 50_000), (4096, 151_936), (4096, 2**23)])
def test_sharing(rows, columns):
    tile = launch.Plan(rows_of(*(x.detach() for x in make_logits(1, 5000))), "statistics").tile
    splits, tiles = launch.share(rows, columns, tile, 132)
    assert (
        1 <= splits <= launch.MAX_SPLITS and (splits - 1) * tiles * tile.BLOCK < columns <= splits * tiles * tile.BLOCK
    )
    if columns < 2**30:
        assert tiles * tile.WIDTH <= launch.MAX_TERMS


def test_a_hundred_runs_are_bit_identical():
    runs = 5 if interpreted("triton") else 100
    student, teacher = make_logits(5, 9000)
    labels = torch.arange(5)

    def run():
        loss, stats = ea_kd_loss(student, teacher, labels, ce_weight=0.1, return_stats=True, backend="triton")
        return [loss.detach(), *stats, torch.autograd.grad(loss, student)[0]]

    first = run()
    assert all(torch.equal(*pair) for _ in range(runs) for pair in zip(first, run(), strict=True))


# ---- recipes -----------------------------------------------------------------------------------------------------


def recipe_of(kernel, standardize=0, caps=(0.0, 0.0), taus=(2.0, 3.0)):
    return ops.Recipe(*kernel, standardize, 0.5, 1.0, *caps, taus, tuple(tau * tau for tau in taus)).flat()


RECIPES = {
    "JSD": recipe_of(divergences.JSD(0.3).kernel()),
    "decoupled, standardised": recipe_of((divergences.DECOUPLED, 1.0, 8.0), standardize=2, caps=(4.0, 9.0)),
}


@pytest.mark.parametrize("vocab_size", [96, 4803], ids=str)
@pytest.mark.parametrize("student_at, teacher_at, form", ALIGNMENTS.values(), ids=ALIGNMENTS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_at_any_alignment(vocab_size, student_at, teacher_at, form, recipe):
    """Rows are read up to four times; NaN around them would show in any of the sums."""
    student, teacher = (x.detach() for x in make_logits(2, vocab_size))
    labels, rule = torch.tensor([0, vocab_size - 1]), rule_for(vocab_size, 0.3)
    options = {"labels": labels, "recipe": recipe, "class_bias": -torch.rand(vocab_size)}
    want = kernels.one_pass(rows_of(student, teacher, **options), rule, exact := torch.empty_like(student))
    rows = rows_of(alone(student, **student_at), alone(teacher, **teacher_at), **options)
    got = kernels.one_pass(rows, rule, gradient := alone(student, **student_at))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernels.row_statistics(rows, False)[:6], want[1][:6])


@pytest.mark.parametrize("vocab_size, width", [(90, 96), (4801, 4864)])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_write_nothing_outside_the_gradient(vocab_size, width, recipe):
    student, teacher = (x.detach() for x in make_logits(3, width))
    rows = rows_of(student, teacher, torch.tensor([0, vocab_size - 1, 5]), vocab_size=vocab_size, recipe=recipe)
    buffer = torch.full((3, width + 5), 7.0)
    gradient = buffer[:, 2 : width + 2]
    kernels.row_gradient(rows, kernels.row_statistics(rows, False), (torch.ones(3), None, None, None), gradient)
    assert (buffer[:, :2] == 7).all() and (buffer[:, width + 2 :] == 7).all()
    assert gradient[:, :vocab_size].any() and not gradient[:, vocab_size:].any()


@pytest.mark.parametrize("vocab_size", [96, 4803], ids=str)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_in_place(vocab_size, recipe):
    """The label's logit is read before its gradient takes its place."""
    student, teacher = (x.detach() for x in make_logits(2, vocab_size))
    rows = rows_of(student, teacher, torch.tensor([vocab_size - 1, 3]), recipe=recipe)
    upstream, rule = (torch.ones(2), None, None, torch.ones(2)), rule_for(vocab_size, 0.3)
    statistics = kernels.row_statistics(rows, False)
    for write in (
        lambda rows, gradient: kernels.row_gradient(rows, statistics, upstream, gradient),
        lambda rows, gradient: kernels.one_pass(rows, rule, gradient),
    ):
        write(rows, gradient := torch.empty_like(student))
        z = student.clone()
        write(rows._replace(student_logits=z), z)
        assert torch.equal(z, gradient)


# ---- launches ----------------------------------------------------------------------------------------------------


def test_the_common_call_launches_three_kernels(monkeypatch):
    """Loss and statistics with the gradient, the sum over rows, and the upstream factor."""
    launched, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *arguments: (launched.append(kernel), run(kernel, *arguments)))
    student, teacher = make_logits(64, 100)
    ea_kd_loss(student, teacher, temperature=4.0, backend="triton").backward()
    assert len(launched) == 3


@pytest.mark.parametrize("value", [0, 1, 7, 16, 4096, 2**31 - 1, 2**31, 2**40 + 48])
def test_numbers_that_triton_does_not_specialise_on(value):
    packed = unspecialised(value)
    assert packed > 2**32 and packed % 16 == 3
    got = torch.zeros(1, dtype=torch.int64)
    _unpack[(1,)](got, (packed,))
    assert got.item() == value


@pytest.mark.parametrize("column, start, want", [(5, 0, 5), (3, 2048, -1), (2**31 + 7, 0, 2048), (0, 2**31 + 2048, -1)])
def test_columns_of_rows_beyond_32_bits(column, start, want):
    tile = launch.Plan(rows_of(*(x.detach() for x in make_logits(1, 5000))), "statistics").tile
    got = torch.zeros(1, dtype=torch.int32)
    _in_tile[(1,)](got, (unspecialised(column), unspecialised(start)), tile)
    assert got.item() == want


@triton.jit
def _in_tile(out, packed, tile: tl.constexpr):
    tl.store(out, in_tile(number(packed[0]), number(packed[1]), tile))


@triton.jit
def _unpack(out, packed):
    tl.store(out, number(packed[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stores_round_to_nearest_even(dtype):
    """At, next to and between representable values, NaN and infinities included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (every[:-1].double() / 2 + every[1:].double() / 2).float()
    values = torch.cat([every, between, between * (1 + 2.0**-20), between * (1 - 2.0**-20)])
    values = values[(values.abs() >= torch.finfo(torch.float32).smallest_normal) | values.isnan()]
    got = torch.empty(len(values), dtype=dtype)
    _round[(triton.cdiv(len(values), 4096),)](values, got, len(values), 4096)
    torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _round(values, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, rounded(tl.load(values + i, i < n, 0.0), out.dtype.element_ty), i < n)


@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (2, 4096), (3, 4099), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_gradient(shape, dtype):
    gradient, factor = torch.randn(shape).to(dtype), torch.tensor(1.7)
    want = (gradient.float() * factor).to(dtype)
    kernels.scale_gradient(gradient, factor, out := torch.empty_like(gradient))
    assert torch.equal(out, want)
    strided = torch.stack([gradient, gradient], -1)[..., 0]
    kernels.scale_gradient(strided, factor, strided)
    assert torch.equal(strided, want)
    kernels.scale_gradient(gradient, torch.ones(()), copy := torch.empty_like(gradient))
    assert torch.equal(copy, gradient)
    kernels.scale_gradient(gradient, factor, gradient)
    assert torch.equal(gradient, want)


def test_what_it_does_not_take():
    device = "cpu" if interpreted("triton") else "cuda"
    fp32 = (torch.float32, torch.float32)
    assert kernels.unsupported_reason(device, fp32) is None
    assert "got mps" in kernels.unsupported_reason("mps", fp32)
    assert "got torch.float64" in kernels.unsupported_reason(device, (torch.float32, torch.float64))


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@needs_gpu
def test_a_row_of_2_31_columns():
    vocab_size = 2**31
    if torch.cuda.mem_get_info()[0] < 16 * vocab_size:
        pytest.skip("needs 32 GiB of free GPU memory")
    student, teacher = (torch.zeros(1, vocab_size, dtype=torch.bfloat16) for _ in range(2))
    student[0, -1] = teacher[0, 0] = 20.0
    statistics = kernels.row_statistics(rows_of(student, teacher, tau=1.0), False)
    p = torch.tensor([20.0]).double().exp() / (vocab_size - 1 + torch.tensor([20.0]).double().exp())
    rest = (1 - p) / (vocab_size - 1)
    want = (p - rest) * 20.0  # the other columns agree
    torch.testing.assert_close(statistics[STATISTICS.index("divergence")].double(), want, rtol=1e-4, atol=1e-5)
