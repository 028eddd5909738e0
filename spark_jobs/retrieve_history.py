"""The past that each sample gets to see: its user's events before it, the most similar to the target or the newest."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.compute as pc

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import ContractError, FileEntry
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.schema import EVENTS, HISTORIES, SPLITS, VECTORS
from reclora_dist.contract.storage import Folder
from spark_jobs.stage import Inputs, Job, Output, main, say
from spark_jobs.transforms.histories import histories
from spark_jobs.transforms.vectors import SharedVectors, share

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS_PER_GROUP = 20_000
RESULT = ", ".join(
    ["path string, row_groups array<bigint>, bytes bigint, sha256 string", *[f"{s} bigint" for s in SPLITS]]
)
"""Spark schema of a written file and its rows per split."""


def check(config: RetrievalConfig, inputs: Inputs) -> tuple[RetrievalConfig, Inputs]:
    """Refuse lengths below 1, missing vectors, and vectors of other events.

    Raises:
        ValueError: as said.
        ContractError: the vectors were made from another events dataset.
    """
    if min(config.long, config.short, config.block) < 1:
        raise ValueError(f"long = {config.long}, short = {config.short}, block = {config.block} must be at least 1")
    if config.strategy == "semantic" and "vectors" not in inputs.folders:
        raise ValueError("strategy = semantic compares item vectors: give --vectors, or set strategy=recent")
    made_from = inputs.manifests["vectors"].parents.get("events") if "vectors" in inputs.manifests else None
    if made_from is not None and made_from != inputs.parents["events"]:
        raise ContractError(
            f"{inputs.folders['vectors'].uri!r} was made from events {made_from[:12]}…, not from these "
            f"({inputs.parents['events'][:12]}…). Run `embed` on these events."
        )
    return config, inputs


def run(spark: "SparkSession", config: RetrievalConfig, inputs: Inputs, out: Folder) -> Output:
    """Write one part of histories per part of events."""
    from spark_jobs.parts import each_part, entries_of

    events = inputs.manifests["events"]
    shared = None
    if config.strategy == "semantic":
        shared = share(spark, inputs.folders["vectors"], inputs.manifests["vectors"], events.facts["items"])
    entries = events.select("events/")
    work = partial(_write, inputs.folders["events"], entries, shared, config, events.facts["min_history"], out)
    written = each_part(spark, len(entries), work, RESULT).collect()
    counts = {split: sum(row[split] for row in written) for split in SPLITS}
    say("retrieve_history", ", ".join(f"{split} {rows:,}" for split, rows in counts.items()) + f", {config.strategy}")
    facts = {"long": config.long, "short": config.short, "strategy": config.strategy, "counts": counts}
    return Output(entries_of(written), facts)


def _write(
    folder: Folder,
    entries: Sequence[FileEntry],
    shared: SharedVectors | None,
    config: RetrievalConfig,
    min_history: int,
    out: Folder,
    part: int,
) -> Iterator[pa.RecordBatch]:
    from spark_jobs.parts import entry_batch

    events = read_parts(folder, [entries[part]], schema.events.names)
    found = histories(events, shared.open() if shared else None, config, min_history)
    if found.num_rows == 0:
        return
    batch = entry_batch([write_part(out, "histories/", part, found, ROWS_PER_GROUP)])
    for split in SPLITS:
        rows = pc.sum(pc.equal(found["split"], split).cast(pa.int64())).as_py()
        batch = batch.append_column(split, pa.array([rows], pa.int64()))
    yield batch


JOB = Job(
    name="retrieve_history",
    summary=__doc__,
    config=RetrievalConfig,
    output=HISTORIES,
    run=run,
    inputs={"events": "folder of the events", "vectors": "folder of the item vectors (strategy=recent does without)"},
    optional=frozenset({"vectors"}),
    formats={"events": EVENTS, "vectors": VECTORS},
    prepare=check,
)


def cli(argv: Sequence[str] | None = None) -> int:
    """The job as a command."""
    return main(JOB, argv)


if __name__ == "__main__":
    sys.exit(cli())
