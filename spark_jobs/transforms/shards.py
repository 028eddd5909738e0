"""Samples to shards: which samples the language model gets, which file a row goes to, and a file put together.

Rows travel in blocks: a task cuts its part of the histories into one block per file, so the shuffle moves a few large
values and no single row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reclora_dist.config.schema import ShardsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.parts import read_part, write_part
from reclora_dist.contract.storage import Folder
from spark_jobs.days import MS_PER_DAY
from spark_jobs.parts import entry_batch
from spark_jobs.transforms.profiles import Profiles

KEY = ("kind", "split", "day", "file")
"""Columns that name a file: crm or text, the split, the day (empty if the log was not built by days), its number."""

BLOCK = "kind string, split string, day string, file int, rows binary"
"""Spark schema of rows on their way to a file: an Arrow stream."""

KEYS = "split string, day string, samples bigint, rows bigint, keys binary"

_LAST = 2**64 - 1
_GROUP_BYTES = 64 << 20


@dataclass(frozen=True)
class Layout:
    """Where samples go: per split and day the number of files of either kind; per split the largest text key (-1: no
    text rows); whether the CRM is trained without the text rows.
    """

    seed: int
    by_days: bool
    crm_files: Mapping[tuple[str, str], int]
    text_files: Mapping[tuple[str, str], int]
    text_limits: Mapping[str, int]
    apart: bool = False


@dataclass(frozen=True)
class Shape:
    """Lengths of a row's lists."""

    user_fields: int
    long: int
    short: int

    def schema(self, kind: str) -> pa.Schema:
        """Arrow schema of the shards of a kind."""
        if kind == "crm":
            return schema.crm_shard(self.user_fields, self.long)
        return schema.text_shard(self.user_fields, self.long, self.short)

    def rows_per_group(self, kind: str, asked: int) -> int:
        """As asked, or as many rows as fill 64 MiB uncompressed."""
        return asked or max(1, _GROUP_BYTES // sum(_bytes(field.type) for field in self.schema(kind)))


def _bytes(kind: pa.DataType) -> int:
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else 1
    return int(size * (kind.value_type if pa.types.is_nested(kind) else kind).bit_width // 8)


def hashed(sample_ids: NDArray[np.int64], seed: int, purpose: int) -> NDArray[np.uint64]:
    """64 well-mixed bits per sample (the finaliser of SplitMix64), others for every seed and purpose."""
    start = np.random.default_rng([seed, purpose]).integers(0, _LAST, dtype=np.uint64, endpoint=True)
    value = sample_ids.astype(np.uint64) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> np.uint64(shift))) * np.uint64(factor)
    mixed: NDArray[np.uint64] = value ^ (value >> np.uint64(31))
    return mixed


def text_key(sample_ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """The language model gets the samples with the smallest keys."""
    return hashed(sample_ids, seed, 1)


def place(sample_ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """The order of rows in the shards."""
    return hashed(sample_ids, seed, 2)


def limit(asked: float, rows: int) -> int:
    """A text key that the samples asked for do not exceed: exact for a share, some more for a number; -1 for none."""
    if asked <= 1:
        return round(asked * 2**64) - 1
    enough = asked + 6 * asked**0.5 + 10
    return _LAST if enough >= rows else int(enough / rows * 2**64)


def keys_below(
    folder: Folder, entries: Sequence[FileEntry], config: ShardsConfig, limits: Mapping[str, int], by_days: bool,
    part: int,
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """How many samples a part of the histories has, and how many text keys within the limit of their split (KEYS).

    The keys themselves come along where a number of samples was asked for, and the largest is yet to be found.
    """
    table = read_part(folder, entries[part], ["sample_id", "time", "split"])
    key = text_key(table["sample_id"].to_numpy(), config.seed)
    for split, day, rows in _groups(table, by_days):
        found = key[rows][_within(key[rows], limits[split])]
        keys = found.tobytes() if config.text[split] > 1 else b""
        columns = {"split": [split], "day": [day], "samples": [len(rows)], "rows": [len(found)], "keys": [keys]}
        yield pa.record_batch(columns)


def _groups(table: pa.Table, by_days: bool) -> Iterator[tuple[str, str, NDArray[np.int64]]]:
    """The rows of every split, and of every day (UTC) if the log was built by days."""
    day = table["time"].to_numpy() // MS_PER_DAY if by_days else np.zeros(table.num_rows, np.int64)
    for split in schema.SPLITS:
        rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())
        for number in np.unique(day[rows]):
            name = str(np.datetime64(int(number), "D")) if by_days else ""
            yield split, name, rows[day[rows] == number]


def _within(key: NDArray[np.uint64], most: int) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (key <= np.uint64(max(most, 0))) & (most >= 0)
    return found


def blocks(
    histories: Folder, entries: Sequence[FileEntry], profiles: Profiles, layout: Layout, shape: Shape, part: int
) -> Iterator[pa.RecordBatch]:
    """One part of the histories as blocks of the schema BLOCK."""
    table = read_part(histories, entries[part])
    table = table.append_column("user_fields", profiles.of(table["user"].to_numpy()))
    ids = table["sample_id"].to_numpy()
    share = place(ids, layout.seed).astype(np.float64) / 2.0**64
    key = text_key(ids, layout.seed)
    for split, day, rows in _groups(table, layout.by_days):
        is_text = _within(key[rows], layout.text_limits[split])
        crm, text = rows[~is_text] if layout.apart and split == "train" else rows, rows[is_text]
        for kind, chosen, files in (("crm", crm, layout.crm_files), ("text", text, layout.text_files)):
            yield from _by_file(table, shape.schema(kind), (kind, split, day), chosen, share, files[split, day])


def _by_file(
    table: pa.Table, target: pa.Schema, name: tuple[str, ...], rows: NDArray[Any], share: NDArray[Any], files: int
) -> Iterator[pa.RecordBatch]:
    """The rows in order of file, one block per file."""
    file = np.minimum((share[rows] * files).astype(np.int32), files - 1)
    order = np.argsort(file, kind="stable")
    cuts = np.searchsorted(file[order], np.arange(files + 1))
    whole = table.select(target.names).take(pa.array(rows[order])).cast(target)
    for number in range(files):
        start, stop = int(cuts[number]), int(cuts[number + 1])
        if stop > start:
            block = _stream(whole.slice(start, stop - start))
            columns = [pa.array([value]) for value in name]
            yield pa.RecordBatch.from_arrays(
                [*columns, pa.array([number], pa.int32()), pa.array([block], pa.binary())], [*KEY, "rows"]
            )


def _stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    found: bytes = sink.getvalue().to_pybytes()
    return found


def prefix(kind: str, split: str, day: str) -> str:
    """Where the files of a split, or of one of its days, lie."""
    return f"{kind}/split={split}/" + (f"day={day}/" if day else "")


def without(
    folder: Folder, entries: Sequence[FileEntry], users: NDArray[np.int64], shape: Shape, asked: int, index: int
) -> Iterator[pa.RecordBatch]:
    """A file of shards as it was if it holds none of ``users``, else written again without their rows."""
    found = [entries[index]]
    table = read_part(folder, entries[index])
    keep = ~np.isin(table["user"].to_numpy(), users)
    if not keep.all():
        place, name = entries[index].path.rsplit("/", 1)
        rows = shape.rows_per_group(place.split("/")[0], asked)
        whole = table.filter(pa.array(keep))
        number = int(name.split("-")[1])
        found = [write_part(folder, f"{place}/", number, whole, rows)] if whole.num_rows else []
    yield entry_batch(found)


def assemble(
    folder: Folder, shape: Shape, rows_per_group: int, seed: int, key: tuple[pa.Scalar, ...], found: pa.Table
) -> pa.Table:
    """Write the file ``key`` from its blocks, rows in order of ``place``.

    Returns:
        One row of the schema ``parts.ENTRY``.
    """
    kind, split, day, file = (scalar.as_py() for scalar in key)
    table = pa.concat_tables(pa.ipc.open_stream(block.as_buffer()).read_all() for block in found["rows"])
    ids = table["sample_id"].to_numpy()
    order = np.lexsort((ids, place(ids, seed)))
    rows = shape.rows_per_group(kind, rows_per_group)
    entry = write_part(folder, prefix(kind, split, day), file, table.take(pa.array(order)), rows)
    return pa.Table.from_batches([entry_batch([entry])])
