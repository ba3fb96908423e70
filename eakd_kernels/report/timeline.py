"""A training of any length in a bounded number of cells."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Cell(Protocol):
    def merge(self, other) -> None: ...


C = TypeVar("C", bound=Cell)


class Timeline(Generic[C]):
    """Cells of 1, 2, 4, ... steps each, as wide as it takes for `most` of them to be enough; those without rows are not
    there. What they hold does not depend on the order in which it came, nor on whose timeline it was in before."""

    def __init__(self, most: int, new_cell: Callable[[], C]):
        self.most, self.new_cell = most, new_cell
        self.width = 1
        self._cells: dict[int, C] = {}

    def at(self, step: int) -> C:
        """The cell that the step is in, to be filled."""
        self._cell(step // self.width)
        self._make_room()
        return self._cells[step // self.width]

    def merge(self, other: "Timeline[C]") -> None:
        self._widen(max(self.width, other.width))
        for number, cell in other._cells.items():
            self._cell(number * other.width // self.width).merge(cell)
        self._make_room()

    def cells(self) -> list[C]:
        """In the order of their steps."""
        return [self._cells[number] for number in sorted(self._cells)]

    def _cell(self, number: int) -> C:
        if number not in self._cells:
            self._cells[number] = self.new_cell()
        return self._cells[number]

    def _make_room(self) -> None:
        while len(self._cells) > self.most:
            self._widen(2 * self.width)

    def _widen(self, width: int) -> None:
        if width == self.width:
            return
        times, narrow = width // self.width, self._cells
        self.width, self._cells = width, {}
        for number in sorted(narrow):
            self._cell(number // times).merge(narrow[number])
