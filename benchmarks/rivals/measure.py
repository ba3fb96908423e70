"""One case, measured: a row of results for every entry, or why there is nothing of it."""

from collections.abc import Callable
from functools import partial

import torch

from .. import check as of_logits
from .. import timing
from ..check import Check, Provider, forget, run
from ..measure import admit, properties, spread_columns
from ..memory import bytes_on_gpu, in_a_fresh_process
from ..report import Row
from . import hidden
from .cases import HiddenCase, HiddenInputs, LogitsCase
from .entries import Entries, Entry, entries

Case = LogitsCase | HiddenCase
# Of a case, in the results.
DESCRIBED = ("family", "model", "vocab_size", "rows", "hidden", "dtype", "student", "device", "clock")
QUARTILES = ("", "_q1", "_q3")
COLUMNS = [f"{name}{quartile}" for name in ("ms", "x_ours") for quartile in QUARTILES]
COLUMNS += ["peak_mb", "retained_mb", "formula", "version", "loss_error", "gradient_error", "left_out"]


def measure(
    case: Case,
    rounds: int,
    entered: Entries | None = None,
    memory: bool = True,
    after_round: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Refuses to time this package where it is wrong; another that is wrong or fails is left out, and why is said.

    `memory`: of the cases that it is measured of at all. A case of errors is checked, and neither timed nor refused.
    """
    inputs, entered = case.inputs(), entries(case) if entered is None else entered
    errors_only = case.family == "errors"
    remembers = case.device == "cpu" or case.family == "hidden"
    judge = partial(check_of, in_fp64=_remembered(inputs) if remembers else in_fp64_of(inputs))
    if errors_only:  # how far off it is, is what is asked for
        judge = partial(_lenient, judge)
    checks = {entry: admit(case, entry.provider, provider, inputs, judge) for entry, provider in entered.items()}
    admitted = {entry: provider for entry, provider in entered.items() if isinstance(checks[entry], Check)}
    samples = {} if errors_only else _samples(case, admitted, inputs, rounds, after_round)
    forget(inputs)
    described = {name: str(getattr(case, name)) for name in DESCRIBED} | {"rounds": str(rounds)}
    rows = []
    for entry in entered:
        row = {**described, **entry._asdict(), **dict.fromkeys(COLUMNS, "")}
        if entry in admitted:
            row |= properties(admitted[entry], checks[entry])
            if entry in samples:
                row |= _times(entry, samples)
            if memory and case.measures_memory:
                row |= memory_of(case, entry, admitted[entry], inputs)
        else:
            row["left_out"] = checks[entry]
        rows.append(row)
    return rows


def check_of(provider: Provider, inputs: tuple, in_fp64: Callable | None = None) -> Check:
    check = hidden.check if isinstance(inputs, HiddenInputs) else of_logits.check
    return check(provider, inputs, in_fp64 or in_fp64_of(inputs))


def in_fp64_of(inputs: tuple) -> Callable:
    return hidden.in_fp64 if isinstance(inputs, HiddenInputs) else of_logits.in_fp64


def _remembered(inputs: tuple) -> Callable:
    """Every formula is computed once for all who claim it. A GPU's logits would take the memory that they need."""
    compute, known = in_fp64_of(inputs), {}

    def in_fp64(formula, inputs, *rows):
        key = formula, *(part.start for part in rows)
        if key not in known:
            known[key] = compute(formula, inputs, *rows)
        return known[key]

    return in_fp64


def _lenient(judge: Callable, provider: Provider, inputs: tuple) -> Check:
    return judge(provider, inputs)._replace(wrong=None)


def _samples(case: Case, admitted: dict[Entry, Provider], inputs: tuple, rounds: int, after_round: Callable):
    calls = {entry: partial(run, provider.loss, inputs) for entry, provider in admitted.items()}
    sample = timing.sampler(case.clock, case.device)
    return timing.interleaved(calls, rounds, sample, partial(forget, inputs), after_round)


def _times(entry: Entry, samples: dict[Entry, list[float]]) -> Row:
    """Also how many times longer than this package's, of the same weights: its first backend, which "auto" takes."""
    columns = spread_columns("ms", timing.spread(samples[entry]))
    ours = [other for other in samples if other.provider.startswith("eakd ") and other.weights == entry.weights]
    if ours and ours[0] != entry:
        columns |= spread_columns("x_ours", timing.ratios(samples[entry], samples[ours[0]]))
    return columns


def memory_of(case: Case, entry: Entry, provider: Provider, inputs: tuple) -> Row:
    if case.device == "cuda":
        memory = bytes_on_gpu(provider.loss, inputs)
    else:
        from .fresh import used  # imports every package

        memory = in_a_fresh_process(used, case, entry, torch.get_num_threads())
    return {"peak_mb": f"{memory.peak / 1e6:.4g}", "retained_mb": f"{memory.retained / 1e6:.4g}"}
