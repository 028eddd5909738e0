"""The same shards by a straightforward script: Polars numbers, sorts and counts; numpy retrieves, user by user.

python benchmarks/rivals/polars_numpy.py RAW VECTORS OUT
"""

import sys
from pathlib import Path

import numpy as np
import polars as pl
from common import LIKE, MIN_HISTORY, ROWS_PER_FILE, histories, shard, write


def main(raw: str, vectors: str, out: str) -> None:
    """Raw events to CRM shards, in files of about ROWS_PER_FILE rows."""
    table = np.load(vectors)
    events = number(pl.read_parquet(f"{raw}/events/**/*.parquet"))
    events = counted(events).sort("user", "time", "item")
    columns = {name: events[name].to_numpy() for name in events.columns}
    starts = np.flatnonzero(np.diff(columns["user"], prepend=-1))
    Path(out).mkdir(parents=True, exist_ok=True)
    pieces, rows, files = [], 0, 0
    for start, stop in zip(starts, np.append(starts[1:], len(events)), strict=True):
        pieces.append(of_user({name: values[start:stop] for name, values in columns.items()}, table))
        rows += pieces[-1].num_rows
        if rows >= ROWS_PER_FILE or stop == len(events):
            import pyarrow as pa

            write(Path(out), files, pa.concat_tables(pieces))
            pieces, rows, files = [], 0, files + 1


def number(events: pl.DataFrame) -> pl.DataFrame:
    """Positions by first appearance, time in milliseconds, label and level."""
    events = events.with_columns(pl.col("timestamp") * 1000)
    for key, name in (("user_id", "user"), ("item_id", "item")):
        first = events.group_by(key).agg(pl.col("timestamp").min()).sort("timestamp", key).select(key)
        places = first.with_row_index(name, offset=1).with_columns(pl.col(name).cast(pl.Int32))
        events = events.join(places, on=key)
    return events.select(
        "user", "item", pl.col("timestamp").alias("time"), pl.col("rating").cast(pl.Int8).alias("level"),
        (pl.col("rating") >= LIKE).cast(pl.Int8).alias("label"),
    )  # fmt: skip


def counted(events: pl.DataFrame) -> pl.DataFrame:
    """Events and likes of item and user strictly before each event."""
    for key in ("item", "user"):
        moments = (
            events.group_by(key, "time").agg(pl.len().alias("n"), pl.col("label").cast(pl.Int64).sum().alias("l"))
            .sort(key, "time")
            .with_columns(
                (pl.col("n").cum_sum().over(key) - pl.col("n")).alias(f"{key}_events"),
                (pl.col("l").cum_sum().over(key) - pl.col("l")).alias(f"{key}_likes"),
            )
            .drop("n", "l")
        )  # fmt: skip
        events = events.join(moments, on=[key, "time"])
    return events


def of_user(log: dict[str, np.ndarray], vectors: np.ndarray):  # type: ignore[no-untyped-def]
    """The samples of one user as shard rows."""
    earlier, index = histories(vectors, log["item"], log["time"])
    rows = np.flatnonzero(earlier >= MIN_HISTORY)
    names = ("item_events", "item_likes", "user_events", "user_likes")
    columns = {
        "sample_id": (log["user"].astype(np.int64) << 32 | np.arange(len(earlier)))[rows],
        **{name: log[name][rows] for name in ("user", "item", "time", "label")},
        "statistics": np.stack([log[name][rows] for name in names], axis=1),
    }
    return shard(columns, log["level"], log["item"], index[rows])


if __name__ == "__main__":
    main(*sys.argv[1:])
