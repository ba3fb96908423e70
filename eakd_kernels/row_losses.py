"""From statistics of rows to a loss: weight -> row loss -> reduction, whatever the statistics were taken from."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from . import weighting as weights
from .stats import RowStats
from .validation import Problem


def is_live(options) -> bool:
    """Whether gradient flows through the weights."""
    if options.detach_weights:
        return False
    if torch.is_tensor(options.weighting):
        return options.weighting.requires_grad
    return options.weighting not in ("none", "teacher")


def wants_cross_entropy(options) -> bool:
    """Whether somebody looks at it: the loss, the caller, or a weighting that is handed all statistics."""
    return options.ce_weight != 0 or options.return_stats or _is_callable(options.weighting)


def is_scale_known(problem: Problem, options) -> bool:
    """Whether a row's gradient can be finished without the other rows, and without what comes after the loss."""
    temperatures = problem.rows.temperatures
    return (
        torch.is_grad_enabled()
        and options.reduction != "none"
        and options.weight_norm != "mean"
        and not _is_callable(options.weighting)
        and not is_live(options)
        and not (temperatures is not None and temperatures.requires_grad)
    )


def _is_callable(weighting) -> bool:
    return not (isinstance(weighting, str) or torch.is_tensor(weighting))


def is_scaled(options) -> bool:
    """Whether a factor tau^2 comes on top of the divergence; a sum over temperatures has its own inside."""
    return options.scale_by_temperature_squared and options.temperatures is None


def row_stats(problem: Problem, loss, weight, public) -> RowStats:
    divergence, teacher_entropy, student_entropy, teacher_lse, student_lse, cross_entropy = public
    if problem.temperatures > 1:
        teacher_lse = student_lse = None
    if not problem.labelled:
        cross_entropy = None
    return RowStats(loss, weight, divergence, teacher_entropy, student_entropy, teacher_lse, student_lse, cross_entropy)


def finish(fields: tuple[Tensor, ...], problem: Problem, options) -> RowStats:
    """RowStats with loss and weight from stats.PUBLIC_FIELDS of every row."""
    stats = row_stats(problem, None, None, fields)
    weight = _weight(stats, problem, options)
    tau_squared = 1.0
    if is_scaled(options):
        rows = problem.rows
        tau = rows.temperature if rows.temperatures is None else rows.temperatures.to(weight.dtype)
        tau_squared = tau * tau
    loss = weights.row_loss(
        stats.divergence, weight, stats.cross_entropy, tau_squared, options.kd_weight, options.ce_weight
    )
    return stats._replace(loss=loss, weight=weight)


def _weight(stats: RowStats, problem: Problem, options) -> Tensor:
    live, keep = is_live(options), problem.rows.keep
    with torch.set_grad_enabled(live and torch.is_grad_enabled()):
        if torch.is_tensor(options.weighting):
            weight = options.weighting.to(stats.divergence.dtype)
        elif callable(options.weighting):
            weight = _called(options.weighting, stats if live else stats.detach(), problem.entropy_bound)
        else:
            weight = weights.BUILT_IN[options.weighting](stats, problem.entropy_bound)
        if keep is not None:
            weight = torch.where(keep, weight, 0.0)
        weight = weights.normalize(weight, options.weight_norm, problem.entropy_bound, keep)
    return weight if live else weight.detach()


def _called(weighting: Callable[..., Tensor], stats: RowStats, entropy_bound: float) -> Tensor:
    bound = {"entropy_bound": entropy_bound} if _takes_bound(weighting) else {}
    try:
        weight = weighting(stats, **bound)
    except (AttributeError, TypeError) as error:
        if "NoneType" not in str(error):
            raise
        raise type(error)(f"weighting read a statistic that is None: {error}{_absent(stats)}") from error
    if not torch.is_tensor(weight) or weight.shape != stats.divergence.shape:
        got = tuple(weight.shape) if torch.is_tensor(weight) else type(weight).__name__
        raise ValueError(
            f"weighting returned {got}; a callable must return a tensor of shape {tuple(stats.divergence.shape)}"
            + (_absent(stats) if weight is None else "")
        )
    return weight.to(stats.divergence.dtype)


def _absent(stats: RowStats) -> str:
    names = [name for name, field in zip(stats._fields, stats, strict=True) if field is None]
    hint = "; cross_entropy needs labels" if "cross_entropy" in names else ""
    return f"; a callable's stats have no {', '.join(names)} (the weight comes before weight and loss{hint})"


def _takes_bound(weighting: Callable[..., Tensor]) -> bool:
    """Whether it has an entropy_bound to fill, as those in eakd_kernels.weighting."""
    called = weighting.forward if isinstance(weighting, torch.nn.Module) else weighting
    try:
        parameter = inspect.signature(called).parameters.get("entropy_bound")
    except (TypeError, ValueError):  # of a builtin, say
        return False
    except AttributeError:
        # Dynamo has no signature of a function that is defined in what it compiles, but the code it is made of.
        code = called.__code__
        return "entropy_bound" in code.co_varnames[: code.co_argcount] and called.__defaults__ is None
    return parameter is not None and parameter.default is parameter.empty


def scale_of(problem: Problem, options) -> tuple[float, Tensor | None]:
    """The loss is scale / denominator * sum over rows; counts that live on the device stay there."""
    student, keep = problem.rows.student_logits, problem.rows.keep
    if torch.is_tensor(options.num_items):
        items = options.num_items.detach()
        if items.device == student.device or torch.compiler.is_compiling():
            return 1.0, items.to(student.device)
        return 1.0 / items.item(), None  # a count on the CPU; copying it to the GPU would wait for the GPU
    if options.num_items is not None:
        return 1.0 / float(options.num_items), None
    if options.reduction == "sum":
        return 1.0, None
    if keep is not None:
        return 1.0, keep.sum().clamp(min=1)
    return 1.0 / max(student.shape[:-1].numel(), 1), None


def reduce(loss: Tensor, problem: Problem, options) -> Tensor:
    if options.reduction == "none":
        return loss
    scale, denominator = scale_of(problem, options)
    return loss.sum() * scale if denominator is None else loss.sum() / denominator.to(loss.dtype)
