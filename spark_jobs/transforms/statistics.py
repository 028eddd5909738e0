"""Point-in-time counts: what was known of the item and the user strictly before a sample's time."""

from pyspark.sql import DataFrame, Window, WindowSpec
from pyspark.sql import functions as F

from reclora_dist.contract.schema import SPLITS


def with_statistics(events: DataFrame, per_user: bool) -> DataFrame:
    """Add ``statistics`` (array<float>, in the order of ``contract.schema.STATISTICS``) and ``earlier``.

    Args:
        events: with user, item, time (whole milliseconds), label and split.
        per_user: the log was split per user; then only training events count, for another user's held-out labels may
            lie before a sample's time.
    """
    counted = F.when(F.col("split") == SPLITS[0], 1).otherwise(0) if per_user else F.lit(1)
    item, user = _before("item"), _before("user")
    names = []
    for key, window in (("item", item), ("user", user)):
        events = events.withColumns(
            {
                f"{key}_events": F.coalesce(F.sum(counted).over(window), F.lit(0)),
                f"{key}_likes": F.coalesce(F.sum(counted * F.col("label")).over(window), F.lit(0)),
            }
        )
        names += [f"{key}_events", f"{key}_likes"]
    return events.withColumns(
        {"earlier": F.count("*").over(user), "statistics": F.array(*[F.col(name).cast("float") for name in names])}
    ).drop(*names)


def _before(key: str) -> WindowSpec:
    """Everything of the same ``key`` with a smaller time; events at the same time do not see one another."""
    return Window.partitionBy(key).orderBy("time").rangeBetween(Window.unboundedPreceding, -1)
