"""A generated raw log: people whose tastes only a long history shows, and items whose titles show their topic."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa

from reclora_dist.config.schema import SynthesiseConfig
from reclora_dist.contract.parts import write_part
from reclora_dist.contract.schema import RAW
from reclora_dist.contract.storage import Folder
from spark_jobs.stage import Inputs, Job, Output, main, say
from spark_jobs.transforms import dirt, generator
from spark_jobs.transforms.plan import DAY, Plan, plan_of, portion

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS_PER_GROUP = 250_000
PROFILES_PER_PART = 250_000
"""Rows of a part of the item or user table, at most."""

_RANGES = {
    "days": (1, 20_000),
    "drift": (0, 1),
    "noise": (0, 100),
    "personal": (0, 10),
    "activity_exponent": (1.05, 100),
    "popularity_exponent": (0, 1.5),
    "heavy_user": (0, 0.9),
    "dirt": (0, 1),
}


def check(config: SynthesiseConfig, inputs: Inputs) -> tuple[SynthesiseConfig, Inputs]:
    """Refuse sizes that make no log.

    Raises:
        ValueError: a size is below 1, a number outside its range, or the heavy user has too many events for the days.
    """
    for name in ("users", "items", "events_per_user", "topics", "styles"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)} must be at least 1")
    for name, (least, most) in _RANGES.items():
        if not least <= getattr(config, name) <= most:
            raise ValueError(f"{name} = {getattr(config, name)} must lie in {least} to {most}")
    if config.heavy_user:
        _check_heavy_user(config)
    return config, inputs


def _check_heavy_user(config: SynthesiseConfig) -> None:
    if config.users < 2:
        raise ValueError(f"heavy_user = {config.heavy_user} of all events needs users of at least 2")
    events = plan_of(config).heavy_events
    if 2 * events > config.days * DAY:
        raise ValueError(
            f"heavy_user = {config.heavy_user} gives user 1 {events:,} events, more than one in two seconds of "
            f"days = {config.days}. Lower heavy_user or raise days."
        )


def run(spark: "SparkSession", config: SynthesiseConfig, inputs: Inputs, out: Folder) -> Output:
    """Write the tables events, items and users."""
    from spark_jobs.parts import ENTRY, collect_entries, each_part

    log = plan_of(config)
    parts = {"events": log.parts, "items": _profile_parts(config.items), "users": _profile_parts(config.users)}
    tasks = [(table, part) for table, count in parts.items() for part in range(count)]
    files = collect_entries(each_part(spark, len(tasks), partial(_write, out, log, tasks), ENTRY))
    counts = {table: sum(f.rows for f in files if f.path.startswith(f"{table}/")) for table in parts}
    bad = {reason: rows for table in parts for reason, rows in dirt.planned(log, table).items()}
    say("synthesise", ", ".join(f"{table} {rows:,}" for table, rows in counts.items()))
    return Output(files, {"counts": counts, "dirt": bad})


def _profile_parts(rows: int) -> int:
    return -(-rows // PROFILES_PER_PART)


def _write(folder: Folder, log: Plan, tasks: Sequence[tuple[str, int]], index: int) -> Iterator[pa.RecordBatch]:
    from spark_jobs.parts import entry_batch

    table, part = tasks[index]
    found = {"events": _events, "items": _items, "users": _users}[table](log, part)
    yield entry_batch([write_part(folder, prefix, part, rows, ROWS_PER_GROUP) for prefix, rows in found.items()])


def _events(log: Plan, part: int) -> dict[str, pa.Table]:
    """The events of a part by the folder that they go to."""
    found = defaultdict(list)
    for piece in log.pieces_of(part):
        rows = generator.events_table(generator.events(log, generator.world(log.config), piece), log.config.truth)
        rows = dirt.with_bad_events(log, rows, piece) if log.config.dirt else rows
        for prefix, table in _by_day(rows) if log.config.by_day else [("events/", rows)]:
            found[prefix].append(table.drop_columns("day"))
    return {prefix: pa.concat_tables(tables) for prefix, tables in sorted(found.items())}


def _by_day(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Rows per day in their old order."""
    day = rows["day"].to_numpy()
    order = np.argsort(day, kind="stable")
    ordered, day = rows.take(pa.array(order)), day[order]
    cuts = [0, *(np.flatnonzero(np.diff(day)) + 1).tolist(), len(day)]
    for start, stop in pairwise(cuts):
        yield f"events/date={np.datetime64(int(day[start]), 'D')}/", ordered.slice(start, stop - start)


def _items(log: Plan, part: int) -> dict[str, pa.Table]:
    parts = _profile_parts(log.config.items)
    rows = generator.items_table(log.config, *portion(log.config.items, part, parts))
    return {"items/": dirt.with_bad_items(log, rows, part, parts) if log.config.dirt else rows}


def _users(log: Plan, part: int) -> dict[str, pa.Table]:
    parts = _profile_parts(log.config.users)
    rows = generator.users_table(log.config, *portion(log.config.users, part, parts))
    return {"users/": dirt.with_bad_users(log, rows, part, parts) if log.config.dirt else rows}


JOB = Job(
    name="synthesise", summary=__doc__, config=SynthesiseConfig, output=RAW, run=run, prepare=check
)  # fmt: skip


def cli(argv: Sequence[str] | None = None, keep: bool = False) -> int:
    """The job as a command; ``keep`` leaves Spark running for the next one."""
    return main(JOB, argv, keep)


if __name__ == "__main__":
    sys.exit(cli())
