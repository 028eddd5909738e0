"""Users left out of a raw log, and ids hashed, before anything else looks at it.

Key and ids travel to executors inside a Python function: as literals or rows they would stand in Spark's plans, which
its web page and its event log show.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession

from spark_jobs.privacy import Privacy, hashed
from spark_jobs.quality import DELETED
from spark_jobs.sources.raw import CORRUPT, RawLog

_TOLD = ("user_id", "item_id", "rating", "time", "time_ms", CORRUPT)
"""Columns of an event that are emptied if its user is to be left out."""


def private(log: RawLog, privacy: Privacy) -> RawLog:
    """The log without the rows of deleted users, and with hashed ids; of a deleted event the fault DELETED is left."""
    if not privacy.wanted:
        return log
    events = log.events.mapInArrow(partial(_events, privacy), log.events.schema)
    users = log.users.mapInArrow(partial(_users, privacy), log.users.schema) if log.users is not None else None
    return replace(log, events=events, users=users, private=True)


def deleted_ids(spark: SparkSession, privacy: Privacy) -> DataFrame:
    """The users on the delete list under the ids that a dataset has them under, as ``user_id``."""

    def ids(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        names = sorted(privacy.deleted or ())
        for _ in batches:
            yield pa.record_batch({"user_id": [hashed(privacy.key, name) if privacy.key else name for name in names]})

    return spark.range(0, 1, 1, 1).mapInArrow(ids, "user_id string")


def _events(privacy: Privacy, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    deleted = pa.array(sorted(privacy.deleted or ()), pa.string())
    for batch in batches:
        gone = pc.is_in(batch["user_id"], deleted)
        batch = _set(batch, "fault", pc.if_else(gone, DELETED, batch["fault"]))
        for name in _TOLD:
            batch = _set(batch, name, pc.if_else(gone, None, batch[name]))
        yield _hashed(batch, privacy.key)


def _users(privacy: Privacy, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    deleted = pa.array(sorted(privacy.deleted or ()), pa.string())
    for batch in batches:
        yield _hashed(batch.filter(pc.invert(pc.is_in(batch["user_id"], deleted))), privacy.key)


def _hashed(batch: pa.RecordBatch, key: bytes) -> pa.RecordBatch:
    if not key:
        return batch
    ids = batch["user_id"].dictionary_encode()
    names = pa.array([hashed(key, user) for user in ids.dictionary.to_pylist()], pa.string())
    return _set(batch, "user_id", names.take(ids.indices))


def _set(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return batch.set_column(batch.schema.get_field_index(name), batch.schema.field(name), column)
