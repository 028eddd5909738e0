"""Running sums over slices of time are those over the whole log."""

import random

import pytest
from pyspark.sql import functions as F

from spark_jobs.transforms.positions import ordered
from spark_jobs.transforms.running import sliced, unsliced
from spark_jobs.transforms.statistics import with_statistics


@pytest.mark.parametrize("per_user", [False, True])
def test_a_log_cut_into_slices_counts_as_a_whole_one(spark, per_user: bool) -> None:
    rng = random.Random(0)
    rows = sorted({(rng.randrange(4), rng.randrange(30), rng.randrange(40)) for _ in range(300)})
    events = spark.createDataFrame(
        [(*row, rng.randrange(2)) for row in rows], "user int, item int, time bigint, label int"
    )
    events = events.withColumn("split", F.when(F.col("time") < 25, "train").otherwise("test")).cache()

    def counted(rows_per_slice: int) -> list:
        cut = ordered(sliced(events, len(rows), rows_per_slice))
        whole = unsliced(with_statistics(cut, per_user))
        return whole.select(sorted(whole.columns)).orderBy("sample_id").collect()

    assert counted(17) == counted(1000)
