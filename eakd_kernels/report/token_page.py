"""A passage as an HTML page: its tokens shaded by weight, once a view, with both models' predictions on demand.

Here the numbers are counted; token_page.js draws them, and writes what tokens say as text nodes only.
"""

import math
import statistics
from dataclasses import asdict

from .pages import end_of_scale, page
from .passages import Passage, View

BINS = 24


def render(passage: Passage, *, title: str, introduction: str) -> str:
    """The page. title and introduction are plain text, like everything in the passage."""
    return page("token_page", title=title, introduction=introduction, data=_drawable(passage))


def _drawable(passage: Passage) -> dict:
    weights = [_finite_weights(view) for view in passage.views]
    scale = end_of_scale(max((w for view in weights for w in view), default=0.0))
    views = [
        {**asdict(view), "summary": _summary(view, kept), "histogram": _histogram(kept, scale)}
        for view, kept in zip(passage.views, weights, strict=True)
    ]
    return {"tokens": passage.tokens, "scale": scale, "views": views}


def _finite_weights(view: View) -> list[float]:
    return [row.weight for row in view.rows if row is not None and math.isfinite(row.weight)]


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
