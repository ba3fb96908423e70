"""Results beside other packages as Markdown: a table of logits, of hidden states and of errors, and who is better."""

from collections import defaultdict
from collections.abc import Iterable

from ..report import PLOTS, Row, device, heading, markdown, number
from . import hidden, packages
from .entries import ONE_NUMBER

RIVALS = packages.RIVALS | hidden.RIVALS
OURS = "eakd "
WEIGHTS = {"none": "plain", "ea": "weighted"}
# By family and the name of pictures.PICTURES: for those who do not see them.
PICTURES = {
    ("logits", "rivals-time"): "Time of a logit against the vocabulary: a line for every package, weighted and plain",
    ("logits", "rivals-memory"): "Peak and retained memory of loss and gradient: bars for every package",
    ("hidden", "rivals-hidden"): "Time of a step from hidden states: bars for every package",
    ("hidden", "rivals-hidden-memory"): "Peak and retained memory of a step from hidden states: bars for every package",
    ("errors", "rivals-errors"): "Error of the gradient against fp64: dots for every package and dtype",
}
DTYPES = ("fp32", "bf16", "fp16")
BETTER = {"ms": "faster", "peak_mb": "a lower peak", "retained_mb": "less retained", "gradient_error": "more exact"}
FAMILIES = {
    "logits": "From logits",
    "hidden": "From hidden states",
    "errors": "Errors of the gradient, in units of a row's largest element, the largest over rows",
}


def tables(rows: list[Row]) -> str:
    """All of it, where and when first."""
    return _text(rows, dict.fromkeys(FAMILIES, ""))


def for_docs(rows: list[Row]) -> str:
    """With the pictures that there are of it."""
    shown = defaultdict(list)
    for (family, name), words in PICTURES.items():
        path = PLOTS / f"{name}-{device(rows)}.svg"
        if path.exists():
            shown[family].append(f"![{words}](plots/{path.name})")
    return _text(rows, {family: "\n\n".join(shown[family]) for family in FAMILIES})


def _text(rows: list[Row], pictures: dict[str, str]) -> str:
    texts = [heading(rows)]
    for family, title in FAMILIES.items():
        of_family = [row for row in rows if row["family"] == family]
        if family == "errors":
            make, medians = of_errors, ""
        else:
            make, medians = of_time, f", medians [quartiles] of {of_family[0]['rounds']} rounds" if of_family else ""
        if any(row["gradient_error"] for row in of_family):
            texts += [f"**{title}**{medians}", pictures[family], make(of_family)]
    return "\n\n".join(filter(None, (*texts, who_is_better(rows), left_out(rows))))


def of_time(rows: list[Row]) -> str:
    """A line for every provider in every case: plain and weighted side by side."""
    lines = []
    for pair in _pairs(rows):
        first = next(iter(pair.values()))
        line = {"vocabulary x rows": _shape(first), "dtype": first["dtype"], "": _name(first)}
        for weights, word in WEIGHTS.items():
            row = pair.get(weights, {})
            line |= {
                f"{word}, ms": _time(row),
                f"{word}, x ours": number(row.get("x_ours", "")),
                f"{word}, peak MB": number(row.get("peak_mb", "")),
                f"{word}, retained MB": number(row.get("retained_mb", "")),
            }
        line["error of gradient"] = max((row["gradient_error"] for row in pair.values()), key=lambda x: float(x or 0))
        lines.append(line)
    return _without_empty(lines)


def of_errors(rows: list[Row]) -> str:
    """Of plain losses: weights do not depend on the package."""
    plain = [row for row in rows if row["weights"] == "none" and row["gradient_error"]]
    found = {(_name(row), row["dtype"], row["student"]): row["gradient_error"] for row in plain}
    names = dict.fromkeys(_name(row) for row in plain)
    where = {"apart": "student apart", "near": "near the teacher"}
    return _without_empty(
        [
            {"": name}
            | {
                f"{dtype}, {words}": found.get((name, dtype, student), "")
                for dtype in DTYPES
                for student, words in where.items()
            }
            for name in names
        ]
    )


def who_is_better(rows: list[Row]) -> str:
    """Where somebody else beats this package in the same case and weights; `_beats` says what counts."""
    ours = {_case(row): row for row in reversed(rows) if row["provider"].startswith(OURS)}
    others = [row for row in rows if _case(row) in ours and not row["provider"].startswith(OURS)]
    found = []
    for column, words in BETTER.items():
        cases = defaultdict(list)
        for row in others:
            mine = ours[_case(row)]
            if row[column] and mine[column] and _beats(column, row, mine):
                student = f", {row['student']}" if row["family"] == "errors" else ""
                what = f"{_shape(row)}, {row['dtype']}, {WEIGHTS[row['weights']]}{student}"
                how = f"{number(row[column])}, ours {number(mine[column])}"
                if column == "ms":
                    how = f"{number(row['x_ours'])} of our time"
                cases[_name(row)].append(f"{what}: {how}")
        found += [f"- {words}: {name} ({'; '.join(where)})" for name, where in cases.items()]
    return "\n".join(["Where others are better:", "", *found]) if found else "Nobody else is better at any of this."


def _beats(column: str, row: Row, ours: Row) -> bool:
    """More than chance: faster in three rounds of four, less by a megabyte, or half the error."""
    if column == "ms":
        return float(row["x_ours_q3"]) < 1
    if column == "gradient_error":
        return row["family"] == "errors" and 2 * float(row[column]) < float(ours[column])
    return float(row[column]) < float(ours[column]) - 1


def left_out(rows: list[Row]) -> str:
    """A line for every rival that did not take part, and why."""
    reasons = {}
    for row in rows:
        if row["left_out"] and row["left_out"] != ONE_NUMBER:
            case = "errors" if row["family"] == "errors" else _shape(row)
            reasons.setdefault((_name(row), row["left_out"]), {})[f"{case}, {row['dtype']}"] = None
    took_part = {_name(row) for row in rows if row["gradient_error"]}
    lines = []
    for (name, reason), cases in reasons.items():
        where = f" ({'; '.join(cases)})" if name in took_part else ""
        lines.append(f"- {name}: {reason}{where}")
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def described() -> str:
    """What is called of each package."""
    lines = []
    for name, rival in RIVALS.items():
        takes = "hidden states, head" if name in hidden.RIVALS else "logits"
        lines.append({"": name, "package": rival.package, "called": rival.calls, "takes": takes})
    return _without_empty(lines)


def _pairs(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows by weights, of every provider and way with a time."""
    pairs = {}
    for row in rows:
        if row["gradient_error"] or row["left_out"] == ONE_NUMBER:
            key = (*(row[name] for name in ("vocab_size", "rows", "dtype", "provider", "logits")),)
            pairs.setdefault(key, {})[row["weights"]] = row
    return [*pairs.values()]


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("family", "vocab_size", "rows", "dtype", "student", "weights"))


def _shape(row: Row) -> str:
    shape = f"{int(row['vocab_size']):,} x {int(row['rows']):,}"
    return f"{shape}, hidden size {row['hidden']}" if row["hidden"] else shape


def _name(row: Row) -> str:
    return f"{row['provider']}, {row['logits']}" if row["logits"] else row["provider"]


def _time(row: Row) -> str:
    if row.get("left_out"):
        return "cannot be weighted"
    return row and f"{number(row['ms'])} [{number(row['ms_q1'])}, {number(row['ms_q3'])}]"


def _without_empty(lines: list[dict[str, str]]) -> str:
    columns = {name: [line[name] or "" for line in lines] for name in lines[0]} if lines else {}
    return markdown({name: cells for name, cells in columns.items() if any(cells)})
