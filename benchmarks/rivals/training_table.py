"""Training beside other packages as Markdown: a line for every loss of what benchmarks.rivals.training has measured.

A row is a step of an entry: its loss, with all digits, and what it took. A step of REFERENCE has a loss alone.
"""

from .. import timing
from ..measure import spread_columns
from ..report import PLOTS, Row, device, heading, markdown, number

REFERENCE = "eager fp64"  # the formula in double, on the same logits: one step
BASELINE = "eager"
PICTURE = "rivals-training"
ALT = "Three loss curves that coincide; bars of the time of loss and gradient, the time of a step, and peak memory"


def by_provider(rows: list[Row]) -> dict[str, list[Row]]:
    """The steps of everyone who was trained."""
    found = {}
    for row in rows:
        if row["step"] and row["provider"] != REFERENCE:
            found.setdefault(row["provider"], []).append(row)
    return found


def curves(rows: list[Row]) -> dict[str, list[float]]:
    return {name: [float(row["loss"]) for row in steps] for name, steps in by_provider(rows).items()}


def differences(rows: list[Row]) -> dict[str, float]:
    """The largest of every loss curve from that of the eager formula, relative."""
    found = curves(rows)
    baseline = found[BASELINE]
    return {
        name: max(abs(a - b) / abs(b) for a, b in zip(curve, baseline, strict=True)) for name, curve in found.items()
    }


def errors(rows: list[Row]) -> dict[str, float]:
    """Of every entry's first loss, relative. Later ones belong to weights that rounding has moved apart."""
    (exact,) = (float(row["loss"]) for row in rows if row["provider"] == REFERENCE)
    return {name: abs(curve[0] - exact) / abs(exact) for name, curve in curves(rows).items()}


def summaries(rows: list[Row]) -> list[Row]:
    """A row for every entry: times with quartiles over all steps, and the first step's error."""
    found, off = [], errors(rows)
    for name, steps in by_provider(rows).items():
        first = steps[0]
        row = first | {"rows": str(int(first["batch"]) * int(first["length"])), "loss_error": f"{off[name]:.1e}"}
        for column in ("loss_ms", "step_ms"):
            row |= spread_columns(column, timing.spread([float(step[column]) for step in steps]))
        found.append(row)
    return found


def table(rows: list[Row]) -> str:
    apart, found, lines = differences(rows), curves(rows), []
    for row in summaries(rows):
        name = row["provider"]
        lines.append(
            {
                "": name,
                "loss, first step": f"{found[name][0]:.5f}",
                "off fp64": row["loss_error"],
                "last step": f"{found[name][-1]:.5f}",
                "apart from eager": f"{apart[name]:.1e}",
                "loss and gradient, ms": _spread(row, "loss_ms"),
                "step, ms": _spread(row, "step_ms"),
                "peak of training, MB": number(row["peak_mb"]),
            }
        )
    return markdown({column: [line[column] for line in lines] for column in lines[0]})


def described(rows: list[Row]) -> str:
    """Where, when and what."""
    steps = by_provider(rows)[BASELINE]
    row = steps[0]
    shape = f"{row['batch']} x {row['length']} tokens, vocabulary {int(row['vocab_size']):,}, logits in {row['dtype']}"
    return f"{heading(rows)} {len(steps)} steps of {shape}; teacher: {row['model']}."


def text(rows: list[Row]) -> str:
    missing = [f"- {row['provider']}: {row['left_out']}" for row in rows if row["left_out"]]
    left_out = "\n".join(["Not measured:", "", *missing]) if missing else ""
    return "\n\n".join(filter(None, (f"{described(rows)} Medians [quartiles] over steps.", table(rows), left_out)))


def for_docs(rows: list[Row]) -> str:
    """With its picture."""
    path = PLOTS / f"{PICTURE}-{device(rows)}.svg"
    return f"![{ALT}](plots/{path.name})\n\n{text(rows)}" if path.exists() else text(rows)


def _spread(row: Row, column: str) -> str:
    return f"{number(row[column])} [{number(row[f'{column}_q1'])}, {number(row[f'{column}_q3'])}]"
