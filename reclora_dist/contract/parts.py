"""Parts of a dataset: written whole under a name that carries their digest, read back verified.

What other programs read is Parquet. What only the next job reads may be Arrow files: lists are written 3.5 times and
read 6 times as fast, and take 1.5 times the space (docs/results).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain

import pyarrow as pa
import pyarrow.parquet as pq

from reclora_dist.contract.manifest import FileEntry, add_digested, verified
from reclora_dist.contract.storage import Folder

_BEHIND = 64
"""Arrow fills the padding of a buffer, 63 bytes at most, with the values that follow: they lie in so many rows."""


def write_part(folder: Folder, prefix: str, index: int, table: pa.Table, rows_per_group: int) -> FileEntry:
    """Write ``table`` as ``{prefix}part-{index}-{digest}.parquet`` (zstd, row groups of ``rows_per_group``)."""
    sink = pa.BufferOutputStream()
    dictionary = list(_of_few_values(table.schema))
    pq.write_table(table, sink, row_group_size=rows_per_group, compression="zstd", use_dictionary=dictionary)
    return _add(folder, f"{prefix}part-{index:05d}", "parquet", sink, table.num_rows, rows_per_group)


def write_arrow_part(
    folder: Folder, prefix: str, index: int, tables: Iterable[pa.Table], rows_per_batch: int
) -> FileEntry:
    """Write the rows of ``tables`` as ``{prefix}part-{index}-{digest}.arrow`` (LZ4, record batches of
    ``rows_per_batch``).

    It holds one table and what is written of the others. The file follows from the rows, however they are divided; the
    first table, which must be there, has the schema of all.
    """
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    pieces, rows = _regrouped(tables, rows_per_batch), 0
    first = next(pieces)
    with pa.ipc.new_file(sink, first.schema, options=options) as writer:
        for piece in chain([first], pieces):
            writer.write_table(piece)
            rows += piece.num_rows
    return _add(folder, f"{prefix}part-{index:05d}", "arrow", sink, rows, rows_per_batch)


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` and a last one, of one chunk each, those that follow behind them in it."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while rest.num_rows >= rows + _BEHIND:
            yield rest.slice(0, rows + _BEHIND).combine_chunks().slice(0, rows)
            rest = rest.slice(rows)
    if rest is not None:
        last = rest.combine_chunks()
        yield from (last.slice(start, rows) for start in range(0, max(last.num_rows, 1), rows))


def _add(folder: Folder, stem: str, suffix: str, sink: pa.BufferOutputStream, rows: int, step: int) -> FileEntry:
    content = sink.getvalue().to_pybytes()
    groups = [min(step, rows - start) for start in range(0, rows, step)]
    return add_digested(folder, f"{stem}.{suffix}", content, groups)


def _of_few_values(schema: pa.Schema) -> Iterator[str]:
    """The columns that always gain by a dictionary.

    Ids and times are too many for one where a user's events stand together, and compress better without; rows in random
    order would gain a little by it and take longer to write (docs/results).
    """
    for field in schema:
        listed = isinstance(field.type, pa.ListType | pa.FixedSizeListType)
        if not pa.types.is_integer(kind := field.type.value_type if listed else field.type) or pa.types.is_int8(kind):
            yield f"{field.name}.list.element" if listed else field.name


def open_part(folder: Folder, entry: FileEntry) -> pq.ParquetFile:
    """Open a Parquet part after its bytes were checked against the manifest.

    Raises:
        ContractError: the file is missing or its digest does not match.
    """
    return pq.ParquetFile(pa.BufferReader(verified(folder, entry)))


def read_part(folder: Folder, entry: FileEntry, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a part of either kind, all columns or those named.

    Raises:
        ContractError: the file is missing or its digest does not match.
    """
    names = None if columns is None else list(columns)
    if not entry.path.endswith(".arrow"):
        return open_part(folder, entry).read(columns=names)
    source = pa.BufferReader(verified(folder, entry))
    fields = None if names is None else [pa.ipc.open_file(source).schema.get_field_index(name) for name in names]
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    table = pa.ipc.open_file(source, options=options).read_all()
    return table if names is None else table.select(names)


def read_parts(folder: Folder, entries: Iterable[FileEntry], columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of the given parts as one table, in path order, each part verified.

    Raises:
        ContractError: a file is missing or its digest does not match.
        ValueError: there is no part to read.
    """
    tables = [read_part(folder, entry, columns) for entry in sorted(entries, key=lambda entry: entry.path)]
    if not tables:
        raise ValueError(f"{folder.uri!r}: no part matches; its dataset has no such table or split")
    return pa.concat_tables(tables)


class Rows:
    """The rows of several parts, numbered through in path order; a range is read without the row groups outside it."""

    def __init__(self, folder: Folder, entries: Iterable[FileEntry]) -> None:
        self._folder = folder
        self._entries = sorted(entries, key=lambda entry: entry.path)
        self._first = [0, *accumulate(entry.rows for entry in self._entries)]

    def __len__(self) -> int:
        """All rows."""
        return self._first[-1]

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return len(self._entries)

    def range_of(self, part: int) -> range:
        """The numbers of the rows of the ``part``-th part."""
        return range(self._first[part], self._first[part + 1])

    def read(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows ``start`` to ``stop`` (exclusive, above ``start``).

        Raises:
            ContractError: a file is missing or its digest does not match.
        """
        pieces = []
        for part in range(bisect_right(self._first, start) - 1, bisect_left(self._first, stop)):
            own = self.range_of(part)
            pieces.append(
                self._piece(part, max(start, own.start) - own.start, min(stop, own.stop) - own.start, columns)
            )
        return pa.concat_tables(pieces)

    def _piece(self, part: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        entry = self._entries[part]
        first = [0, *accumulate(entry.row_groups)]
        groups = range(bisect_right(first, start) - 1, bisect_left(first, stop))
        read = open_part(self._folder, entry).read_row_groups(list(groups), columns=list(columns))
        return read.slice(start - first[groups.start], stop - start)
