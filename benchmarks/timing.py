"""Times whose ratios hold on a machine that others use as well.

Samples are taken in interleaved rounds (A, B, C, A, B, C, ...), so that a disturbance falls on all alike; ratios are
taken within a round, and the median over rounds is given with its quartiles. A sample repeats a call until it lasts
SAMPLE_MS or more: in calls of 1 ms the waking of threads would be most of what is seen.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

SAMPLE_MS = 20.0
# The first touch of memory is slow, on virtual machines very much so: rounds are thrown away until none gets faster.
WARM_UP_ROUNDS = range(3, 10)
STILL_FASTER = 0.9

Call = Callable[[], object]
Sample = Callable[[Call, int], float]  # (call, how often) -> milliseconds per call


class Spread(NamedTuple):
    median: float
    q1: float
    q3: float


def interleaved(
    calls: dict[str, Call],
    rounds: int,
    sample: Sample,
    before: Call = lambda: None,
    after_round: Call = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds per call: a list over rounds for each name. `before` runs ahead of every sample, untimed."""
    gc.collect()
    gc.disable()
    try:
        repeats = _warm_up(calls, sample, before)
        samples = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                before()
                samples[name].append(sample(call, repeats[name]))
            after_round()
    finally:
        gc.enable()
    return samples


def spread(values: list[float]) -> Spread:
    q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Spread(median.item(), q1.item(), q3.item())


def ratios(numerators: list[float], denominators: list[float]) -> Spread:
    """Of two lists over the same rounds, round by round."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def _warm_up(calls, sample, before) -> dict[str, int]:
    """How often each call is repeated in a sample."""
    repeats, best = dict.fromkeys(calls, 1), dict.fromkeys(calls, math.inf)
    for finished in range(1, WARM_UP_ROUNDS.stop):
        faster = False
        for name, call in calls.items():
            before()
            milliseconds = sample(call, repeats[name])
            faster |= milliseconds < STILL_FASTER * best[name]
            best[name] = min(best[name], milliseconds)
            repeats[name] = math.ceil(SAMPLE_MS / best[name])
        if finished >= WARM_UP_ROUNDS.start and not faster:
            break
    return repeats


def sampler(clock: str, device: str) -> Sample:
    """The functions below are the only ones that read a clock."""
    if clock == "events":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        return partial(_events, torch.empty(flushing_bytes(l2_bytes), dtype=torch.uint8, device=device))
    return partial(_wall, torch.cuda.synchronize if device == "cuda" else lambda: None)


def flushing_bytes(l2_bytes: int) -> int:
    """As many as leave nothing else in a second-level cache of this size; 0: it is not known."""
    return 2 * l2_bytes or 256 << 20


def _wall(wait: Call, call: Call, repeats: int) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) * 1e3 / repeats


def _events(flushed: torch.Tensor, call: Call, repeats: int) -> float:
    """Every call starts from a cold cache. The median: the first finds an idle GPU, and its launching shows."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flushed.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)
