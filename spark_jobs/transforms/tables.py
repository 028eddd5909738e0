"""The tables of users and items: ids, what the log says of them, and where the values of their fields stand."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from reclora_dist.contract import schema
from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.storage import Folder
from spark_jobs.days import Before
from spark_jobs.parts import ROWS_PER_PART, read_parts, write_parts
from spark_jobs.transforms.fields import categories, with_fields
from spark_jobs.transforms.ranks import with_rank
from spark_jobs.transforms.settle import settle
from spark_jobs.transforms.vocabulary import Vocabulary

_COUNTS = ("train_events", "events", "likes")


@dataclass(frozen=True)
class Table:
    """Rows, and per field the values in order of their positions."""

    frame: DataFrame
    values: dict[str, list[str]]


def user_table(
    users: Vocabulary, profiles: DataFrame | None, fields: Sequence[str], by_days: bool, before: Before | None
) -> Table:
    """The users of a build's events; those of the days before keep the fields they had then."""
    frame = _profiled(users.frame, profiles, "user", fields)
    new = frame.where(F.col("known").isNull()) if before else frame
    values = categories(new, fields, "user" if by_days else "", before.facts["user_fields"] if before else None)
    coded = with_fields(frame, values)
    return Table(coded.withColumn("fields", F.coalesce("known", "fields")) if before else coded, values)


def item_table(
    items: Vocabulary,
    profiles: DataFrame | None,
    fields: Sequence[str],
    text: Column,
    by_days: bool,
    before: Before | None,
) -> Table:
    """All items so far; those of the days before are what they were then, but for the counts of their events."""
    new = items.frame.select("item_id", "item")
    new = new.where(F.col("item") > before.facts["items"]) if before else new
    frame = _profiled(new, profiles, "item", ("title", *fields))
    frame = frame.withColumn("title", F.coalesce("title", "item_id")).withColumn("text", text)
    values = categories(frame, fields, "item" if by_days else "", before.facts["item_fields"] if before else None)
    columns = schema.items(len(fields))
    coded = with_fields(frame, values).withColumns({name: F.lit(0).cast("bigint") for name in _COUNTS})
    coded = coded.select(*columns.names)
    if before:
        old = read_parts(coded.sparkSession, before.folder, before.manifest.select("items/"), columns)
        coded = old.unionByName(coded)
    return Table(coded, values)


def write_users(users: Table, out: Folder, dense: bool) -> tuple[list[FileEntry], list[int]]:
    """Write the user table; its files, and the first user of each.

    Args:
        dense: whether the table has every user from 1 on.
    """
    frame, place = users.frame, F.col("user") - 1
    if not dense:
        frame, place = with_rank(frame, ["user"], "_rank").frame, F.col("_rank")
    part = F.floor(place / ROWS_PER_PART).cast("int")
    files = write_parts(frame.withColumn("part", part), out, "users/", schema.users(len(users.values)), ["user"])
    if dense:
        return files, list(range(1, 1 + ROWS_PER_PART * len(files), ROWS_PER_PART))
    return files, [_first(out, entry) for entry in files]


def _first(out: Folder, entry: FileEntry) -> int:
    with out.open(entry.path) as file:
        return int(pq.ParquetFile(file).metadata.row_group(0).column(0).statistics.min)


def write_items(items: Table, events: DataFrame, out: Folder) -> list[FileEntry]:
    """Write the item table, with how often each item occurs, in all and in the training split, and was liked."""
    train = F.count_if(F.col("split") == schema.SPLITS[0])
    sums = dict(zip(_COUNTS, (train, F.count("*"), F.sum("label")), strict=True))
    seen = events.groupBy("item").agg(*[total.alias(f"_{name}") for name, total in sums.items()])
    added = {name: F.col(name) + F.coalesce(F.col(f"_{name}"), F.lit(0)) for name in _COUNTS}
    full = items.frame.join(seen, "item", "left").withColumns(added)
    part = F.floor((F.col("item") - 1) / ROWS_PER_PART).cast("int")
    return write_parts(full.withColumn("part", part), out, "items/", schema.items(len(items.values)), ["item"])


def _profiled(positions: DataFrame, profiles: DataFrame | None, kind: str, columns: Sequence[str]) -> DataFrame:
    """Positions with what the log's own table says of them; null where it has no such row."""
    if profiles is None:
        return positions.select("*", *[F.lit(None).cast("string").alias(name) for name in columns])
    return settle(positions.join(profiles.select(f"{kind}_id", *columns), f"{kind}_id", "left"))
