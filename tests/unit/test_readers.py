"""read_batches: the planned rows, verified, through both readers, without a thread left behind."""

import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reclora_dist.config.schema import ReaderConfig
from reclora_dist.contract.manifest import ContractError, FileEntry, add_file
from reclora_dist.contract.parts import write_part
from reclora_dist.contract.schema import crm_shard
from reclora_dist.contract.storage import Folder
from reclora_dist.data import readers
from reclora_dist.data.plan import EpochPlan, Plan, SequentialPlan, row_groups
from reclora_dist.data.readers import ArrowReader, read_batches, row_group_reader

KINDS = ("arrow", "petastorm")
ROWS, FILES, LONG = 53, 3, 4
COLUMNS = ("sample_id", "label", "user_fields", "statistics", "long_items", "long_levels", "long_length")


def table(start: int, rows: int, fields: int = 2) -> pa.Table:
    """Rows in the CRM shard schema; every value can be told from its sample_id."""
    ids = np.arange(start, start + rows)

    def lists(width: int, kind: pa.DataType) -> pa.Array:
        return pa.array([[(i + j) % 100 for j in range(width)] for i in ids], kind)

    schema = crm_shard(fields, LONG)
    columns = {"sample_id": ids, "user": ids, "item": ids, "time": ids, "label": ids % 2, "long_length": ids % LONG}
    for name, width in {"user_fields": fields, "statistics": 4, "long_items": LONG, "long_levels": LONG}.items():
        columns[name] = lists(width, schema.field(name).type)
    return pa.table([pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names], schema=schema)


def write(folder: Folder, fields: int = 2) -> list[FileEntry]:
    return [write_part(folder, "crm/split=train/", i, table(i * ROWS, ROWS, fields), 10) for i in range(FILES)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "shards #1 %20"))


@pytest.fixture
def entries(folder: Folder) -> list[FileEntry]:
    return write(folder)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def epoch(entries: list[FileEntry], batch: int = 8, rank: int = 0, world: int = 1, number: int = 0) -> EpochPlan:
    return EpochPlan(row_groups(entries), 7, number, rank, world, world * batch)


def expected_ids(plan: Plan, start_step: int = 0) -> list[int]:
    return [
        part.file * ROWS + part.group * 10 + int(row)
        for part in plan.slices(start_step)
        for row in part.indices(plan.groups[part.file * 6 + part.group].rows)
    ]


def ids(batches: Iterator[pa.Table]) -> list[int]:
    return [i for batch in batches for i in batch["sample_id"].to_pylist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [0, 1, 50])
def test_batches_are_the_plan(folder: Folder, entries: list[FileEntry], kind: str, prefetch: int) -> None:
    plan = epoch(entries)
    batches = list(read_batches(folder, entries, plan, COLUMNS, ReaderConfig(kind, prefetch)))
    assert [b.num_rows for b in batches] == [8] * plan.steps
    assert ids(iter(batches)) == expected_ids(plan)
    whole = pa.concat_tables(batches)
    every = pa.concat_tables(table(i * ROWS, ROWS) for i in range(FILES)).select(COLUMNS)
    assert whole.equals(every.take(whole["sample_id"]))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_resumption(folder: Folder, entries: list[FileEntry], kind: str) -> None:
    seen: list[int] = []
    for rank in range(2):
        plan = epoch(entries, rank=rank, world=2)
        whole = ids(read_batches(folder, entries, plan, COLUMNS, ReaderConfig(kind)))
        assert ids(read_batches(folder, entries, plan, COLUMNS, ReaderConfig(kind), 5)) == whole[40:]
        assert ids(read_batches(folder, entries, plan, COLUMNS, ReaderConfig(kind), plan.steps)) == []
        seen += whole
    assert len(set(seen)) == len(seen) == plan.steps * 16


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_pass_reads_every_row_in_order(folder: Folder, entries: list[FileEntry], kind: str) -> None:
    plan = SequentialPlan(row_groups(entries), 50)
    batches = list(read_batches(folder, entries, plan, None, ReaderConfig(kind)))
    assert [b.num_rows for b in batches] == [50, 50, 50, 9]
    assert pa.concat_tables(batches).equals(pa.concat_tables(table(i * ROWS, ROWS) for i in range(FILES)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_without_user_fields(folder: Folder, kind: str) -> None:
    entries = write(folder, fields=0)
    (batch,) = read_batches(folder, entries, SequentialPlan(row_groups(entries), 200), None, ReaderConfig(kind))
    assert batch.equals(pa.concat_tables(table(i * ROWS, ROWS, 0) for i in range(FILES)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_file_system(kind: str) -> None:
    folder = Folder("memory://reader-test/shards")
    entries = write(folder)
    plan = epoch(entries)
    assert ids(read_batches(folder, entries, plan, COLUMNS, ReaderConfig(kind))) == expected_ids(plan)
    fsspec.filesystem("memory").rm("/reader-test", recursive=True)


def test_few_files_stay_open_and_each_is_verified_once(
    folder: Folder, entries: list[FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    real = readers.open_part

    def counting(where: Folder, entry: FileEntry) -> pq.ParquetFile:
        verified.append(entry.path)
        return real(where, entry)

    monkeypatch.setattr(readers, "open_part", counting)
    monkeypatch.setattr(readers, "OPEN_FILES", 1)
    plan = epoch(entries)
    assert ids(read_batches(folder, entries, plan, COLUMNS)) == expected_ids(plan)
    assert sorted(verified) == sorted(e.path for e in entries)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_stops_the_reader(folder: Folder, entries: list[FileEntry], kind: str) -> None:
    content = bytearray(folder.read(entries[1].path))
    content[200] ^= 1
    folder.write(entries[1].path, bytes(content))
    with pytest.raises(ContractError, match=r"part-00001.*SHA-256"):
        list(read_batches(folder, entries, epoch(entries), COLUMNS, ReaderConfig(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_stops_the_reader(folder: Folder, entries: list[FileEntry], kind: str) -> None:
    folder.delete(entries[2].path)
    with pytest.raises(ContractError, match=r"part-00002.*missing"):
        list(read_batches(folder, entries, epoch(entries), COLUMNS, ReaderConfig(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_named(folder: Folder, entries: list[FileEntry], kind: str) -> None:
    with pytest.raises(ContractError, match=r"lacks the columns \['lenght'\], it has \['sample_id'"):
        list(read_batches(folder, entries, epoch(entries), ("sample_id", "lenght"), ReaderConfig(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_row_counts_of_the_manifest_are_checked(folder: Folder, entries: list[FileEntry], kind: str) -> None:
    wrong = [replace(entries[0], row_groups=(10, 10, 10, 10, 10, 4)), *entries[1:]]
    with pytest.raises(ContractError, match=r"rows, the manifest says \(10, 10, 10, 10, 10, 4\)"):
        list(read_batches(folder, wrong, epoch(wrong), COLUMNS, ReaderConfig(kind)))


@pytest.mark.parametrize("lost", [slice(0, 0), slice(0, 9)])
def test_a_reader_that_loses_rows_is_found_out(
    folder: Folder, entries: list[FileEntry], monkeypatch: pytest.MonkeyPatch, lost: slice
) -> None:
    real = ArrowReader.read
    monkeypatch.setattr(ArrowReader, "read", lambda self, file, group: real(self, file, group)[lost])
    with pytest.raises(ContractError, match=rf"gave {lost.stop} rows, the manifest says"):
        list(read_batches(folder, entries, epoch(entries), COLUMNS))


class Failing:
    """Storage that does not answer the calls named by their number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: range) -> None:
        self.calls, self.seen, self.real = calls, 0, Folder.open
        monkeypatch.setattr(Folder, "open", lambda folder, name: self.opened(folder, name))
        monkeypatch.setattr(readers, "OPEN_FILES", 1)  # so that files are opened again

    def opened(self, folder: Folder, name: str) -> IO[bytes]:
        self.seen += 1
        if self.seen - 1 in self.calls:
            raise OSError("the storage does not answer")
        return self.real(folder, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_storage_that_fails_for_a_while_costs_only_time(
    folder: Folder,
    entries: list[FileEntry],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    prefetch: int,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("reclora_dist.contract.storage.sleep", waits.append)
    plan = epoch(entries)
    Failing(monkeypatch, range(2, 5))
    assert ids(read_batches(folder, entries, plan, COLUMNS, ReaderConfig(kind, prefetch))) == expected_ids(plan)
    assert waits == [1.0, 2.0, 4.0]
    assert "the storage does not answer; trying again in 2 s" in capsys.readouterr().out


def test_storage_that_fails_for_longer_ends_the_reading(
    folder: Folder, entries: list[FileEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing(monkeypatch, range(2, 1000))
    with pytest.raises(OSError, match="the storage does not answer"):
        list(read_batches(folder, entries, epoch(entries), COLUMNS, ReaderConfig(storage_patience=0.0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_closed_reader_lets_its_thread_go(folder: Folder, entries: list[FileEntry], kind: str, taken: int) -> None:
    batches = read_batches(folder, entries, epoch(entries), COLUMNS, ReaderConfig(kind, 2))
    for _ in range(taken):
        next(batches)
    batches.close()  # the fixture looks for the thread
    assert list(batches) == []


def test_reading_ahead_is_bounded(folder: Folder, entries: list[FileEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, int]] = []
    real = ArrowReader.read

    def noting(self: ArrowReader, file: int, group: int) -> pa.Table:
        started.append((file, group))
        return real(self, file, group)

    monkeypatch.setattr(ArrowReader, "read", noting)
    batches = read_batches(folder, entries, epoch(entries, batch=1), COLUMNS, ReaderConfig(prefetch=3))
    assert not started
    next(batches)
    batches.close()
    assert len(started) <= 4


def test_settings_that_make_no_sense(folder: Folder, entries: list[FileEntry]) -> None:
    plan = epoch(entries)
    with pytest.raises(ValueError, match="prefetch -1"):
        read_batches(folder, entries, plan, COLUMNS, ReaderConfig(prefetch=-1))
    with pytest.raises(ValueError, match=r"made for other files than the 2"):
        read_batches(folder, entries[:2], plan, COLUMNS)
    with pytest.raises(ValueError, match="start step 999"):
        read_batches(folder, entries, plan, COLUMNS, start_step=999)
    with pytest.raises(ValueError, match="reader 'parquet' is unknown"):
        row_group_reader(folder, entries, COLUMNS, "parquet")


class Explosive:
    """Leaves a mark if it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_petastorm_never_unpickles_metadata(folder: Folder, entries: list[FileEntry], tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    key = b"dataset-toolkit.unischema.v1"
    bomb = pickle.dumps(Explosive(mark))
    sink = pa.BufferOutputStream()
    pq.write_metadata(table(0, 1).schema.with_metadata({key: bomb}), sink)
    for name in ("_common_metadata", "crm/_common_metadata", "crm/split=train/_common_metadata"):
        folder.write(name, sink.getvalue().to_pybytes())
    loaded = table(0, ROWS).replace_schema_metadata({key: bomb})
    poisoned = [write_part(folder, "crm/split=train/", 9, loaded, 10)]
    assert ids(read_batches(folder, poisoned, epoch(poisoned), COLUMNS, ReaderConfig("petastorm")))
    assert not mark.exists()
    pickle.loads(bomb)  # noqa: S301  (the bomb works: had anything unpickled it, the mark would be there)
    assert mark.exists()


def test_petastorm_says_what_it_cannot_read(folder: Folder) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"split": ["train"]}), sink)
    entry = add_file(folder, "part.parquet", sink.getvalue().to_pybytes(), [1])
    plan = SequentialPlan(row_groups([entry]), 1)
    with pytest.raises(ValueError, match=r"'split' has type string.*reader.kind=arrow"):
        list(read_batches(folder, [entry], plan, None, ReaderConfig("petastorm")))


def test_petastorm_leaves_pyarrow_as_it_is() -> None:
    from reclora_dist.data.petastorm_compat import batch_reader

    batch_reader()
    assert not hasattr(pa, "filesystem") and not hasattr(pa, "hdfs") and not hasattr(pq, "ParquetDatasetPiece")
    with pytest.raises(ImportError):
        __import__("pyarrow.filesystem")
