"""Sorted runs: tables in order of an int64 key, of which a few rows are found without reading the others.

A run lies in uncompressed Arrow files of one record batch each, whose names tell their first keys. Where the folder is
local they are memory-mapped, and a search touches a few pages; elsewhere the files that may hold a key are read whole,
and no others. A newer run hides the rows of an
older one with equal keys, so what is known of a key grows by small new runs; ``absorbed`` says which older ones are to
be merged with a new one, such that every row is written again only a logarithmic number of times (size-tiered
compaction).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from reclora_dist.contract.manifest import ContractError, FileEntry, add_digested
from reclora_dist.contract.storage import Folder

MERGED_FACTOR = 2
"""An older run is absorbed if it has at most this many times the rows of what would absorb it."""

_LEAST = -(2**63)
"""The smallest key."""

_DIGITS = 16
"""Hexadecimal digits of a key's distance from the smallest one: names stand in order of the keys."""


def write_piece(folder: Folder, prefix: str, table: pa.Table, key: str) -> FileEntry:
    """Write a piece of a run, at least one row in order of ``key``, as ``{prefix}part-{first key}-{digest}.arrow``.

    Pieces of a run have no key in common.
    """
    batch = pa.Table.combine_chunks(table).to_batches(max_chunksize=table.num_rows)[0]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue().to_pybytes()
    first = table[key][0].as_py() - _LEAST
    return add_digested(folder, f"{prefix}part-{first:0{_DIGITS}x}.arrow", content, [table.num_rows])


class Run:
    """The rows of one run, numbered through in order of their key."""

    def __init__(self, folder: Folder, entries: Sequence[FileEntry], key: str) -> None:
        self.folder, self.entries, self.key = folder, tuple(entries), key
        self._starts = [0, *accumulate(entry.rows for entry in self.entries)]
        self._open: dict[int, pa.RecordBatch] = {}

    def __reduce__(self) -> tuple[type["Run"], tuple[Folder, tuple[FileEntry, ...], str]]:
        """A run travels as names; whoever gets it opens the files."""
        return Run, (self.folder, self.entries, self.key)

    def __len__(self) -> int:
        """All rows."""
        return self._starts[-1]

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The first key of every piece."""
        return np.array([self._first(index) for index in range(len(self.entries))], np.int64)

    def _first(self, index: int) -> int:
        told = self.entries[index].path.rpartition("part-")[2].partition("-")[0]
        if len(told) == _DIGITS:
            return int(told, 16) + _LEAST
        return int(self._piece(index)[self.key][0].as_py())  # written before names told it

    def _piece(self, index: int) -> pa.RecordBatch:
        if index not in self._open:
            self._open[index] = _batch(self.folder, self.entries[index])
        return self._open[index]

    def below(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each key the number of rows with a smaller one: where its own rows start, if there are any."""
        piece = np.searchsorted(self.firsts, keys, "left") - 1
        found = np.zeros(len(keys), np.int64)
        for index in np.unique(piece[piece >= 0]).tolist():
            inside = piece == index
            there = self._piece(index)[self.key].to_numpy()
            found[inside] = self._starts[index] + np.searchsorted(there, keys[inside], "left")
        return found

    def take(self, rows: NDArray[np.int64], columns: Sequence[str] | None = None) -> pa.Table:
        """Some rows, numbered in ascending order; all columns or those named."""
        piece = np.searchsorted(self._starts, rows, "right") - 1
        tables = [self._piece(0).slice(0, 0)] if not len(rows) else []
        names = columns or self._piece(0).schema.names
        for index in np.unique(piece).tolist():
            batch = self._piece(index).select(list(names))
            tables.append(batch.take(pa.array(rows[piece == index] - self._starts[index])))
        return pa.Table.from_batches([batch.select(list(names)).replace_schema_metadata(None) for batch in tables])


def _batch(folder: Folder, entry: FileEntry) -> pa.RecordBatch:
    """The record batch of a piece. Its size is checked; its digest is not, for that would read all of it."""
    if not folder.exists(entry.path) or folder.fs.size(folder.path(entry.path)) != entry.bytes:
        raise ContractError(
            f"{folder.uri!r}: {entry.path!r} is missing or has not its {entry.bytes:,} bytes. Restore the file, or "
            "build again from the first day."
        )
    local = isinstance(folder.fs, LocalFileSystem)
    source = pa.memory_map(folder.path(entry.path)) if local else pa.BufferReader(folder.read(entry.path))
    try:
        return pa.ipc.open_file(source).get_batch(0)
    except pa.ArrowInvalid as error:
        raise ContractError(
            f"{folder.uri!r}: {entry.path!r} is no Arrow file ({error}). Restore it, or build again from the first day."
        ) from error


@dataclass(frozen=True)
class Found:
    """Where the rows of some keys lie: per key the place of its run, and the row in it; -1 where there is none."""

    run: NDArray[np.int64]
    row: NDArray[np.int64]


def find(runs: Sequence[Run], keys: NDArray[np.int64], ids: pa.Array | None = None, name: str = "") -> Found:
    """The newest row of each key.

    Args:
        runs: newest first.
        keys: keys, int64 [N].
        ids: what the column ``name`` must hold besides; for keys that are hashes.
    """
    found = Found(np.full(len(keys), -1, np.int64), np.full(len(keys), -1, np.int64))
    for number, run in enumerate(runs):
        left = np.flatnonzero(found.run < 0)
        row = run.below(keys[left])
        while len(left):
            left, row = left[row < len(run)], row[row < len(run)]
            order = np.argsort(row, kind="stable")
            left, row = left[order], row[order]
            there = run.take(row, [run.key, *([name] if ids is not None else [])])
            same = there[run.key].to_numpy() == keys[left]
            hit = same
            if ids is not None:
                hit = same & pc.equal(there[name], ids.take(pa.array(left))).to_numpy()
            found.run[left[hit]], found.row[left[hit]] = number, row[hit]
            left, row = left[same & ~hit], row[same & ~hit] + 1
    return found


def take(runs: Sequence[Run], found: Found, columns: Sequence[str] | None = None) -> tuple[NDArray[np.int64], pa.Table]:
    """The rows that were found, and which of the keys each belongs to."""
    places, tables = [], []
    for number, run in enumerate(runs):
        place = np.flatnonzero(found.run == number)
        place = place[np.argsort(found.row[place], kind="stable")]
        places.append(place)
        tables.append(run.take(found.row[place], columns))
    return np.concatenate(places), pa.concat_tables(tables)


def absorbed(rows: int, older: Sequence[int]) -> int:
    """How many of the older runs (rows of each, newest first) a new one of ``rows`` rows is to be merged with."""
    count = 0
    while count < len(older) and older[count] <= MERGED_FACTOR * rows:
        rows += older[count]
        count += 1
    return count


def ranges(runs: Sequence[Run], size: int) -> list[tuple[int, int | None]]:
    """All keys in ranges, first key and end (None: no end), to be merged one by one.

    The pieces that start in a range have about ``size`` bytes together, or are one; of every run one more may reach in.
    """
    firsts = np.concatenate([run.firsts for run in runs])
    order = np.argsort(firsts, kind="stable")
    sizes = np.array([entry.bytes for run in runs for entry in run.entries])
    group = np.cumsum(sizes[order]) // size
    cuts = np.unique(firsts[order][1:][np.diff(group) > 0]).tolist()
    return list(pairwise([_LEAST, *cuts, None]))


def pieces(table: pa.Table, key: str, sizes: NDArray[np.int64], size: int) -> Iterator[pa.Table]:
    """Rows in order of ``key`` in tables whose ``sizes`` are about ``size`` together; equal keys are not parted."""
    keys = table[key].to_numpy()
    group = (np.cumsum(sizes) // size)[np.searchsorted(keys, keys)]
    cuts = [*np.flatnonzero(np.diff(group, prepend=-1)).tolist(), len(keys)]
    for start, stop in pairwise(cuts):
        yield table.slice(start, stop - start)


def merged(runs: Sequence[Run], low: int, high: int | None, unique: bool, without: NDArray[np.int64]) -> pa.Table:
    """The rows of several runs, newest first, with ``low`` <= key < ``high`` (None: no end), in order of key.

    Args:
        unique: of equal keys the newest row alone is kept; else all are.
        without: rows whose column ``user`` is one of these are left out.
    """
    tables = []
    for run in runs:
        ends = run.below(np.array([low] if high is None else [low, high], np.int64)).tolist()
        tables.append(run.take(np.arange(ends[0], len(run) if high is None else ends[1])))
    table = pa.concat_tables(tables)
    keys = table[runs[0].key].to_numpy()
    order = np.argsort(keys, kind="stable")
    keep = ~np.isin(table["user"].to_numpy()[order], without) if len(without) else np.full(len(order), True)
    if unique:
        keep &= np.diff(keys[order], prepend=keys[order][:1] - 1) != 0
    return table.take(pa.array(order[keep]))
