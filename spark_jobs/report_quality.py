"""What a build holds, as figures and as a page with plots, and whether it is good enough to train on."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reclora_dist.config.schema import QualityConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import MANIFEST, ContractError, FileEntry, Manifest, add_file, read_manifest
from reclora_dist.contract.schema import EVENTS, QUALITY, SHARDS
from reclora_dist.contract.storage import Folder
from spark_jobs.days import added
from spark_jobs.report.drift import KEPT, comparable, drift
from spark_jobs.report.thresholds import Threshold, check_limits, thresholds
from spark_jobs.stage import Inputs, Job, Output, main, say

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

GOOD, FAILED = "quality", "failed"
"""Names, without suffix, of the report of a good build and of one that crossed a threshold."""


def check(config: QualityConfig, inputs: Inputs) -> tuple[QualityConfig, Inputs]:
    """Refuse limits that nothing can hold, and shards of other events.

    Raises:
        ValueError: as said.
        ContractError: the shards were made from another events dataset.
    """
    check_limits(config)
    made_from = inputs.manifests["shards"].parents.get("events", "")
    if made_from != inputs.parents["events"]:
        raise ContractError(
            f"{inputs.folders['shards'].uri!r} was made from events {made_from[:12]}…, not from these "
            f"({inputs.parents['events'][:12]}…). Run write_shards on these events."
        )
    return config, inputs


def run(spark: "SparkSession", config: QualityConfig, inputs: Inputs, out: Folder) -> Output:
    """Write ``quality.json`` and ``quality.html``.

    Raises:
        ValueError: a threshold is crossed; the report is then ``failed.json`` and ``failed.html``, and what was in
            ``out`` before stays.
    """
    previous = _previous(out)
    report = _measure(spark, inputs)
    if previous and not comparable(report["profile"], previous.facts["profile"]):
        say("report_quality", "no comparison with the previous build: only one of the two was built by days")
        previous = None
    moved = drift(report["profile"], previous.facts["profile"]) if previous else None
    report |= {"previous": previous.content_digest if previous else None, "drift": moved}
    limits = thresholds(config, report, moved)
    crossed = [str(limit) for limit in limits if limit.crossed]
    files = _write(out, FAILED if crossed else GOOD, report, limits)
    if crossed:
        told = "\n  ".join([f"the build crosses {len(crossed)} of its {len(limits)} thresholds:", *crossed])
        raise ValueError(f"{told}\nIts report: {out.path(FAILED)}.html")
    say("report_quality", f"all {len(limits)} thresholds hold; report: {out.path(GOOD)}.html")
    return Output(files, {name: report[name] for name in ("profile", "previous")})


def _previous(out: Folder) -> Manifest | None:
    """The report that this one replaces; the manifest has what is compared, so that a killed run loses nothing."""
    if not out.exists(MANIFEST):
        return None
    try:
        return read_manifest(out, QUALITY)
    except ContractError as error:
        say("report_quality", f"no comparison with the previous build: {error}")
        return None


def _measure(spark: "SparkSession", inputs: Inputs) -> dict[str, Any]:
    """The figures of the build, and the profile that the next one is compared with.

    Of a log built by days they are those of the days that this build added.
    """
    from spark_jobs.report.figures import figures, profile
    from spark_jobs.report.tally import event_parts, shard_parts, tally

    events, shards = inputs.manifests["events"], inputs.manifests["shards"]
    days = added(events.facts)
    parts = event_parts(inputs.folders["events"], events) + shard_parts(inputs.folders["shards"], shards, days)
    counted = tally(spark, parts, KEPT)
    report = figures(events, shards, counted)
    items = _by_position(counted.popular) if days else _named(spark, inputs, counted.popular)
    return {**report, "profile": profile(report, counted.counts["level"], items, len(days))}


def _by_position(items: Mapping[int, int]) -> dict[str, int]:
    """Items that were built by days keep their positions."""
    return {str(item): rows for item, rows in items.items()}


def _named(spark: "SparkSession", inputs: Inputs, items: Mapping[int, int]) -> dict[str, int]:
    """Item ids in place of positions."""
    import pyarrow as pa
    from pyspark.sql import functions as F

    from spark_jobs.parts import read_parts

    events = inputs.manifests["events"]
    whole = schema.items(len(events.facts["item_fields"]))
    columns = pa.schema([whole.field(name) for name in ("item", "item_id")])
    table = read_parts(spark, inputs.folders["events"], events.select("items/"), columns)
    found = {row["item"]: row["item_id"] for row in table.where(F.col("item").isin(list(items))).collect()}
    return {found[item]: rows for item, rows in items.items()}


def _write(out: Folder, name: str, report: Mapping[str, Any], limits: Sequence[Threshold]) -> list[FileEntry]:
    from spark_jobs.report.page import page

    judged = [
        {"name": t.name, "value": t.value, "limit": None if t.off else t.limit, "crossed": t.crossed} for t in limits
    ]
    content = json.dumps({**report, "thresholds": judged}, indent=1).encode()
    return [add_file(out, f"{name}.json", content), add_file(out, f"{name}.html", page(report, limits))]


JOB = Job(
    name="report_quality",
    summary=__doc__,
    config=QualityConfig,
    output=QUALITY,
    run=run,
    inputs={"events": "folder of the events", "shards": "folder of the shards"},
    formats={"events": EVENTS, "shards": SHARDS},
    prepare=check,
    fixed=frozenset(f"{name}.{suffix}" for name in (GOOD, FAILED) for suffix in ("json", "html")),
)


def cli(argv: Sequence[str] | None = None, keep: bool = False) -> int:
    """The job as a command; ``keep`` leaves Spark running for the next one."""
    return main(JOB, argv, keep)


if __name__ == "__main__":
    sys.exit(cli())
