"""The same shards by idiomatic Spark: each user's events collected as a list of structs, a pandas function per user.

python benchmarks/rivals/idiomatic_spark.py RAW VECTORS OUT
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from common import LIKE, of_user
from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

SCHEMA = (
    "sample_id bigint, user int, item int, time bigint, label byte, statistics array<float>, long_items array<int>, "
    "long_levels array<byte>, long_length int"
)
COUNTS = ("item_events", "item_likes", "user_events", "user_likes")


def main(raw: str, vectors: str, out: str) -> None:
    """Raw events to CRM shards."""
    spark = SparkSession.builder.master("local[*]").config("spark.driver.memory", "6g").getOrCreate()
    spark.sparkContext.addPyFile(str(Path(__file__).with_name("common.py")))
    events = spark.read.parquet(f"{raw}/events").withColumn("time", F.col("timestamp") * 1000)
    for key, name in (("user_id", "user"), ("item_id", "item")):
        first = events.groupBy(key).agg(F.min("time").alias("first"))
        place = F.row_number().over(Window.orderBy("first", key)).alias(name)
        events = events.join(first.select(key, place), key)
    label = (F.col("rating") >= LIKE).cast("byte")
    events = events.select("user", "item", "time", F.col("rating").cast("byte").alias("level"), label.alias("label"))
    for key in ("item", "user"):
        before = Window.partitionBy(key).orderBy("time").rangeBetween(Window.unboundedPreceding, -1)
        events = events.withColumn(f"{key}_events", F.count("*").over(before))
        events = events.withColumn(f"{key}_likes", F.coalesce(F.sum("label").over(before), F.lit(0)))
    table = spark.sparkContext.broadcast(np.load(vectors))
    packed = F.sort_array(F.collect_list(F.struct("time", "item", "level", "label", *COUNTS))).alias("log")
    users = events.groupBy("user").agg(packed)

    def retrieve(group: pd.DataFrame) -> pd.DataFrame:
        row = group.iloc[0]
        log = pd.DataFrame([event.asDict() if hasattr(event, "asDict") else event for event in row["log"]])
        columns = {name: log[name].to_numpy() for name in log.columns}
        columns["user"] = np.full(len(log), row["user"], np.int32)
        found = of_user(columns, table.value).to_pandas()
        return found.astype({"time": np.int64})

    users.groupBy("user").applyInPandas(retrieve, SCHEMA).write.mode("overwrite").option("compression", "zstd").parquet(
        out
    )
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
