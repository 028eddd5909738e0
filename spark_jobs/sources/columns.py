"""Any CSV, JSON-lines or Parquet log, by a mapping of its columns."""

from collections.abc import Sequence

import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from reclora_dist.config.schema import SourceConfig
from reclora_dist.contract.manifest import MANIFEST, read_manifest
from reclora_dist.contract.schema import RAW
from reclora_dist.contract.storage import Folder
from spark_jobs.parts import read_parts
from spark_jobs.sources.raw import (
    CORRUPT,
    PLACE,
    RawLog,
    delimited,
    events_of,
    placed,
    spark_path,
    table_of,
    with_corrupt,
)
from spark_jobs.sources.uniform import check_uniform

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
    frame = _table(spark, folder, source, source.events, list(needed.values()))
    for key, name in needed.items():
        _check(frame, folder, source.events, key, name, kinds[key])
    if isinstance(frame.schema[source.rating].dataType, T.BooleanType):
        frame = frame.withColumn(source.rating, F.col(f"`{source.rating}`").cast("int"))
    events = events_of(frame, source.user, source.item, source.rating, source.time, source.time_unit)
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


def _table(spark: SparkSession, folder: Folder, source: SourceConfig, name: str, used: Sequence[str]) -> DataFrame:
    if folder.exists(MANIFEST):
        return _own(spark, folder, name)
    path = spark_path(folder, name)
    if source.format == "parquet":
        check_uniform(spark, folder, name, used)
        return placed(spark.read.parquet(path))
    if source.format == "json":
        reader = spark.read.option("primitivesAsString", True).option("columnNameOfCorruptRecord", CORRUPT)
        return placed(reader.json(path))
    header = spark.read.option("header", True).option("escape", '"').csv(path).columns
    return delimited(spark, [path], header, {"header": True, "quote": '"', "escape": '"', "enforceSchema": False})


def _own(spark: SparkSession, folder: Folder, name: str) -> DataFrame:
    """A table of a dataset of ours (``synthesise`` writes one): its parts are named and proved by a manifest."""
    entries = read_manifest(folder, RAW).select(f"{name}/")
    if not entries:
        raise ValueError(f"{folder.uri!r} has no table {name!r} in its {MANIFEST}; set source.events, items and users")
    with folder.open(entries[0].path) as file:
        schema = pq.read_schema(file)
    # Parts are read one per partition, in path order, so the row number alone orders them.
    place = F.struct(F.lit("").alias("file"), F.lit(0).alias("block"), F.monotonically_increasing_id().alias("row"))
    return with_corrupt(read_parts(spark, folder, entries, schema).withColumn(PLACE, place))


def _check(
    frame: DataFrame, folder: Folder, table: str, key: str, name: str, kinds: Sequence[type[T.DataType]]
) -> None:
    there = [column for column in frame.columns if column not in (CORRUPT, PLACE)]
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
