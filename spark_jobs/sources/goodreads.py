"""GoodReads ratings as CSV files of (ID, Name, Rating): verbal ratings, titles as item ids, no time."""

from collections.abc import Sequence

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from reclora_dist.contract.storage import Folder
from spark_jobs.sources.raw import RawLog, decoded, delimited, events_of, spark_path, text

_STARS = {
    "did not like it": "1",
    "it was ok": "2",
    "liked it": "3",
    "really liked it": "4",
    "it was amazing": "5",
}
_NOBODY = "This user doesn't have any rating"

USER_WITHOUT_RATINGS = "user_without_ratings"
"""Fault of the row that stands for a user who rated nothing."""


def goodreads(spark: SparkSession, folder: Folder, names: Sequence[str]) -> RawLog:
    """The files ``names`` in path order; the order of rows is the order of events."""
    frame = delimited(
        spark,
        [spark_path(folder, name) for name in names],
        ["ID", "Name", "Rating"],
        {"header": True, "quote": '"', "escape": '"'},
    )
    nobody = F.when((text("Name") == "Rating") & (text("Rating") == _NOBODY), F.lit(USER_WITHOUT_RATINGS))
    stars = frame.withColumn("stars", decoded("Rating", _STARS))
    return RawLog(events_of(stars, "ID", "Name", "stars", "", fault=nobody), None, None, clock=False)
