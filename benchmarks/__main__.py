"""`python -m benchmarks`: time every provider on every case, and print what came out."""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import eakd_kernels

from . import report, timing
from .cases import Case, cases
from .memory import peak_memory
from .providers import in_fp64, providers, run, wrong


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default here: %(default)s")
    parser.add_argument("--full", action="store_true", help="all vocabularies, fp16, labels, statistics, reference")
    parser.add_argument("--memory", action="store_true", help="the peak memory of a step too, in units of the logits")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help='only cases with this text, such as "Llama 2" or bf16'
    )
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a CSV file there, such as benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    every_case = cases(arguments.full)
    chosen = [case for case in every_case if arguments.case in str(case)]
    if not chosen:
        parser.error(f'no case contains "{arguments.case}"; there are\n' + "\n".join(map(str, every_case)))

    where, rows = machine(), []
    with tqdm(total=len(chosen) * arguments.rounds, unit="round", file=sys.stderr) as bar:
        for case in chosen:
            bar.set_description(str(case))
            measured = measure(case, arguments.rounds, arguments.full, arguments.memory, bar.update)
            rows += [{**where, "rounds": str(arguments.rounds), **row} for row in measured]
    print(*filter(None, (report.table(rows), report.goals(rows))), sep="\n\n")
    if arguments.out:
        print(f"\nwritten to {report.save(rows, arguments.out)}")


def machine() -> dict[str, str]:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]  # none on some aarch64
    return {
        "machine": models[0] if models else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "eakd_kernels": eakd_kernels.__version__,
        "date": datetime.date.today().isoformat(),
    }


def measure(
    case: Case, rounds: int, full: bool = False, memory: bool = False, after_round: Callable[[], object] = lambda: None
) -> list[report.Row]:
    """A row for each provider and for a plain copy, the roof. Refuses to time what is wrong."""
    inputs, competitors = case.inputs(), providers(case, reference=full)
    exact = in_fp64(inputs)
    for name, provider in competitors.items():
        if reason := wrong(provider, inputs, exact):
            raise SystemExit(f"{case}: {name} is wrong and will not be timed: {reason}")
    del exact
    student = inputs.student.detach()
    calls = {name: partial(run, provider, inputs) for name, provider in competitors.items()}
    calls["copy"] = partial(torch.empty_like(student).copy_, student)
    # Repetitions inside a sample free each other's gradient on the clock; what an earlier sample left is freed here.
    samples = timing.interleaved(calls, rounds, partial(setattr, inputs.student, "grad", None), after_round)
    inputs.student.grad = None

    described = {field: str(value) for field, value in vars(case).items()}
    rows = []
    for name, milliseconds in samples.items():
        streams = 2 if name == "copy" else case.streams
        ms = timing.spread(milliseconds)
        copy_time = timing.ratios(samples["copy"], milliseconds).median  # for 2 streams
        rows.append(
            {
                **described,
                "provider": name,
                **_columns("ms", ms),
                **_faster("eager", name, samples),
                **_faster("compile", name, samples),
                "gb_per_s": f"{streams * student.nbytes / ms.median / 1e6:.4g}",
                "percent_of_copy": f"{100 * copy_time * streams / 2:.4g}",
                "peak_memory": f"{peak_memory(case, name):.4g}" if memory and name != "copy" else "",
            }
        )
    return rows


def _faster(baseline: str, name: str, samples: dict[str, list[float]]) -> dict[str, str]:
    """How many times; nothing for a copy, which is no competitor."""
    if name in (baseline, "copy"):
        return dict.fromkeys((f"x_{baseline}", f"x_{baseline}_q1", f"x_{baseline}_q3"), "")
    return _columns(f"x_{baseline}", timing.ratios(samples[baseline], samples[name]))


def _columns(name: str, spread: timing.Spread) -> dict[str, str]:
    return {name: f"{spread.median:.4g}", f"{name}_q1": f"{spread.q1:.4g}", f"{name}_q3": f"{spread.q3:.4g}"}


if __name__ == "__main__":
    main()
