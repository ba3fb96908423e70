"""The options of a loss: written once, as the keywords of `functional.ea_kd_loss`, and checked here.

`options_class` makes a frozen dataclass of those keywords; `takes_options` lets the other functions and the modules
take them as **options, with a signature that help() and editors show.
"""

import difflib
import functools
import inspect
import math
import numbers
from dataclasses import fields, make_dataclass

import torch

from . import divergences, weighting

REDUCTIONS = ("mean", "sum", "none")
WEIGHT_NORMS = ("none", "mean", "bound")
# Beyond it log2(e)/temperature leaves fp32.
_LARGEST_TEMPERATURE = 1e30
# What the kernels have room for: MLD takes five.
MOST_TEMPERATURES = 8


def keyword_names(function) -> tuple[str, ...]:
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)


# What others call these.
_ALIASES = {
    **dict.fromkeys(("tau", "T", "temp"), "temperature"),
    "t": "entropy_temperature",
    **dict.fromkeys(("attention_mask", "loss_mask", "labels_mask"), "mask"),
    "h_ub": "entropy_bound",
}
_WEIGHTS = (("kd_weight", "ce_weight"), "use kd_weight and ce_weight, the factors of the two terms")
# Of what has no single name here: the options that stand for it, and how.
_ADVICE = {
    "alpha": _WEIGHTS,
    "beta": (("divergence", *_WEIGHTS[0]), f"{_WEIGHTS[1]}; for that of a mixture divergence=JSD(beta)"),
    "label_smoothing": (
        ("ce_weight",),
        "leave ce_weight at 0 and add torch.nn.functional.cross_entropy with label_smoothing to the loss",
    ),
}


def check_keywords(given, known, what: str) -> None:
    for name in given:
        if name not in known:
            near = _near(name, known)
            needed, advice = _ADVICE.get(name, ((), ""))
            if advice and set(needed) <= set(known):
                raise TypeError(f"{what} got an unknown keyword {name!r}; {name}: {advice}")
            hint = f"did you mean {' and '.join(map(repr, near))}?" if near else f"it takes {', '.join(sorted(known))}"
            raise TypeError(f"{what} got an unknown keyword {name!r}; {hint}")


def _near(name: str, known) -> list[str]:
    """Both sides' options, what others mean by it, or the nearest name."""
    sides = [option for option in sorted(known) if option in (f"student_{name}", f"teacher_{name}")]
    alias = _ALIASES.get(name)
    return sides or [alias] * (alias in known) or difflib.get_close_matches(name, known, 1)


def _shown(parameters) -> list[str]:
    return [p.name for p in parameters if p.name != "self"]


def _signature(function, leading, names, defaults) -> inspect.Signature:
    options = inspect.signature(function).parameters
    keywords = [options[name].replace(default=defaults.get(name, options[name].default)) for name in names]
    return inspect.Signature([*leading, *keywords], return_annotation=inspect.signature(function).return_annotation)


def explicit(function):
    """For a function that spells its keywords out: an unknown one is met with the nearest known one."""
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args, **keywords):
        if not known.issuperset(keywords):
            check_keywords(keywords, known, f"{function.__name__}()")
        return function(*args, **keywords)

    return checked


def takes_options(source, *, only=None, without=(), **defaults):
    """Give a function's **options the keywords of `source`: those in `only`, or all but those in `without`."""

    def decorate(function):
        names = tuple(n for n in keyword_names(source) if n not in without and (only is None or n in only))
        known = frozenset(names)
        own = inspect.signature(function)
        leading = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in leading)

        @functools.wraps(function)
        def checked(*args, **options):
            if not known.issuperset(options):
                check_keywords(options, (*names, *_shown(leading)), f"{function.__qualname__}()")
            if len(args) > positional:
                _refuse_positional(function, args[positional])
            return function(*args, **{**defaults, **options})

        shown = _signature(source, leading, names, defaults)
        checked.__signature__ = shown.replace(return_annotation=own.return_annotation)
        return checked

    return decorate


def _refuse_positional(function, value) -> None:
    owner = function.__qualname__.removesuffix(".__init__")
    before = "" if owner != function.__qualname__ else "..., "
    raise TypeError(f"{owner}() takes options as keywords, as {owner}({before}temperature=4.0), got {_kind(value)}")


def options_class(function) -> type:
    """A frozen dataclass with the keyword-only parameters of `function`, checked when it is made."""
    parameters = inspect.signature(function).parameters.values()
    items = [(p.name, p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY]
    options = make_dataclass("Options", items, bases=(_Checked,), frozen=True)
    options.__module__ = function.__module__
    return options


class _Checked:
    """The checks that need no other argument; validation.py has those that need the logits."""

    def __post_init__(self):
        self._check_group()
        self._check_choices()
        self._check_temperatures()
        self._check_numbers()

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """Those to sum over."""
        return tuple(map(float, self.temperature)) if isinstance(self.temperature, tuple | list) else None

    def _check_group(self):
        group, distributed = self.process_group, torch.distributed
        if group is None or (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            return
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD or "
            f"device_mesh.get_group(), got {_kind(group)}"
        )

    def _check_choices(self):
        if isinstance(self.reduction, str) and self.reduction == "batchmean":
            raise ValueError('reduction="batchmean" does not exist here; "mean" divides by the number of rows kept')
        _check_choice("reduction", self.reduction, REDUCTIONS)
        _check_choice("weight_norm", self.weight_norm, WEIGHT_NORMS)
        if isinstance(self.weighting, str) or not (callable(self.weighting) or torch.is_tensor(self.weighting)):
            more = ", a tensor or a callable, such as eakd_kernels.weighting.focal"
            _check_choice("weighting", self.weighting, (*weighting.BUILT_IN,), more)
        if not isinstance(self.divergence, divergences.Divergence):
            if isinstance(self.divergence, type) and issubclass(self.divergence, divergences.Divergence):
                raise TypeError(f"divergence must be an instance, got the class: {self.divergence.__name__}(...)")
            classes = ", ".join(kind.__name__ for kind in divergences.ALL)
            more = f" or an instance out of eakd_kernels.divergences ({classes}), such as JSD(0.5)"
            _check_choice("divergence", self.divergence, (*divergences.BY_NAME,), more)
        if not (isinstance(self.standardize, bool) or self.standardize == "all"):
            raise ValueError(f'standardize must be False, True or "all", got {self.standardize!r}')
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a name, got {_kind(self.backend)}")
        flags = ("detach_weights", "scale_by_temperature_squared", "inplace_gradient", "return_stats")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _check_temperatures(self):
        if isinstance(self.temperature, tuple | list):
            if not 1 <= len(self.temperature) <= MOST_TEMPERATURES:
                raise ValueError(
                    f"temperature must have 1 to {MOST_TEMPERATURES} entries to sum over, got {len(self.temperature)}; "
                    "add up several calls for more"
                )
            for i, tau in enumerate(self.temperature):
                check_number(f"temperature[{i}]", tau, above=0, below=_LARGEST_TEMPERATURE)
        elif not torch.is_tensor(self.temperature):
            check_number("temperature", self.temperature, above=0, below=_LARGEST_TEMPERATURE)
        elif not self.temperature.is_floating_point():
            raise TypeError(f"temperature must be a float or a floating-point tensor, got {self.temperature.dtype}")
        check_number("entropy_temperature", self.entropy_temperature, above=0, below=_LARGEST_TEMPERATURE)

    def _check_numbers(self):
        if self.entropy_bound is not None:
            check_number("entropy_bound", self.entropy_bound, at_least=0)
        for name in ("student_logit_scale", "teacher_logit_scale"):
            check_number(name, getattr(self, name), above=0, below=_LARGEST_TEMPERATURE)
        for name in ("student_softcap", "teacher_softcap"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, below=_LARGEST_TEMPERATURE)
        check_number("kd_weight", self.kd_weight, at_least=0)
        check_number("ce_weight", self.ce_weight, at_least=0)
        if not _is_int(self.ignore_index):
            raise TypeError(f"ignore_index must be an int, got {_kind(self.ignore_index)}")
        if self.vocab_size is not None and not _is_int(self.vocab_size):
            raise TypeError(f"vocab_size must be an int or None, got {_kind(self.vocab_size)}")
        if self.num_items is not None:
            if self.reduction == "none":
                raise ValueError('num_items goes with reduction "mean" or "sum" (both then give sum / num_items)')
            if not torch.is_tensor(self.num_items):
                check_number("num_items", self.num_items, above=0)
            elif self.num_items.dim() != 0:
                raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {tuple(self.num_items.shape)}")


def _kind(value) -> str:
    if torch.is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _is_int(value) -> bool:
    # torch.compile(dynamic=True) makes sizes symbolic
    return isinstance(value, int | torch.SymInt | numbers.Integral) and not isinstance(value, bool)


def _check_choice(name, value, known, more="") -> None:
    if not (isinstance(value, str) and value in known):
        choices = ", ".join(f'"{choice}"' for choice in known)
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"{name} must be one of {choices}{more}, got {value!r}"
        )


def _is_real(value) -> bool:
    # numbers.Real is there for NumPy's scalars
    number = isinstance(value, int | float | torch.SymInt | torch.SymFloat | numbers.Real)
    return number and not isinstance(value, bool)


def check_number(name, value, *, above=None, at_least=None, below=math.inf) -> None:
    # Comparisons only, false for NaN, and text only for errors: torch.compile(dynamic=True) makes numbers symbolic.
    if _is_real(value) and (value >= at_least if above is None else value > above) and value < below:
        return
    wanted = f">= {at_least}" if above is None else f"> {above}"
    if not _is_real(value):
        raise TypeError(f"{name} must be a number {wanted}, got {_kind(value)}")
    limit = "" if below == math.inf else f" and < {below:g}"
    raise ValueError(f"{name} must be a finite number {wanted}{limit}, got {value!r}")
