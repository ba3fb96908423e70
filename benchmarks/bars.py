"""Pictures made of bars: time and memory of a few cases side by side, and how many times faster all of them are."""

from itertools import accumulate, groupby

from matplotlib.axes import Axes

from .drawing import INK, MARGIN, MUTED, PROVIDERS, TIMES, Card, name_of, number
from .report import OURS, Row, heading, headline_cases, usual


def overview(rows: list[Row]) -> Card | None:
    """Time and memory of the first cases of the list in bf16, providers below each other."""
    groups = [{name: group[name] for name in PROVIDERS if name in group} for group in headline_cases(rows)]
    if not groups:
        return None
    step, header, gap, top = 22, 26, 16, 82
    height = sum(header + step * len(group) + gap for group in groups)
    caption = (
        f"{heading(rows)} Medians of {rows[0]['rounds']} rounds, interleaved; thin lines are quartiles. "
        "Memory is beyond the inputs, in tensors of the logits' size. In PyTorch, the formula takes bf16 to fp32 first."
    )
    card = Card(720, top + height, "EA-KD, loss and gradient, bf16 logits", caption)
    card.text(150, 64, "time of a step", color=MUTED)
    card.text(530, 64, f"peak memory, {TIMES} logits", color=MUTED)
    most = max(float(row["peak_memory"] or 0) for group in groups for row in group.values())
    for group in groups:
        row = next(iter(group.values()))
        shape = f"{row['model']}, vocabulary {int(row['vocab_size']):,}, {row['rows']} rows"
        card.text(MARGIN, top + 15, shape, fontweight="bold")
        top += header
        slowest = max(float(row["ms_q3"]) for row in group.values())
        times = bar_axes(card.axes(150, top, 360, step * len(group)), len(group) - 0.5, -0.5, 1.7 * slowest)
        memory = bar_axes(card.axes(530, top, 172, step * len(group)), len(group) - 0.5, -0.5, 1.35 * most)
        for i, (name, row) in enumerate(group.items()):
            label, color = PROVIDERS[name]
            ours = {"fontweight": "bold"} if name in OURS else {}
            card.text(142, top + step * i + 15, label, ha="right", **ours or {"color": MUTED})
            bar(times, i, row, "ms", color, faster(row) if ours else milliseconds(row), **ours)
            if row["peak_memory"]:
                bar(memory, i, row, "peak_memory", color, number(row["peak_memory"]), **ours)
        top += step * len(group) + gap
    return card


def faster(row: Row) -> str:
    ratios = [f"{number(row[column])}{TIMES}" for column in ("x_eager", "x_compile") if row[column]]
    return f"{milliseconds(row)}, {' and '.join(ratios)} faster" if ratios else milliseconds(row)


def milliseconds(row: Row) -> str:
    return f"{number(row['ms'])} ms"


def ratio_bars(rows: list[Row]) -> Card | None:
    """A bar for every dtype and backend, cases in the order of their vocabularies."""
    ours = [row for row in usual(rows) if row["provider"] in OURS and row["ms"]]
    if not ours:
        return None
    ours.sort(key=lambda row: (-int(row["vocab_size"]), -int(row["rows"])))
    groups = [list(group) for _, group in groupby(ours, lambda row: (row["model"], row["vocab_size"], row["rows"]))]
    step, gap, top = 17, 12, 78
    *tops, bottom = accumulate((step * len(group) + gap for group in groups), initial=top)
    caption = f"{heading(rows)} Loss and gradient; medians of {rows[0]['rounds']} rounds; thin lines are quartiles."
    card = Card(830, bottom, "How many times faster", caption)
    for y, group in zip(tops, groups, strict=True):
        shape = f"{int(group[0]['vocab_size']):,} {TIMES} {group[0]['rows']}"
        card.text(MARGIN, y + 12.5, group[0]["model"], fontweight="bold")
        card.text(MARGIN, y + 28.5, shape, color=MUTED, fontsize=9)
        for i, row in enumerate(group):
            card.text(167, y + step * i + 12.5, row["dtype"], color=MUTED, fontsize=9, ha="right")
    for left, column, baseline in ((175, "x_eager", "eager"), (515, "x_compile", "compile")):
        most = max(float(row[f"{column}_q3"] or 0) for row in ours)
        axes = bar_axes(card.axes(left, top, 297, bottom - top), bottom, top, 1.4 * most)
        axes.set_title(f"than {PROVIDERS[baseline][0]}")
        for y, group in zip(tops, groups, strict=True):
            for i, row in enumerate(group):
                if row[column]:
                    note = f"{number(row[column])}{TIMES}{backend_of(row)}"
                    color = PROVIDERS[row["provider"]][1]
                    bar(axes, y + step * (i + 0.5), row, column, color, note, 0.72 * step, fontsize=9)
    return card


def backend_of(row: Row) -> str:
    """Of which there is only one on a CPU."""
    return "" if row["provider"] == "eakd cpu" else f" {row['provider'].removeprefix('eakd ')}"


def bar_axes(axes: Axes, bottom: float, top: float, most: float) -> Axes:
    axes.set(ylim=(bottom, top), xlim=(0, most or 1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def bar(axes: Axes, y: float, row: Row, column: str, color: str, note: str, height: float = 0.66, **style) -> None:
    """From 0, with a line from quartile to quartile where there are quartiles, and a note where all of that ends."""
    value = end = float(row[column])
    (patch,) = axes.barh(y, value, height, color=color)
    patch.set_gid(f"{name_of(row)}: {column}")
    if row.get(f"{column}_q1"):
        quartiles = [float(row[f"{column}_q1"]), float(row[f"{column}_q3"])]
        (line,) = axes.plot(quartiles, [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
        line.set_gid(f"{name_of(row)}: {column}, quartiles")
        end = max(value, quartiles[1])
    axes.annotate(note, (end, y), (5, 0), textcoords="offset points", va="center_baseline", **style)
