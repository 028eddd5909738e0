"""The time of a log in few stretches: days where there is a clock, equal slices where times are places in the log."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLICES = 50
LONGEST = 1000
"""Days, or weeks, that are still shown one by one."""

_MONDAY = 3
"""1970-01-01 was a Thursday: so many days after a Monday."""


@dataclass(frozen=True)
class Periods:
    """Rows and likes of each stretch that has any, by its place.

    A stretch covers ``width`` days from day ``origin + place * width`` since 1970 on; slices of a log without a clock
    have only their place.
    """

    unit: str
    origin: int
    width: int
    counts: Mapping[int, tuple[int, int]]

    def each(self) -> Iterator[tuple[str, int, int]]:
        """What each stretch is called (its first day, UTC), its rows and likes; those without rows in between, too."""
        for place in range(min(self.counts), max(self.counts) + 1):
            yield self._name(place), *self.counts.get(place, (0, 0))

    def _name(self, place: int) -> str:
        return str(place) if self.unit == "slice" else str(np.datetime64(self.origin + place * self.width, "D"))


def slices(time: NDArray[Any], rows: int) -> NDArray[Any]:
    """The slice of each time, if times are places in a log of ``rows`` rows; else -1.

    A log without a clock has its rows' places as times. Milliseconds since 1970 are never below the number of rows,
    unless the whole log is of its first minutes, and then slices serve it better than its one day.
    """
    return np.where((time >= 0) & (time < rows), time * SLICES // rows, -1)


def spans(first: int, last: int) -> tuple[str, int, int]:
    """Unit, origin and width in days of the stretches that cover the days ``first`` to ``last`` since 1970.

    Days, or weeks from Monday on, if they are not too many; else SLICES stretches of equal length.
    """
    days = last - first + 1
    if days <= LONGEST:
        return "day", first, 1
    if days <= 7 * (LONGEST - 1):
        return "week", first - (first + _MONDAY) % 7, 7
    return "stretch", first, -(-days // SLICES)
