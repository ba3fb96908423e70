"""`python -m benchmarks.memory_over_rows`: every provider's memory against rows, on a CPU; other work may go on."""

import argparse
from pathlib import Path

import torch

from .cases import cases_over_rows
from .measure import machine, memory_columns
from .memory import memory_on_cpu
from .progress import Progress
from .providers import providers
from .report import RESULTS, save


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_over_rows", description=__doc__.split(": ")[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default here: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory", metavar="FOLDER", help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = [(case, name) for case in cases_over_rows() for name in providers(case)]
    progress, rows = Progress(len(work)), []
    for case, name in work:
        progress.begins(f"{case}: {name}")
        described = {field: str(value) for field, value in vars(case).items()} | {"provider": name}
        rows.append({**machine("cpu"), **described, **memory_columns(memory_on_cpu(case, name))})
        progress.round()
    print(f"written to {save(rows, arguments.out)}")


if __name__ == "__main__":
    main()
