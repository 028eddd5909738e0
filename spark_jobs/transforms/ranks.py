"""Places of rows in a sorted order, without ever bringing all rows into one partition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from spark_jobs.transforms.settle import settle

_BITS = 33
"""``monotonically_increasing_id`` is the partition shifted by this many bits, plus the row's place in it."""

_ID = "_sorted_id"

_BITS_PER_PASS = 16
"""At most 65,537 counts travel to the driver at once."""


@dataclass(frozen=True)
class Ranked:
    """Rows with their place, and how many they are."""

    frame: DataFrame
    rows: int


def with_rank(frame: DataFrame, order: Sequence[Column | str], name: str) -> Ranked:
    """Add the bigint column ``name``: 0, 1, 2, ... in ``order``, which must leave no ties."""
    ordered, offsets = _sorted(frame, order)
    offset = F.element_at(F.array(*[F.lit(step) for step in offsets]), F.shiftright(_ID, _BITS).cast("int") + 1)
    place = F.col(_ID).bitwiseAND((1 << _BITS) - 1)
    return Ranked(ordered.withColumn(name, (offset + place).cast("bigint")).drop(_ID), offsets[-1])


def values_at(frame: DataFrame, column: str, ranks: Callable[[int], Sequence[int]]) -> list[int]:
    """The values of a bigint column at some places (from 0) of its sorted order; nothing is sorted (radix select).

    Each pass counts the rows by a few more of the value's leading bits, in the cells where the places lie.

    Args:
        frame: the rows, settled; there are no nulls in the column.
        column: its name.
        ranks: from the number of rows to the places, each below that number.
    """
    value = F.col(column)
    low, high, rows = frame.agg(F.min(value), F.max(value), F.count("*")).first() or (0, 0, 0)
    rest = list(ranks(rows))
    cells = [0] * len(rest)
    above, shift = 64, max((high - low).bit_length() - _BITS_PER_PASS, 0)
    while above:
        inside = frame if above == 64 else frame.where(F.shiftright(value, above).isin(cells))
        found = inside.groupBy(F.shiftright(value, shift).alias("cell")).count().collect()
        counts = sorted((row["cell"], row["count"]) for row in found)
        for place, parent in enumerate(cells):
            for cell, number in counts:
                if above < 64 and cell >> (above - shift) != parent:
                    continue
                if rest[place] < number:
                    cells[place] = cell
                    break
                rest[place] -= number
        above, shift = shift, max(shift - _BITS_PER_PASS, 0)
    return cells


def _sorted(frame: DataFrame, order: Sequence[Column | str]) -> tuple[DataFrame, list[int]]:
    """The frame in order, with _ID; how many rows lie before each partition, and at last how many there are.

    The rows are settled, for the counts of their partitions are only right for this very order.
    """
    ordered = settle(frame.orderBy(*order).withColumn(_ID, F.monotonically_increasing_id()))
    parts = ordered.groupBy(F.shiftright(_ID, _BITS).alias("part")).count().collect()
    counts = {row["part"]: row["count"] for row in parts}
    return ordered, [0, *accumulate(counts.get(part, 0) for part in range(max(counts, default=-1) + 1))]
