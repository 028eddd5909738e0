"""The one way into the sources: a configuration to a raw log."""

from pyspark.sql import SparkSession

from reclora_dist.config.schema import SourceConfig
from reclora_dist.contract.storage import Folder
from spark_jobs.sources.columns import columns
from spark_jobs.sources.goodreads import goodreads
from spark_jobs.sources.layout import tables
from spark_jobs.sources.movielens import movielens_1m, movielens_25m, movielens_100k
from spark_jobs.sources.raw import RawLog


def open_log(spark: SparkSession, source: SourceConfig, folder: Folder) -> RawLog:
    """Open the raw log in ``folder``.

    Raises:
        ValueError: a file or column is missing, or a column has a type that cannot be used.
    """
    names = tables(source, folder)
    if source.kind == "goodreads":
        return goodreads(spark, folder, names)
    if source.kind == "columns":
        return columns(spark, folder, source)
    published = {"movielens_1m": movielens_1m, "movielens_100k": movielens_100k, "movielens_25m": movielens_25m}
    return published[source.kind](spark, folder)
