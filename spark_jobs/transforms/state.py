"""What a build by days leaves for the next day: the users' states, and who has which position."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from reclora_dist.config.schema import EventsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.parts import Rows
from reclora_dist.contract.runs import Run, absorbed, find, merged, pieces, ranges, take, write_piece
from reclora_dist.contract.storage import Folder
from spark_jobs.days import RUNS, Before, lasting, named
from spark_jobs.parts import ENTRY, by_part, collect_entries, each_part, entry_batch
from spark_jobs.privacy import Privacy
from spark_jobs.stage import Output
from spark_jobs.transforms.private import deleted_ids
from spark_jobs.transforms.profiles import Profiles
from spark_jobs.transforms.user_states import EVENTS_AT_ONCE, few, states, whole_users

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS_PER_PIECE = 250_000
"""Rows of a piece of the vocabulary, about."""

BYTES_AT_ONCE = 1 << 26
"""Of files that are merged in one task, about."""


def keep(
    spark: "SparkSession", config: EventsConfig, out: Folder, events: Sequence[FileEntry], profiles: Profiles,
    users: DataFrame, before: Before | None, privacy: Privacy, gone: Sequence[int],
) -> Output:  # fmt: skip
    """Write what the next day needs to know.

    Args:
        events: parts of the events of this build, in ``out``.
        profiles: fields of this build's users.
        users: its new users, with user_id and user.
        before: what the days before left.
        privacy: with the key of this build's user ids.
        gone: users of whom nothing may be kept.

    Returns:
        Files, and the facts that a build by days has besides.
    """
    older = before.runs if before else dict.fromkeys(RUNS, ())
    work = partial(_states, out, tuple(events), profiles, config.keep, tuple(older["state"]))
    new = {
        "state": collect_entries(each_part(spark, len(events), work, ENTRY)),
        "vocabulary": _write_vocabulary(users, out),
    }
    known = set(before.facts["forgotten"]) if before else set()
    files, runs = [], {}
    for table, entries in new.items():
        run = Run(out, entries, RUNS[table])
        due = len(older[table]) if set(gone) - known else absorbed(len(run), [len(old) for old in older[table]])
        files += _merged(spark, out, table, [run, *older[table][:due]], gone) if due else entries
        runs[table] = [named(old, out) for old in older[table][due:]]
    facts = {
        "days": [before.facts["days"][0] if before else config.source.days[0], config.source.days[1]],
        "added": list(config.source.days),
        "lasting": lasting(config, privacy),
        "keep": config.keep,
        "previous": named(before.folder, out) if before else None,
        "ancestors": [*before.facts["ancestors"], before.manifest.content_digest] if before else [],
        "runs": runs,
        "forgotten": sorted(known | set(gone)),
    }
    return Output(files, facts)


def forgotten(spark: "SparkSession", privacy: Privacy, before: Before | None) -> list[int]:
    """Positions of the users on the delete list whom the days before know."""
    if before is None or not privacy.deleted:
        return []
    vocabulary = before.runs["vocabulary"]

    def look(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            _, rows = take(vocabulary, find(vocabulary, batch["key"].to_numpy(), batch["user_id"], "user_id"))
            yield from rows.select(["user"]).to_batches()

    found = deleted_ids(spark, privacy).withColumn("key", F.xxhash64("user_id")).mapInArrow(look, "user bigint")
    return sorted(row["user"] for row in found.collect())


def _merged(
    spark: "SparkSession", out: Folder, table: str, runs: Sequence[Run], gone: Sequence[int]
) -> list[FileEntry]:
    """Write several runs, newest first, as one."""
    runs = [run for run in runs if len(run)]
    spans = ranges(runs, BYTES_AT_ONCE) if runs else []
    without = np.array(gone, np.int64)

    def merge(index: int) -> Iterator[pa.RecordBatch]:
        rows, key = merged(runs, *spans[index], table == "state", without), RUNS[table]
        found = pieces(rows, key, _sizes(rows), EVENTS_AT_ONCE)
        yield entry_batch([write_piece(out, f"{table}/", piece, key) for piece in found])

    return collect_entries(each_part(spark, len(spans), merge, ENTRY))


def _sizes(rows: pa.Table) -> NDArray[np.int64]:
    """What each row counts of the EVENTS_AT_ONCE that a piece may have: a state its events, others all the same."""
    if "items" not in rows.column_names:
        return np.full(rows.num_rows, EVENTS_AT_ONCE // ROWS_PER_PIECE)
    counts: NDArray[np.int64] = pc.list_value_length(rows["items"]).to_numpy() + 1
    return counts


def _write_vocabulary(users: DataFrame, out: Folder) -> list[FileEntry]:
    """New users by the hash of their id; pieces are ranges of the hash, so what they hold follows from the ids."""
    bits = max(0, int(users.count() // ROWS_PER_PIECE).bit_length())
    key = F.xxhash64("user_id")
    part = (F.shiftright(key, 63 - bits).cast("int") + (1 << bits)) if bits else F.lit(0)
    keyed = users.select(key.alias("key"), "user_id", F.col("user").cast("bigint").alias("user"), part.alias("part"))
    spread = keyed.repartitionById(2 << bits, "part").sortWithinPartitions("part", "key", "user_id")

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _, table in by_part(batches):
            whole = table.select(schema.vocabulary.names).cast(schema.vocabulary)
            yield entry_batch([write_piece(out, "vocabulary/", whole, "key")])

    return collect_entries(spread.mapInArrow(write, ENTRY))


def _states(
    out: Folder, events: Sequence[FileEntry], profiles: Profiles, limit: int, older: Sequence[Run], part: int
) -> Iterator[pa.RecordBatch]:
    """The states of the users whose events begin in a part."""
    log = whole_users(Rows(out, events), part)
    if log is None:
        return
    users = np.unique(log["user"])
    for some in few(users, older, limit):
        first, last = users[some][[0, -1]]
        rows = slice(np.searchsorted(log["user"], first), np.searchsorted(log["user"], last, "right"))
        table = states({name: values[rows] for name, values in log.items()}, profiles, limit, older)
        yield entry_batch([write_piece(out, "state/", table, "user")])
