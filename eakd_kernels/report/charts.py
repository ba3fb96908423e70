"""Charts as SVG that stretches to whatever room there is, between labels of HTML that do not."""

import math
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from .markup import element

WIDTH, HEIGHT = 1000, 1000  # of a chart's own coordinates, which the page stretches


def round_ticks(low: float, high: float, *, most: int = 6, whole: bool = False) -> list[float]:
    """Round numbers, equally far apart by at most `most` steps, that enclose low..high as tightly as such can."""
    high = high if high > low else low + 1
    power = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    best = None
    for distance in (step * power for step in (1, 2, 2.5, 5, 10, 20, 25, 50, 100)):
        if whole and not distance.is_integer():
            continue
        first, last = math.floor(low / distance), max(math.ceil(high / distance), math.floor(low / distance) + 1)
        if last - first <= most and (best is None or (last - first) * distance < best[0]):
            best = (last - first) * distance, [float(f"{i * distance:.12g}") for i in range(first, last + 1)]
    return best[1]


def plot(
    drawing: Element, x_ticks: Sequence[str], y_ticks: Sequence[str], names: Sequence[Element | str], *, between=False
) -> Element:
    """A drawing and its axes. Ticks are equally far apart, in rising order; between: x_ticks name the spaces between.
    names: of the axes, x first."""
    x, y = (element("div", {"class": f"{axis} name"}, name) for axis, name in zip("xy", names, strict=True))
    return element(
        "div",
        {"class": "plot"},
        y,
        element("div", {"class": "y at", "aria-hidden": "true"}, *(element("span", {}, t) for t in reversed(y_ticks))),
        drawing,
        element(
            "div",
            {"class": "x between" if between else "x at", "aria-hidden": "true"},
            *(element("span", {}, t) for t in x_ticks),
        ),
        x,
    )


def drawing(description: str, y_ticks: int, *shapes: Element, x_ticks: int = 0) -> Element:
    """An image with a line across at each of so many ticks."""
    across = "".join(f"M0,{HEIGHT * i / (y_ticks - 1):.4g}H{WIDTH}" for i in range(y_ticks))
    up = "".join(f"M{WIDTH * i / (x_ticks - 1):.4g},0V{HEIGHT}" for i in range(x_ticks))
    grid = element("path", {"class": "grid", "d": across + up})
    return element(
        "svg",
        {
            "viewBox": f"0 0 {WIDTH} {HEIGHT}",
            "preserveAspectRatio": "none",
            "role": "img",
            "aria-label": description,
        },
        grid,
        *shapes,
    )


class Scale:
    """From values to a chart's coordinates. backwards: upwards, as y has it."""

    def __init__(self, ticks: Sequence[float], size: int = WIDTH, *, backwards: bool = False):
        self.low, self.high, self.size, self.backwards = ticks[0], ticks[-1], size, backwards

    def __call__(self, value: float) -> float:
        fraction = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return round(self.size * (1 - fraction if self.backwards else fraction), 1)


def band(x: Sequence[float], lower: Sequence[float], upper: Sequence[float], kind: str) -> Element:
    """The space between two lines, in the chart's coordinates."""
    there = [f"{a:g},{b:g}" for a, b in zip(x, upper, strict=True)]
    back = [f"{a:g},{b:g}" for a, b in zip(reversed(x), reversed(lower), strict=True)]
    return element("path", {"class": kind, "d": f"M{'L'.join([*there, *back])}Z"})


def line(x: Sequence[float], y: Sequence[float], kind: str) -> Element:
    return element("path", {"class": kind, "d": "M" + "L".join(f"{a:g},{b:g}" for a, b in zip(x, y, strict=True))})


def bars(heights: Sequence[float], kind: str, *, first: float = 0.0, width: float = 1.0) -> Element:
    """A bar for each of equal parts of the chart's width, of these parts of its height: from `first` on, as a part of
    its place, and `width` wide."""
    place = WIDTH / len(heights)
    shapes = (
        f"M{place * (i + first):.5g},{HEIGHT}v{-HEIGHT * height:.5g}h{place * width:.5g}V{HEIGHT}Z"
        for i, height in enumerate(heights)
        if height > 0
    )
    return element("path", {"class": kind, "d": "".join(shapes)})


def outline(heights: Sequence[float], kind: str) -> Element:
    """The upper edge of bars without spaces."""
    place = WIDTH / len(heights)
    steps = "".join(f"V{HEIGHT * (1 - h):.5g}H{place * (i + 1):.5g}" for i, h in enumerate(heights))
    return element("path", {"class": kind, "d": f"M0,{HEIGHT}{steps}V{HEIGHT}"})
