"""The same shards by a straightforward script: Polars numbers, sorts and counts; numpy retrieves, user by user.

python benchmarks/rivals/polars_numpy.py RAW VECTORS OUT
"""

import sys

import polars as pl
from common import LIKE, write_users


def main(raw: str, vectors: str, out: str) -> None:
    """Raw events to CRM shards."""
    events = counted(number(pl.read_parquet(f"{raw}/events/**/*.parquet"))).sort("user", "time", "item")
    write_users({name: events[name].to_numpy() for name in events.columns}, vectors, out)


def number(events: pl.DataFrame) -> pl.DataFrame:
    """Positions by first appearance, time in milliseconds, label and level."""
    events = events.with_columns((pl.col("timestamp") * 1000).alias("time"))
    for key, name in (("user_id", "user"), ("item_id", "item")):
        first = events.group_by(key).agg(pl.col("time").min()).sort("time", key).select(key)
        places = first.with_row_index(name, offset=1).with_columns(pl.col(name).cast(pl.Int32))
        events = events.join(places, on=key)
    return events.select(
        "user", "item", "time", pl.col("rating").cast(pl.Int8).alias("level"),
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


if __name__ == "__main__":
    main(*sys.argv[1:])
