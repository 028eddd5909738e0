"""Any CSV, JSON-lines or Parquet log, by a mapping of its columns."""

from collections.abc import Sequence

import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from reclora_dist.config.schema import SourceConfig
from reclora_dist.contract.manifest import MANIFEST, read_manifest
from reclora_dist.contract.schema import RAW
from reclora_dist.contract.storage import Folder
from spark_jobs.days import MS_PER_DAY
from spark_jobs.parts import read_parts
from spark_jobs.quality import LATE_EVENT
from spark_jobs.sources.layout import event_folders
from spark_jobs.sources.raw import (
    CORRUPT,
    PLACE,
    RawLog,
    delimited,
    events_of,
    milliseconds,
    placed,
    spark_path,
    table_of,
    with_corrupt,
)
from spark_jobs.sources.uniform import NANOSECONDS, check_uniform

DELIVERED = "_delivered"

_TEXT = (T.StringType, T.IntegralType, T.DecimalType)
_NUMBER = (T.StringType, T.NumericType, T.BooleanType)
_MOMENT = (T.StringType, T.NumericType, T.TimestampType, T.TimestampNTZType, T.DateType)
_WORD = (*_TEXT, T.NumericType, T.BooleanType)


def columns(spark: SparkSession, folder: Folder, source: SourceConfig) -> RawLog:
    """Read the tables that ``source`` names.

    Raises:
        ValueError: a column is missing, of a type that cannot hold what it should, or not the same in all files.
    """
    needed = {"source.user": source.user, "source.item": source.item, "source.rating": source.rating}
    kinds = {"source.user": _TEXT, "source.item": _TEXT, "source.rating": _NUMBER, "source.time": _MOMENT}
    if source.time:
        needed["source.time"] = source.time
    frame = _events(spark, folder, source, list(needed.values()))
    for key, name in needed.items():
        _check(frame, folder, source.events, key, name, kinds[key])
    frame = frame.withColumn(source.rating, _number(source.rating, frame.schema[source.rating].dataType))
    late = _late(frame, source) if any(source.days) else None
    events = events_of(frame, source.user, source.item, source.rating, source.time, source.time_unit, late)
    items = _profile(spark, folder, source, source.items, "item")
    users = _profile(spark, folder, source, source.users, "user")
    fields = source.item_fields if items is not None else (), source.user_fields if users is not None else ()
    return RawLog(events, items, users, *fields, clock=bool(source.time))


def _profile(spark: SparkSession, folder: Folder, source: SourceConfig, name: str, kind: str) -> DataFrame | None:
    """The item or user table: its id, for items the title, and its fields."""
    fields = source.item_fields if kind == "item" else source.user_fields
    if not name:
        if fields:
            raise ValueError(f"source.{kind}_fields = {list(fields)} needs a table of {kind}s: set source.{kind}s")
        return None
    id_column = source.item if kind == "item" else source.user
    wanted = {f"{kind}_id": id_column, **({"title": source.title} if kind == "item" else {}), **{f: f for f in fields}}
    frame = _table(spark, folder, source, name, list(wanted.values()))
    _check(frame, folder, name, f"source.{kind}", id_column, _TEXT)
    if kind == "item":
        _check(frame, folder, name, "source.title", source.title, _WORD)
    for field in fields:
        _check(frame, folder, name, f"source.{kind}_fields", field, _WORD)
    return table_of(frame, dict(wanted))


def _events(spark: SparkSession, folder: Folder, source: SourceConfig, used: Sequence[str]) -> DataFrame:
    """The events, under source.days with their folder's day as the column DELIVERED."""
    frame = _table(spark, folder, source, source.events, used, event_folders(source))
    if not any(source.days) or DELIVERED in frame.columns:
        return frame
    return frame.withColumn(DELIVERED, F.regexp_extract(F.col(PLACE)["file"], r"date=(\d{4}-\d\d-\d\d)", 1))


def _number(name: str, kind: T.DataType) -> Column:
    """A column with booleans, also such as are words in a text, as 1 and 0."""
    column = F.col(f"`{name}`")
    if isinstance(kind, T.BooleanType):
        return column.cast("int")
    if not isinstance(kind, T.StringType):
        return column
    word = F.lower(F.trim(column))
    return F.when(word == "true", "1").when(word == "false", "0").otherwise(column)


def _late(frame: DataFrame, source: SourceConfig) -> Column:
    """The fault of an event that did not happen on the day it came with (UTC)."""
    moment = milliseconds(source.time, frame.schema[source.time].dataType, source.time_unit)
    day = F.floor(moment / MS_PER_DAY)
    return F.when(day != F.unix_date(F.to_date(DELIVERED)), F.lit(LATE_EVENT))


def _table(
    spark: SparkSession, folder: Folder, source: SourceConfig, name: str, used: Sequence[str],
    places: Sequence[str] = (),
) -> DataFrame:  # fmt: skip
    """The table ``name``, or those of its sub-folders that ``places`` names."""
    places = places or [name]
    if folder.exists(MANIFEST):
        return _own(spark, folder, name, places)
    paths = [spark_path(folder, place) for place in places]
    if source.format == "parquet":
        kinds = check_uniform(spark, folder, name, places, used)
        nanoseconds = [column for column, kind in kinds.items() if kind == NANOSECONDS]
        return _in_microseconds(placed(spark.read.parquet(*paths)), nanoseconds)
    if source.format == "json":
        reader = spark.read.option("primitivesAsString", True).option("columnNameOfCorruptRecord", CORRUPT)
        return placed(reader.json(paths))
    header = spark.read.option("header", True).option("escape", '"').csv(paths[0]).columns
    return delimited(spark, paths, header, {"header": True, "quote": '"', "escape": '"', "enforceSchema": False})


def _in_microseconds(frame: DataFrame, names: Sequence[str]) -> DataFrame:
    """Columns that hold nanoseconds as numbers (see ``session.OURS``) as timestamps, cut to what Spark can hold."""
    for name in names:
        moment = F.col(f"`{name}`")
        whole = F.call_function("div", moment - F.pmod(moment, F.lit(1000)), F.lit(1000))
        frame = frame.withColumn(name, F.timestamp_micros(whole))
    return frame


def _own(spark: SparkSession, folder: Folder, name: str, places: Sequence[str]) -> DataFrame:
    """A table of a dataset of ours (``synthesise`` writes one): its parts are named and proved by a manifest."""
    manifest = read_manifest(folder, RAW)
    entries = [entry for place in places for entry in manifest.select(f"{place}/")]
    if not entries:
        raise ValueError(f"{folder.uri!r} has no table {name!r} in its {MANIFEST}; set source.events, items and users")
    with folder.open(entries[0].path) as file:
        schema = pq.read_schema(file)
    # Parts are read one per partition, in path order, so the row number alone orders them.
    place = F.struct(F.lit("").alias("file"), F.lit(0).alias("block"), F.monotonically_increasing_id().alias("row"))
    frame = with_corrupt(read_parts(spark, folder, entries, schema).withColumn(PLACE, place))
    if len(places) > 1 or places[0] != name:
        days = F.array(*[F.lit(entry.path.split("date=")[1].split("/")[0]) for entry in entries])
        frame = frame.withColumn(DELIVERED, F.element_at(days, F.spark_partition_id() + 1))
    return frame


def _check(
    frame: DataFrame, folder: Folder, table: str, key: str, name: str, kinds: Sequence[type[T.DataType]]
) -> None:
    there = [column for column in frame.columns if column not in (CORRUPT, PLACE, DELIVERED)]
    if name not in there:
        raise ValueError(
            f"{table!r} in {folder.uri!r} has no column {name!r}; there are: {', '.join(there)}. "
            f"Set {key} to one of them."
        )
    kind = frame.schema[name].dataType
    if not isinstance(kind, tuple(kinds)):
        raise ValueError(
            f"column {name!r} of {table!r} in {folder.uri!r} has type {kind.simpleString()}, which cannot serve "
            f"as {key}. Name another column, or convert it first."
        )
