"""Pictures of a distillation, each a single HTML file that asks for nothing else.

`passages` turns logits into plain values; `token_page` makes of those, without any further library, a page that shades
the tokens of a passage by their weights. `training_record` gathers the statistics of a training; `training_page` shows
how they went.
"""

from .passages import Candidate, Passage, Prediction, Row, View, rows_from_logits
from .token_page import render
from .training_record import TrainingRecord, row_gradient_norms

__all__ = [
    "Candidate",
    "Passage",
    "Prediction",
    "Row",
    "TrainingRecord",
    "View",
    "render",
    "row_gradient_norms",
    "rows_from_logits",
]
