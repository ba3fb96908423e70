"""The charts of a training's page."""

import math
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from torch import Tensor

from . import charts
from .binning import histogram
from .charts import Scale, round_ticks
from .markup import element
from .phases import SIDE
from .rows import QUANTITIES
from .training_view import BANDS, TENTHS, Part, TrainingView, common_planes, odd, share_of_tenths
from .training_words import MEASURES, NAMES, UNITS, amount, heading, kind, percent, rows, symbol

BARS = 40
ENTROPIES = QUANTITIES[:2]
# Of weights and divergences; so few lie beyond that they are counted in the last bar.
HISTOGRAM_END = 0.99
ODD_MARK = 80  # how far down the marks of rows that are not finite go


def step_ticks(view: TrainingView) -> list[float]:
    return round_ticks(view.steps[0].first, view.steps[-1].last, most=5, whole=True)


def places_of_steps(view: TrainingView) -> list[float]:
    """In the coordinates of the charts over time."""
    x = Scale(step_ticks(view))
    return [x((cell.first + cell.last) / 2) for cell in view.steps]


def over_time(view: TrainingView, quantity: str, reading: str) -> Element:
    """reading: of the step that the cursor is at first."""
    i, x_ticks, places = QUANTITIES.index(quantity), step_ticks(view), places_of_steps(view)
    known = [k for k, bands in enumerate(view.bands) if not math.isnan(bands[i][0])]
    values = [view.bands[k][i] for k in known]
    y_ticks = _value_ticks(view, quantity, [value for bands in values for value in (bands[0], bands[-1])])
    y = Scale(y_ticks, charts.HEIGHT, backwards=True)
    x, lines = [places[k] for k in known], [[y(bands[b]) for bands in values] for b in range(len(BANDS))]
    if len(known) == 1:  # which would be a line without length
        x, lines = [0, charts.WIDTH], [2 * line for line in lines]
    shapes = []
    if known:
        low, lower, middle, upper, high = lines
        shapes += [charts.band(x, low, high, "outer"), charts.band(x, lower, upper, "inner")]
        shapes.append(charts.line(x, middle, "median"))
    if quantity in ENTROPIES and view.bound is not None:
        shapes.append(charts.line([0, charts.WIDTH], 2 * [y(view.bound)], "bound"))
    marked = (places[k] for k, cell in enumerate(view.steps) if odd(cell, i))
    shapes += [charts.line([at, at], [0, ODD_MARK], "odd") for at in marked]
    shapes.append(charts.line([0, 0], [0, charts.HEIGHT], "cursor"))
    drawing = charts.drawing(_in_words(view, quantity, "by step"), len(y_ticks), *shapes)
    return _panel(
        heading(quantity),
        element("p", {"class": "summary reading"}, reading),
        charts.plot(drawing, [f"{step:,.0f}" for step in x_ticks], _labels(y_ticks), ("step", UNITS[quantity])),
        kind=kind(quantity),
    )


def histograms(view: TrainingView, quantity: str) -> Element:
    """Of the rows in each part of the training."""
    i = QUANTITIES.index(quantity)
    far = [part.quantiles(quantity, (1.0 if quantity in ENTROPIES else HISTOGRAM_END,))[0] for part in view.parts]
    ticks = _value_ticks(view, quantity, [0.0, *(value for value in far if not math.isnan(value))])
    heights = [_shares(histogram(part.distributions.counts[i], ticks[-1], BARS)) for part in view.parts]
    y_ticks = round_ticks(0, max(100 * height for part in heights for height in part), most=4)
    relative = [[100 * height / y_ticks[-1] for height in part] for part in heights]
    shapes = [charts.bars(relative[-1], "late", first=0.06, width=0.88)]
    shapes += [charts.outline(part, "early") for part in relative[:-1]]
    drawing = charts.drawing(_in_words(view, quantity, "as a histogram"), len(y_ticks), *shapes)
    return _panel(
        heading(quantity),
        charts.plot(
            drawing, _labels(ticks), [f"{label} %" for label in _labels(y_ticks)], (UNITS[quantity], "of rows")
        ),
        kind=kind(quantity),
    )


def planes(view: TrainingView) -> list[Element]:
    """H_S over H_T, once for each part of the training."""
    extent, sums = common_planes(view.parts)
    largest = max((float(part.distributions.largest[:2].max()) for part in view.parts), default=0.0)
    ticks = round_ticks(0, max(largest, view.bound or 0.0, extent / SIDE))
    most = max(float(counts.max()) for counts, _ in sums)
    return [_plane(view, part, plane, extent, ticks, most) for part, plane in zip(view.parts, sums, strict=True)]


def _plane(view: TrainingView, part: Part, plane: Tensor, extent: float, ticks: list[float], most: float) -> Element:
    counts, weights = plane
    cell, paths = charts.WIDTH * extent / SIDE / ticks[-1], {}
    for teacher, student in counts.nonzero().tolist():
        count = float(counts[teacher, student])
        side = cell * max(0.25, (count / most) ** 0.25)
        left, top = cell * (teacher + 0.5) - side / 2, charts.HEIGHT - cell * (student + 0.5) - side / 2
        shade = view.shade(float(weights[teacher, student]) / count)
        paths.setdefault(shade, []).append(f"M{left:.1f},{top:.1f}h{side:.1f}v{side:.1f}h{-side:.1f}z")
    squares = [element("path", {"class": f"square w-{shade}", "d": "".join(paths[shade])}) for shade in sorted(paths)]
    said = f"{rows(int(counts.sum()))}. {_who_is_less_sure(counts)}"
    medians = [amount(quantity, part.quantiles(quantity, (0.5,))[0]) for quantity in ENTROPIES]
    description = f"Rows by both entropies, {part.steps}: {said} Medians: H_T {medians[0]}, H_S {medians[1]} nats."
    diagonal = charts.line([0, charts.WIDTH], [charts.HEIGHT, 0], "diagonal")
    drawing = charts.drawing(description, len(ticks), *squares, diagonal, x_ticks=len(ticks))
    names = [element("span", {}, symbol(quantity), ", nats") for quantity in ENTROPIES]
    return _panel(
        element("h3", {}, f"{part.name}, {part.steps}"),
        charts.plot(drawing, _labels(ticks), _labels(ticks), names),
        element("figcaption", {"class": "summary"}, said),
        kind="plane",
    )


def _who_is_less_sure(counts: Tensor) -> str:
    """Cells on the diagonal are taken for half above it."""
    total, above = float(counts.sum()), float(counts.triu(1).sum() + counts.diagonal().sum() / 2)
    return f"The student is less sure than the teacher in about {percent(above / total)} of them." if total else ""


def shares(view: TrainingView) -> list[Element]:
    """Of D, w D and the gradient in each tenth of the rows by H_T, once for each part of the training."""
    wanted = measures(view)
    found = [{name: share_of_tenths(part.phase)[name] for name in wanted} for part in view.parts]
    known = [share for part in found for values in part.values() for share in values if not math.isnan(share)]
    ticks = round_ticks(0, 100 * max([1 / TENTHS, *known]), most=5)
    return [_shares_of_part(part, values, ticks) for part, values in zip(view.parts, found, strict=True)]


def measures(view: TrainingView) -> list[str]:
    return [name for name in MEASURES if name != "gradient norm" or view.has_norms]


def _shares_of_part(part: Part, found: dict[str, list[float]], ticks: list[float]) -> Element:
    width = 0.84 / len(found)
    bars = [
        charts.bars(
            [0.0 if math.isnan(share) else 100 * share / ticks[-1] for share in values],
            MEASURES[name][2],
            first=0.08 + i * width,
            width=0.9 * width,
        )
        for i, (name, values) in enumerate(found.items())
    ]
    even = charts.HEIGHT * (1 - 100 / TENTHS / ticks[-1])
    highest = ", ".join(f"{percent(values[-1])} of {MEASURES[name][1]}" for name, values in found.items())
    said = f"The tenth with the highest teacher entropy has {highest}."
    drawing = charts.drawing(
        f"Shares by tenth of teacher entropy, {part.steps}. {said}",
        len(ticks),
        *bars,
        charts.line([0, charts.WIDTH], [even, even], "bound"),
    )
    tenths = [str(i + 1) for i in range(TENTHS)]
    names = element("span", {}, "tenth by ", symbol("teacher_entropy")), "share"
    return _panel(
        element("h3", {}, f"{part.name}, {part.steps}"),
        charts.plot(drawing, tenths, [f"{label} %" for label in _labels(ticks)], names, between=True),
        element("figcaption", {"class": "summary"}, said),
    )


def _panel(*children: Element, kind: str = "") -> Element:
    return element("figure", {"class": f"card {kind}".strip()}, *children)


def _labels(ticks: Iterable[float]) -> list[str]:
    return [f"{tick:g}" for tick in ticks]


def _shares(counts: Tensor) -> list[float]:
    return (counts / counts.sum().clamp(min=1)).tolist()


def _value_ticks(view: TrainingView, quantity: str, values: Sequence[float]) -> list[float]:
    """From 0, or below where values are, to beyond them; entropies' up to their bound, so that both share a scale."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if quantity in ENTROPIES and view.bound is not None:
        high = max(high, view.bound)
    # A divergence that rounding puts below 0 shall not move the axis.
    return round_ticks(low if low < -0.01 * high else 0.0, high)


def _in_words(view: TrainingView, quantity: str, how: str) -> str:
    said = []
    for part in view.parts:
        low, _, middle, _, high = (amount(quantity, value) for value in part.quantiles(quantity))
        said.append(f"{part.name.lower()} in training, {part.steps}, median {middle}, nine tenths from {low} to {high}")
    return f"{NAMES[quantity]} {how}{', in nats' if UNITS[quantity] else ''}: {'; '.join(said)}."
