"""Pictures of results: `python -m benchmarks.plot [CSV ...] [--out FOLDER]` writes SVG files, named by device.

overview   time and memory of three cases, for README
time       against the vocabulary
ratios     how many times faster than eager PyTorch and torch.compile
memory     peak and retained, against rows: of a file that python -m benchmarks.memory_over_rows wrote
rivals-*   beside other packages: of a file that python -m benchmarks.rivals wrote, and rivals-training of one that
           python -m benchmarks.rivals.training wrote

What is drawn from a measurement has the measurement's name as its id in the file.
"""

import argparse
from pathlib import Path

import matplotlib

from .bars import overview, ratio_bars
from .drawing import STYLE
from .lines import memory_against_rows, time_against_vocabulary
from .report import PLOTS, Row, device, kind, load, newest
from .rivals import training_table
from .rivals.pictures import PICTURES
from .rivals.training_picture import training

OF_KIND = {
    "times": {"overview": overview, "time": time_against_vocabulary, "ratios": ratio_bars},
    "memory": {"memory": memory_against_rows},
    "rivals": PICTURES,
    "training": {training_table.PICTURE: training},
}


def draw(measured: list[list[Row]], folder: Path) -> list[Path]:
    """Pictures of every results file, as far as it has something to draw; of two of the same device, the last."""
    written = []
    for rows in measured:
        for name, picture in OF_KIND[kind(rows)].items():
            path = folder / f"{name}-{device(rows)}.svg"
            with matplotlib.rc_context(STYLE):
                if card := picture(rows):
                    card.save(path)
                    written.append(path)
    return list(dict.fromkeys(written))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split(": ")[0])
    parser.add_argument("csv", nargs="*", type=Path, help="default: the latest of benchmarks/results")
    parser.add_argument("--out", type=Path, default=PLOTS, metavar="FOLDER", help="default: %(default)s")
    arguments = parser.parse_args()
    print(*draw([load(path) for path in arguments.csv or newest()], arguments.out), sep="\n")


if __name__ == "__main__":
    main()
