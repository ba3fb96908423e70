"""Pictures beside other packages: time against the vocabulary, memory, hidden states, errors against the dtype."""

from collections.abc import Callable

from matplotlib.axes import Axes

from ..bars import bar, bar_axes
from ..drawing import MARGIN, MUTED, Card, name_of, number
from ..lines import draw, label_ends, panels
from ..report import Row, heading
from .cases import APART, NEAR

# Of whom, and how. Of one package all ways have one colour.
PROVIDERS = {
    "eager": ("eager PyTorch", "#8c959f"),
    "compile": ("torch.compile", "#3b8fd0"),
    "trl": ("TRL", "#cc79a7"),
    "trl chunked": ("TRL, chunked", "#cc79a7"),
    "modelopt": ("ModelOpt", "#8e6bd8"),
    "torchdistill": ("torchdistill", "#a9761d"),
    "torchtune": ("torchtune", "#5f9ea0"),
    "torchtune chunked": ("torchtune, chunked", "#2f7f86"),
    "liger kl": ("Liger, kl_div", "#009e73"),
    "liger jsd": ("Liger, jsd", "#6cbf3f"),
    "liger chunked": ("Liger, chunked", "#009e73"),
    "liger fused jsd": ("Liger, fused jsd", "#6cbf3f"),
    "liger fused kl": ("Liger, fused kl", "#1f8f4d"),
    "eakd cpu": ("eakd_kernels", "#e0620d"),
    "eakd triton": ("eakd, Triton", "#d39b00"),
    "eakd cuda": ("eakd, CUDA", "#e0620d"),
}
OURS = ("eakd cpu", "eakd triton", "eakd cuda")
WEIGHTS = {"ea": "weighted by entropy", "none": "the plain KL divergence"}
DTYPES = {"fp32": "#3b8fd0", "bf16": "#e0620d", "fp16": "#009e73"}
LETTER = 6.4
STUDENTS = {APART: "student far from the teacher", NEAR: "student near the teacher"}


def times(rows: list[Row]) -> Card | None:
    """Of a logit, since cases have as many of them in rows of different lengths."""
    timed = [_with_way(row) for row in rows if row["family"] == "logits" and row["ms"]]
    if not timed:
        return None
    caption = (
        f"{heading(rows)} Loss and gradient from logits; medians of {timed[0]['rounds']} rounds, interleaved, bands "
        "are quartiles. Both axes are logarithmic. Dashed: bf16 logits as they are, in the package's own 16-bit "
        "arithmetic. Losses of other packages are weighted by entropies that PyTorch makes beside them."
    )
    card = Card(830, 640, "Time of a logit against the vocabulary", caption, LETTER)
    dashed = {f"{name}, as is": ("", color) for name, (_, color) in PROVIDERS.items()}
    for top, (weights, words) in zip((94, 384), WEIGHTS.items(), strict=True):
        card.text(MARGIN, top - 30, f"{words}, ns per logit", color=MUTED, fontsize=9.5)
        of_dtype = _by_dtype([row for row in timed if row["weights"] == weights])
        for dtype, axes in panels(card, list(of_dtype), top, 210).items():
            axes.set(xscale="log", yscale="log", xlabel="vocabulary" if weights == "none" else "")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.minorticks_off()
            ends = draw(axes, of_dtype[dtype], PROVIDERS | dashed, "vocab_size", "ms", _ns_per_logit, dashed)
        label_ends(axes, [end for end in ends if end[1]], 15)
    return card


def _with_way(row: Row) -> Row:
    return row | {"provider": f"{row['provider']}, as is"} if row["logits"] == "as is" else row


def _ns_per_logit(row: Row) -> float:
    return 1e6 / (int(row["rows"]) * int(row["vocab_size"]))


def _by_dtype(rows: list[Row]) -> dict[str, list[Row]]:
    found = {dtype: [row for row in rows if row["dtype"] == dtype] for dtype in DTYPES}
    return {dtype: of_dtype for dtype, of_dtype in found.items() if of_dtype}


def memory(rows: list[Row]) -> Card | None:
    """Of the largest vocabulary that it was measured of."""
    measured = [row for row in rows if row["family"] == "logits" and row["peak_mb"]]
    if not measured:
        return None
    largest = max((row["vocab_size"] for row in measured), key=int)
    measured = [row for row in measured if row["vocab_size"] == largest]
    caption = (
        f"{heading(rows)} {measured[0]['rows']} rows of {int(largest):,} logits: megabytes beyond the inputs, the "
        f"gradient counted. {PEAK_AND_RETAINED}"
    )
    return _beside("Memory of loss and gradient, MB", caption, measured, "peak_mb", _peak_and_retained)


def hidden_time(rows: list[Row]) -> Card | None:
    measured = [row for row in rows if row["family"] == "hidden" and row["ms"]]
    if not measured:
        return None
    caption = (
        f"{_of_hidden(measured)}; medians of {measured[0]['rounds']} rounds, interleaved, thin lines are quartiles. "
        "eager PyTorch and torch.compile make all logits at once."
    )
    return _beside("From hidden states: time of a step, ms", caption, measured, "ms", _time)


def hidden_memory(rows: list[Row]) -> Card | None:
    measured = [row for row in rows if row["family"] == "hidden" and row["peak_mb"]]
    if not measured:
        return None
    caption = f"{_of_hidden(measured)}: megabytes beyond the inputs, these gradients counted. {PEAK_AND_RETAINED}"
    return _beside("From hidden states: memory of a step, MB", caption, measured, "peak_mb", _peak_and_retained)


PEAK_AND_RETAINED = (
    "Pale: the peak of a step. Dark: retained, what is allocated once forward has returned and backward has not begun. "
    "The numbers are both."
)


def _of_hidden(rows: list[Row]) -> str:
    shape = "{rows} rows, vocabulary {vocab_size}, hidden size {hidden}".format(**rows[0])
    return f"{heading(rows)} {shape}: loss and gradients of hidden states and head"


def _beside(title: str, caption: str, rows: list[Row], column: str, draw_bar: Callable[..., None]) -> Card:
    """Providers below each other, weighted and plain; dtypes side by side, on one scale."""
    step, header, gap, top, left, apart = 20, 24, 14, 70, 176, 20
    rows = [_with_way(row) for row in rows]
    dtypes = _by_dtype(rows)
    groups = {weights: [row for row in rows if row["weights"] == weights] for weights in WEIGHTS}
    names = {weights: _in_order(group) for weights, group in groups.items() if group}
    height = sum(header + step * len(lines) + gap for lines in names.values())
    card = Card(830, top + height, title, caption, LETTER)
    width = (card.width - left - MARGIN + apart) / len(dtypes) - apart
    most = max(float(row.get(f"{column}_q3") or row[column]) for row in rows)
    for i, dtype in enumerate(dtypes):
        card.text(left + i * (width + apart), top - 8, dtype, fontweight="bold")
    for weights, lines in names.items():
        card.text(MARGIN, top + 14, WEIGHTS[weights], color=MUTED)
        for i, name in enumerate(lines):
            style = {"fontweight": "bold"} if name in OURS else {}
            card.text(left - 8, top + header + step * i + 14, label_of(name), ha="right", **style)
        for i, of_dtype in enumerate(dtypes.values()):
            place = left + i * (width + apart)
            axes = bar_axes(
                card.axes(place, top + header, width, step * len(lines)), len(lines) - 0.5, -0.5, 1.5 * most
            )
            for row in of_dtype:
                if row["weights"] == weights:
                    style = {"fontweight": "bold"} if row["provider"] in OURS else {}
                    draw_bar(axes, lines.index(row["provider"]), row, color_of(row["provider"]), **style)
        top += header + step * len(lines) + gap
    return card


def _in_order(rows: list[Row]) -> list[str]:
    present = {row["provider"] for row in rows}
    return [name for known in PROVIDERS for name in (known, f"{known}, as is") if name in present]


def label_of(name: str) -> str:
    provider, as_is, _ = name.partition(", as is")
    return PROVIDERS[provider][0] + as_is


def color_of(name: str) -> str:
    return PROVIDERS[name.removesuffix(", as is")][1]


def _time(axes: Axes, y: float, row: Row, color: str, **style) -> None:
    bar(axes, y, row, "ms", color, number(row["ms"]), **style)


def _peak_and_retained(axes: Axes, y: float, row: Row, color: str, **style) -> None:
    (pale,) = axes.barh(y, float(row["peak_mb"]), 0.66, color=color, alpha=0.4)
    pale.set_gid(f"{name_of(row)}: peak")
    both = f"{number(row['peak_mb'])} / {number(row['retained_mb'])}"
    axes.annotate(both, (float(row["peak_mb"]), y), (5, 0), textcoords="offset points", va="center_baseline", **style)
    (dark,) = axes.barh(y, float(row["retained_mb"]), 0.66, color=color)
    dark.set_gid(f"{name_of(row)}: retained")


def errors(rows: list[Row]) -> Card | None:
    """A dot for every dtype. Of the plain loss: weights do not depend on the package."""
    checked = [row for row in rows if row["family"] == "errors" and row["gradient_error"] and row["weights"] == "none"]
    if not checked:
        return None
    checked = [_with_way(row) for row in checked]
    names, step, top, left = _in_order(checked), 22, 104, 176
    caption = (
        f"{heading(rows)} {checked[0]['rows']} rows of {int(checked[0]['vocab_size']):,} logits, their difference of "
        "standard deviation 4.2 (far) and 0.3 (near); against fp64, relative to a row's largest element, the largest "
        "over rows; logarithmic. As is: logits of 16 bits in the package's own 16-bit arithmetic. A gradient in bf16 "
        "is rounded by up to 0.002 of itself, in fp16 by 0.0005."
    )
    card = Card(830, top + step * len(names) + 34, "Error of the gradient, by dtype of the logits", caption, LETTER)
    for i, (dtype, color) in enumerate(DTYPES.items()):
        card.text(left + 60 * i, 58, f"\N{BLACK CIRCLE} {dtype}", color=color, fontweight="bold")
    values = [float(row["gradient_error"]) for row in checked]
    for i, (student, words) in enumerate(STUDENTS.items()):
        axes = card.axes(left + i * 322, top, 300, step * len(names))
        axes.set(title=words, xscale="log", xlim=(min(values) / 2, max(values) * 2), ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), ["" if i else label_of(name) for name in names])
        axes.grid(axis="x")
        axes.minorticks_off()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for row in checked:
            if row["student"] == student:
                place = float(row["gradient_error"]), names.index(row["provider"])
                (dot,) = axes.plot(*place, "o", color=DTYPES[row["dtype"]], markersize=6, alpha=0.85)
                dot.set_gid(f"{name_of(row)}, {student}: error")
    return card


PICTURES = {
    "rivals-time": times,
    "rivals-memory": memory,
    "rivals-hidden": hidden_time,
    "rivals-hidden-memory": hidden_memory,
    "rivals-errors": errors,
}
