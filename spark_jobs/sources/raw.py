"""A raw log as Spark frames in the same columns, whatever its layout; nothing is dropped or judged here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from reclora_dist.contract.storage import Folder

CORRUPT = "_corrupt"
"""Column with the text of a record that could not be parsed."""

PLACE = "_place"
"""Column with a row's place in the log: file, block, row; it orders rows as their files do."""


@dataclass(frozen=True)
class RawLog:
    """A log: ``events`` (user_id, item_id: text; rating, time: text or as they are stored; time_ms: bigint; fault: text
    or null), ``items`` (item_id, title and fields) and ``users`` (user_id and fields) if there are such tables; all
    with CORRUPT and PLACE. Of a ``private`` log no row may be quoted whose columns cannot be trusted: a user's id may
    be anywhere in it.
    """

    events: DataFrame
    items: DataFrame | None
    users: DataFrame | None
    item_fields: tuple[str, ...] = ()
    user_fields: tuple[str, ...] = ()
    clock: bool = True
    private: bool = False


def spark_path(folder: Folder, name: str = "") -> str:
    """The URI under which Spark opens ``name``."""
    protocol = folder.fs.protocol if isinstance(folder.fs.protocol, str) else folder.fs.protocol[0]
    path = folder.path(name)
    if protocol in ("file", "local"):
        return f"file://{path}"
    if "://" in path:
        return path
    return f"{ {'s3': 's3a'}.get(protocol, protocol) }://{path.lstrip('/')}"


def delimited(
    spark: SparkSession, paths: Sequence[str], columns: Sequence[str], options: Mapping[str, str | bool]
) -> DataFrame:
    """Read delimited text as text columns, with CORRUPT and PLACE; a row of another width is corrupt."""
    schema = T.StructType([T.StructField(name, T.StringType()) for name in [*columns, CORRUPT]])
    reader = spark.read.schema(schema).option("columnNameOfCorruptRecord", CORRUPT).option("columnPruning", False)
    return placed(reader.options(**options).csv(list(paths)))


def placed(frame: DataFrame) -> DataFrame:
    """Add PLACE to a frame that reads files (and CORRUPT, all null, where the reader had none)."""
    metadata = F.col("_metadata")
    place = F.struct(
        metadata["file_path"].alias("file"),
        metadata["file_block_start"].alias("block"),
        F.monotonically_increasing_id().alias("row"),
    )
    return with_corrupt(frame.withColumn(PLACE, place))


def with_corrupt(frame: DataFrame) -> DataFrame:
    """Add the column CORRUPT, all null, where there is none."""
    return frame if CORRUPT in frame.columns else frame.withColumn(CORRUPT, F.lit(None).cast("string"))


def text(name: str) -> Column:
    """A column as trimmed text; null if it is empty."""
    return F.nullif(F.trim(F.col(f"`{name}`").cast("string")), F.lit(""))


def _stored(frame: DataFrame, name: str) -> Column:
    """A column as it is stored; text is trimmed."""
    return text(name) if isinstance(frame.schema[name].dataType, T.StringType) else F.col(f"`{name}`")


def milliseconds(name: str, kind: T.DataType, unit: str) -> Column:
    """An event time in milliseconds since the epoch, from a number in ``unit``, a timestamp, or text; else null."""
    column = F.col(f"`{name}`")
    if isinstance(kind, T.TimestampType | T.TimestampNTZType | T.DateType):
        return F.unix_millis(column.cast("timestamp"))
    factor = 1000 if unit == "s" else 1
    if isinstance(kind, T.IntegralType):
        return F.try_multiply(column.cast("bigint"), F.lit(factor))
    number = F.round(column.try_cast("double") * factor).try_cast("bigint")
    if not isinstance(kind, T.StringType):
        return number
    return F.coalesce(number, F.unix_millis(column.try_cast("timestamp")))


def events_of(
    frame: DataFrame, user: str, item: str, rating: str, time: str, unit: str = "s", fault: Column | None = None
) -> DataFrame:
    """The events of a frame in the columns of ``RawLog.events``; an empty ``time`` means there is no clock."""
    nothing = F.lit(None).cast("string")
    moment = milliseconds(time, frame.schema[time].dataType, unit) if time else F.lit(None).cast("bigint")
    return frame.select(
        text(user).alias("user_id"),
        text(item).alias("item_id"),
        _stored(frame, rating).alias("rating"),
        (_stored(frame, time) if time else nothing).alias("time"),
        moment.alias("time_ms"),
        (nothing if fault is None else fault).alias("fault"),
        CORRUPT,
        PLACE,
    )


def table_of(frame: DataFrame, names: Mapping[str, str | Column]) -> DataFrame:
    """Columns of an item or user table under their new names, as text."""
    columns = [(text(old) if isinstance(old, str) else old).alias(new) for new, old in names.items()]
    return frame.select(*columns, CORRUPT, PLACE)


def decoded(name: str, words: Mapping[str, str]) -> Column:
    """A column of codes as words; a code that is not listed stays as it is."""
    table = F.create_map(*[F.lit(word) for pair in words.items() for word in pair])
    return F.coalesce(F.element_at(table, text(name)), text(name))
