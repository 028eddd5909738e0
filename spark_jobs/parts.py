"""Parts of a dataset written and read by executors, so that no row passes through the driver."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.parts import open_part, write_part
from reclora_dist.contract.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql._typing import ColumnOrName

ROWS_PER_PART = 50_000
"""Rows of an event part, about: what one task holds in memory."""

ROWS_PER_GROUP = 20_000

ENTRY = "path string, row_groups array<bigint>, bytes bigint, sha256 string"
"""Spark schema of a file entry."""


def write_parts(
    frame: DataFrame, folder: Folder, prefix: str, schema: pa.Schema, order: Sequence["ColumnOrName"]
) -> list[FileEntry]:
    """Write ``frame`` as parts numbered by its int column ``part``, rows in ``order``; along it ``part`` never falls.

    Content and names depend on the rows alone, not on how Spark happens to partition them.
    """
    spread = frame.repartitionById(_partitions(frame.sparkSession), "part").sortWithinPartitions(*order)
    write = partial(_write, folder, prefix, schema)
    return collect_entries(spread.select("part", *schema.names).mapInArrow(write, ENTRY))


def part_of(key: str, rows: int, rows_per_part: int = ROWS_PER_PART) -> Column:
    """The part of a row, such that rows of the same ``key`` share one and parts have about ``rows_per_part`` rows."""
    return F.pmod(F.xxhash64(F.col(key)), F.lit(max(1, -(-rows // rows_per_part)))).cast("int")


def collect_entries(frame: DataFrame) -> list[FileEntry]:
    """The file entries that a frame of the schema ``ENTRY`` holds, in path order."""
    return entries_of(frame.collect())


def entries_of(rows: Iterable[Row]) -> list[FileEntry]:
    """The file entries of collected rows, in path order."""
    entries = [FileEntry(row.path, tuple(row.row_groups), row.bytes, row.sha256) for row in rows]
    return sorted(entries, key=lambda entry: entry.path)


def entry_batch(entries: Iterable[FileEntry]) -> pa.RecordBatch:
    """File entries as an Arrow batch of the schema ``ENTRY``."""
    entries = list(entries)
    return pa.record_batch(
        {
            "path": pa.array([e.path for e in entries], pa.string()),
            "row_groups": pa.array([list(e.row_groups) for e in entries], pa.list_(pa.int64())),
            "bytes": pa.array([e.bytes for e in entries], pa.int64()),
            "sha256": pa.array([e.sha256 for e in entries], pa.string()),
        }
    )


def each_part(
    spark: SparkSession, count: int, work: Callable[[int], Iterable[pa.RecordBatch]], schema: str
) -> DataFrame:
    """Run ``work(index)`` for every index below ``count``, each in a task of its own; its batches are the rows."""
    return spark.range(0, count, 1, max(count, 1)).mapInArrow(partial(_each, work), schema)


def read_parts(spark: SparkSession, folder: Folder, entries: Sequence[FileEntry], schema: pa.Schema) -> DataFrame:
    """The columns of ``schema`` of some parts, one partition per part, each file checked against its manifest entry."""
    plain = pa.schema([pa.field(field.name, _variable(field.type)) for field in schema])
    sql = from_arrow_schema(plain).simpleString().removeprefix("struct<").removesuffix(">")
    return each_part(spark, len(entries), partial(_read, folder, list(entries), plain), sql)


def _partitions(spark: SparkSession) -> int:
    return int(str(spark.conf.get("spark.sql.shuffle.partitions")))


def _variable(kind: pa.DataType) -> pa.DataType:
    """Spark has no lists of fixed length."""
    return pa.list_(kind.value_type) if pa.types.is_fixed_size_list(kind) else kind


def _spare_collector() -> None:
    """Leave what a Python worker has imported out of the garbage collection that Spark asks for after every task: it
    takes longer than a small task.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def _each(
    work: Callable[[int], Iterable[pa.RecordBatch]], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    _spare_collector()
    for batch in batches:
        for index in batch.column("id").to_pylist():
            yield from work(index)


def _read(folder: Folder, entries: list[FileEntry], schema: pa.Schema, index: int) -> Iterator[pa.RecordBatch]:
    for batch in open_part(folder, entries[index]).iter_batches(columns=schema.names):
        yield pa.RecordBatch.from_arrays(
            [batch.column(name).cast(schema.field(name).type) for name in schema.names], schema=schema
        )


def _write(
    folder: Folder, prefix: str, schema: pa.Schema, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    _spare_collector()
    for part, table in by_part(batches):
        whole = table.select(schema.names).cast(schema)
        yield entry_batch([write_part(folder, prefix, part, whole, ROWS_PER_GROUP)])


def by_part(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Group sorted batches by their column ``part``, holding one part at a time."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        parts = batch.column("part").to_numpy()
        cuts = [0, *((parts[1:] != parts[:-1]).nonzero()[0] + 1).tolist(), len(parts)]
        for start, stop in pairwise(cuts):
            if start == stop:
                continue
            if held and held[0].column("part")[0].as_py() != parts[start]:
                yield held[0].column("part")[0].as_py(), pa.Table.from_batches(held)
                held = []
            held.append(batch.slice(start, stop - start))
    if held:
        yield held[0].column("part")[0].as_py(), pa.Table.from_batches(held)
