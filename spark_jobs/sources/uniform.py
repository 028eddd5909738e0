"""Whether all files of a Parquet table are Parquet and agree on the columns that are read.

Spark takes the columns from one file and reads nulls where another lacks one of them.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F

from reclora_dist.contract.storage import Folder
from spark_jobs.parts import each_part

_FOUND = "name string, kind string, file string"
_MISSING = "missing"

NANOSECONDS = "timestamp[ns]"
"""Kind of a timestamp that Spark has no type for."""


def check_uniform(
    spark: SparkSession, folder: Folder, table: str, places: Sequence[str], columns: Sequence[str]
) -> dict[str, str]:
    """Read the footers of all files of ``table``, which lie in ``places``, on executors and compare the types of
    ``columns``.

    Returns:
        The kind of each column.

    Raises:
        ValueError: there is no file, or a column is missing in some files or has several types.
        PySparkException: a file is not Parquet; ``session.cause`` has the message.
    """
    files = [file for place in places for file in _files(folder, place)]
    tasks = min(len(files), 4 * spark.sparkContext.defaultParallelism)
    work = partial(_footers, folder, files, [name.lower() for name in columns], tasks)
    found = each_part(spark, tasks, work, _FOUND).groupBy("name", "kind").agg(F.min("file").alias("file")).collect()
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(found, key=lambda row: str(row["file"])):
        by_name[row["name"]].append(row)
    for name in columns:
        _check_column(folder, table, name, by_name[name.lower()])
    return {name: by_name[name.lower()][0]["kind"] for name in columns}


def _files(folder: Folder, place: str) -> list[str]:
    files = [file for file in folder.files(place) if _visible(file.removeprefix(place))]
    if not files:
        raise ValueError(f"{place!r} in {folder.uri!r} holds no file. Point source.path at the right folder.")
    return files


def _check_column(folder: Folder, table: str, name: str, found: Sequence[Row]) -> None:
    if len(found) > 1:
        kinds = ", ".join(f"{row['kind']} in {row['file']!r}" for row in found)
        raise ValueError(
            f"column {name!r} differs between the files of {table!r} in {folder.uri!r}: {kinds}. "
            "Write all files with the same columns, or take the odd ones out of the folder."
        )


def _visible(file: str) -> bool:
    """Whether Spark reads it: it leaves out names that start with a dot, or with an underscore but ``_key=value``."""
    return not any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in file.split("/"))


def _footers(
    folder: Folder, files: Sequence[str], columns: Sequence[str], tasks: int, task: int
) -> Iterator[pa.RecordBatch]:
    """The kind of every column in every ``tasks``-th file from ``task`` on."""
    for file in files[task::tasks]:
        there = _kinds(folder, file)
        kinds = [there.get(name, _MISSING) for name in columns]
        yield pa.record_batch({"name": list(columns), "kind": kinds, "file": [file] * len(kinds)})


def _kinds(folder: Folder, file: str) -> dict[str, str]:
    """The kind of every column of a file, by its name in lower case."""
    try:
        with folder.open(file) as opened:
            metadata = pq.read_metadata(opened)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file!r} in {folder.uri!r} cannot be read as Parquet ({reason}). Take it out of the folder, replace it, "
            "or set source.format."
        ) from error
    stored = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    old = {column.path.lower(): "timestamp" for column in stored if column.physical_type == "INT96"}
    return {field.name.lower(): _kind(field.type) for field in metadata.schema.to_arrow_schema()} | old


def _kind(kind: pa.DataType) -> str:
    """The name of a type; ways to store the same values that Spark reads as one type have one name."""
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    if pa.types.is_timestamp(kind):
        return NANOSECONDS if kind.unit == "ns" else "timestamp"
    return str(kind)
