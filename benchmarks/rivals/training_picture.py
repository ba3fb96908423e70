"""The picture of training beside other packages: loss curves on top of each other, and what each of them costs."""

from matplotlib.axes import Axes

from ..bars import bar, bar_axes
from ..drawing import MARGIN, MUTED, Card
from ..lines import DASHES, label_ends
from ..report import Row, number
from .pictures import LETTER, OURS, color_of, label_of
from .training_table import BASELINE, by_provider, described, differences, summaries

COSTS = {"loss_ms": "loss and gradient, ms", "step_ms": "whole step, ms", "peak_mb": "peak memory of training, MB"}
WIDTHS = (8, 4.5, 1.6)  # of curves that coincide: what is drawn later leaves something to be seen of what is below


def training(rows: list[Row]) -> Card:
    entries, step, top = summaries(rows), 22, 84
    header, gap = 24, 16
    group = header + step * len(entries) + gap
    apart = max(value for name, value in differences(rows).items() if name != BASELINE)
    errors = ", ".join(f"{row['loss_error']} ({label_of(row['provider'])})" for row in entries)
    caption = (
        f"{described(rows)} Bars are medians over steps, thin lines are quartiles; memory is beyond both models. "
        f"Relatively, the curves differ from that of {label_of(BASELINE)} by up to {apart:.1e}, and the first losses "
        f"from the formula in fp64 by {errors}."
    )
    card = Card(830, top + len(COSTS) * group, "One loss curve, three costs", caption, LETTER)
    card.text(MARGIN, 60, "EA-KD loss, nats", color=MUTED, fontsize=9.5)
    _curves(card.axes(52, top, 260, len(COSTS) * group - gap - 34), rows)
    left = 548
    for i, (column, title) in enumerate(COSTS.items()):
        y = top + i * group
        card.text(left, y + 8, title, fontweight="bold")
        most = max(float(row.get(f"{column}_q3") or row[column]) for row in entries)
        box = left, y + header - 6, card.width - left - MARGIN, step * len(entries)
        axes = bar_axes(card.axes(*box), len(entries) - 0.5, -0.5, 1.3 * most)
        for j, row in enumerate(entries):
            style = {"fontweight": "bold"} if row["provider"] in OURS else {}
            card.text(left - 8, box[1] + step * j + 15, label_of(row["provider"]), ha="right", **style)
            bar(axes, j, row, column, color_of(row["provider"]), number(row[column]), **style)
    return card


def _curves(axes: Axes, rows: list[Row]) -> None:
    ends = []
    entries = by_provider(rows)
    for width, (name, steps) in zip(WIDTHS[-len(entries) :], entries.items(), strict=True):
        losses = [float(row["loss"]) for row in steps]
        style = {"linewidth": width, "color": color_of(name), "clip_on": False}
        style |= {"linestyle": DASHES} if name in OURS else {"solid_joinstyle": "round", "solid_capstyle": "round"}
        (line,) = axes.plot([int(row["step"]) for row in steps], losses, **style)
        line.set_gid(f"{name}: loss")
        ends.append((losses[-1], label_of(name), color_of(name)))
    axes.set(xlabel="step", ylim=(0, None))
    axes.locator_params("x", integer=True)
    axes.grid()
    axes.tick_params(length=0)
    axes.spines[["left"]].set_visible(False)
    label_ends(axes, ends)
