"""What the straightforward scripts share: the numpy kernel per user, and the shard they all write."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

K = 60
MIN_HISTORY = 5
ROWS_PER_FILE = 400_000
LIKE = 4.0


def histories(vectors: np.ndarray, items: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One user's events, sorted: events strictly before each, and its K most similar, oldest first, -1 padded."""
    n = len(items)
    earlier = np.searchsorted(times, times, side="left")
    own = vectors[items]
    keys = (np.rint(own @ own.T * 2.0**24).astype(np.int64) << 32) | np.arange(n)
    keys[np.arange(n) >= earlier[:, None]] = -1 << 62
    k = min(K, n)
    best = np.argpartition(keys, n - k, axis=1)[:, n - k :]
    real = np.take_along_axis(keys, best, axis=1) > -1 << 62
    best = np.sort(np.where(real, best, n), axis=1)
    index = np.full((n, K), -1, np.int64)
    index[:, :k] = np.where(best < n, best, -1)
    return earlier, index


def shard(columns: dict[str, np.ndarray], levels: np.ndarray, items: np.ndarray, index: np.ndarray) -> pa.Table:
    """Rows with their long history; ``index`` points into ``items`` and ``levels``."""
    real = index >= 0
    table = {name: pa.array(values) for name, values in columns.items() if name != "statistics"}
    table["statistics"] = pa.FixedSizeListArray.from_arrays(pa.array(columns["statistics"].ravel(), pa.float32()), 4)
    for name, values, kind in (("items", items, pa.int32()), ("levels", levels, pa.int8())):
        flat = pa.array(np.where(real, values[index], 0).ravel(), kind)
        table[f"long_{name}"] = pa.FixedSizeListArray.from_arrays(flat, K)
    table["long_length"] = pa.array(real.sum(axis=1), pa.int32())
    return pa.table(table)


def write(folder: Path, number: int, table: pa.Table) -> None:
    """One file of shards."""
    pq.write_table(table, folder / f"part-{number:05d}.parquet", row_group_size=20_000, compression="zstd")
