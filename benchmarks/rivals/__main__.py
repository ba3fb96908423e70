"""`python -m benchmarks.rivals`: this package beside others on the same inputs, interleaved, and what came out."""

import argparse
import math
import sys
from pathlib import Path

import torch

from ..gpu import why_no_gpu
from ..measure import machine
from ..progress import Progress
from ..report import save
from .cases import cases
from .entries import COMPILED, entries
from .measure import measure
from .table import tables

QUICK_ROUNDS = 2
HIDDEN_ROUNDS = 3  # at most: one lasts seconds


def main() -> None:
    arguments = parse()
    if arguments.device == "cuda" and (reason := why_no_gpu()):
        raise SystemExit(reason)
    torch.set_num_threads(arguments.threads)
    chosen = [case for case in cases(arguments.device, arguments.quick) if arguments.case in str(case)]
    if not chosen:
        raise SystemExit(f'no case contains "{arguments.case}"; there are\n' + "\n".join(map(str, cases())))
    rows, path, where = [], None, machine(arguments.device)
    most = QUICK_ROUNDS if arguments.quick else arguments.rounds
    by_family = {"logits": most, "hidden": min(most, HIDDEN_ROUNDS), "errors": 0}
    rounds = {case: by_family[case.family] for case in chosen}
    progress = Progress(sum(rounds.values()), arguments.minutes)
    for case in chosen:
        if not progress.begins(str(case)):
            continue
        entered = entries(case)
        if arguments.quick:  # compiling takes longer than all the rest
            entered = {entry: provider for entry, provider in entered.items() if entry.provider not in COMPILED}
        try:
            measured = measure(case, rounds[case], entered, not arguments.quick, progress.round)
        except torch.OutOfMemoryError:
            print(f"{case}: left out: its inputs do not fit into memory", file=sys.stderr)
            continue
        rows += [{**where, **row} for row in measured]
        if arguments.out:
            path = save(rows, arguments.out)  # what is measured stays if a later case fails
    if not rows:
        raise SystemExit("nothing was measured")
    print(tables(rows))
    if path:
        print(f"\nwritten to {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default here: %(default)s")
    parser.add_argument("--quick", action="store_true", help="that it runs: tiny, in seconds, without torch.compile")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help='only cases with this text, such as "Llama 2" or hidden'
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after so long")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write a CSV file there, such as benchmarks/results/rivals"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
