"""Positions of users and items that go on from the days before, and counts that start where those ended."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from reclora_dist.contract import schema
from reclora_dist.contract.runs import Run, find, take
from spark_jobs.days import Before
from spark_jobs.parts import read_parts
from spark_jobs.transforms.positions import positions
from spark_jobs.transforms.settle import joinable, settle

BASE = "user_base_events"
"""Column of events: the place at which their user's log goes on, 0 without days before."""

_FOUND = "user_id string, user int, user_base_events int, user_base_likes int, known array<int>"


@dataclass(frozen=True)
class Vocabulary:
    """Ids and positions of what this build's events name, and how many positions there are in all.

    ``frame`` has the id and the position; with days before also ``{key}_base_events`` and ``{key}_base_likes``, what
    happened to the key until then, and for users ``known``, their fields (null if new). ``most`` is the number of this
    build's events of the key that has most of them.
    """

    frame: DataFrame
    rows: int
    total: int
    most: int
    first_new: int = 1

    def fresh(self) -> DataFrame:
        """Id and position of those that the days before did not know."""
        key, position = self.frame.columns[:2]
        return self.frame.where(F.col(position) >= self.first_new).select(key, position)


def numbered(events: DataFrame, before: Before | None) -> tuple[Vocabulary, Vocabulary]:
    """The users and the items of some events: old ones keep their position, new ones follow by time, then id."""
    if before is None:
        first = positions(events, "user_id", "user"), positions(events, "item_id", "item")
        users, items = (_vocabulary(found.frame, found.rows) for found in first)
        return users, items
    seen = events.select("user_id").distinct()
    known = _looked_up(seen, before)
    columns = pa.schema([schema.items(0).field(name) for name in ("item", "item_id", "events", "likes")])
    old = read_parts(events.sparkSession, before.folder, before.manifest.select("items/"), columns)
    counts = F.col("events").alias("item_base_events"), F.col("likes").alias("item_base_likes")
    there = old.select("item_id", "item", *counts)
    return _joined(events, known, "user", before), _joined(events, there, "item", before)


def _vocabulary(frame: DataFrame, total: int, first_new: int = 1) -> Vocabulary:
    """Of a settled frame with the number of each key's events."""
    rows, most = frame.agg(F.count("*"), F.max("events")).first() or (0, 0)
    return Vocabulary(frame.drop("events"), rows, total, most or 0, first_new)


def _joined(events: DataFrame, old: DataFrame, key: str, before: Before) -> Vocabulary:
    """The old ones among the events' keys, and the new ones behind all that were there before."""
    name, count = f"{key}_id", before.facts[f"{key}s"]
    seen = settle(old.join(events.groupBy(name).agg(F.count("*").alias("events")), name))
    fresh = positions(events.join(seen.select(name), name, "left_anti"), name, key)
    added = fresh.frame.withColumn(key, (F.col(key) + count).cast("int"))
    for column in seen.columns[2:-1]:
        kind = seen.schema[column].dataType
        added = added.withColumn(column, F.lit(None).cast(kind) if column == "known" else F.lit(0).cast(kind))
    return _vocabulary(settle(seen.unionByName(added)), count + fresh.rows, count + 1)


def _looked_up(users: DataFrame, before: Before) -> DataFrame:
    """Users that the days before know, in the columns of _FOUND."""
    vocabulary, state = before.runs["vocabulary"], before.runs["state"]

    def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield from _known(batch["key"].to_numpy(), batch["user_id"], vocabulary, state).to_batches()

    if not vocabulary:
        return users.sparkSession.createDataFrame([], _FOUND)
    return settle(users.withColumn("key", F.xxhash64("user_id")).mapInArrow(look, _FOUND))


def _known(keys: np.ndarray, ids: pa.Array, vocabulary: Sequence[Run], state: Sequence[Run]) -> pa.Table:
    _, names = take(vocabulary, find(vocabulary, keys, ids, "user_id"))
    names = names.sort_by("user")
    numbers = names["user"].to_numpy()
    found = find(state, numbers)
    place, rows = take(state, found)
    back = pa.array(np.argsort(place))
    rows = rows.select(["events", "likes", "fields"]).take(back)
    columns = [names["user_id"], names["user"].cast(pa.int32()), rows["events"].cast(pa.int32())]
    return pa.table([*columns, rows["likes"].cast(pa.int32()), rows["fields"]], names=_NAMES)


_NAMES = [column.strip().split(" ")[0] for column in _FOUND.split(",")]


def continued(events: DataFrame, users: Vocabulary, items: Vocabulary) -> DataFrame:
    """Events whose places and counts go on from the days before; those within this build alone is what they had.

    Adds BASE.
    """
    for key, known in (("user", users), ("item", items)):
        base = known.frame.select(key, f"{key}_base_events", f"{key}_base_likes")
        events = events.join(joinable(base, known.rows), key)
    sums = {
        name: (F.col(name) + F.col(f"{key}_base_{what}")).cast("int")
        for name, key, what in ((n, *n.split("_")) for n in schema.STATISTICS)
    }
    before = F.col("user_base_events").cast("bigint")
    events = events.withColumns({**sums, "order": F.col("order") + before, "earlier": F.col("earlier") + before})
    sample_id = F.shiftleft(F.col("user").cast("bigint"), 32).bitwiseOR(F.col("order"))
    return events.withColumn("sample_id", sample_id).drop("item_base_events", "item_base_likes", "user_base_likes")
