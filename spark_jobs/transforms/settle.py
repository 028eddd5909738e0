"""Frames that are used again: computed once, with a short plan, and joined the cheap way where they are small."""

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.session import is_local

SMALL = 1_000_000
"""Rows of a table of ids that every executor can hold: about 100 MB."""


def settle(frame: DataFrame) -> DataFrame:
    """Compute a frame and keep its rows for what follows.

    On a local master the plan is cut off as well (nothing can be lost there, and planning long plans again for every
    step costs more than the steps); on a cluster the plan stays, so that a lost executor's rows can be computed again.
    """
    if is_local(frame.sparkSession):
        return frame.localCheckpoint(eager=True, storageLevel=StorageLevel.MEMORY_AND_DISK)
    kept = frame.persist(StorageLevel.MEMORY_AND_DISK)
    kept.count()
    return kept


def joinable(frame: DataFrame, rows: int) -> DataFrame:
    """The frame, marked for a broadcast join if it has few rows."""
    return F.broadcast(frame) if rows <= SMALL else frame
