"""One case, measured: a row of results for every provider and for a plain copy, the roof."""

import datetime
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import eakd_kernels

from . import timing
from .cases import Case, Inputs
from .check import Check, Provider, check, forget, in_a_line, run
from .memory import Memory, memory_on_cpu, memory_on_gpu
from .providers import providers
from .report import BASELINES, Row
from .rivals.packages import version_of


def machine(device: str) -> dict[str, str]:
    """Where and with what."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        where = {"machine": torch.cuda.get_device_name(), "capability": f"sm_{major}{minor}", "threads": ""}
        where |= {"driver": _driver(), "cuda": torch.version.cuda, "triton": version_of("triton")}
    else:
        cpus = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]  # aarch64 may not
        where = {
            "machine": models[0] if models else platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
            **dict.fromkeys(("driver", "cuda", "triton"), ""),
        }
    versions = {"torch": torch.__version__, "eakd_kernels": eakd_kernels.__version__}
    return where | versions | {"date": datetime.date.today().isoformat()}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return ""


def measure(
    case: Case, rounds: int, full: bool = False, memory: bool = False, after_round: Callable[[], object] = lambda: None
) -> list[Row]:
    """Refuses to time this package where it is wrong; another that is wrong or fails is left out, and why is said."""
    inputs, entered = case.inputs(), providers(case, reference=full)
    checks = {name: admit(case, name, provider, inputs) for name, provider in entered.items()}
    timed = {name: entered[name] for name, result in checks.items() if isinstance(result, Check)}
    student = inputs.student.detach()
    calls = {name: partial(run, provider.loss, inputs) for name, provider in timed.items()}
    calls["copy"] = partial(torch.empty_like(student).copy_, student)
    sample = timing.sampler(case.clock, case.device)
    # Repetitions inside a sample free each other's gradient on the clock; what an earlier sample left is freed here.
    samples = timing.interleaved(calls, rounds, sample, partial(forget, inputs), after_round)
    forget(inputs)

    described = {field: str(value) for field, value in vars(case).items()} | {"clock": case.clock}
    rows = []
    for name in (*entered, "copy"):
        row = {**described, "provider": name, **dict.fromkeys(COLUMNS, "")}
        if name in samples:
            row |= _times(name, samples) | _bandwidth(case, name, samples, student.nbytes)
        if name in timed:
            row |= properties(timed[name], checks[name])
            if case.device == "cuda":
                row |= memory_columns(memory_on_gpu(timed[name].loss, inputs))
            elif memory:
                row |= memory_columns(memory_on_cpu(case, name))
        elif name != "copy":
            row["left_out"] = checks[name]
        rows.append(row)
    return rows


SPREADS = ("ms", *BASELINES)
COLUMNS = [f"{name}{quartile}" for name in SPREADS for quartile in ("", "_q1", "_q3")]
COLUMNS += ["gb_per_s", "percent_of_copy", "percent_at_5_streams", "peak_memory", "retained_memory"]
COLUMNS += ["formula", "version", "loss_error", "gradient_error", "left_out"]


def admit(case: Case, name: str, provider: Provider | str, inputs: Inputs, check: Callable = check) -> Check | str:
    """The provider's check, or why it is not timed."""
    if isinstance(provider, str):
        return provider
    own = name.startswith("eakd ")
    try:
        result = check(provider, inputs)
    except torch.OutOfMemoryError:
        result = "out of memory"
    except Exception as error:
        if own:
            raise
        result = f"fails: {in_a_line(error)}"
    else:
        if result.wrong and own:
            raise SystemExit(f"{case}: {name} is wrong and will not be timed: {result.wrong}")
        result = f"wrong: {result.wrong}" if result.wrong else result
    if case.device == "cuda":
        torch.cuda.empty_cache()  # the next one's tensors have other sizes
    return result


def _times(name: str, samples: dict[str, list[float]]) -> Row:
    columns = spread_columns("ms", timing.spread(samples[name]))
    for column, baseline in BASELINES.items():
        if name not in (baseline, "copy") and baseline in samples:
            columns |= spread_columns(column, timing.ratios(samples[baseline], samples[name]))
    return columns


def _bandwidth(case: Case, name: str, samples: dict[str, list[float]], logits_bytes: int) -> Row:
    """A copy moves 2 streams. Two sweeps, statistics and then the gradient, move 5, one sweep 3."""
    if case.device == "cuda" and case.clock == "wall":
        return {}
    streams = 2 if name == "copy" else case.streams
    seconds = timing.spread(samples[name]).median / 1e3
    share = timing.ratios(samples["copy"], samples[name]).median / 2
    columns = {
        "gb_per_s": f"{streams * logits_bytes / seconds / 1e9:.4g}",
        "percent_of_copy": f"{100 * share * streams:.4g}",
    }
    if case.device == "cuda" and streams == 3:
        columns["percent_at_5_streams"] = f"{100 * share * 5:.4g}"
    return columns


def memory_columns(memory: Memory) -> Row:
    return {"peak_memory": f"{memory.peak:.4g}", "retained_memory": f"{memory.retained:.4g}"}


def properties(provider: Provider, result: Check) -> Row:
    gradient = "" if result.gradient_error is None else f"{result.gradient_error:.2g}"
    return {
        "formula": provider.name_of_formula,
        "version": provider.version,
        "loss_error": f"{result.loss_error:.2g}",
        "gradient_error": gradient,
    }


def spread_columns(name: str, spread: timing.Spread) -> Row:
    return {name: f"{spread.median:.4g}", f"{name}_q1": f"{spread.q1:.4g}", f"{name}_q3": f"{spread.q3:.4g}"}
