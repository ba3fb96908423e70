"""A call on shards of the vocabulary in every process of a world, against the same call on whole rows."""

import pytest
import torch
from processes import Collectives
from torch import distributed as dist

from eakd_kernels import ea_kd_loss
from eakd_kernels.stats import RowStats

VOCAB, ROWS = 61, 7
LAYOUTS = {"2 even": (31, 30), "2 uneven": (3, 58), "4 even": (16, 16, 16, 13), "4 uneven": (1, 40, 0, 20)}


def positions(rows):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 40, (rows,), generator=generator)
    labels[1::5] = -100
    return labels


def own_columns(widths):
    first = sum(widths[: dist.get_rank()])
    return slice(first, first + widths[dist.get_rank()])


def upstream_of(values):
    return torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)


def tensors_of(teacher, columns=slice(None)):
    """What a teacher is passed as: some columns of its logits; or, if it is a tuple, ids and log-probabilities."""
    return teacher if isinstance(teacher, tuple) else (teacher[..., columns].clone(),)


def gradient_twice(loss, leaf):
    """(the gradient, whether it is the same again); a second derivative raises."""
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    (create,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(create.sum(), leaf)
    return first, torch.equal(first, second)


def promises(loss_of, leaf):
    """(loss, gradient, {promise: whether it is kept}) of loss_of(logits, **options)."""
    loss = loss_of(leaf)
    gradient, same = gradient_twice(loss, leaf)
    logits = leaf * 1
    (inplace,) = torch.autograd.grad(loss_of(logits, inplace_gradient=True), logits)
    compiled = torch.compile(lambda x: loss_of(x * 1), backend="aot_eager")(leaf)
    (traced,) = torch.autograd.grad(compiled, leaf)
    return (
        loss,
        gradient,
        {
            "again": same and torch.equal(loss, loss_of(leaf)),
            "in place": torch.equal(inplace, gradient) and torch.equal(logits.detach(), gradient),
            "compiled": torch.equal(compiled, loss) and torch.equal(traced, gradient),
        },
    )


def sharded(widths, function, student, teacher, labels, options):
    """This rank's part of a call on shards: what a process is asked to do."""
    columns = own_columns(widths)
    student, teacher = student[..., columns].clone().requires_grad_(), tensors_of(teacher, columns)
    options = {**options, "process_group": dist.group.WORLD}
    temperature = options.get("temperature")
    if torch.is_tensor(temperature):
        options["temperature"] = temperature = temperature.detach().clone().requires_grad_(temperature.requires_grad)
    with Collectives() as forward:
        loss, stats = function(student, *teacher, labels, return_stats=True, **options)
    with Collectives() as backward:
        (loss * upstream_of(loss)).sum().backward()
    return {
        "loss": loss.detach(),
        "stats": stats,
        "gradient": student.grad,
        "temperature": temperature.grad if torch.is_tensor(temperature) else None,
        "sizes": sum(dtype == torch.int64 for _, dtype in forward.calls),
        "forward": len(forward.calls),
        "backward": len(backward.calls),
    }


def whole(function, student, teacher, labels, options):
    student = student.clone().requires_grad_()
    loss, stats = function(student, *tensors_of(teacher), labels, return_stats=True, **options)
    (loss * upstream_of(loss)).sum().backward()
    return loss.detach(), stats, student.grad


def assert_close(got, want, bound=1e-6, name="it"):
    """Statistics: bound * max(1, |want|), and the same places infinite or NaN."""
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite) and got.dtype == want.dtype, f"{name} is {got}, not {want}"
    assert torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()), f"{name} is {got}, not {want}"
    error = (got - want).abs()[finite] / want.abs()[finite].clamp(min=1)
    assert not error.numel() or error.max() <= bound, f"{name} is off by {error.max():.2g}"


def distance(got, want):
    return (got - want).nan_to_num().double().norm() / want.nan_to_num().double().norm().clamp(min=1e-30)


def doubled(teacher):
    if isinstance(teacher, tuple):
        return tuple(x.double() if x.is_floating_point() else x for x in teacher)
    return teacher.double()


def check(world, widths, student, teacher, labels, options, function=ea_kd_loss, backend="cpu", collectives=1):
    options = {"backend": backend, **options}
    student = student.detach()
    answers = world(len(widths)).run(sharded, widths, function, student, teacher, labels, options)
    loss, stats, gradient = whole(function, student, teacher, labels, options)
    for answer in answers:
        assert torch.equal(answer["loss"].nan_to_num(7), answers[0]["loss"].nan_to_num(7))
        for name, got, want, first in zip(RowStats._fields, answer["stats"], stats, answers[0]["stats"], strict=True):
            assert (got is None) == (want is None), name
            if got is not None:
                assert torch.equal(got.nan_to_num(7), first.nan_to_num(7)), f"{name} differs between ranks"
                assert_close(got, want, name=name)
        assert (answer["sizes"], answer["forward"], answer["backward"]) == (1, 1 + collectives, 0)
    assert_close(answers[0]["loss"], loss)
    got = torch.cat([answer["gradient"] for answer in answers], -1)
    assert got.dtype == gradient.dtype and torch.equal(got.isnan(), gradient.isnan())
    bound = 1e-6 if gradient.dtype.itemsize > 2 else torch.finfo(gradient.dtype).eps
    if (error := distance(got, gradient)) > bound:
        # Sums over ranks go on in double: they may be nearer to the truth than the run on whole rows.
        *_, exact = whole(function, student.double(), doubled(teacher), labels, {**options, "backend": "reference"})
        assert distance(got, exact) <= min(bound, distance(gradient, exact)), f"off by {error:.2g}"
    return answers
