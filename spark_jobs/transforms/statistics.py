"""Point-in-time counts: what was known of the item and the user strictly before an event."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from reclora_dist.contract.schema import SPLITS, STATISTICS
from spark_jobs.transforms.running import running, strictly_before


def with_statistics(events: DataFrame, per_user: bool) -> DataFrame:
    """Add the int columns of ``contract.schema.STATISTICS``.

    Args:
        events: sliced, with user, item, time (whole milliseconds), label and split, and what ``ordered`` added.
        per_user: the log was split per user; then only training events count, for another user's held-out labels may
            lie before a sample's time.
    """
    counted = F.when(F.col("split") == SPLITS[0], 1).otherwise(0) if per_user else F.lit(1)
    for key in ("item", "user") if per_user else ("item",):
        sums = {f"{key}_events": strictly_before(counted), f"{key}_likes": strictly_before(counted * F.col("label"))}
        events = running(events, key, sums)
    if not per_user:
        events = events.withColumn("user_events", F.col("earlier"))
    return events.withColumns({name: F.col(name).cast("int") for name in STATISTICS})
