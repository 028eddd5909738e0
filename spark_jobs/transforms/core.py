"""k-core filter."""

from collections.abc import Callable

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.transforms.settle import joinable, settle


def k_core(events: DataFrame, k: int, report: Callable[[int, int], None]) -> DataFrame:
    """Remove users and items with fewer than ``k`` events, again and again until none is left.

    What a round kept is given back once the next one is there: a log hardly shrinks after the first.

    Args:
        events: with user_id and item_id; read several times, so they must be cheap to read.
        k: smallest number of events; below 2 nothing is removed.
        report: called with the round and the rows that are left after it.
    """
    turn = 0
    while k > 1 and (left := _round(events, k)) is not None:
        if turn:  # the log that came in is its caller's
            events.unpersist()
        events, turn = left, turn + 1
        report(turn, events.count())
    return events


def _round(events: DataFrame, k: int) -> DataFrame | None:
    """The events without those of rare users and items; None: there are none."""
    rare = {key: _rare(events, key, k) for key in ("user_id", "item_id")}
    few = {key: frame.count() for key, frame in rare.items()}
    left = events
    for key, frame in rare.items():
        if few[key]:
            left = left.join(joinable(frame, few[key]), key, "left_anti")
    settled = settle(left) if any(few.values()) else None
    for frame in rare.values():
        frame.unpersist()
    return settled


def _rare(events: DataFrame, key: str, k: int) -> DataFrame:
    return settle(events.groupBy(key).count().where(F.col("count") < k).select(key))
