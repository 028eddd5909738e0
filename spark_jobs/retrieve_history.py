"""The past that each sample gets to see: its user's events before it, the most similar to the target or the newest."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa
import pyarrow.compute as pc

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract.manifest import ContractError
from reclora_dist.contract.parts import Rows, write_arrow_part
from reclora_dist.contract.runs import Run
from reclora_dist.contract.schema import EVENTS, HISTORIES, SPLITS, STATISTICS, VECTORS
from reclora_dist.contract.storage import Folder
from spark_jobs.days import previous_of
from spark_jobs.stage import Inputs, Job, Output, main, say
from spark_jobs.transforms import tasks as tasks_of
from spark_jobs.transforms.histories import histories, with_state
from spark_jobs.transforms.tasks import Task
from spark_jobs.transforms.vectors import COMPARES_VECTORS, SharedSimilarity, share

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS_PER_BATCH = 20_000
COLUMNS = ("sample_id", "user", "item", "time", "level", "label", "split", *STATISTICS)
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
    if min(config.long, config.short, config.candidates, config.block) < 1:
        raise ValueError(
            f"long = {config.long}, short = {config.short}, candidates = {config.candidates} and block = "
            f"{config.block} must be at least 1"
        )
    kept = inputs.manifests["events"].facts.get("keep", config.candidates)
    if config.candidates > kept:
        raise ValueError(
            f"candidates = {config.candidates:,}, but these events were built by days that keep the newest {kept:,} of "
            "a user: lower candidates, or build again from the first day with a larger keep"
        )
    if config.bits < 1 or config.bits % 64:
        raise ValueError(f"bits = {config.bits} must be a multiple of 64")
    if config.strategy in COMPARES_VECTORS and "vectors" not in inputs.folders:
        raise ValueError(f"strategy = {config.strategy} compares item vectors: give --vectors, or set strategy=recent")
    made_from = inputs.manifests["vectors"].parents.get("events") if "vectors" in inputs.manifests else None
    ancestors = inputs.manifests["events"].facts.get("ancestors", [])
    if made_from is not None and made_from not in (inputs.parents["events"], *ancestors):
        raise ContractError(
            f"{inputs.folders['vectors'].uri!r} was made from events {made_from[:12]}…, not from these "
            f"({inputs.parents['events'][:12]}…). Run `embed` on these events."
        )
    return config, inputs


def run(spark: "SparkSession", config: RetrievalConfig, inputs: Inputs, out: Folder) -> Output:
    """Write one part of histories per task; tasks are cut by cost, so a hot user's events lie in many."""
    from spark_jobs.parts import each_part, entries_of

    events = inputs.manifests["events"]
    earlier = previous_of(inputs.folders["events"], events)
    shared = share(spark, config, inputs.folders, inputs.manifests)
    entries = events.select("events/")
    tasks = tasks_of.plan(spark, inputs.folders["events"], entries, config.candidates)
    state = tuple(earlier.runs["state"]) if earlier else ()
    rows = Rows(inputs.folders["events"], entries)
    job = Retrieval(rows, tasks, shared, config, events.facts["min_history"], out, state, events.facts.get("keep", 0))
    written = each_part(spark, len(tasks), job.write, RESULT).collect()
    counts = {split: sum(row[split] for row in written) for split in SPLITS}
    say("retrieve_history", ", ".join(f"{split} {rows:,}" for split, rows in counts.items()) + f", {config.strategy}")
    facts = {"long": config.long, "short": config.short, "strategy": config.strategy, "counts": counts}
    return Output(entries_of(written), facts)


@dataclass(frozen=True)
class Retrieval:
    """What a task needs, and travels to executors."""

    log: Rows
    tasks: Sequence[Task]
    shared: SharedSimilarity
    config: RetrievalConfig
    min_history: int
    out: Folder
    state: Sequence[Run]
    keep: int

    def write(self, number: int) -> Iterator[pa.RecordBatch]:
        """Do task ``number``: one row of the schema RESULT, none if the task has no sample."""
        from spark_jobs.parts import entry_batch

        counts = Counter[str]()
        found = self._retrieved(number, counts)
        for first in found:
            part = write_arrow_part(self.out, "histories/", number, chain([first], found), ROWS_PER_BATCH)
            batch = entry_batch([part])
            for split in SPLITS:
                batch = batch.append_column(split, pa.array([counts[split]], pa.int64()))
            yield batch

    def _retrieved(self, number: int, counts: Counter[str]) -> Iterator[pa.Table]:
        """The histories of task ``number``, some at a time; ``counts`` gets the samples of each split."""
        events, own = tasks_of.read_with_past(self.log, self.tasks[number], self.config.candidates, COLUMNS)
        similarity = self.shared.open()
        pieces = with_state(events, own, self.state, self.keep) if self.state else [(events, own)]
        for piece in pieces:
            for table in histories(*piece, similarity, self.config, self.min_history):
                for split in SPLITS:
                    counts[split] += pc.sum(pc.equal(table["split"], split).cast(pa.int64())).as_py()
                yield table


JOB = Job(
    name="retrieve_history",
    summary=__doc__,
    config=RetrievalConfig,
    output=HISTORIES,
    run=run,
    inputs={"events": "folder of the events", "vectors": "folder of the item vectors (semantic and simhash need them)"},
    optional=frozenset({"vectors"}),
    formats={"events": EVENTS, "vectors": VECTORS},
    prepare=check,
)


def cli(argv: Sequence[str] | None = None, keep: bool = False) -> int:
    """The job as a command; ``keep`` leaves Spark running for the next one."""
    return main(JOB, argv, keep)


if __name__ == "__main__":
    sys.exit(cli())
