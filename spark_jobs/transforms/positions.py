"""Dense positions of users and items, and the order of a user's events."""

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from spark_jobs.transforms.ranks import Ranked, with_rank
from spark_jobs.transforms.settle import settle


def positions(events: DataFrame, key: str, name: str) -> Ranked:
    """``key`` and its position ``name`` (int, from 1) by first appearance: time, then id."""
    first = events.groupBy(key).agg(F.min("time").alias("first"))
    ranked = with_rank(first, ["first", key], "rank")
    return Ranked(settle(ranked.frame.select(key, (F.col("rank") + 1).cast("int").alias(name))), ranked.rows)


def ordered(events: DataFrame) -> DataFrame:
    """Add, per event, its ``order`` in its user's log (time, then item), ``earlier`` (events strictly before) and
    ``sample_id``.
    """
    user = Window.partitionBy("user")
    order = F.row_number().over(user.orderBy("time", "item")) - 1
    earlier = F.rank().over(user.orderBy("time")) - 1
    frame = events.withColumns({"order": order, "earlier": earlier})
    sample_id = F.shiftleft(F.col("user").cast("bigint"), 32).bitwiseOR(F.col("order").cast("bigint"))
    return frame.withColumn("sample_id", sample_id)
