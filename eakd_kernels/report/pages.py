"""What every page has in common: one file that asks for nothing else, and runs no script or style but its own."""

import base64
import hashlib
import html
import json
import math
from importlib.resources import files
from string import Template

DIGITS = 4  # significant ones: no more are shown


def page(name: str, *, title: str, introduction: str, data, **markup: str) -> str:
    """{name}.html with its style and script. title and introduction: plain text. data: what the script reads, as JSON.
    markup: HTML for the places of these names, which must have been escaped where it was made."""
    style, script = _source("page.css") + _source(f"{name}.css"), _source(f"{name}.js")
    return Template(_source(f"{name}.html")).substitute(
        title=html.escape(title),
        introduction=html.escape(introduction),
        style=style,
        script=script,
        style_hash=_content_hash(style),
        script_hash=_content_hash(script),
        data=_json_in_html(data),
        **markup,
    )


def end_of_scale(largest: float) -> float:
    """The smallest round number that is not below the largest weight."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(round(step * power, 12) for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= largest)


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _content_hash(text: str) -> str:
    """What a Content-Security-Policy calls a script or style by, so that no other one runs."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
