"""Sorted runs: a few rows found among many, the newest first, and merged without losing any."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.contract.manifest import ContractError, FileEntry
from reclora_dist.contract.runs import Run, absorbed, find, merged, pieces, ranges, take, write_piece
from reclora_dist.contract.storage import Folder

Rows = dict[int, int]
rows_strategy = st.dictionaries(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9), st.integers(0, 99), max_size=30)
NONE = np.zeros(0, np.int64)


def run_of(folder: Path | str, rows: Rows, piece: int = 7) -> Run:
    """A run of (key, user) in pieces of a few rows."""
    target, pairs = Folder(str(folder)), sorted(rows.items())
    pieces = [pairs[start : start + piece] for start in range(0, len(pairs), piece)]
    tables = [pa.table({"key": [k for k, _ in part], "user": [u for _, u in part]}) for part in pieces]
    return Run(target, [write_piece(target, "run/", table, "key") for table in tables], "key")


@settings(deadline=None)
@given(st.lists(rows_strategy, min_size=1, max_size=4), st.lists(st.integers(-9, 9)))
def test_the_newest_row_of_a_key_is_found(
    tmp_path_factory: pytest.TempPathFactory, found: list[Rows], more: list
) -> None:
    home = tmp_path_factory.mktemp("runs")
    runs = [run_of(home / str(n), rows) for n, rows in enumerate(found)]
    runs = [run for run in runs if len(run)]
    keys = sorted({key for rows in found for key in rows} | set(more))
    places, table = take(runs, find(runs, np.array(keys, np.int64))) if runs else (NONE, None)
    expected = {key: value for rows in reversed(found) for key, value in rows.items()}
    assert sorted(keys[place] for place in places) == sorted(expected)
    for place, row in zip(places, table.to_pylist() if table else [], strict=True):
        assert row == {"key": keys[place], "user": expected[keys[place]]}


@settings(deadline=None)
@given(st.lists(rows_strategy, min_size=1, max_size=4), st.integers(-9, 9), st.lists(st.integers(0, 99), max_size=9))
def test_merged_runs_are_one(
    tmp_path_factory: pytest.TempPathFactory, found: list[Rows], cut: int, gone: Sequence[int]
) -> None:
    home = tmp_path_factory.mktemp("runs")
    runs = [run_of(home / str(n), rows) for n, rows in enumerate(found) if rows]
    if not runs:
        return
    without = np.array(gone, np.int64)
    halves = [merged(runs, *span, True, without) for span in ((-(2**63), cut), (cut, None))]
    newest = {key: value for rows in reversed(found) for key, value in rows.items()}
    expected = [(key, newest[key]) for key in sorted(newest) if newest[key] not in gone]
    assert [(row["key"], row["user"]) for half in halves for row in half.to_pylist()] == expected


def test_ids_of_one_hash_are_told_apart(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    table = pa.table({"key": [3, 5, 5, 5, 8], "user_id": ["a", "b", "c", "d", "e"], "user": [1, 2, 3, 4, 5]})
    runs = [Run(folder, [write_piece(folder, "run/", table, "key")], "key")]
    keys = np.array([5, 5, 5, 8, 9, 5], np.int64)
    ids = pa.array(["d", "x", "b", "e", "e", "c"])
    places, rows = take(runs, find(runs, keys, ids, "user_id"))
    assert dict(zip(places.tolist(), rows["user"].to_pylist(), strict=True)) == {0: 4, 2: 2, 3: 5, 5: 3}


def test_equal_runs_are_absorbed_and_much_larger_ones_are_left() -> None:
    assert absorbed(10, []) == 0
    assert absorbed(10, [20, 60, 180]) == 3
    assert absorbed(10, [21, 1]) == 0
    runs: list[int] = []
    for _ in range(1000):
        count = absorbed(5, runs)
        runs = [5 + sum(runs[:count]), *runs[count:]]
        assert len(runs) <= 12


def test_on_object_stores_no_piece_is_read_but_those_that_may_hold_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("memory://runs/of-many-pieces", {key: key for key in range(700)})
    assert len(run.entries) == 100
    read: list[str] = []
    whole = Folder.read
    monkeypatch.setattr(Folder, "read", lambda folder, name: read.append(name) or whole(folder, name))
    found = find([copy.copy(run)], np.array([350]))
    assert found.row.tolist() == [350]
    assert 1 <= len(read) <= 2


def test_pieces_whose_names_tell_no_first_key_are_read(tmp_path: Path) -> None:
    run = run_of(tmp_path, {key: key for key in range(-30, 30)})
    renamed = []
    for number, entry in enumerate(run.entries):
        renamed.append(replace(entry, path=f"run/part-{number:08d}-{entry.sha256[:12]}.arrow"))
        (tmp_path / entry.path).rename(tmp_path / renamed[-1].path)
    assert Run(run.folder, renamed, "key").firsts.tolist() == run.firsts.tolist() == [*range(-30, 30, 7)]


def test_pieces_stay_small_and_few_when_all_new_keys_are_the_largest(tmp_path: Path) -> None:
    folder, rng, runs, total = Folder(str(tmp_path)), np.random.default_rng(0), [], 2_000
    for day in range(40):
        new = np.arange(total, total := total + 200) if day else np.arange(total)
        keys = np.union1d(new, rng.integers(0, total, 200))
        run = run_of(tmp_path / str(day), dict.fromkeys(keys.tolist(), day), 50)
        due = absorbed(len(run), [len(older) for older in runs])
        merging, entries = [run, *runs[:due]], list[FileEntry]()
        for span in ranges(merging, 4_000):
            rows = merged(merging, *span, True, NONE)
            assert rows.num_rows < 500
            sizes = np.ones(rows.num_rows, np.int64)
            entries += [write_piece(folder, f"{day}/", piece, "key") for piece in pieces(rows, "key", sizes, 100)]
        runs = [Run(folder, entries, "key"), *runs[due:]]
        assert entries == sorted(entries, key=lambda entry: entry.path)
        assert max(entry.rows for entry in entries) <= 100
        assert len(entries) < 10 + 3 * len(runs[0]) / 100
    assert merged(runs, -(2**63), None, True, NONE)["key"].to_pylist() == [*range(total)]


def test_equal_keys_stay_in_one_piece() -> None:
    table = pa.table({"key": [1, 2, 2, 2, 3, 4]})
    found = pieces(table, "key", np.ones(6, np.int64), 2)
    assert [piece["key"].to_pylist() for piece in found] == [[1], [2, 2, 2], [3], [4]]


def test_a_lost_or_shortened_piece_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, {key: key for key in range(20)})
    path = tmp_path / run.entries[1].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContractError, match=run.entries[1].path):
        run.take(np.array([8]))
