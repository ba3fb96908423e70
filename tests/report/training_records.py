"""Statistics and records for the tests of training pages."""

import math
import re

import torch

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


def cells_of(html, table):
    """Of the table with this number in the page, the text of its rows' cells."""
    body = re.findall(r"<table.*?</table>", html, re.DOTALL)[table]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]
