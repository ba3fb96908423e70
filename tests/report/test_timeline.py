"""eakd_kernels.report.timeline: cells that hold the steps themselves."""

import random

import pytest

from eakd_kernels.report.timeline import Timeline

MOST = 8


class Steps(list):
    def merge(self, other):
        self.extend(other)


def timeline_of(steps):
    timeline = Timeline(MOST, Steps)
    for step in steps:
        timeline.at(step).append(step)
    return timeline


def content(timeline):
    return timeline.width, [sorted(cell) for cell in timeline.cells()]


def expected(steps):
    width = 1
    while len({step // width for step in steps}) > MOST:
        width *= 2
    numbers = sorted({step // width for step in steps})
    return width, [sorted(step for step in steps if step // width == number) for number in numbers]


cases = pytest.mark.parametrize(
    "steps",
    [range(1), range(8), range(9), range(1000), range(50_000, 50_100), range(0, 10_000, 100), [3, 3, 7], [10**9, 1]],
    ids=["one", "full", "one more", "many", "resumed", "every 100th", "twice", "far apart"],
)


@cases
def test_cells_are_as_narrow_as_they_can_be(steps):
    assert content(timeline_of(steps)) == expected(steps)


@cases
def test_neither_order_nor_parts_matter(steps):
    steps, generator = list(steps), random.Random(0)
    for _ in range(5):
        generator.shuffle(steps)
        assert content(timeline_of(steps)) == expected(steps)
        parts = [timeline_of(steps[i::3]) for i in range(3)]
        before = content(parts[1])
        parts[0].merge(parts[1])
        parts[0].merge(parts[2])
        assert content(parts[0]) == expected(steps)
        assert content(parts[1]) == before
