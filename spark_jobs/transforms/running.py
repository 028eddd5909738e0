"""What lies before each event of a user or an item, counted without one task per key.

The log is cut into slices of time. Within a slice a window counts; what the slices before it hold of the key is one
number, added afterwards. So the events of a hot user or item spread over as many tasks as there are slices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window, WindowSpec
from pyspark.sql import functions as F

ROWS_PER_SLICE = 250_000
"""Events of one key that a task may well have beside those of others."""

_SLICE = "_slice"

_FINER = 20
"""How many times smaller than a slice the error of a cut is; no sum depends on where the cuts are."""


@dataclass(frozen=True)
class Running:
    """A running sum of ``value``: ``inside`` is what a window of one key and slice, in order of time, has of it."""

    value: Column
    inside: Callable[[WindowSpec], Column]


def strictly_before(value: Column) -> Running:
    """The sum of ``value`` over events with a smaller time; events at the same time do not see one another."""
    return Running(
        value,
        lambda window: F.coalesce(
            F.sum(value).over(window.orderBy("time").rangeBetween(Window.unboundedPreceding, -1)), F.lit(0)
        ),
    )


def sliced(events: DataFrame, most: int, rows_per_slice: int = ROWS_PER_SLICE) -> DataFrame:
    """Mark every event's slice: stretches of time with about equally many events, so that a few odd times do no harm.

    They are so many that one has about ``rows_per_slice`` events of a key with ``most`` events; where no key has more,
    the log stays as it is.
    """
    slices = -(-most // rows_per_slice)
    if slices <= 1:
        return events
    shares = [number / slices for number in range(1, slices)]
    found = events.agg(F.percentile_approx("time", shares, _FINER * slices).alias("cuts")).first()
    return events.withColumn(_SLICE, _place(sorted(set(found["cuts"])) if found else []))


def _place(cuts: Sequence[int], before: int = 0) -> Column:
    """How many of the ascending ``cuts`` are not after the time, and ``before``: a binary search as an expression."""
    if not cuts:
        return F.lit(before)
    middle = len(cuts) // 2
    above = _place(cuts[middle + 1 :], before + middle + 1)
    return F.when(F.col("time") < cuts[middle], _place(cuts[:middle], before)).otherwise(above)


def unsliced(events: DataFrame) -> DataFrame:
    """The events without the mark."""
    return events.drop(_SLICE)


def running(events: DataFrame, key: str, sums: Mapping[str, Running]) -> DataFrame:
    """Add bigint columns of running sums over the events of the same ``key``; events must be ``sliced``."""
    if _SLICE not in events.columns:
        whole = Window.partitionBy(key)
        return events.withColumns({name: total.inside(whole).cast("bigint") for name, total in sums.items()})
    window = Window.partitionBy(key, _SLICE)
    totals = events.groupBy(key, _SLICE).agg(*[F.sum(total.value).alias(name) for name, total in sums.items()])
    earlier = Window.partitionBy(key).orderBy(_SLICE).rowsBetween(Window.unboundedPreceding, -1)
    base = totals.select(key, _SLICE, *[F.sum(name).over(earlier).alias(f"_{name}") for name in sums])
    counted = events.withColumns({name: total.inside(window) for name, total in sums.items()})
    both = {name: (F.col(name) + F.coalesce(F.col(f"_{name}"), F.lit(0))).cast("bigint") for name in sums}
    return counted.join(base, [key, _SLICE]).withColumns(both).drop(*[f"_{name}" for name in sums])
