"""petastorm 0.13.1 on current pyarrow.

petastorm calls Arrow interfaces that left pyarrow years ago. Its batch reader runs if its own modules get, in place of
``pyarrow.parquet``, the few classes below; pyarrow itself stays as it is. They report no ``_common_metadata``, because
petastorm would unpickle a schema found there. Its thread pool loses rows, so the pool that reads in the calling thread
is used (``readers`` runs it in a thread of its own and counts the rows).
"""

import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.parts import open_part
from reclora_dist.contract.storage import Folder
from reclora_dist.data.readers import check_file

_LOCK = threading.Lock()
_PATCHED = ("reader", "arrow_reader_worker", "py_dict_reader_worker", "etl.dataset_metadata")


class _Piece:
    """One file, or one row group of it (``pyarrow.parquet.ParquetDatasetPiece`` of old)."""

    def __init__(
        self,
        path: str,
        open_file_func: Callable[[str], IO[bytes]],
        row_group: int | None = None,
        partition_keys: Sequence[Any] = (),
    ) -> None:
        self.path = path
        self.row_group = row_group
        self.partition_keys = partition_keys
        self._open = open_file_func

    def get_metadata(self) -> SimpleNamespace:
        """Number of row groups, and the schema as petastorm can take it."""
        with self._open(self.path) as file:
            metadata = pq.read_metadata(file)
        schema = _variable(metadata.schema.to_arrow_schema())
        return SimpleNamespace(
            num_row_groups=metadata.num_row_groups, schema=SimpleNamespace(to_arrow_schema=lambda: schema)
        )

    def read(self, columns: Iterable[str], partitions: None = None) -> pa.Table:
        """The row group's columns, lists of variable size."""
        with self._open(self.path) as file:
            table = pq.ParquetFile(file).read_row_group(self.row_group, columns=sorted(columns), use_threads=False)
        return table.cast(_variable(table.schema))


def _variable(schema: pa.Schema) -> pa.Schema:
    """The schema with lists of variable size instead of fixed-size lists, which petastorm does not know."""
    return pa.schema(
        field.with_type(pa.list_(field.type.value_field)) if pa.types.is_fixed_size_list(field.type) else field
        for field in schema
    )


class _Dataset:
    """One Parquet file without partitions or metadata files (``pyarrow.parquet.ParquetDataset`` of old)."""

    partitions = None
    metadata = None
    common_metadata = None

    def __init__(self, path_or_paths: str, filesystem: Any, **_: Any) -> None:
        self.paths = path_or_paths
        self.fs = filesystem
        self.pieces = [_Piece(path_or_paths, filesystem.open)]


class _Unopened:
    """A file that petastorm opens beside the piece that reads it, and never closes: nothing is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        file.close()


@contextmanager
def _old_modules() -> Iterator[None]:
    """The two modules of old pyarrow that petastorm imports names from, for the time of the import."""
    names = {"pyarrow.filesystem": "LocalFileSystem", "pyarrow.hdfs": "HadoopFileSystem"}
    for module, name in names.items():
        stand_in = ModuleType(module)
        setattr(stand_in, name, type(name, (), {}))
        sys.modules[module] = stand_in
    try:
        yield
    finally:
        for module in names:
            del sys.modules[module]


@cache
def batch_reader() -> Callable[..., Any]:
    """petastorm's ``make_batch_reader``, made to run here.

    Raises:
        ImportError: petastorm is not installed.
    """
    parquet = SimpleNamespace(
        ParquetDataset=_Dataset, ParquetDatasetPiece=_Piece, ParquetFile=_Unopened, read_metadata=pq.read_metadata
    )
    with _LOCK, _old_modules():
        try:
            modules = [import_module(f"petastorm.{name}") for name in _PATCHED]
        except ImportError as error:
            raise ImportError(
                f"reader.kind petastorm needs petastorm ({error}): `pip install --no-deps petastorm==0.13.1`, "
                "or use reader.kind=arrow"
            ) from error
        for module in modules:
            vars(module).update({"pq": parquet, "ParquetFile": _Unopened})
    logging.getLogger("petastorm").setLevel(logging.WARNING)
    make: Callable[..., Any] = modules[0].make_batch_reader
    return make


class PetastormReader:
    """Row groups through petastorm's batch reader; same rows and types as ``readers.ArrowReader`` gives."""

    def __init__(self, folder: Folder, entries: Sequence[FileEntry], columns: Sequence[str] | None) -> None:
        self._make = batch_reader()
        self._folder = folder
        self._entries = tuple(entries)
        self._columns = columns
        self._schemas: dict[int, pa.Schema] = {}

    def read(self, file: int, group: int) -> pa.Table:
        """See ``readers.RowGroupReader``.

        petastorm's shards are row groups modulo the number of shards: with as many shards as the file has row groups,
        shard ``group`` is row group ``group``.
        """
        entry, schema = self._entries[file], self._schema(file)
        reader = self._make(
            "file:///part",  # any path will do: what it opens does not depend on it, so no URI is ever misread
            schema_fields=[re.escape(name) for name in schema.names],
            reader_pool_type="dummy",
            shuffle_row_groups=False,
            cur_shard=group,
            shard_count=len(entry.row_groups),
            filesystem=SimpleNamespace(open=lambda _: self._folder.open(entry.path)),
        )
        try:
            rows = next(reader)
        finally:
            reader.stop()
            reader.join()
        return pa.table([_column(getattr(rows, field.name), field) for field in schema], schema=schema)

    def close(self) -> None:
        """Nothing stays open between reads."""

    def _schema(self, file: int) -> pa.Schema:
        """Schema of the columns asked for; the file is verified when it is first touched."""
        if file not in self._schemas:
            entry = self._entries[file]
            with open_part(self._folder, entry) as part:
                check_file(self._folder, entry, part, self._columns)
                schema = part.schema_arrow
            names = schema.names if self._columns is None else self._columns
            self._schemas[file] = _checked(pa.schema([schema.field(name) for name in names]))
        return self._schemas[file]


def _checked(schema: pa.Schema) -> pa.Schema:
    """The schema itself.

    Raises:
        ValueError: it has a column that petastorm does not read on current numpy.
    """
    for field in schema:
        kind = field.type.value_type if pa.types.is_nested(field.type) else field.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise ValueError(
                f"column {field.name!r} has type {field.type}, petastorm reads numbers: use reader.kind=arrow"
            )
    return schema


def _column(values: np.ndarray[Any, Any], field: pa.Field) -> pa.Array:
    """One column of a petastorm batch, [rows] or [rows, width], as an array of the stored type."""
    if not pa.types.is_nested(field.type):
        return pa.array(values, field.type)
    ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    flat = pa.array(values.ravel(), field.type.value_type)
    return pa.ListArray.from_arrays(pa.array(ends), flat).cast(field.type)
