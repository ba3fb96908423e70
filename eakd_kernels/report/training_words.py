"""How a training's page writes names and numbers."""

import math
from xml.etree.ElementTree import Element

from .markup import element

UNITS = {"teacher_entropy": "nats", "student_entropy": "nats", "weight": "", "divergence": "nats"}
NAMES = {
    "teacher_entropy": "Teacher's entropy",
    "student_entropy": "Student's entropy",
    "weight": "Weight",
    "divergence": "Divergence",
}
# Letter and subscript.
SYMBOLS = {
    "teacher_entropy": ("H", "T"),
    "student_entropy": ("H", "S"),
    "weight": ("w", ""),
    "divergence": ("D", ""),
    "bound": ("H", "ub"),
}
UNKNOWN = "\N{EN DASH}"
# What is shared out over the tenths: its name on its own, its name in a sentence, and its class in the style sheet.
MEASURES = {
    "divergence": ("D", "D", "raw"),
    "weighted divergence": ("w D", "w D", "weighted"),
    "gradient norm": ("gradient norm", "the gradient norm", "norm"),
}


def kind(quantity: str) -> str:
    """Its class in the style sheet."""
    return quantity.replace("_", "-")


def symbol(quantity: str) -> Element:
    letter, below = SYMBOLS[quantity]
    return element("span", {"class": "symbol"}, letter, *([element("sub", {}, below)] if below else []))


def heading(quantity: str) -> Element:
    return element("h3", {}, f"{NAMES[quantity]} ", symbol(quantity))


def amount(quantity: str, value: float) -> str:
    return f"{value:.2f}" if quantity.endswith("entropy") and abs(value) < 1000 else figure(value)


def figure(value: float) -> str:
    """Three significant digits."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def percent(share: float) -> str:
    """Of a share in 0..1."""
    if math.isnan(share):
        return UNKNOWN
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if abs(share) < 0.0995 else f"{100 * share:.0f} %"


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
