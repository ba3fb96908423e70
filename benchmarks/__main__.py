"""`python -m benchmarks`: time every provider on every case, and print what came out."""

import argparse
import math
import sys
from pathlib import Path

import torch

from . import report
from .cases import cases
from .gpu import why_no_gpu
from .measure import machine, measure
from .progress import Progress


def main() -> None:
    arguments, every_case = parse()
    chosen = [case for case in every_case if arguments.case in str(case)]
    if not chosen:
        raise SystemExit(f'no case contains "{arguments.case}"; there are\n' + "\n".join(map(str, every_case)))
    if arguments.device == "cuda" and (reason := why_no_gpu()):
        raise SystemExit(reason)

    torch.set_num_threads(arguments.threads)
    where, rows, path = machine(arguments.device), [], None
    progress = Progress(len(chosen) * arguments.rounds, arguments.minutes)
    for case in chosen:
        if not progress.begins(str(case)):
            continue
        try:
            measured = measure(case, arguments.rounds, arguments.full, arguments.memory, progress.round)
        except torch.OutOfMemoryError:
            print(f"{case}: left out: its inputs do not fit into memory", file=sys.stderr)
            continue
        rows += [{**where, "rounds": str(arguments.rounds), **row} for row in measured]
        if arguments.out:
            path = report.save(rows, arguments.out)  # what is measured stays if a later case fails
    if not rows:
        raise SystemExit("nothing was measured")
    texts = [report.table(rows)]
    if arguments.device == "cuda":
        texts += [report.left_out(rows), report.summary(rows)]
    print(*filter(None, (*texts, report.goals(rows))), sep="\n\n")
    if path:
        print(f"\nwritten to {path}")


def parse():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default here: %(default)s")
    parser.add_argument("--full", action="store_true", help="all vocabularies, fp16, labels, statistics, reference")
    parser.add_argument("--memory", action="store_true", help="the peak memory of a step too; on a GPU it always is")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help='only cases with this text, such as "Llama 2" or bf16'
    )
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a CSV file there, such as benchmarks/results")
    arguments = parser.parse_args()
    return arguments, cases(arguments.full, arguments.device)


if __name__ == "__main__":
    main()
