"""A passage as an HTML page: its tokens shaded by weight, once a view, with both models' predictions on demand.

Here the numbers are counted; token_page.js draws them, and writes what tokens say as text nodes only.
"""

import base64
import hashlib
import html
import json
import math
import statistics
from dataclasses import asdict
from importlib.resources import files
from string import Template

from .passages import Passage, View

BINS = 24
DIGITS = 4  # significant ones: no more are shown


def render(passage: Passage, *, title: str, introduction: str) -> str:
    """The page. title and introduction are plain text, like everything in the passage."""
    style, script = _source("page.css") + _source("token_page.css"), _source("token_page.js")
    return Template(_source("token_page.html")).substitute(
        title=html.escape(title),
        introduction=html.escape(introduction),
        style=style,
        script=script,
        style_hash=_content_hash(style),
        script_hash=_content_hash(script),
        data=_json_in_html(_drawable(passage)),
    )


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _content_hash(text: str) -> str:
    """What a Content-Security-Policy calls a script or style by, so that no other one runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _drawable(passage: Passage) -> dict:
    weights = [_finite_weights(view) for view in passage.views]
    scale = _end_of_scale(max((w for view in weights for w in view), default=0.0))
    views = [
        {**asdict(view), "summary": _summary(view, kept), "histogram": _histogram(kept, scale)}
        for view, kept in zip(passage.views, weights, strict=True)
    ]
    return {"tokens": passage.tokens, "scale": scale, "views": views}


def _finite_weights(view: View) -> list[float]:
    return [row.weight for row in view.rows if row is not None and math.isfinite(row.weight)]


def _end_of_scale(largest: float) -> float:
    """The smallest round number that is not below the largest weight."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(round(step * power, 12) for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest)


def _histogram(weights: list[float], scale: float) -> list[int]:
    """Tokens in each of BINS equal parts of 0..scale; what lies below 0 is counted in the first."""
    counts = [0] * BINS
    for weight in weights:
        counts[min(max(int(weight / scale * BINS), 0), BINS - 1)] += 1
    return counts


def _summary(view: View, weights: list[float]) -> str:
    predicted = sum(row is not None for row in view.rows)
    if not weights:
        return "No token here has a weight." if predicted == 0 else "No token here has a finite weight."
    mean = statistics.fmean(weights)
    words = f"Mean of w {mean:.3f}"
    if mean > 0 and len(weights) > 1:
        words += f", coefficient of variation {statistics.stdev(weights) / mean:.2f}"
    odd = predicted - len(weights)
    return words + (f"; {odd} not finite" if odd else "")


def _json_in_html(value) -> str:
    """JSON that no HTML parser finds a tag or a comment in."""
    text = json.dumps(_plain(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value):
    """What JSON knows. Floats that it does not know become strings, as JavaScript's Number() reads them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if math.isfinite(value):
            return float(f"{value:.{DIGITS}g}")
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    return value
