"""A TrainingRecord as an HTML page. Everything is drawn here; training_page.js only moves a cursor over the steps."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from . import training_figures as figures
from . import training_tables as tables
from .markup import element, to_html
from .pages import page
from .rows import QUANTITIES
from .training_view import SHADES, Part, TrainingView, odd, odd_kinds, span, view_of
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
        body=to_html(_facts(view, record.every), *_warnings(view), *sections),
    )


def _facts(view: TrainingView, every: int) -> Element:
    steps = f"{view.steps[0].first:,} to {view.steps[-1].last:,}"
    known: list[tuple[Element | str, str]] = [
        ("Steps", steps + (f", every {every}" if every > 1 else "")),
        ("Rows", f"{view.in_all.rows:,}"),
    ]
    if view.bound is not None:
        known.append((element("span", {}, "Bound of entropies ", symbol("bound")), f"{view.bound:.2f} nats"))
    pairs = (element("div", {}, element("dt", {}, name), element("dd", {}, text)) for name, text in known)
    return element("dl", {"class": "facts"}, *pairs)


def _warnings(view: TrainingView) -> list[Element]:
    """How many rows are not finite, and in what."""
    said = []
    for i, quantity in enumerate(QUANTITIES):
        nan, infinite = odd_kinds(view.in_all, i)
        if nan or infinite:
            first = next(cell for cell in view.steps if odd(cell, i))
            kinds = [f"NaN in {rows(nan)}"] * bool(nan) + [f"infinite in {rows(infinite)}"] * bool(infinite)
            words = f": {' and '.join(kinds)}, first at {span(first.first, first.last)}"
            said.append(element("li", {}, f"{NAMES[quantity]} ", symbol(quantity), words))
    if view.odd_norms:
        said.append(element("li", {}, f"Gradient norm: NaN or infinite in {rows(view.odd_norms)}"))
    if not said:
        return []
    heading = element("h2", {}, "Rows that are not finite")
    note = element("p", {"class": "hint"}, "They are counted here, and left out of what would need the number.")
    return [element("section", {"class": "warning"}, heading, element("ul", {}, *said), note)]


def _over_training(view: TrainingView, readings: list[dict]) -> Element:
    widest = max(cell.last - cell.first + 1 for cell in view.steps)
    together = f" A point is up to {widest:,} steps." if widest > 1 else ""
    swatches: dict[str, Element | str] = {
        "median": "median",
        "inner": "half of the rows",
        "outer": "nine tenths",
    }
    if view.bound is not None:
        swatches["bound"] = element("span", {}, "bound ", symbol("bound"))
    if any(odd(view.in_all, i) for i in range(len(QUANTITIES))):
        swatches["odd"] = "has rows that are not finite"
    latest = readings[-1]
    place = {"min": 0, "max": len(readings) - 1, "value": len(readings) - 1, "aria-valuetext": latest["label"]}
    slider = [
        element("label", {"for": "step"}, "Step"),
        element("input", {"type": "range", "id": "step"} | place),
    ]
    charts = [figures.over_time(view, *each) for each in zip(QUANTITIES, latest["lines"], strict=True)]
    return _section(
        "Over training",
        [f"How the rows of a step were spread.{together} Point at a chart or move the slider to read one."],
        _legend(swatches),
        _grid(*charts, kind="time"),
        _card(
            element("p", {"class": "stepper", "hidden": True}, *slider),
            tables.quantiles_at_step(latest),
            kind="reader",
        ),
    )


def _early_and_late(view: TrainingView) -> Element:
    named = [f"{part.name.lower()}, {part.steps}" for part in view.parts]
    swatches = {"late": named[-1]} | ({"early": named[0]} if len(named) > 1 else {})
    return _section(
        "Early and late" if len(named) > 1 else "In all",
        ["How many of the rows have which value. A last bar also has what lies beyond it."],
        _legend(swatches),
        _grid(*(figures.histograms(view, quantity) for quantity in QUANTITIES)),
    )


def _planes(view: TrainingView) -> Element:
    ends = (element("span", {}, f"{view.weight_scale * i / 4:.3g}") for i in range(5))
    scale = [
        element("p", {}, "mean weight ", symbol("weight")),
        element("div", {"class": "scale"}, *(element("span", {"class": f"w-{shade}"}) for shade in range(SHADES))),
        element("div", {"class": "ticks"}, *ends),
    ]
    explanation = [
        "A square is the rows of these two entropies. Its colour is their mean weight; its area grows as the square "
        "root of their number. On the diagonal both models are equally sure; above it the student is less sure."
    ]
    return _section(
        "Teacher against student",
        explanation,
        element("div", {"class": "weights"}, *scale),
        _grid(*figures.planes(view)),
    )


def _shares(view: TrainingView) -> Element:
    measures = figures.measures(view)
    explanation: list[Element | str] = [
        "Rows in ten equal parts by teacher entropy, 1 the lowest, and each part's share of three totals: of the "
        "divergence D, without weights; of w D, the distillation loss; and of the whole loss's gradient, as the sum of "
        "the Euclidean norms of what each row's logits get. ",
        "" if view.has_norms else "The last is missing: no gradient_norms were passed. ",
        "Dashed: an even share.",
    ]
    numbers = element(
        "details",
        {},
        element("summary", {}, "The numbers"),
        _grid(*(_card(tables.tenths(part, measures)) for part in view.parts)),
    )
    return _section(
        "Where loss and gradient fall",
        explanation,
        _legend({MEASURES[name][2]: MEASURES[name][0] for name in measures}),
        _grid(*figures.shares(view)),
        numbers,
    )


def _samples(view: TrainingView) -> list[Element]:
    """Those late in training first: they are about the student that came of it."""
    sections = []
    if view.odd_samples:
        table = tables.samples(view, "Not finite, earliest first", view.odd_samples)
        explanation = ["The first that came. What is wrong often precedes them."]
        sections.append(_section("Rows that are not finite, one by one", explanation, _card(table, kind="alone")))
    latest, *earlier = reversed(view.parts)
    if latest.phase.samples.keep == 0:
        return sections
    what, explanation = "rows", []
    if view.tokens_known:
        what = "tokens"
        explanation = [
            "Shaded by weight: what a row predicts, after the tokens before it. Each is here once, however often it "
            "was trained on."
        ]
    shown = [_heaviest_and_lightest(view, latest)]
    for part in earlier:
        summary = element("summary", {}, f"The same {part.name.lower()} in training, {part.steps}")
        shown.append(element("details", {}, summary, _heaviest_and_lightest(view, part)))
    return [*sections, _section(f"Heaviest and lightest {what}", explanation, *shown)]


def _heaviest_and_lightest(view: TrainingView, part: Part) -> Element:
    found = part.phase.samples.found
    captions = {name: f"{name.capitalize()}, {part.name.lower()}: {part.steps}" for name in ("heaviest", "lightest")}
    return _grid(*(_card(tables.samples(view, caption, found[name])) for name, caption in captions.items()))


def _section(title: str, explanation: Sequence[Element | str], *children: Element) -> Element:
    heading = [element("h2", {}, title), element("p", {"class": "hint"}, *explanation)]
    return element("section", {}, element("div", {"class": "lead"}, *heading), *children)


def _grid(*children: Element, kind: str = "") -> Element:
    return element("div", {"class": f"charts {kind}".strip()}, *children)


def _card(*children: Element, kind: str = "") -> Element:
    return element("div", {"class": f"card {kind}".strip()}, *children)


def _legend(swatches: dict[str, Element | str]) -> Element:
    """By class in the style sheet, what it stands for."""
    items = (
        element("li", {}, element("span", {"class": f"swatch {kind}", "aria-hidden": "true"}), name)
        for kind, name in swatches.items()
    )
    return element("ul", {"class": "legend"}, *items)
