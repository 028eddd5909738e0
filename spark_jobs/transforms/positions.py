"""Dense positions of users and items, the order of a user's events, and the part of the log they lie in."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from spark_jobs.transforms.ranks import Ranked, with_rank
from spark_jobs.transforms.running import Running, running, strictly_before
from spark_jobs.transforms.settle import joinable, settle

USERS_PER_GROUP = 1_000_000


def positions(events: DataFrame, key: str, name: str) -> Ranked:
    """``key``, its position ``name`` (int, from 1) by first appearance (time, then id), and how many ``events``."""
    first = events.groupBy(key).agg(F.min("time").alias("first"), F.count("*").alias("events"))
    ranked = with_rank(first, ["first", key], "rank")
    return Ranked(settle(ranked.frame.select(key, (F.col("rank") + 1).cast("int").alias(name), "events")), ranked.rows)


def ordered(events: DataFrame) -> DataFrame:
    """Add, per event, its ``order`` in its user's log (time, then item), ``earlier`` and ``user_likes`` (events and
    likes strictly before) and ``sample_id``. Events must be sliced.
    """
    one = F.lit(1)
    order = Running(one, lambda window: F.row_number().over(window.orderBy("time", "item")) - 1)
    before = {"earlier": strictly_before(one), "user_likes": strictly_before(F.col("label"))}
    frame = running(events, "user", {"order": order, **before})
    sample_id = F.shiftleft(F.col("user").cast("bigint"), 32).bitwiseOR(F.col("order"))
    return frame.withColumn("sample_id", sample_id)


def rows_per_part(rows: int) -> int:
    """Rows of an event part: a 64th of a large log, so that tasks are neither many nor long."""
    return min(max(-(-rows // 64), 50_000), 1_000_000)


def parted(events: DataFrame, rows: int, order: Column) -> DataFrame:
    """Add ``part``: the log in order of user and order, cut every ``rows_per_part`` rows, whoever they belong to.

    A row's place is the number of events of the users before its own, plus its ``order`` among its user's events here;
    nothing has to be sorted for it.
    """
    offsets = _offsets(events.groupBy("user").count())
    placed = events.join(joinable(offsets.frame, offsets.rows), "user")
    part = F.floor((F.col("_offset") + order) / rows_per_part(rows)).cast("int")
    return placed.withColumn("part", part).drop("_offset")


def _offsets(counts: DataFrame) -> Ranked:
    """For each user the events of all users before it, as the column ``_offset``."""
    grouped = settle(counts.withColumn("_group", F.floor(F.col("user") / USERS_PER_GROUP).cast("int")))
    totals = grouped.groupBy("_group").agg(F.sum("count").alias("events"), F.count("*").alias("users"))
    found = {row["_group"]: row for row in totals.collect()}
    base, before = {}, 0
    for group in sorted(found):
        base[group], before = before, before + found[group]["events"]
    window = Window.partitionBy("_group").orderBy("user").rowsBetween(Window.unboundedPreceding, -1)
    start = F.element_at(F.create_map(*[F.lit(value) for pair in base.items() for value in pair]), F.col("_group"))
    offset = (start + F.coalesce(F.sum("count").over(window), F.lit(0))).cast("bigint")
    return Ranked(grouped.select("user", offset.alias("_offset")), sum(row["users"] for row in found.values()))
