"""A build counted: one pass over every file of its events and shards, then a few small aggregates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from reclora_dist.contract.manifest import FileEntry, Manifest
from reclora_dist.contract.parts import open_part
from reclora_dist.contract.schema import SPLITS
from reclora_dist.contract.storage import Folder
from spark_jobs.days import MS_PER_DAY
from spark_jobs.parts import each_part
from spark_jobs.report.periods import SLICES, Periods, slices, spans
from spark_jobs.transforms.settle import settle

TALLY = "kind string, key bigint, rows bigint, likes bigint"
"""Spark schema of a count: how many rows of a kind have a key, and how many of them are likes."""

MANY = ("user", "item", "day")
"""Kinds with so many keys that they stay in Spark."""

SHORT_BITS = 32
"""A key of the kind ``covered`` is the length of a short history, shifted by this, plus how much of it is covered."""

BATCH_ROWS = 20_000
"""Rows that a task holds at once."""

Numbers = NDArray[Any]


@dataclass(frozen=True)
class Count:
    """How many rows, and how many of them are likes."""

    rows: int
    likes: int


@dataclass(frozen=True)
class Part:
    """A file to count: the columns that are looked at, and how a batch of them is counted."""

    folder: Folder
    entry: FileEntry
    columns: tuple[str, ...]
    count: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Tally:
    """Everything that the report needs of the tables.

    ``counts`` is kind → key → count; ``activity`` is ``user`` and ``item`` → number of events → how many have as many;
    ``popular`` are the events of the most popular items by position, most popular first.
    """

    counts: Mapping[str, Mapping[int, Count]]
    activity: Mapping[str, Mapping[int, int]]
    periods: Periods
    popular: Mapping[int, int]


def tally(spark: SparkSession, parts: Sequence[Part], popular: int) -> Tally:
    """Count ``parts`` (see ``event_parts`` and ``shard_parts``) and keep the ``popular`` most popular items."""
    counted = each_part(spark, len(parts), partial(_count_part, list(parts)), TALLY)
    sums = [F.sum(name).alias(name) for name in ("rows", "likes")]
    found = settle(counted.groupBy("kind", "key").agg(*sums))
    counts = _few(found)
    activity = {kind: _activity(found, kind) for kind in ("user", "item")}
    return Tally(counts, activity, _periods(found, counts["slice"]), _popular(found, popular))


def event_parts(folder: Folder, events: Manifest) -> list[Part]:
    """The files of the event table."""
    count = partial(_count_events, events.facts["counts"]["clean"])
    columns = ("user", "item", "time", "level", "label")
    return [Part(folder, entry, columns, count) for entry in events.select("events/")]


def shard_parts(folder: Folder, shards: Manifest, days: Sequence[str]) -> list[Part]:
    """The files of the shards of both kinds and all splits; of shards by days only those of ``days``."""
    places = [f"day={day}/" for day in days] or [""]
    crm, text = ("label", "long_length"), ("label", "long_items", "short_items", "short_length")
    return [
        Part(folder, entry, columns, partial(count, split))
        for kind, columns, count in (("crm", crm, _count_crm), ("text", text, _count_text))
        for split in SPLITS
        for place in places
        for entry in shards.select(f"{kind}/split={split}/{place}")
    ]


def _count_part(parts: Sequence[Part], index: int) -> Iterator[pa.RecordBatch]:
    part = parts[index]
    for batch in open_part(part.folder, part.entry).iter_batches(BATCH_ROWS, columns=list(part.columns)):
        yield from part.count(batch)


def _count_events(clean: int, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    label, time = _numbers(batch, "label"), _numbers(batch, "time")
    for kind in ("user", "item", "level"):
        yield _counted(kind, _numbers(batch, kind), label)
    yield _counted("day", time // MS_PER_DAY, label)
    yield _counted("slice", slices(time, clean), label)


def _count_crm(split: str, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    label = _numbers(batch, "label")
    yield _counted(f"crm/{split}", np.zeros(len(label)), label)
    yield _counted("long", _numbers(batch, "long_length"), label)


def _count_text(split: str, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    label, length = _numbers(batch, "label"), _numbers(batch, "short_length")
    long, short = _lists(batch, "long_items"), _lists(batch, "short_items")
    yield _counted(f"text/{split}", np.zeros(len(label)), label)
    yield _counted("short", length, label)
    yield _counted("covered", (length.astype(np.int64) << SHORT_BITS) + _covered(long, short), label)
    yield _counted("distinct_long", _distinct(long), label)
    yield _counted("distinct_short", _distinct(short), label)


def _covered(long: Numbers, short: Numbers) -> Numbers:
    """How many of the items in ``short`` [n, S] the same row of ``long`` [n, L] holds; 0 is padding."""
    held = np.zeros(len(short), np.int64)
    for column in short.T:
        held += (column > 0) & (long == column[:, None]).any(axis=1)
    return held


def _distinct(lists: Numbers) -> Numbers:
    """How many different items each row of ``lists`` [n, L] has; 0 is padding."""
    ordered = np.sort(lists, axis=1)
    first = np.diff(ordered, axis=1, prepend=0) > 0
    found: Numbers = first.sum(axis=1)
    return found


def _numbers(batch: pa.RecordBatch, name: str) -> Numbers:
    column: Numbers = batch.column(name).to_numpy(zero_copy_only=False)
    return column


def _lists(batch: pa.RecordBatch, name: str) -> Numbers:
    column = batch.column(name)
    lists: Numbers = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return lists


def _counted(kind: str, keys: Numbers, labels: Numbers) -> pa.RecordBatch:
    """The distinct keys with their rows and likes, in the schema TALLY."""
    found, place, rows = np.unique(keys, return_inverse=True, return_counts=True)
    likes = np.bincount(place, weights=labels, minlength=len(found))
    columns = [pa.array(values.astype(np.int64)) for values in (found, rows, likes)]
    kinds = pa.array([kind] * len(found), pa.string())
    return pa.RecordBatch.from_arrays([kinds, *columns], ["kind", "key", "rows", "likes"])


def _few(found: DataFrame) -> dict[str, dict[int, Count]]:
    """The counts of every kind that has few keys, in order of the keys."""
    result: dict[str, dict[int, Count]] = {}
    for row in sorted(found.where(~F.col("kind").isin(*MANY)).collect()):
        result.setdefault(row["kind"], {})[row["key"]] = Count(row["rows"], row["likes"])
    return result


def _activity(found: DataFrame, kind: str) -> dict[int, int]:
    rows = found.where(F.col("kind") == kind).groupBy("rows").count().collect()
    return {row["rows"]: row["count"] for row in sorted(rows)}


def _popular(found: DataFrame, most: int) -> dict[int, int]:
    items = found.where(F.col("kind") == "item").orderBy(F.desc("rows"), "key").limit(most)
    return {row["key"]: row["rows"] for row in items.collect()}


def _periods(found: DataFrame, sliced: Mapping[int, Count]) -> Periods:
    """Events and likes over time: days or longer, or slices of a log whose times are places."""
    if set(sliced) <= set(range(SLICES)):
        return Periods("slice", 0, 1, {key: (count.rows, count.likes) for key, count in sliced.items()})
    days = found.where(F.col("kind") == "day")
    first, last = days.agg(F.min("key"), F.max("key")).collect()[0]
    unit, origin, width = spans(first, last)
    place = F.floor((F.col("key") - origin) / width).alias("place")
    rows = days.groupBy(place).agg(F.sum("rows").alias("rows"), F.sum("likes").alias("likes")).collect()
    return Periods(unit, origin, width, {row["place"]: (row["rows"], row["likes"]) for row in sorted(rows)})
