"""k-core filter."""

from collections.abc import Callable

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.transforms.settle import joinable, settle


def k_core(events: DataFrame, k: int, report: Callable[[int, int], None]) -> DataFrame:
    """Remove users and items with fewer than ``k`` events, again and again until none is left.

    Args:
        events: with user_id and item_id; read several times, so they must be cheap to read.
        k: smallest number of events; below 2 nothing is removed.
        report: called with the round and the rows that are left after it.
    """
    turn = 0
    while k > 1:
        rare = {key: _rare(events, key, k) for key in ("user_id", "item_id")}
        few = {key: frame.count() for key, frame in rare.items()}
        if not any(few.values()):
            break
        for key, frame in rare.items():
            if few[key]:
                events = events.join(joinable(frame, few[key]), key, "left_anti")
        events, turn = settle(events), turn + 1
        report(turn, events.count())
    return events


def _rare(events: DataFrame, key: str, k: int) -> DataFrame:
    return settle(events.groupBy(key).count().where(F.col("count") < k).select(key))
