"""Sorted runs: a few rows found among many, the newest first, and merged without losing any."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.contract.manifest import ContractError
from reclora_dist.contract.runs import Run, absorbed, find, merged, take, write_piece
from reclora_dist.contract.storage import Folder

Rows = dict[int, int]
rows_strategy = st.dictionaries(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9), st.integers(0, 99), max_size=30)
NONE = np.zeros(0, np.int64)


def run_of(folder: Path, rows: Rows, piece: int = 7) -> Run:
    """A run of (key, user) in pieces of a few rows."""
    target, pairs = Folder(str(folder)), sorted(rows.items())
    pieces = [pairs[start : start + piece] for start in range(0, len(pairs), piece)]
    tables = [pa.table({"key": [k for k, _ in part], "user": [u for _, u in part]}) for part in pieces]
    return Run(target, [write_piece(target, "run/", i, table, "key") for i, table in enumerate(tables)], "key")


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
    runs = [Run(folder, [write_piece(folder, "run/", 0, table, "key")], "key")]
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


def test_a_lost_or_shortened_piece_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, {key: key for key in range(20)})
    path = tmp_path / run.entries[1].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ContractError, match="part-00000001"):
        run.take(np.array([8]))
