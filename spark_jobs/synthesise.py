"""A generated raw log: people whose tastes only a long history shows, and items whose titles show their topic."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa

from reclora_dist.config.schema import SynthesiseConfig
from reclora_dist.contract.parts import write_part
from reclora_dist.contract.schema import RAW
from reclora_dist.contract.storage import Folder
from spark_jobs.stage import Inputs, Job, Output, main, say
from spark_jobs.transforms import generator

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS_PER_GROUP = 50_000
EVENTS_PER_PART = 50_000
"""Mean events per part; which users share a part depends on the configuration alone."""


def check(config: SynthesiseConfig, inputs: Inputs) -> tuple[SynthesiseConfig, Inputs]:
    """Refuse sizes that make no log.

    Raises:
        ValueError: a size is below 1, a share outside 0 to 1, or a spread negative.
    """
    for name in ("users", "items", "events_per_user", "days", "topics", "styles"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)} must be at least 1")
    if not 0 <= config.drift <= 1 or config.noise < 0:
        raise ValueError(f"drift = {config.drift} must lie in 0 to 1, noise = {config.noise} must not be negative")
    return config, inputs


def run(spark: "SparkSession", config: SynthesiseConfig, inputs: Inputs, out: Folder) -> Output:
    """Write the tables events, items and users."""
    from spark_jobs.parts import ENTRY, collect_entries, each_part

    users_per_part = max(1, EVENTS_PER_PART // config.events_per_user)
    count = -(-config.users // users_per_part)
    files = collect_entries(each_part(spark, count, partial(_write, out, config, users_per_part), ENTRY))
    files.append(write_part(out, "items/", 0, generator.world(config).items, ROWS_PER_GROUP))
    tables = ("events", "items", "users")
    counts = {table: sum(f.rows for f in files if f.path.startswith(f"{table}/")) for table in tables}
    say("synthesise", ", ".join(f"{table} {rows:,}" for table, rows in counts.items()))
    return Output(files, {"counts": counts})


def _write(folder: Folder, config: SynthesiseConfig, users_per_part: int, part: int) -> Iterator[pa.RecordBatch]:
    from spark_jobs.parts import entry_batch

    start, stop = part * users_per_part, min((part + 1) * users_per_part, config.users)
    events = generator.events_table(config, generator.world(config), start, stop)
    users = generator.users_table(config, start, stop)
    tables = (("events/", events), ("users/", users))
    yield entry_batch([write_part(folder, prefix, part, table, ROWS_PER_GROUP) for prefix, table in tables])


JOB = Job(
    name="synthesise", summary=__doc__, config=SynthesiseConfig, output=RAW, run=run, prepare=check
)  # fmt: skip


def cli(argv: Sequence[str] | None = None) -> int:
    """The job as a command."""
    return main(JOB, argv)


if __name__ == "__main__":
    sys.exit(cli())
