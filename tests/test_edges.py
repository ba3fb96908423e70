"""-inf, NaN, masks, strange shapes and strides: what design calls edges, on every backend."""

import math

import pytest
import torch
from support import assert_same_on, eager, interpreted, leaf, make_logits, takes_fp64, widest

from eakd_kernels import distill_stats, ea_kd_loss, ea_weights

INF = math.inf


def gradient_of(loss, tensor):
    return torch.autograd.grad(loss, tensor, retain_graph=True)[0]


def both_paths(student, teacher, **options):
    """(row losses, gradient) by statistics + gradient, and by one pass where the backend has it."""
    rows = ea_kd_loss(student, teacher, reduction="none", **options)
    yield rows, gradient_of(rows.sum(), student)
    loss, stats = ea_kd_loss(student, teacher, reduction="sum", return_stats=True, **options)
    yield stats.loss, gradient_of(loss, student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [slice(90, 100), slice(0, 3), slice(17, 18)], ids=["tail", "head", "one"])
def test_columns_masked_in_both(columns, dtype, backend):
    if dtype == torch.float64 and not takes_fp64(backend):
        pytest.skip("this backend takes no fp64")
    student, teacher = make_logits(4, 100, dtype=dtype)
    masked = [tensor.detach().clone() for tensor in (student, teacher)]
    for tensor in masked:
        tensor[:, columns] = -INF
    kept = torch.ones(100, dtype=torch.bool)
    kept[columns] = False
    bound = math.log(kept.sum())
    z = leaf(masked[0], dtype)
    narrow = leaf(student[:, kept], dtype)
    options = {"entropy_bound": bound, "temperature": 2.0, "backend": backend}
    want = ea_kd_loss(narrow, teacher[:, kept], reduction="none", **options)
    for rows, gradient in both_paths(z, masked[1], **options):
        torch.testing.assert_close(rows, want)
        assert not gradient[:, columns].any()
        torch.testing.assert_close(gradient[:, kept], gradient_of(want.sum(), narrow))


@pytest.mark.parametrize("tau, t", [(0.25, 50.0), (50.0, 0.25), (1.0, 7.3), (2.0, 3.0), (0.1, 0.3)])
def test_far_columns_at_temperatures_far_apart(tau, t, backend):
    """What has vanished at one temperature has not at the other; what is masked has at both."""
    student, teacher = make_logits(3, 90, scale=40.0)
    z, y = student.detach().clone(), teacher.clone()
    z[:, 50:] = y[:, 50:] = -INF
    stats = distill_stats(z, y, temperature=tau, entropy_temperature=t, backend=backend)
    want = eager(z[:, :50].double(), y[:, :50].double(), tau=tau, t=t)
    for name in ("divergence", "teacher_entropy", "student_entropy"):
        torch.testing.assert_close(getattr(stats, name).double(), want[name], rtol=1e-5, atol=1e-6)


def test_student_masked_under_teacher_mass(backend):
    student, teacher = make_logits(3, 40, dtype=widest(backend))
    z = student.detach().clone()
    z[1, 5] = -INF
    z.requires_grad_()
    p, q = (x.softmax(-1) for x in (teacher, z))
    weights = ea_weights(z, teacher, backend=backend)
    for rows, gradient in both_paths(z, teacher, backend=backend):
        assert rows[1] == INF and rows[[0, 2]].isfinite().all()
        torch.testing.assert_close(gradient, weights[:, None] * (q - p).detach())
    stats = distill_stats(z, teacher, backend=backend)
    assert stats.divergence[1] == INF


def test_zero_weight_silences_an_infinite_divergence(backend):
    student, teacher = make_logits(3, 40, dtype=widest(backend))
    z = student.detach().clone()
    z[1, 5] = -INF
    z.requires_grad_()
    for weighting in (torch.tensor([1.0, 0.0, 1.0]), lambda stats: torch.tensor([1.0, 0.0, 1.0])):
        rows = ea_kd_loss(z, teacher, weighting=weighting, reduction="none", backend=backend)
        assert rows[1] == 0 and not gradient_of(rows.sum(), z)[1].any()
    loss = ea_kd_loss(z, teacher, weighting=torch.tensor([1.0, 0.0, 1.0]), backend=backend)
    assert loss.isfinite() and not gradient_of(loss, z)[1].any()
    # A one-hot teacher has entropy 0, hence weight 0, whatever the student says of its column.
    one_hot = torch.full((1, 40), -INF, dtype=z.dtype)
    one_hot[0, 5] = 0.0
    loss = ea_kd_loss(leaf(z[1:2], z.dtype), one_hot, backend=backend)
    assert loss == 0


def test_zero_weight_silences_it_with_live_weights(backend):
    z = leaf(torch.tensor([[-INF, 0.0, 0.0]]), widest(backend))
    one_hot = torch.tensor([[0.0, -INF, -INF]], dtype=z.dtype)
    loss = ea_kd_loss(z, one_hot, detach_weights=False, backend=backend)
    assert loss == 0 and not gradient_of(loss, z).any()


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("weighting", ["ea", "none", "zero"])
@pytest.mark.parametrize("column", [0, 37, 5000])
def test_nan_and_inf_in_a_kept_row_win(bad, side, weighting, column, backend):
    pair = dict(zip(("student", "teacher"), make_logits(2, 5001), strict=True))
    pair[side] = pair[side].detach().clone()
    pair[side][1, column] = bad
    z = leaf(pair["student"], torch.float32)
    weighting = torch.zeros(2) if weighting == "zero" else weighting
    for rows, gradient in both_paths(z, pair["teacher"], weighting=weighting, backend=backend):
        assert rows[1].isnan() and gradient[1].isnan().any()
        assert rows[0].isfinite() and gradient[0].isfinite().all()


@pytest.mark.parametrize("payload", [0x7FC00001, 0x7FFFFFFF, -1])
def test_nan_of_any_payload(payload, kernels):
    student, teacher = make_logits(2, 64)
    z = student.detach().clone()
    z.view(torch.int32)[0, 3] = payload
    assert z[0, 3].isnan()
    for rows, gradient in both_paths(leaf(z, torch.float32), teacher, backend=kernels):
        assert rows[0].isnan() and gradient[0].isnan().any() and rows[1].isfinite()


@pytest.mark.parametrize("junk", [math.nan, INF, -INF])
@pytest.mark.parametrize("how", ["mask", "labels", "both"])
def test_rows_left_out_are_not_read(junk, how, backend):
    student, teacher = make_logits(2, 4, 60)
    keep = torch.tensor([[True, False, True, True], [False, True, True, False]])
    labels = torch.randint(0, 60, (2, 4))
    z, y = student.detach().clone(), teacher.clone()
    z[~keep], y[~keep] = junk, junk
    z.requires_grad_()
    ignored = {"mask": torch.ones_like(keep), "labels": keep, "both": keep.logical_or(torch.eye(2, 4).bool())}[how]
    masked = {"mask": keep, "labels": None, "both": keep | ~torch.eye(2, 4).bool()}[how]
    options = {"mask": masked, "ce_weight": 0.5, "backend": backend}
    labels = torch.where(ignored, labels, -100)
    loss, stats = ea_kd_loss(z, y, labels, return_stats=True, **options)
    want = ea_kd_loss(leaf(student[keep], torch.float32), teacher[keep], labels[keep], ce_weight=0.5, backend=backend)
    torch.testing.assert_close(loss, want)
    gradient = gradient_of(loss, z)
    assert gradient.isfinite().all() and not gradient[~keep].any() and gradient[keep].any()
    for rows in (stats, distill_stats(z, y, labels, temperature=2.0, **options)):
        assert not any(field[~keep].any() for field in rows)


def test_per_row_values_of_rows_left_out_do_not_matter(backend):
    student, teacher = make_logits(3, 60, dtype=widest(backend))
    mask = torch.tensor([True, False, True])
    temperature = torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64, requires_grad=True)
    weighting = torch.tensor([1.0, math.nan, 2.0])
    loss = ea_kd_loss(student, teacher, temperature=temperature, weighting=weighting, mask=mask, backend=backend)
    gradients = torch.autograd.grad(loss, (student, temperature))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients) and gradients[1][1] == 0


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"weight_norm": "mean"}, {"num_items": 3}], ids=str)
def test_all_rows_left_out(options, backend):
    student, teacher = make_logits(3, 60)
    loss = ea_kd_loss(student, teacher, mask=torch.zeros(3, dtype=torch.bool), backend=backend, **options)
    assert loss == 0 and loss.requires_grad
    assert not gradient_of(loss, student).any()


@pytest.mark.parametrize("who", ["both", "student", "teacher"])
def test_fully_masked_vocabulary(who, backend):
    student, teacher = make_logits(2, 60)
    labels = torch.tensor([3, 4])
    z, y = student.detach().clone(), teacher.clone()
    if who != "teacher":
        z[0] = -INF
    if who != "student":
        y[0] = -INF
    z.requires_grad_()
    stats = distill_stats(z, y, labels, backend=backend)
    mine = {
        "student": ("student_entropy", "student_lse", "cross_entropy"),
        "teacher": ("teacher_entropy", "teacher_lse"),
    }
    for side in mine if who == "both" else (who,):
        assert not any(getattr(stats, name)[0] for name in mine[side])
    assert stats.divergence[0] == (INF if who == "student" else 0)
    loss = ea_kd_loss(z, y, labels, ce_weight=1.0, mask=torch.tensor([True, True]), backend=backend)
    gradient = gradient_of(loss, z)
    assert not gradient.isnan().any()
    if who == "both":
        assert not torch.stack([field[0] for field in stats]).any() and not gradient[0].any()


def test_no_rows_and_one_column(backend):
    student, teacher = make_logits(0, 60)
    loss = ea_kd_loss(student, teacher, backend=backend)
    assert loss == 0 and gradient_of(loss, student).shape == (0, 60)
    student, teacher = make_logits(3, 1)
    for rows, gradient in both_paths(student, teacher, backend=backend):
        assert not rows.any() and not gradient.any()
    assert not ea_weights(student, teacher, weight_norm="bound", backend=backend).any()


@pytest.mark.parametrize("shape", [(60,), (1, 60), (2, 3, 60), (2, 3, 4, 60), (2, 1, 3, 1, 60)], ids=str)
def test_any_leading_shape(shape, backend):
    student, teacher = make_logits(*shape, dtype=widest(backend))
    flat = leaf(student.reshape(-1, 60), student.dtype)
    rows = ea_kd_loss(student, teacher, reduction="none", backend=backend)
    want = ea_kd_loss(flat, teacher.reshape(-1, 60), reduction="none", backend=backend)
    assert rows.shape == shape[:-1]
    torch.testing.assert_close(rows.reshape(-1), want)
    torch.testing.assert_close(gradient_of(rows.sum(), student).reshape(-1, 60), gradient_of(want.sum(), flat))


VIEWS = {
    "slice of rows": lambda x: x[:, 1:-1],
    "slice of columns": lambda x: x[..., 3:40],
    "every other row": lambda x: x[:, ::2],
    "every other column": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(0, 1),
    "classes first": lambda x: x.transpose(0, 2).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "permuted in four dimensions": lambda x: x.reshape(2, 2, 3, 4, -1).permute(3, 0, 2, 1, 4),
    "storage offset": lambda x: x.flatten()[7 : 7 + 8 * 50].reshape(8, 50),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(view, dtype, backend):
    base, teacher = make_logits(4, 12, 50, dtype=dtype)
    student, teacher = view(base), view(teacher)
    plain = leaf(student, dtype)
    for strided, contiguous in zip(
        both_paths(student, teacher, backend=backend),
        both_paths(plain, teacher.contiguous(), backend=backend),
        strict=True,
    ):
        for got, want in zip(strided, contiguous, strict=True):
            assert_same_on(backend, got, want)


def test_large_odd_alignment(kernels):
    """Rows that start at every offset within a vector, large enough for several segments."""
    rows, columns = 2 if interpreted(kernels) else 5, 2 * 16384 + 77
    student, teacher = make_logits(rows * columns + 64)
    for offset in (0, 3) if interpreted(kernels) else range(0, 20, 3):
        z = student.detach()[offset : offset + rows * columns].view(rows, columns)
        y = teacher[offset + 1 : offset + 1 + rows * columns].view(rows, columns)
        moved = z.clone().requires_grad_()
        loss = ea_kd_loss(z.requires_grad_(), y, backend=kernels)
        want = ea_kd_loss(moved, y.clone(), backend=kernels)
        assert_same_on(kernels, loss, want)
        assert_same_on(kernels, gradient_of(loss, z), gradient_of(want, moved))


@pytest.mark.parametrize("widths", [(60, 60), (64, 60), (60, 70), (64, 70)], ids=str)
def test_vocab_size(widths, backend):
    student, teacher = make_logits(2, 3, 60)
    z = torch.full((2, 3, widths[0]), math.nan)
    y = torch.full((2, 3, widths[1]), INF)
    z[..., :60], y[..., :60] = student.detach(), teacher
    z.requires_grad_()
    want = ea_kd_loss(student, teacher, backend=backend)
    loss = ea_kd_loss(z, y, vocab_size=60, backend=backend)
    assert_same_on(backend, loss, want)
    gradient = gradient_of(loss, z)
    assert_same_on(backend, gradient[..., :60], gradient_of(want, student))
    assert not gradient[..., 60:].any()


def test_label_of_a_masked_column(backend):
    student, teacher = make_logits(2, 60, dtype=widest(backend))
    z = student.detach().clone()
    z[0, 7] = -INF
    z.requires_grad_()
    y = teacher.clone()
    y[0, 7] = -INF
    stats = distill_stats(z, y, torch.tensor([7, 8]), backend=backend)
    assert stats.cross_entropy[0] == INF and stats.cross_entropy[1].isfinite()
    gradient = gradient_of(stats.cross_entropy.sum(), z)
    want = z.detach().softmax(-1)
    want[[0, 1], [7, 8]] -= 1
    torch.testing.assert_close(gradient, want)


def test_masks_of_the_smallest_float(backend):
    """transformers masks with finfo.min, not -inf: an ordinary, very small logit."""
    student, teacher = make_logits(2, 60)
    z, y = student.detach().clone(), teacher.clone()
    z[:, 50:] = y[:, 50:] = torch.finfo(torch.float32).min
    z[1] = y[1] = torch.finfo(torch.float32).min
    z.requires_grad_()
    stats = distill_stats(z, y, backend=backend)
    want = eager(student[:1, :50].double(), teacher[:1, :50].double(), bound=math.log(60))
    torch.testing.assert_close(stats.loss[:1].double(), want["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.teacher_entropy[1].item(), math.log(60), rtol=1e-6, atol=0)
    assert gradient_of(stats.loss.sum(), z).isfinite().all()


def test_subnormal_half_logits(kernels):
    tiny = torch.arange(-40, 40, dtype=torch.float64).repeat(3, 1) * 2.0**-24
    z = leaf(tiny, torch.float16)
    assert torch.equal(z.double(), tiny)
    teacher, tau = tiny.flip(-1), 2.0**-18
    stats = distill_stats(z, teacher.half(), temperature=tau, entropy_temperature=tau, backend=kernels)
    want = eager(tiny, teacher, tau=tau, t=tau)
    torch.testing.assert_close(stats.divergence.double(), want["divergence"], rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"weight_norm": "mean"}, {"detach_weights": False}], ids=str
)
def test_everything_may_come_from_inference_mode(options, backend):
    student, teacher = make_logits(3, 60)
    labels, mask = torch.tensor([1, -100, 3]), torch.tensor([True, True, False])
    temperature = torch.tensor([1.0, 2.0, 3.0])
    plain = ea_kd_loss(student, teacher, labels, mask=mask, temperature=temperature, backend=backend, **options).sum()
    with torch.inference_mode():
        made = [x.clone() for x in (teacher, labels, mask, temperature)]
    loss = ea_kd_loss(student, *made[:2], mask=made[2], temperature=made[3], backend=backend, **options).sum()
    assert torch.equal(loss, plain) and torch.equal(gradient_of(loss, student), gradient_of(plain, student))


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_wins_over_a_fully_masked_other_side(bad, side, backend):
    pair = [torch.full((1, 5), -INF), torch.full((1, 5), -INF)]
    pair[side] = torch.tensor([[1.0, bad, 0.0, 2.0, 1.0]])
    z = leaf(pair[0], torch.float32)
    for rows, _ in both_paths(z, pair[1], weighting="none", backend=backend):
        assert rows.isnan().all()


def test_an_infinite_cross_entropy_that_does_not_count(backend):
    student, teacher = make_logits(2, 60)
    z, y = student.detach().clone(), teacher.clone()
    z[0, 7] = y[0, 7] = -INF
    loss, stats = ea_kd_loss(z.requires_grad_(), y, torch.tensor([7, 8]), return_stats=True, backend=backend)
    assert stats.cross_entropy[0] == INF and loss.isfinite() and gradient_of(loss, z).isfinite().all()


@pytest.mark.parametrize("far", [200.0, 1e3, 1e5, 1e20, 2.0**100])
@pytest.mark.parametrize("rows", [1, 12], ids=["shared", "whole"])
def test_a_student_far_below_in_some_columns(far, rows, backend):
    """Teacher mass there is worth about its share of `far`."""
    student, teacher = make_logits(rows, 5003)
    z, y = student.detach().clone(), teacher.clone()
    for start in (0, 2048, 3000, 4995):
        z[:, start : start + 8] = -far
    stats = distill_stats(z, y, backend=backend)
    want = eager(z.double(), y.double())
    torch.testing.assert_close(stats.divergence.double(), want["divergence"], rtol=4e-6, atol=4e-6)


def test_a_temperature_gradient_over_two_dtypes(kernels):
    """The student fp32 and strided, the teacher bf16, the last tile a partial one."""
    student, teacher = make_logits(3, 4104)
    z, y = torch.stack([student.detach(), student.detach()], -1)[..., 0], teacher.to(torch.bfloat16)
    gradients = []
    for dtype, backend in ((torch.float32, kernels), (torch.float64, "reference")):
        tau = torch.tensor([0.7, 1.3, 2.0], dtype=dtype, requires_grad=True)
        stats = distill_stats(z.to(dtype), y, temperature=tau, backend=backend)
        gradients.append(torch.autograd.grad(stats.divergence.sum(), tau)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_one_dimensional_rows_left_out(backend):
    student, teacher = make_logits(10)
    ignored = {"labels": torch.tensor(-100), "ce_weight": 0.1}
    masked = {"labels": torch.tensor(-1), "mask": torch.tensor(False), "ce_weight": 0.1}
    tau = {"mask": torch.tensor(False), "temperature": torch.tensor(math.nan)}
    for options in (ignored, masked, tau):
        loss = ea_kd_loss(student, teacher, backend=backend, **options)
        assert loss == 0 and not gradient_of(loss, student).any()


def test_mean_weights_of_certain_teachers_have_a_gradient(backend):
    """Entropies of 1e-30: their sum squared is 0 in fp32."""
    student, _teacher = make_logits(4, 10)
    sure = torch.zeros(4, 10)
    sure[:, 0] = 150.0
    options = {"weight_norm": "mean", "detach_weights": False, "entropy_temperature": 2.0, "backend": backend}
    loss = ea_kd_loss(student, sure, **options)
    assert loss.isfinite() and gradient_of(loss, student).isfinite().all()
