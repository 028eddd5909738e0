"""Running sums over slices of time are those over the whole log."""

import random

import pytest
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.transforms.positions import ordered
from spark_jobs.transforms.running import sliced, unsliced
from spark_jobs.transforms.statistics import with_statistics


def sums(events: DataFrame, per_user: bool) -> list:
    whole = unsliced(with_statistics(ordered(events), per_user))
    return whole.select(sorted(whole.columns)).orderBy("sample_id").collect()


@pytest.mark.parametrize("per_user", [False, True])
def test_a_log_cut_into_slices_counts_as_a_whole_one(spark, per_user: bool) -> None:
    rng = random.Random(0)
    rows = sorted({(rng.randrange(4), rng.randrange(30), rng.randrange(40)) for _ in range(300)})
    events = spark.createDataFrame(
        [(*row, rng.randrange(2)) for row in rows], "user int, item int, time bigint, label int"
    )
    events = events.withColumn("split", F.when(F.col("time") < 25, "train").otherwise("test")).cache()

    def counted(rows_per_slice: int) -> list:
        return sums(sliced(events, len(rows), rows_per_slice), per_user)

    assert counted(17) == counted(1000)


def test_a_few_odd_times_do_not_bring_the_others_together(spark) -> None:
    rng = random.Random(0)
    times = [0, 10**15, *range(10**9, 10**9 + 400)]
    events = spark.createDataFrame(
        [(rng.randrange(4), 1, time, rng.randrange(2)) for time in times], "user int, item int, time bigint, label int"
    )
    events = events.withColumn("split", F.lit("train")).cache()
    cut = sliced(events, len(times), 20)
    assert max(row["count"] for row in cut.groupBy("_slice").count().collect()) <= 2 * 20
    assert sums(cut, per_user=True) == sums(events, per_user=True)
