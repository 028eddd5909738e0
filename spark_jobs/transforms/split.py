"""Training, validation and test: two moments for the whole log, given or found, or two places in each user's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from reclora_dist.config.schema import EventsConfig
from reclora_dist.contract.schema import SPLITS
from spark_jobs.days import midnight
from spark_jobs.transforms.ranks import values_at


@dataclass(frozen=True)
class Split:
    """Events with their column ``split``, and the two moments of a global cut (none under ``per_user``)."""

    events: DataFrame
    times: tuple[int, ...]


def is_sample(min_history: int) -> Column:
    """Whether an event has enough events strictly before it."""
    return F.col("earlier") >= min_history


def split(events: DataFrame, config: EventsConfig) -> Split:
    """Add the column ``split``.

    Args:
        events: with user, time, order and ``earlier`` (events of the user strictly before).
        config: ``fractions`` are shares of the samples (see ``check_fractions``), for ``dates`` of no use.

    Raises:
        ValueError: there is no sample to split.
    """
    if config.split == "per_user":
        return Split(_per_user(events, config), ())
    if config.split == "dates":
        first, second = (midnight(day) for day in config.cut_dates)
    else:
        samples = events.where(is_sample(config.min_history))
        first, second = values_at(samples, "time", lambda count: _moments(count, config))
    column = F.when(F.col("time") < first, SPLITS[0]).when(F.col("time") < second, SPLITS[1]).otherwise(SPLITS[2])
    return Split(events.withColumn("split", column), (first, second))


def _moments(count: int, config: EventsConfig) -> list[int]:
    """Places of the first validation and the first test sample among ``count`` samples in order of time."""
    if count == 0:
        raise ValueError(
            f"no event has min_history = {config.min_history} earlier ones of its user: there is no sample. "
            "Lower min_history or k_core, or use a longer log."
        )
    shares = (config.fractions[0], config.fractions[0] + config.fractions[1])
    return [min(math.floor(count * share + 1e-9), count - 1) for share in shares]


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse shares that are negative or do not add up to 1.

    Raises:
        ValueError: as said.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise ValueError(
            f"fractions = {list(fractions)}: training (above 0), validation and test shares must add up to 1"
        )


def _per_user(events: DataFrame, config: EventsConfig) -> DataFrame:
    """The r-th of a user's n samples is for training if r < n * share, and so on; what comes before them, too."""
    user = Window.partitionBy("user")
    sample = is_sample(config.min_history).cast("int")
    rank = F.sum(sample).over(user.orderBy("order").rowsBetween(Window.unboundedPreceding, Window.currentRow)) - 1
    total = F.sum(sample).over(user)
    train, validation = config.fractions[0], config.fractions[0] + config.fractions[1]
    column = (
        F.when(F.col("_rank") < F.col("_total") * train - 1e-9, SPLITS[0])
        .when(F.col("_rank") < F.col("_total") * validation - 1e-9, SPLITS[1])
        .otherwise(SPLITS[2])
    )
    column = F.when(F.col("_rank") < 0, SPLITS[0]).otherwise(column)
    return events.withColumns({"_rank": rank, "_total": total}).withColumn("split", column).drop("_rank", "_total")
