"""Measurements as text. `python -m benchmarks.report [CSV] --readme README.md` puts them between README's markers.

A measurement is a row of the CSV file: a dict of strings, "" where there is nothing.
"""

import argparse
import csv
import re
from pathlib import Path

from .cases import GOALS

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

# How an operation is told apart from the usual one, loss and gradient.
OPERATIONS = {"gradient": "", "labels": ", cross-entropy too", "statistics": ", loss alone"}

Row = dict[str, str]


def table(rows: list[Row]) -> str:
    """Markdown that also reads well in a terminal: where and when, then a line for every case and provider."""
    first = rows[0]
    heading = (
        f"{first['machine']}, {first['threads']} threads, {first['capability']}, torch {first['torch']}, "
        f"eakd_kernels {first['eakd_kernels']}, {first['date']}. Loss and gradient; medians [quartiles] of "
        f"{first['rounds']} rounds."
    )
    columns = {
        "vocabulary x rows": lambda row: f"{row['model']}, {row['vocab_size']} x {row['rows']}",
        "dtype": lambda row: row["dtype"] + OPERATIONS[row["operation"]],
        "provider": lambda row: row["provider"],
        "ms": lambda row: _spread(row, "ms"),
        "x eager": lambda row: _spread(row, "x_eager"),
        "x compile": lambda row: _spread(row, "x_compile"),
        "GB/s": lambda row: _number(row["gb_per_s"]),
        "% of copy": lambda row: _number(row["percent_of_copy"]),
        "memory, x logits": lambda row: _number(row["peak_memory"]),
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    return f"{heading}\n\n{_markdown({name: column for name, column in cells.items() if any(column)})}"


def goals(rows: list[Row]) -> str:
    """Each goal that was measured, with the ratio reached by the fastest of this package's backends."""
    lines = []
    for goal in GOALS:
        reached = [
            row
            for row in rows
            if row["provider"].startswith("eakd ")
            and (row["model"], row["dtype"], row["operation"]) == (goal.model, goal.dtype, "gradient")
        ]
        if not reached:
            continue
        row = max(reached, key=lambda row: float(row[f"x_{goal.baseline}"]))
        ratio = float(row[f"x_{goal.baseline}"])
        verdict = "goal met" if ratio >= goal.goal else "pass" if ratio >= goal.at_least else "MISS"
        lines.append(
            {
                "vocabulary": goal.model,
                "dtype": goal.dtype,
                "x faster than": goal.baseline,
                "reached": _spread(row, f"x_{goal.baseline}"),
                "at least": f"{goal.at_least:g}",
                "goal": f"{goal.goal:g}",
                "verdict": verdict,
            }
        )
    return _markdown({name: [line[name] for line in lines] for name in lines[0]}) if lines else ""


def save(rows: list[Row], folder: Path) -> Path:
    """One small file per machine, torch version and day."""
    machine, version = rows[0]["machine"].lower(), rows[0]["torch"].split("+")[0]
    path = folder / f"{re.sub('[^a-z0-9]+', '-', machine).strip('-')}-torch{version}-{rows[0]['date']}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def load(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def insert(text: str, readme: str) -> str:
    """`readme` with `text` between the markers."""
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"the file needs the lines {BEGIN} and {END}, and the table goes between them")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def _spread(row: Row, name: str) -> str:
    if not row[name]:
        return ""
    return f"{_number(row[name])} [{_number(row[f'{name}_q1'])}, {_number(row[f'{name}_q3'])}]"


def _number(value: str) -> str:
    """Three digits."""
    return value and (f"{float(value):.0f}" if float(value) >= 100 else f"{float(value):#.3g}")


def _markdown(columns: dict[str, list[str]]) -> str:
    widths = {name: max(len(cell) for cell in (name, *column, "---")) for name, column in columns.items()}
    header = [name.ljust(width) for name, width in widths.items()]
    rule = ["-" * width for width in widths.values()]
    body = [
        [cell.ljust(width) for cell, width in zip(line, widths.values(), strict=True)]
        for line in zip(*columns.values(), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="?", type=Path, help="default: the latest of benchmarks/results")
    parser.add_argument("--readme", type=Path, required=True)
    arguments = parser.parse_args()
    path = arguments.csv or max(RESULTS.glob("*.csv"), key=lambda path: path.stem[-len("yyyy-mm-dd") :], default=None)
    if path is None:
        parser.error(f"{RESULTS} has no CSV file yet: python -m benchmarks --out {RESULTS}")
    arguments.readme.write_text(insert(table(load(path)), arguments.readme.read_text()))


if __name__ == "__main__":
    main()
