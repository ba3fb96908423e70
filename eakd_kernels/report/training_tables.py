"""The tables of a training's page."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from .markup import element, inline, visible
from .rows import QUANTITIES
from .samples import Sample
from .training_view import BANDS, TENTHS, Part, TrainingView, bounds_of_tenths, odd, share_of_tenths, span
from .training_words import MEASURES, UNKNOWN, amount, figure, kind, percent, symbol


def readings(view: TrainingView) -> list[dict]:
    """For each of the steps in the charts over time, what the charts and the table below them say of it."""
    found = []
    for cell, all_bands in zip(view.steps, view.bands, strict=True):
        cells = [
            [*(amount(quantity, value) for value in bands), f"{odd(cell, i):,}"]
            for i, (quantity, bands) in enumerate(zip(QUANTITIES, all_bands, strict=True))
        ]
        label = span(cell.first, cell.last).capitalize()
        lines = [
            f"{label}: median {median}, half of the rows from {lower} to {upper}"
            for _, lower, median, upper, *_ in cells
        ]
        found.append({"label": label, "cells": cells, "lines": lines})
    return found


def quantiles_at_step(reading: dict) -> Element:
    """Of the step that the cursor is at."""
    columns = [*("median" if b == 0.5 else f"{100 * b:.0f} %" for b in BANDS), "not finite"]
    heads = (element("th", {"scope": "row", "class": kind(quantity)}, symbol(quantity)) for quantity in QUANTITIES)
    body = [element("tr", {}, head, *map(_cell, cells)) for head, cells in zip(heads, reading["cells"], strict=True)]
    caption = element(
        "caption", {}, element("output", {"id": "label", "for": "step", "aria-live": "off"}, reading["label"])
    )
    return element("table", {"id": "reading"}, caption, _head(["", *columns]), element("tbody", {}, *body))


def tenths(part: Part, measures: Sequence[str]) -> Element:
    """The numbers of a chart of shares."""
    shares, bounds = share_of_tenths(part.phase), bounds_of_tenths(part)
    body = []
    for i in range(TENTHS):
        limits = f"{bounds[i]:.2f} to {bounds[i + 1]:.2f}"
        cells = [limits, *(percent(shares[name][i]) for name in measures)]
        body.append(element("tr", {}, element("th", {"scope": "row"}, str(i + 1)), *map(_cell, cells)))
    names = [MEASURES[name][0] for name in measures]
    span_of_entropy = element("span", {}, symbol("teacher_entropy"), ", nats")
    return element(
        "table",
        {},
        element("caption", {}, f"{part.name}, {part.steps}: each tenth's share"),
        _head(["tenth", span_of_entropy, *names]),
        element("tbody", {}, *body),
    )


def samples(view: TrainingView, caption: str, found: Sequence[Sample]) -> Element:
    """Rows one by one, each with its token above its numbers."""
    columns = [symbol(quantity) for quantity in ("weight", "teacher_entropy", "student_entropy", "divergence")]
    columns += ["gradient"] if view.has_norms else []
    bodies = [_sample(view, sample, len(columns) + 1) for sample in found]
    return element("table", {"class": "samples"}, element("caption", {}, caption), _head([*columns, "step"]), *bodies)


def _sample(view: TrainingView, sample: Sample, columns: int) -> Element:
    cells = [
        figure(sample.weight),
        amount("teacher_entropy", sample.teacher_entropy),
        amount("student_entropy", sample.student_entropy),
        figure(sample.divergence),
    ]
    if view.has_norms:
        cells.append(UNKNOWN if sample.gradient_norm is None else figure(sample.gradient_norm))
    numbers = element("tr", {}, *map(_cell, [*cells, f"{sample.step:,}"]))
    if not view.tokens_known:
        return element("tbody", {}, numbers)
    place = {"scope": "rowgroup", "colspan": columns, "class": "place", "dir": "auto"}
    return element("tbody", {}, element("tr", {}, element("th", place, *_passage(view, sample))), numbers)


def _passage(view: TrainingView, sample: Sample) -> list[Element]:
    token = UNKNOWN if sample.token is None else visible(_text(view, sample.token))
    weight = sample.weight
    shade = f"w-{view.shade(weight)}" if abs(weight) < float("inf") else "not-finite"
    shown = [element("span", {"class": f"token {shade}"}, token)]
    if sample.context:
        words = "".join(inline(_text(view, other)) for other in sample.context)
        shown.insert(0, element("span", {"class": "context"}, words.lstrip()))
    return shown


def _text(view: TrainingView, token: int) -> str:
    """Ids that the tokenizer does not know, such as those that stand for images, as numbers."""
    try:
        return f" #{token}" if view.decode is None else str(view.decode(token))
    except Exception:
        return f" #{token}"


def _head(columns: Sequence[Element | str]) -> Element:
    cells = (element("td", {}) if name == "" else element("th", {"scope": "col"}, name) for name in columns)
    return element("thead", {}, element("tr", {}, *cells))


def _cell(text: str) -> Element:
    return element("td", {}, text)
