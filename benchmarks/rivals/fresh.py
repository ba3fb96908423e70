"""What a fresh process runs, forked from one that has imported this module and with it every package there is."""

from functools import partial

import torch

from ..check import forget, run
from ..memory import Memory, memory_of
from . import hidden, packages
from .entries import Entry, entries

for rival in (*packages.RIVALS.values(), *hidden.RIVALS.values()):
    if not rival.on_gpus_only:
        packages.load(rival)


def used(case, entry: Entry, threads: int) -> Memory:
    """Bytes beyond the inputs of a step that has run before."""
    torch.set_num_threads(threads)
    inputs, loss = case.inputs(), entries(case)[entry].loss
    return memory_of(lambda between: run(loss, inputs, between), partial(forget, inputs))
