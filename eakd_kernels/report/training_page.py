"""A TrainingRecord as an HTML page. Everything is drawn here; training_page.js only moves a cursor over the steps."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from . import training_figures as figures
from . import training_tables as tables
from .markup import element, to_html
from .pages import page
from .rows import QUANTITIES
from .training_view import SHADES, Part, TrainingView, odd_kinds, span, view_of
from .training_words import MEASURES, NAMES, rows, symbol


def render(record, *, title: str, introduction: str) -> str:
    """The page. title and introduction are plain text, like every token."""
    view = view_of(record)
    readings = tables.readings(view)
    sections = [_over_training(view, readings), _early_and_late(view), _planes(view), _shares(view), *_samples(view)]
    return page(
        "training_page",
        title=title,
        introduction=introduction,
        data={"readings": readings, "places": figures.places_of_steps(view)},
        body=to_html(_facts(view, record), *_warnings(view), *sections),
    )


def _facts(view: TrainingView, record) -> Element:
    known = {
        "Steps": span(view.steps[0].first, view.steps[-1].last).split(" ", 1)[1]
        + (f", every {record.every}" if record.every > 1 else ""),
        "Rows": f"{view.in_all.rows:,}",
    }
    if view.bound is not None:
        known["Bound of entropy, H_ub"] = f"{view.bound:.2f} nats"
    pairs = (element("div", {}, element("dt", {}, name), element("dd", {}, text)) for name, text in known.items())
    return element("dl", {"class": "facts"}, *pairs)


def _warnings(view: TrainingView) -> list[Element]:
    """Rows that are not finite, by what is not. In the charts they are missing."""
    said = []
    for i, quantity in enumerate(QUANTITIES):
        nan, infinite = odd_kinds(view.in_all, i)
        if nan or infinite:
            first = next(cell for cell in view.steps if any(odd_kinds(cell, i)))
            kinds = [f"NaN in {rows(nan)}"] * bool(nan) + [f"infinite in {rows(infinite)}"] * bool(infinite)
            words = f": {' and '.join(kinds)}, first at {span(first.first, first.last)}"
            said.append(element("li", {}, f"{NAMES[quantity]} ", symbol(quantity), words))
    if view.odd_norms:
        said.append(element("li", {}, f"Gradient norm: NaN or infinite in {rows(view.odd_norms)}"))
    if not said:
        return []
    heading = element("h2", {}, "Rows that are not finite")
    note = element("p", {"class": "hint"}, "They are counted here, and left out of the charts below.")
    return [element("section", {"class": "warning"}, heading, element("ul", {}, *said), note)]


def _section(title: str, explanation: Sequence[Element | str], *children: Element) -> Element:
    heading = [element("h2", {}, title), element("p", {"class": "hint"}, *explanation)]
    return element("section", {}, element("div", {"class": "lead"}, *heading), *children)


def _over_training(view: TrainingView, readings: list[dict]) -> Element:
    last = len(readings) - 1
    slider = {"type": "range", "id": "step", "min": 0, "max": last, "value": last, "aria-valuetext": readings[last]["label"]}
    widest = max(cell.last - cell.first + 1 for cell in view.steps)
    together = f" Up to {widest:,} steps are taken together." if widest > 1 else ""
    swatches = {"median": "median", "inner": "half of the rows", "outer": "nine tenths"}
    if view.bound is not None:
        swatches["bound"] = "upper bound H_ub"
    if any(odd_kinds(view.in_all, i) != (0, 0) for i in range(len(QUANTITIES))):
        swatches["odd"] = "rows that are not finite"
    return _section(
        "Over training",
        ["How the rows of a step were spread.", together, " Choose a step to read it."],
        _legend(swatches),
        element("div", {"class": "charts time"}, *(figures.over_time(view, quantity) for quantity in QUANTITIES)),
        element(
            "div",
            {"class": "card reader"},
            element(
                "p",
                {"class": "stepper", "hidden": True},
                element("label", {"for": "step"}, "Step"),
                element("input", slider),
            ),
            tables.quantiles_at_step(readings[last]),
        ),
    )


def _early_and_late(view: TrainingView) -> Element:
    names = [f"{part.name.lower()}, {part.steps}" for part in view.parts]
    swatches = {"late": names[-1]} | ({"early": names[0]} if len(names) > 1 else {})
    return _section(
        "Early and late" if len(names) > 1 else "In all",
        ["How many of the rows have which value. The last bar also has what lies beyond it."],
        _legend(swatches),
        element("div", {"class": "charts"}, *(figures.histograms(view, quantity) for quantity in QUANTITIES)),
    )


def _planes(view: TrainingView) -> Element:
    shades = (element("span", {"class": f"w-{k}"}) for k in range(SHADES))
    ends = (element("span", {}, f"{view.weight_scale * i / 4:.3g}") for i in range(5))
    scale = element(
        "div",
        {"class": "weights"},
        element("p", {}, "mean weight ", symbol("weight")),
        element("div", {"class": "scale"}, *shades),
        element("div", {"class": "ticks"}, *ends),
    )
    explanation = [
        "Each square has the rows of these two entropies. Its colour is their mean weight, and its area grows with the "
        "square root of their number. On the diagonal both models are equally sure; above it the student is less sure."
    ]
    return _section(
        "Teacher against student", explanation, scale, element("div", {"class": "charts"}, *figures.planes(view))
    )


def _shares(view: TrainingView) -> Element:
    measures = figures.measures(view)
    explanation = [
        "Rows in ten equal parts by teacher entropy, 1 the lowest: which share of the divergence D, of the weighted "
        "divergence w D, and so of the distillation loss, and of the gradient falls on each. ",
        "Of the gradient: the Euclidean norms of the loss's gradient in each row's logits."
        if view.has_norms
        else "Its gradient is not known: nobody passed gradient_norms.",
        " Dashed: an even share.",
    ]
    numbers = element(
        "details",
        {},
        element("summary", {}, "The numbers"),
        element("div", {"class": "charts"}, *(tables.tenths(part, measures) for part in view.parts)),
    )
    return _section(
        "Where loss and gradient fall",
        explanation,
        _legend({MEASURES[name][1]: MEASURES[name][0] for name in measures}),
        element("div", {"class": "charts"}, *figures.shares(view)),
        numbers,
    )


def _samples(view: TrainingView) -> list[Element]:
    """Those late in training first: they are about the student that came of it."""
    sections = []
    if view.odd_samples:
        table = tables.samples(view, "Not finite, earliest first", view.odd_samples)
        explanation = ["The first that came. What made them is often in what precedes them."]
        sections.append(_section("Rows that are not finite, one by one", explanation, _card(table)))
    latest, *earlier = reversed(view.parts)
    what = "tokens" if view.tokens_known else "rows"
    if latest.phase.samples.keep == 0:
        return sections
    explanation = ["Shaded by weight: the token that the row predicts, after those before it."] if view.tokens_known else []
    shown = [_heaviest_and_lightest(view, latest)]
    for part in earlier:
        summary = element("summary", {}, f"The same {part.name.lower()}, {part.steps}")
        shown.append(element("details", {}, summary, _heaviest_and_lightest(view, part)))
    return [*sections, _section(f"Heaviest and lightest {what}", explanation, *shown)]


def _heaviest_and_lightest(view: TrainingView, part: Part) -> Element:
    found = part.phase.samples.found
    cards = (
        _card(tables.samples(view, f"{name.capitalize()}, {part.name.lower()}: {part.steps}", found[name]))
        for name in ("heaviest", "lightest")
    )
    return element("div", {"class": "charts"}, *cards)


def _card(table: Element) -> Element:
    return element("div", {"class": "card"}, table)


def _legend(swatches: dict[str, str]) -> Element:
    """By class in the style sheet, what it stands for."""
    items = (
        element("li", {}, element("span", {"class": f"swatch {kind}", "aria-hidden": "true"}), name)
        for kind, name in swatches.items()
    )
    return element("ul", {"class": "legend"}, *items)
