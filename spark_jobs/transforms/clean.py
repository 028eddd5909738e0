"""Rows of a raw log judged: each gets the reason why it is bad, or none."""

from collections.abc import Sequence

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from spark_jobs import quality
from spark_jobs.sources.raw import CORRUPT, PLACE, RawLog
from spark_jobs.transforms.settle import joinable, settle

REASON = "reason"
ROW = "row"
"""Column with a bad row as JSON."""


def judged_events(log: RawLog, items: DataFrame | None, levels: Sequence[float]) -> DataFrame:
    """Every event row: user_id, item_id, rating (float), time (bigint, null without a clock), PLACE, REASON, ROW.

    Args:
        log: the raw log.
        items: the good rows of its item table, if it has one.
        levels: the rating scale; empty: any number is a rating.
    """
    value = F.col("rating").try_cast("double")
    reason = _event_reason(value, levels, log.clock)
    frame = log.events.select("*", value.cast("float").alias("value"), reason.alias(REASON))
    if items is not None:
        known = items.select("item_id", F.lit(True).alias("known"))
        unknown = F.when(F.col("known").isNull(), F.lit(quality.UNKNOWN_ITEM))
        frame = frame.join(known, "item_id", "left").withColumn(REASON, F.coalesce(REASON, unknown))
    key = ["user_id", "item_id", "time_ms"] if log.clock else ["user_id", "item_id"]
    frame = _rare_repeats(frame, key, quality.DUPLICATE_EVENT)
    row = F.when(F.col(REASON).isNotNull(), _quoted(["user_id", "item_id", "rating", "time", CORRUPT], log.private))
    return frame.select(
        "user_id",
        "item_id",
        F.col("value").alias("rating"),
        F.col("time_ms").alias("time"),
        PLACE,
        REASON,
        row.alias(ROW),
    )


def judged_profiles(frame: DataFrame, key: str, private: bool) -> DataFrame:
    """Every row of an item or user table with its REASON and its ROW; see ``RawLog`` for ``private``."""
    missing, repeated = {
        "item_id": (quality.MISSING_ITEM_ID, quality.DUPLICATE_ITEM),
        "user_id": (quality.MISSING_USER_ID, quality.DUPLICATE_USER),
    }[key]
    reason = F.when(F.col(CORRUPT).isNotNull(), quality.MALFORMED_ROW).when(F.col(key).isNull(), missing)
    names = [name for name in frame.columns if name != PLACE]
    judged = _repeats(frame.withColumn(REASON, reason), [key], repeated)
    return judged.withColumn(ROW, _quoted(names, private))


def good(frame: DataFrame) -> DataFrame:
    """The rows without a REASON."""
    return frame.where(F.col(REASON).isNull()).drop(REASON, ROW, CORRUPT)


def bad(frame: DataFrame, table: str) -> DataFrame:
    """The rows with a REASON, in the columns of the quarantine table; what was deleted is in none."""
    return frame.where(F.col(REASON) != quality.DELETED).select(F.lit(table).alias("table"), REASON, ROW)


def counted(quarantine: DataFrame) -> DataFrame:
    """Equal rows of the quarantine as one, with their number: a million copies of an event take one row."""
    return quarantine.groupBy(*quarantine.columns).agg(F.count("*").alias("rows"))


def untitled(items: DataFrame) -> DataFrame:
    """Quarantine rows that warn of items without a title."""
    frame = items.where(F.col(REASON).isNull() & F.col("title").isNull())
    return frame.select(F.lit("items").alias("table"), F.lit(quality.ITEM_WITHOUT_TITLE).alias(REASON), ROW)


def _quoted(names: Sequence[str], private: bool) -> Column:
    """A row as JSON; in a private log only its file, unless it was read well enough to be compared with others."""
    whole = F.to_json(F.struct(*[F.col(name).cast("string").alias(name) for name in names]))
    if not private:
        return whole
    file = F.to_json(F.struct(F.substring_index(F.col(PLACE)["file"], "/", -1).alias("file")))
    return F.when(F.coalesce(F.col(REASON).isin(*quality.WELL_READ), F.lit(True)), whole).otherwise(file)


def _event_reason(value: Column, levels: Sequence[float], clock: bool) -> Column:
    strange = value.isNull() | F.isnan(value) | (F.abs(value) == float("inf"))
    reason = (
        F.when(F.col(CORRUPT).isNotNull(), F.lit(quality.MALFORMED_ROW))
        .when(F.col("fault").isNotNull(), F.col("fault"))
        .when(F.col("user_id").isNull(), quality.MISSING_USER_ID)
        .when(F.col("item_id").isNull(), quality.MISSING_ITEM_ID)
        .when(F.col("rating").isNull(), quality.MISSING_RATING)
        .when(strange, quality.UNPARSEABLE_RATING)
    )
    if levels:
        scale = [F.lit(level).cast("float") for level in levels]
        reason = reason.when(~value.cast("float").isin(scale), quality.RATING_NOT_IN_LEVELS)
    if clock:
        reason = reason.when(F.col("time").isNull(), quality.MISSING_TIME)
        reason = reason.when(F.col("time_ms").isNull(), quality.UNPARSEABLE_TIME)
    return reason


def _repeats(frame: DataFrame, key: Sequence[str], reason: str) -> DataFrame:
    """Give all but the first good row of each key the REASON ``reason``; first means first in file order."""
    fine = F.col(REASON).isNull()
    # Every bad row has a window of its own: all missing ids in one window would be one huge task.
    window = Window.partitionBy(*key, F.when(~fine, F.col(PLACE))).orderBy(PLACE)
    repeated = fine & (F.row_number().over(window) > 1)
    return frame.withColumn(REASON, F.when(repeated, F.lit(reason)).otherwise(F.col(REASON)))


def _rare_repeats(frame: DataFrame, key: Sequence[str], reason: str) -> DataFrame:
    """What ``_repeats`` gives, of a large frame with few repeats: only rows whose hashed key is there twice are sorted.

    The frame is settled on the way.
    """
    fine = F.col(REASON).isNull()
    frame = settle(frame.withColumn("_hash", F.when(fine, F.xxhash64(*key))))
    twice = settle(frame.where(fine).groupBy("_hash").count().where("count > 1").select("_hash"))
    suspects = joinable(twice, twice.count())
    once = frame.join(suspects, "_hash", "left_anti")
    judged = settle(_repeats(frame.join(suspects, "_hash", "left_semi"), key, reason))
    return once.unionByName(judged).drop("_hash")
