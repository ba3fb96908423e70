"""Pictures made of lines: time against the vocabulary, memory against rows."""

import math
from collections.abc import Callable, Container

from matplotlib.axes import Axes

from .cases import DTYPES
from .drawing import MARGIN, MUTED, PROVIDERS, Card, weights_of
from .report import Row, heading, usual

TIMED = PROVIDERS | {"copy": ("copy of the logits", MUTED)}
MEMORY = {"peak_memory": "peak of a step", "retained_memory": "retained by forward"}
DASHES = (0, (4, 3))


def time_against_vocabulary(rows: list[Row]) -> Card | None:
    """Per row, since of long rows fewer are timed. Where a vocabulary has several numbers of rows, the largest."""
    by_rows = sorted(usual(rows), key=lambda row: int(row["rows"]))
    largest = {(row["dtype"], row["provider"], row["vocab_size"]): row for row in by_rows if row["ms"]}
    if not largest:
        return None
    caption = (
        f"{heading(rows)} Loss and gradient; medians of {rows[0]['rounds']} rounds, bands are quartiles. Both axes are "
        "logarithmic. Small tensors stay in caches."
    )
    card = Card(830, 392, "Time of a row against the vocabulary", caption)
    card.text(MARGIN, 56, "µs per row", color=MUTED, fontsize=9.5)
    of_dtype = by_dtype(list(largest.values()))
    for dtype, axes in panels(card, list(of_dtype), 86, 250).items():
        axes.set(xscale="log", yscale="log", xlabel="vocabulary")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
        ends = draw(axes, of_dtype[dtype], TIMED, "vocab_size", "ms", lambda row: 1e3 / int(row["rows"]))
    label_ends(axes, ends)
    return card


def memory_against_rows(rows: list[Row]) -> Card:
    """Peak above, retained below, in MB."""
    caption = (
        f"{heading(rows)} {rows[0]['model']}'s vocabulary of {int(rows[0]['vocab_size']):,}; bytes beyond the inputs. "
        "Retained: what is allocated once forward has returned and backward has not begun."
    )
    card = Card(830, 562, "Memory against rows", caption)
    of_dtype = by_dtype(rows)
    for top, column in ((88, "peak_memory"), (336, "retained_memory")):
        card.text(MARGIN, top - 26, f"{MEMORY[column]}, MB", color=MUTED, fontsize=9.5)
        for dtype, axes in panels(card, list(of_dtype), top, 170).items():
            axes.set(
                xlabel="rows" if column == "retained_memory" else "",
                xticks=sorted({int(row["rows"]) for row in rows})[-3:],
            )
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            ends = draw(axes, of_dtype[dtype], PROVIDERS, "rows", column, megabytes)
        axes.set_ylim(bottom=0)
        label_ends(axes, ends)
    return card


def megabytes(row: Row) -> float:
    """Of a tensor of the logits' size."""
    return int(row["rows"]) * int(row["vocab_size"]) * DTYPES[row["dtype"]].itemsize / 1e6


def by_dtype(rows: list[Row]) -> dict[str, list[Row]]:
    found = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in DTYPES}
    return {dtype: of_dtype for dtype, of_dtype in found.items() if of_dtype}


def panels(card: Card, names: list[str], top: float, height: float) -> dict[str, Axes]:
    """Side by side, with the same axes, and room for labels at their right."""
    left, right, gap, found = 58, 150, 16, {}
    width = (card.width - left - right + gap) / len(names)
    for i, name in enumerate(names):
        first = next(iter(found.values()), None)
        axes = card.axes(left + i * width, top, width - gap, height, sharex=first, sharey=first)
        axes.set_title(name)
        axes.grid()
        axes.tick_params(length=0, labelleft=first is None)
        axes.spines[["left", "top", "right"]].set_visible(False)
        found[name] = axes
    return found


def draw(
    axes: Axes,
    rows: list[Row],
    providers: dict[str, tuple[str, str]],
    x_column: str,
    column: str,
    unit: Callable[[Row], float],
    dashed: Container[str] = ("copy",),
) -> list[tuple[float, str, str]]:
    """A line and a band of quartiles for each provider. Returns where lines end, and their labels and colours."""
    ends = []
    for name, (label, color) in providers.items():
        line = sorted((row for row in rows if row["provider"] == name), key=lambda row: int(row[x_column]))
        if not line:
            continue
        x = [int(row[x_column]) for row in line]
        y = [float(row[column]) * unit(row) for row in line]
        solid = {"linewidth": 1.8, "marker": "o", "markersize": 4.5, "clip_on": False}
        (drawn,) = axes.plot(x, y, color=color, **({"linewidth": 1, "linestyle": DASHES} if name in dashed else solid))
        name_of_line = f"{name}, {line[0]['dtype']}{weights_of(line[0])}: {column}"
        drawn.set_gid(name_of_line)
        if line[0].get(f"{column}_q1"):
            q1, q3 = ([float(row[f"{column}_{q}"]) * unit(row) for row in line] for q in ("q1", "q3"))
            band = axes.fill_between(x, q1, q3, color=color, alpha=0.22, linewidth=0)
            band.set_gid(f"{name_of_line}, quartiles")
        ends.append((y[-1], label, color))
    return ends


def label_ends(axes: Axes, ends: list[tuple[float, str, str]], apart: float = 16) -> None:
    """Names at the right of where lines end, from the top down, moved apart where they would overlap."""
    axes.figure.draw_without_rendering()  # until then, limits are not known
    pixel = axes.figure.dpi / 96
    lowest = math.inf
    for y, label, color in sorted(ends, reverse=True):
        lowest = min(axes.transData.transform((1, y))[1], lowest - apart * pixel)
        at = axes.transAxes.inverted().transform((0, lowest))[1]
        axes.annotate(
            label,
            (1, at),
            (2, 0),
            "axes fraction",
            "offset points",
            color=color,
            va="center_baseline",
            fontsize=9.5,
            fontweight="bold",
        )
