"""Passages for pages, and what is in a page."""

import json
import re

from eakd_kernels.report import Candidate, Passage, Prediction, Row, View, render

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 2'>",
    "</script ",  # an end tag that needs no >
    "<!-- <script ",  # after which an end tag does not end the script
    "]]>",
    "\"'`&amp;",
    "${title} $title",
    "\n",
    "\r\n\t",
    "\u202eright to left",
    "\u2028",
    "\x00\x1b\x85",
    "\ud800",
    "",
    "x" * 400,
    " ",
)


def prediction(entropy=1.5, probability=0.25, candidates=(("a", 0.5), (" b", 0.25))):
    return Prediction(entropy, probability, tuple(Candidate(*pair) for pair in candidates))


def row(weight, teacher=None, student=None):
    return Row(weight, teacher or prediction(2.25), student or prediction(9.75))


def passage(tokens, *weights, labels=("before training", "after 200 steps")):
    """tokens, of which the first has no row, and for each view the weights of the others."""
    views = (View(label, (None, *map(row, ws))[: len(tokens)]) for label, ws in zip(labels, weights, strict=False))
    return Passage(tuple(tokens), tuple(views))


def hostile_passage():
    """Every token also as a candidate."""
    rows = [
        row(i / 20, prediction(candidates=((token, 0.5),)), prediction(candidates=((token, 0.1),)))
        for i, token in enumerate(HOSTILE)
    ]
    return Passage(HOSTILE, (View("<b>before</b>", (None, *rows[1:])), View("after", (None, *rows[1:]))))


def page(passage, title="Title", introduction="Introduction"):
    return render(passage, title=title, introduction=introduction)


def json_in(html):
    """What the page's script reads."""
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1]


def data_in(html):
    return json.loads(json_in(html))
