"""Statistics and records for the tests of training pages."""

import math
import re

import torch
from token_pages import HOSTILE

from eakd_kernels import RowStats
from eakd_kernels.report import TrainingRecord

BOUND = math.log(1000)
FIELDS = ("teacher_entropy", "student_entropy", "weight", "divergence")


def stats_of(teacher_entropy, student_entropy, weight, divergence):
    """RowStats that have these alone; lists or tensors."""
    fields = (torch.as_tensor(x) for x in (weight, divergence, teacher_entropy, student_entropy))
    return RowStats(None, *fields, None, None, None)


def random_stats(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher, student, divergence = (torch.rand(*shape, generator=generator) for _ in range(3))
    teacher, student = BOUND * teacher**2, BOUND * student
    return stats_of(teacher, student, teacher * (1 + student / BOUND) / 2 / BOUND, 4 * divergence**3)


def random_batch(step, shape=(2, 12), vocabulary=50):
    """What a call of add takes: statistics, ids, labels with some rows left out, gradient norms; step."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(vocabulary, shape, generator=generator)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    labels[torch.rand(shape, generator=generator) < 0.2] = -100
    stats = random_stats(*shape, seed=step)
    left_out = labels == -100
    stats = RowStats(*(None if x is None else x.masked_fill(left_out, 0) for x in stats))
    norms = torch.rand(shape, generator=generator).masked_fill(left_out, 0)
    return (stats, ids, labels), {"step": step, "gradient_norms": norms}


def record_of(steps, **options):
    record = TrainingRecord(**{"bound": BOUND} | options)
    for step in steps:
        arguments, keywords = random_batch(step)
        record.add(*arguments, **keywords)
    return record


def hostile_record(decode=lambda token: HOSTILE[token % len(HOSTILE)]):
    """Every token is among the heaviest and the lightest, and among those before them."""
    record = TrainingRecord(decode=decode, bound=BOUND, keep=len(HOSTILE))
    for step in range(30):
        stats = random_stats(1, len(HOSTILE), seed=step)
        stats.divergence[0, step % len(HOSTILE)] = math.inf
        ids = torch.arange(len(HOSTILE))[None]
        record.add(stats, ids, ids.roll(-1), step=step, gradient_norms=stats.weight)
    return record


def odd_records():
    everything_odd = TrainingRecord(bound=BOUND)
    everything_odd.add(stats_of(*([math.nan, math.inf] for _ in range(4))), torch.tensor([1, 2]), step=4)
    off_scale = TrainingRecord()
    off_scale.add(stats_of([0.0, 1e30], [0.0, 1e30], [-1.0, 1e9], [-1e-8, 1e20]), step=10**9)
    nothing = TrainingRecord(bound=0.5)
    nothing.add(stats_of([0.0], [0.0], [0.0], [0.0]), step=0, gradient_norms=torch.zeros(1))
    images = TrainingRecord(decode=["cat", "dog"].__getitem__)
    images.add(random_stats(8), labels=torch.tensor([0, 1] * 4), step=1)
    return {"everything odd": everything_odd, "off the scale": off_scale, "zeros": nothing, "images": images}


def cells_of(html, table):
    """Of the table with this number in the page, the text of its rows' cells."""
    body = re.findall(r"<table.*?</table>", html, re.DOTALL)[table]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
