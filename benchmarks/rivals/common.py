"""What the straightforward scripts share: the numpy kernel per user, and the shards they write."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

K = 60
CANDIDATES = 10_000
MIN_HISTORY = 5
ROWS_PER_FILE = 400_000
LIKE = 4.0
COUNTS = ("item_events", "item_likes", "user_events", "user_likes")
TARGETS = 512
"""Targets of a user that are compared with its events together."""


def write_users(log: dict[str, np.ndarray], vectors: str, out: str) -> None:
    """Shards of a whole log, sorted by user, time and item; in files of about ROWS_PER_FILE rows."""
    table = np.load(vectors)
    starts = np.flatnonzero(np.diff(log["user"], prepend=-1))
    stops = np.append(starts[1:], len(log["user"]))
    Path(out).mkdir(parents=True, exist_ok=True)
    pieces, rows, files = [], 0, 0
    for start, stop in zip(starts, stops, strict=True):
        pieces.append(of_user({name: values[start:stop] for name, values in log.items()}, table))
        rows += pieces[-1].num_rows
        if rows >= ROWS_PER_FILE or stop == stops[-1]:
            whole = pa.concat_tables(pieces)
            pq.write_table(whole, f"{out}/part-{files:05d}.parquet", row_group_size=20_000, compression="zstd")
            pieces, rows, files = [], 0, files + 1


def of_user(log: dict[str, np.ndarray], vectors: np.ndarray) -> pa.Table:
    """The samples of one user, its events in order, as rows of a CRM shard."""
    earlier = np.searchsorted(log["time"], log["time"], side="left")
    rows = np.flatnonzero(earlier >= MIN_HISTORY)
    blocks = [rows[start : start + TARGETS] for start in range(0, len(rows), TARGETS)]
    found = [most_similar(vectors, log["item"], earlier, block) for block in blocks]
    index = np.concatenate(found) if found else np.zeros((0, K), np.int64)
    columns = {
        "sample_id": pa.array((log["user"].astype(np.int64) << 32 | np.arange(len(earlier)))[rows]),
        **{name: pa.array(log[name][rows]) for name in ("user", "item", "time", "label")},
        "statistics": _lists(np.stack([log[name][rows] for name in COUNTS], axis=1), pa.float32()),
    }
    for name, values, kind in (("items", log["item"], pa.int32()), ("levels", log["level"], pa.int8())):
        columns[f"long_{name}"] = _lists(np.where(index >= 0, values[index], 0), kind)
    return pa.table({**columns, "long_length": pa.array((index >= 0).sum(axis=1), pa.int32())})


def most_similar(vectors: np.ndarray, items: np.ndarray, earlier: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Per target the places of its K most similar events before it, oldest first, -1 at the end.

    One integer per pair, score above place, makes a newer event win a tie.
    """
    n = int(earlier[rows[-1]])
    first = max(0, int(earlier[rows[0]]) - CANDIDATES)
    place = np.arange(first, n)
    scores = vectors[items[rows]] @ vectors[items[first:n]].T
    keys = (np.rint(scores * 2.0**24).astype(np.int64) << 32) | place
    stop = earlier[rows][:, None]
    keys[(place >= stop) | (place < stop - CANDIDATES)] = -1 << 62
    k = min(K, n - first)
    best = np.argpartition(keys, n - first - k, axis=1)[:, n - first - k :]
    real = np.take_along_axis(keys, best, axis=1) > -1 << 62
    best = np.sort(np.where(real, best + first, n), axis=1)
    index = np.full((len(rows), K), -1, np.int64)
    index[:, :k] = np.where(best < n, best, -1)
    return index


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind), values.shape[1])
