"""Measurements as text. `python -m benchmarks.report [CSV ...] --readme README.md` puts them between README's markers,
and draws the pictures of benchmarks/plot.py beside it, in docs/plots.

A measurement is a row of the CSV file: a dict of strings, "" where there is nothing. Columns are added as time goes by:
what an older file does not have reads as "".
"""

import argparse
import csv
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from .cases import GOALS, Case, Goal, cases

RESULTS = Path(__file__).parent / "results"
PLOTS = Path(__file__).parents[1] / "docs" / "plots"
# README's places for the tables, by device. The second is made where there is something to put into it.
MARKERS = {"cpu": "benchmark", "cuda": "benchmark-gpu"}

# Whom others are compared with: the column of the CSV file, the provider.
BASELINES = {"x_eager": "eager", "x_compile": "compile", "x_liger_kl": "liger kl", "x_trl": "trl"}
BASELINES |= {"x_one_temperature": "one temperature"}  # a sum over temperatures, with the time of one of them
# This package's, but for the reference, which is not there to be fast.
OURS = ("eakd cpu", "eakd cuda", "eakd triton")
# What `usual` rows have in common with the first case of their device.
USUAL = ("operation", "method", "temperature", "entropy_temperature", "device")
# How an operation is told apart from the usual one, loss and gradient.
OPERATIONS = {"gradient": "", "labels": ", cross-entropy too", "statistics": ", loss alone"}
# Cases in the picture of README.
HEADLINES = 3

# Of results files, by a column that the later ones have not.
KINDS = {"family": "rivals", "step": "training", "ms": "times"}

Row = dict[str, str]


def table(rows: list[Row]) -> str:
    """Markdown that also reads well in a terminal: where and when, then a line for every case and provider."""
    columns = {
        "vocabulary x rows": _shape,
        "dtype": lambda row: row["dtype"] + OPERATIONS[row["operation"]] + _method(row),
        "provider": lambda row: row["provider"],
        "ms": lambda row: _spread(row, "ms"),
        **{f"x {name}": lambda row, column=column: _spread(row, column) for column, name in BASELINES.items()},
        "GB/s": lambda row: number(row["gb_per_s"]),
        "% of copy": lambda row: number(row["percent_of_copy"]),
        "% at 5 streams": lambda row: number(row.get("percent_at_5_streams", "")),
        "peak memory, x logits": lambda row: number(row["peak_memory"]),
        "retained": lambda row: number(row.get("retained_memory", "")),
        "error, loss": lambda row: row.get("loss_error", ""),
        "error, gradient": lambda row: row.get("gradient_error", ""),
    }
    measured = [row for row in rows if row["ms"]]
    return (
        f"{heading(rows)} Loss and gradient; medians [quartiles] of {_rounds(rows)}.\n\n{_tabulate(measured, columns)}"
    )


def brief(rows: list[Row]) -> str:
    """README's table of a CPU: a line for each case of the quick list."""
    lines = [line for case in cases(device=device(rows)) if (line := _line(case, rows))]
    return f"{heading(rows)} Medians [quartiles] of {_rounds(rows)}.\n\n{_markdown_of(lines)}"


def _line(case: Case, rows: list[Row]) -> Row:
    by_name = {row["provider"]: row for row in rows if case.is_case_of(row) and row["ms"]}
    ours = min((row for name, row in by_name.items() if name in OURS), key=lambda row: float(row["ms"]), default=None)
    if ours is None:
        return {}
    baselines = {"eager": "x_eager", "compile": "x_compile"}
    memory = {name: number(row["peak_memory"]) for name, row in by_name.items()}
    return {
        "vocabulary x rows": _shape(ours),
        "dtype": ours["dtype"],
        "ms": _spread(ours, "ms"),
        **{f"x {name}": _spread(ours, column) for name, column in baselines.items()},
        "memory": memory[ours["provider"]],
        **{f"of {name}": memory.get(name, "") for name in baselines},
    }


def summary(rows: list[Row]) -> str:
    """Of a GPU's results, what they say of this package: a line for every case and backend."""
    measured = [row for row in rows if row["provider"].startswith("eakd ") and row["ms"]]
    if not measured:
        return "Nothing of this package was measured."
    columns = {
        "vocabulary x rows": _shape,
        "dtype": lambda row: row["dtype"] + OPERATIONS[row["operation"]] + _method(row),
        "tau, t": lambda row: f"{float(row['temperature']):g}, {float(row['entropy_temperature']):g}",
        "backend": lambda row: row["provider"].removeprefix("eakd "),
        "ms": lambda row: number(row["ms"]) + (" *" if row["clock"] == "wall" else ""),
        "% of copy": lambda row: row["percent_of_copy"] and f"{number(row['percent_of_copy'])} at {_streams(row)}",
        "at 5": lambda row: number(row["percent_at_5_streams"]),
        **{f"x {name}": lambda row, column=column: number(row[column]) for column, name in BASELINES.items()},
        "peak memory, x logits": lambda row: number(row["peak_memory"]),
        "retained": lambda row: number(row.get("retained_memory", "")),
    }
    table = _tabulate(measured, columns)
    return f"{heading(rows)} Loss and gradient; medians of {_rounds(rows)}.\n\n{table}\n\n{legend(rows)}"


def legend(rows: list[Row]) -> str:
    """What the summary's columns leave open."""
    others = [row for row in rows if row["formula"] == "KL"]
    rivals = dict.fromkeys(f"{row['provider']} ({row['version']})" for row in others if " in " not in row["provider"])
    narrow = [float(row["gradient_error"]) for row in others if " in " in row["provider"] and row["gradient_error"]]
    lines = [
        '"% of copy": of the bandwidth of a device copy, counting 2 streams of the logits\' size for the loss alone, 3 '
        "for loss and gradient; 5 is what two sweeps move. Every call starts from a cold cache.",
    ]
    if any(row["clock"] == "wall" for row in rows):
        lines.append("* What the caller waits for, launching included, over many calls.")
    if rivals:
        lines.append(
            f"{', '.join(rivals)}: the plain KL, neither entropies nor weights, on logits in fp32; each was checked "
            "against the plain KL in fp64."
        )
    if narrow:
        lines.append(
            "With log-probabilities in 16 bits, times of which are in the CSV file, their gradients are off by up to "
            f"{100 * max(narrow):.2g} % of the row's largest element."
        )
    return "\n".join(lines)


def heading(rows: list[Row]) -> str:
    first = rows[0]
    threads = f"{first['threads']} threads, " if first["threads"] else ""
    versions = [f"{name} {first[name]}" for name in ("driver", "cuda", "torch", "triton") if first.get(name)]
    return (
        f"{first['machine']}, {threads}{first['capability']}, {', '.join(versions)}, "
        f"eakd_kernels {first['eakd_kernels']}, {first['date']}."
    )


def left_out(rows: list[Row]) -> str:
    """A line for every provider that did not take part, or not everywhere, and why."""
    where = defaultdict(list)
    for row in rows:
        if row.get("left_out"):
            where[row["provider"], row["left_out"]].append(f"{row['model']} {row['dtype']} {row['operation']}")
    return "\n".join(
        f"{provider}: not timed: {reason} ({f'{len(cases)} cases' if len(cases) > 1 else cases[0]})"
        for (provider, reason), cases in where.items()
    )


def goals(rows: list[Row]) -> str:
    """Each goal whose case was measured, and what was reached."""
    lines = []
    for goal in GOALS:
        ours = [
            row for row in rows if goal.case.is_case_of(row) and row["provider"].startswith(goal.provider or "eakd ")
        ]
        if not ours:
            continue
        best = max(ours, key=lambda row: (bool(row["ms"]), float(row[goal.column] or 0)))
        value = best[goal.column]
        lines.append(
            {
                "vocabulary": goal.case.model,
                "dtype": goal.case.dtype + OPERATIONS[goal.case.operation],
                "of": _quantity(goal),
                "reached": _spread(best, goal.column) if value else "",
                "at least": f"{goal.at_least:g}",
                "goal": f"{goal.goal:g}",
                "verdict": _verdict(float(value), goal) if value else f"not measured ({_why_not(goal, rows, best)})",
            }
        )
    return _markdown_of(lines)


def _quantity(goal: Goal) -> str:
    if goal.column in BASELINES:
        return f"x {BASELINES[goal.column]}"
    streams = 5 if goal.column == "percent_at_5_streams" else goal.case.streams
    return f"{goal.provider.removeprefix('eakd ')}: % of copy at {streams} streams"


def _verdict(value: float, goal: Goal) -> str:
    return "goal met" if value >= goal.goal else "pass" if value >= goal.at_least else "MISS"


def _why_not(goal: Goal, rows: list[Row], ours: Row) -> str:
    """`ours` has nothing in the goal's column."""
    if not ours["ms"]:
        return ours["left_out"]
    baseline = BASELINES[goal.column]
    return next(row["left_out"] for row in rows if goal.case.is_case_of(row) and row["provider"] == baseline)


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


def device(rows: list[Row]) -> str:
    return rows[0].get("device", "cpu")


def kind(rows: list[Row]) -> str:
    """Of a results file: "times", "rivals" beside other packages, "training" beside them, or "memory" alone."""
    return next((name for column, name in KINDS.items() if column in rows[0]), "memory")


def usual(rows: list[Row]) -> list[Row]:
    """Loss and gradient of the KL divergence, at the temperatures that most cases have."""
    first = cases(device=device(rows))[0]
    of_case = {field: str(value) for field, value in vars(first).items() if field in USUAL}
    return [row for row in rows if all(row.get(field, value) == value for field, value in of_case.items())]


def for_readme(rows: list[Row]) -> str:
    text = summary(rows) if device(rows) == "cuda" else brief(rows)
    return f"![{told(rows)}](docs/plots/overview-{device(rows)}.svg)\n\n{text}"


def for_docs(rows: list[Row]) -> str:
    return summary(rows) if device(rows) == "cuda" else table(rows)


def told(rows: list[Row]) -> str:
    """What the picture shows, for those who do not see it."""
    ours = [
        row for group in headline_cases(rows) for row in group.values() if row["provider"] in OURS and row["x_eager"]
    ]
    words = [f"{number(row['x_eager'])} times for a vocabulary of {row['vocab_size']}" for row in ours]
    return f"Time and memory beside eager PyTorch and torch.compile. Faster than eager: {', '.join(words)}."


def headline_cases(rows: list[Row]) -> list[dict[str, Row]]:
    """What was timed on the first cases in bf16: rows by provider."""
    first = [case for case in cases(device=device(rows)) if case.dtype == "bf16" and case.operation == "gradient"]
    groups = [{row["provider"]: row for row in rows if case.is_case_of(row) and row["ms"]} for case in first]
    return [group for group in groups if group][:HEADLINES]


def markers(device: str) -> tuple[str, str]:
    return f"<!-- {MARKERS[device]}:begin -->", f"<!-- {MARKERS[device]}:end -->"


def insert(text: str, readme: str, device: str = "cpu") -> str:
    """`readme` with `text` between the device's markers; a GPU's come below the CPU's if it has none yet."""
    begin, end = markers(device)
    if device == "cuda" and begin not in readme:
        end_of_cpu = markers("cpu")[1]
        readme = readme.replace(end_of_cpu, f"{end_of_cpu}\n\n{begin}\n{end}")
    if begin not in readme or end not in readme:
        raise ValueError(f"the file needs the lines {begin} and {end}, and the table goes between them")
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"


def latest(folder: Path) -> list[Path]:
    """The last file of each device."""
    files = sorted(folder.glob("*.csv"), key=lambda path: (path.stem[-len("yyyy-mm-dd") :], path.stem))
    return list({device(load(path)): path for path in files}.values())


def newest() -> list[Path]:
    """What README and docs show."""
    folders = RESULTS, *(RESULTS / name for name in ("memory", "rivals", "training"))
    return [path for folder in folders for path in latest(folder)]


def _rounds(rows: list[Row]) -> str:
    return f"{rows[0]['rounds']} rounds"


def _method(row: Row) -> str:
    method = row.get("method") or "KL"
    return "" if method == "KL" else f", {method}"


def _shape(row: Row) -> str:
    return f"{row['model']}, {row['vocab_size']} x {row['rows']}"


def _streams(row: Row) -> int:
    return 2 if row["operation"] == "statistics" else 3


def _spread(row: Row, name: str) -> str:
    if not row.get(name):
        return ""
    if not row.get(f"{name}_q1"):
        return number(row[name])
    return f"{number(row[name])} [{number(row[f'{name}_q1'])}, {number(row[f'{name}_q3'])}]"


def number(value: str) -> str:
    """Three digits."""
    return value and (f"{float(value):.0f}" if float(value) >= 100 else f"{float(value):#.3g}")


def _tabulate(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """Without the columns that are empty."""
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    return markdown({name: column for name, column in cells.items() if any(column)})


def _markdown_of(lines: list[Row]) -> str:
    return markdown({name: [line[name] for line in lines] for name in lines[0]}) if lines else ""


def markdown(columns: dict[str, list[str]]) -> str:
    widths = {name: max(len(cell) for cell in (name, *column, "---")) for name, column in columns.items()}
    header = [name.ljust(width) for name, width in widths.items()]
    rule = ["-" * width for width in widths.values()]
    body = [
        [cell.ljust(width) for cell, width in zip(line, widths.values(), strict=True)]
        for line in zip(*columns.values(), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def publish(paths: list[Path], readme: Path) -> None:
    """Tables into `readme`, pictures beside it."""
    from .plot import draw  # needs matplotlib, which tables do without

    measured, text = [load(path) for path in paths], readme.read_text()
    for rows in measured:
        if kind(rows) == "times":
            text = insert(for_readme(rows), text, device(rows))
    readme.write_text(text)
    draw(measured, readme.parent / "docs" / "plots")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("csv", nargs="*", type=Path, help="default: the latest of benchmarks/results")
    parser.add_argument("--readme", type=Path, required=True)
    arguments = parser.parse_args()
    paths = arguments.csv or newest()
    if not paths:
        parser.error(f"{RESULTS} has no CSV file yet: python -m benchmarks --out {RESULTS}")
    publish(paths, arguments.readme)


if __name__ == "__main__":
    main()
