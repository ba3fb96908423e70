"""Pictures of a distillation, each a single HTML file that asks for nothing else.

`passages` turns logits into plain values; `token_page` makes of those, without any further library, a page that shades
the tokens of a passage by their weights.
"""

from .passages import Candidate, Passage, Prediction, Row, View, rows_from_logits
from .token_page import render

__all__ = ["Candidate", "Passage", "Prediction", "Row", "View", "render", "rows_from_logits"]
