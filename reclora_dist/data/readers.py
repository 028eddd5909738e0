"""Verified row groups to batches of rows, read ahead by one thread; pyarrow by default, petastorm on request."""

from collections import OrderedDict, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from reclora_dist.config.schema import ReaderConfig
from reclora_dist.contract.manifest import ContractError, FileEntry
from reclora_dist.contract.parts import open_part
from reclora_dist.contract.storage import Folder, patiently
from reclora_dist.data.plan import Plan, Slice, row_groups

OPEN_FILES = 4
"""Files that a reader keeps open."""

Tables: TypeAlias = Generator[pa.Table, None, None]


class RowGroupReader(Protocol):
    """Reads whole row groups of the files it was made for."""

    def read(self, file: int, group: int) -> pa.Table:
        """Row group ``group`` of file ``file`` in stored order, with the reader's columns in the order asked for.

        Raises:
            ContractError: the file is missing, damaged, or lacks a column.
        """
        ...

    def close(self) -> None:
        """Let go of open files."""
        ...


class ArrowReader:
    """Row groups through pyarrow. A file's digest is checked when it is first touched, not when it is opened again."""

    def __init__(self, folder: Folder, entries: Sequence[FileEntry], columns: Sequence[str] | None) -> None:
        self._folder = folder
        self._entries = tuple(entries)
        self._columns = None if columns is None else list(columns)
        self._verified: set[int] = set()
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def read(self, file: int, group: int) -> pa.Table:
        """See ``RowGroupReader``."""
        try:
            return self._file(file).read_row_group(group, columns=self._columns, use_threads=False)
        except OSError:
            self._open.pop(file, None)  # whoever tries again wants a new handle
            raise

    def close(self) -> None:
        """See ``RowGroupReader``."""
        while self._open:
            self._open.popitem()[1].close(force=True)

    def _file(self, file: int) -> pq.ParquetFile:
        if file not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close(force=True)
            self._open[file] = self._opened(file)
        self._open.move_to_end(file)
        return self._open[file]

    def _opened(self, file: int) -> pq.ParquetFile:
        entry = self._entries[file]
        if file in self._verified:
            return pq.ParquetFile(self._folder.open(entry.path))
        opened = open_part(self._folder, entry)
        check_file(self._folder, entry, opened, self._columns)
        self._verified.add(file)
        return opened


def check_file(folder: Folder, entry: FileEntry, file: pq.ParquetFile, columns: Sequence[str] | None) -> None:
    """Check a file's row groups against its manifest entry, and that it has the columns that a reader is asked for.

    Raises:
        ContractError: row groups differ or a column is missing.
    """
    found = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    if found != entry.row_groups:
        raise ContractError(
            f"{folder.uri!r}: {entry.path!r} has row groups of {found} rows, the manifest says {entry.row_groups}: "
            "rebuild the dataset"
        )
    missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
    if missing:
        raise ContractError(
            f"{folder.uri!r}: {entry.path!r} lacks the columns {missing}, it has {file.schema_arrow.names}: ask for "
            "columns of its schema, or rebuild the dataset with this release"
        )


def row_group_reader(
    folder: Folder, entries: Sequence[FileEntry], columns: Sequence[str] | None, kind: str
) -> RowGroupReader:
    """The reader that ``kind`` (``arrow`` or ``petastorm``) names.

    Raises:
        ValueError: it names none.
    """
    if kind == "arrow":
        return ArrowReader(folder, entries, columns)
    if kind == "petastorm":
        from reclora_dist.data.petastorm_compat import PetastormReader

        return PetastormReader(folder, entries, columns)
    raise ValueError(f"reader {kind!r} is unknown: use 'arrow' or 'petastorm'")


def read_batches(
    folder: Folder,
    entries: Sequence[FileEntry],
    plan: Plan,
    columns: Sequence[str] | None = None,
    reader: ReaderConfig | None = None,
    start_step: int = 0,
) -> Tables:
    """The plan's batches from step ``start_step`` on, of ``plan.batch`` rows (a sequential plan's last may have less).

    Up to ``reader.prefetch`` row groups are read ahead by a thread. It ends when the generator is exhausted or closed,
    and its errors are raised here. ``columns=None`` reads all columns. Storage that fails is tried again.

    Raises:
        OSError: the storage failed for longer than ``reader.storage_patience``.
        ContractError: a file is missing, damaged, lacks a column, or has other row counts than the manifest.
        ValueError: the plan is one of other files, ``start_step`` lies outside it, or ``reader`` makes no sense.
    """
    config = reader or ReaderConfig()
    if config.prefetch < 0:
        raise ValueError(f"prefetch {config.prefetch} is negative: use 0 to read without a thread")
    if plan.groups != row_groups(entries):
        raise ValueError(f"{folder.uri!r}: the plan was made for other files than the {len(entries)} given here")
    expected = plan.rows_from(start_step)
    slices = plan.slices(start_step)
    source = row_group_reader(folder, entries, columns, config.kind)
    pieces = _prefetched(folder, entries, source, slices, config)
    return _counted(folder, _batches(pieces, plan.batch), expected)


def _counted(folder: Folder, batches: Tables, expected: int) -> Tables:
    """The same batches; an error at the end if their rows do not add up to the plan's."""
    seen = 0
    with closing(batches):
        for batch in batches:
            seen += batch.num_rows
            yield batch
    if seen != expected:
        raise ContractError(
            f"{folder.uri!r}: {seen} rows were read, the plan has {expected}: use the other reader kind"
        )


def _batches(pieces: Tables, size: int) -> Tables:
    """Cut the concatenation of ``pieces`` every ``size`` rows; the last batch may be smaller."""
    held: list[pa.Table] = []
    rows = 0
    with closing(pieces):
        for piece in pieces:
            start = 0
            while rows + piece.num_rows - start >= size:
                taken = size - rows
                yield pa.concat_tables([*held, piece.slice(start, taken)])
                held, rows, start = [], 0, start + taken
            if start < piece.num_rows:
                held.append(piece.slice(start))
                rows += piece.num_rows - start
    if rows:
        yield pa.concat_tables(held)


def _prefetched(
    folder: Folder, entries: Sequence[FileEntry], source: RowGroupReader, slices: Iterable[Slice], config: ReaderConfig
) -> Tables:
    """The rows of the slices, ``config.prefetch`` of them read before they are asked for."""

    def read(part: Slice) -> pa.Table:
        def say(failure: str) -> None:
            print(f"{folder.uri}: {entries[part.file].path}: {failure}", flush=True)

        return patiently(lambda: _rows(folder, entries, source, part), config.storage_patience, say)

    try:
        if config.prefetch == 0:
            yield from map(read, slices)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="row-groups") as pool:
            pending: deque[Future[pa.Table]] = deque()
            try:
                for part in slices:
                    pending.append(pool.submit(read, part))
                    if len(pending) > config.prefetch:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
    finally:
        source.close()


def _rows(folder: Folder, entries: Sequence[FileEntry], source: RowGroupReader, part: Slice) -> pa.Table:
    """The rows of one slice, its row group counted against the manifest."""
    entry = entries[part.file]
    table = source.read(part.file, part.group)
    expected = entry.row_groups[part.group]
    if table.num_rows != expected:
        raise ContractError(
            f"{folder.uri!r}: row group {part.group} of {entry.path!r} gave {table.num_rows} rows, the manifest says "
            f"{expected}: rebuild the dataset"
        )
    if part.shuffle_seed is None:
        return table.slice(part.start, part.rows)
    return table.take(pa.array(part.indices(expected)))
