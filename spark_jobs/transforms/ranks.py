"""Places of rows in a sorted order, without ever bringing all rows into one partition."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from spark_jobs.transforms.settle import settle

_BITS = 33
"""``monotonically_increasing_id`` is the partition shifted by this many bits, plus the row's place in it."""

_ID = "_sorted_id"


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


def rows_at(frame: DataFrame, order: Sequence[str], ranks: Callable[[int], Sequence[int]]) -> list[Row]:
    """The rows at some places (from 0) of the sorted order.

    Args:
        frame: the rows; only the columns of ``order`` are looked at.
        order: columns to sort by.
        ranks: from the number of rows to the places, each below that number.
    """
    ordered, offsets = _sorted(frame.select(*order), order)
    wanted = [_id_at(offsets, rank) for rank in ranks(offsets[-1])]
    found = {row[_ID]: row for row in ordered.where(F.col(_ID).isin(wanted)).collect()} if wanted else {}
    return [found[key] for key in wanted]


def _id_at(offsets: Sequence[int], rank: int) -> int:
    partition = max(i for i, offset in enumerate(offsets[:-1]) if offset <= rank)
    return (partition << _BITS) + rank - offsets[partition]


def _sorted(frame: DataFrame, order: Sequence[Column | str]) -> tuple[DataFrame, list[int]]:
    """The frame in order, with _ID; how many rows lie before each partition, and at last how many there are.

    The rows are settled, for the counts of their partitions are only right for this very order.
    """
    ordered = settle(frame.orderBy(*order).withColumn(_ID, F.monotonically_increasing_id()))
    parts = ordered.groupBy(F.shiftright(_ID, _BITS).alias("part")).count().collect()
    counts = {row["part"]: row["count"] for row in parts}
    return ordered, [0, *accumulate(counts.get(part, 0) for part in range(max(counts, default=-1) + 1))]
