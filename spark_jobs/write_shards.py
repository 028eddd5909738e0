"""Events and histories to training files: CRM shards of all samples, text shards of those the language model gets."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reclora_dist.config.schema import ShardsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import ContractError, Manifest
from reclora_dist.contract.schema import EVENTS, HISTORIES, SHARDS
from reclora_dist.contract.storage import Folder
from spark_jobs.stage import Inputs, Job, Output, main, say

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.transforms.shards import Layout, Shape

COPIED = ("rating_levels", "level_likes", "user_fields", "item_fields", "users", "items", "split", "min_history")
"""Facts of the events that readers of shards need, too."""


def check(config: ShardsConfig, inputs: Inputs) -> tuple[ShardsConfig, Inputs]:
    """Refuse sizes that make no files, and histories of other events.

    Raises:
        ValueError: as said.
        ContractError: the histories were made from another events dataset.
    """
    if min(config.rows_per_file, config.rows_per_group) < 1:
        raise ValueError(
            f"rows_per_file = {config.rows_per_file} and rows_per_group = {config.rows_per_group} start at 1"
        )
    if min(config.text_train, config.text_validation, config.text_test) < 0:
        raise ValueError("text_train, text_validation and text_test are shares or numbers, not negative ones")
    made_from = inputs.manifests["histories"].parents.get("events", "")
    if made_from != inputs.parents["events"]:
        raise ContractError(
            f"{inputs.folders['histories'].uri!r} was made from events {made_from[:12]}…, not from these "
            f"({inputs.parents['events'][:12]}…). Run retrieve_history on these events."
        )
    return config, inputs


def run(spark: "SparkSession", config: ShardsConfig, inputs: Inputs, out: Folder) -> Output:
    """Write ``crm/split=*/`` and ``text/split=*/``."""
    from spark_jobs.parts import ENTRY, collect_entries, each_part
    from spark_jobs.transforms import shards

    events, past = inputs.manifests["events"], inputs.manifests["histories"]
    shape = shards.Shape(len(events.facts["user_fields"]), past.facts["long"], past.facts["short"])
    counts = past.facts["counts"]
    entries = past.select("histories/")
    samples = _samples(spark, inputs)
    layout = shards.plan(samples, config, counts)
    read = partial(shards.packed_part, inputs.folders["histories"], entries, shape)
    left = shards.placed(each_part(spark, len(entries), read, shards.PACKED), layout)
    right = shards.placed(samples, layout)
    grouped = left.groupBy(*shards.KEY).cogroup(right.groupBy(*shards.KEY))
    files = collect_entries(grouped.applyInArrow(partial(shards.assemble, out, shape, config.rows_per_group), ENTRY))
    facts = _facts(events, past, layout, shape)
    _verify(files, facts)
    say("write_shards", f"CRM {facts['crm']}, text {facts['text']}")
    return Output(files, facts)


def _only(whole: Any, *names: str) -> Any:
    import pyarrow as pa

    return pa.schema([whole.field(name) for name in names])


def _samples(spark: "SparkSession", inputs: Inputs) -> "DataFrame":
    """All samples with label, user fields and statistics."""
    from pyspark.sql import functions as F

    from spark_jobs.parts import read_parts
    from spark_jobs.transforms.settle import joinable, settle
    from spark_jobs.transforms.statistics import with_statistics

    manifest, folder = inputs.manifests["events"], inputs.folders["events"]
    columns = _only(schema.events, "sample_id", "user", "item", "time", "label", "split")
    events = read_parts(spark, folder, manifest.select("events/"), columns)
    profile = _only(schema.users(len(manifest.facts["user_fields"])), "user", "fields")
    users = read_parts(spark, folder, manifest.select("users/"), profile).withColumnRenamed("fields", "user_fields")
    counted = with_statistics(events, per_user=manifest.facts["split"] == "per_user")
    samples = counted.where(F.col("earlier") >= manifest.facts["min_history"]).drop("earlier")
    return settle(samples.join(joinable(users, manifest.facts["users"]), "user"))


def _facts(events: Manifest, past: Manifest, layout: "Layout", shape: "Shape") -> dict[str, Any]:
    return {
        **{name: events.facts[name] for name in COPIED},
        "long": shape.long,
        "short": shape.short,
        "strategy": past.facts["strategy"],
        "crm": {split: layout.rows[split] for split in schema.SPLITS},
        "text": {split: layout.text[split] for split in schema.SPLITS},
    }


def _verify(files: Sequence[Any], facts: Mapping[str, Any]) -> None:
    """Every sample must have arrived in its files."""
    for kind in ("crm", "text"):
        for split, wanted in facts[kind].items():
            found = sum(entry.rows for entry in files if entry.path.startswith(f"{kind}/split={split}/"))
            if found != wanted:
                raise ContractError(
                    f"{kind}/split={split} has {found} rows, not {wanted}: events and histories do not hold the same "
                    "samples. Run retrieve_history on these events."
                )


JOB = Job(
    name="write_shards",
    summary=__doc__,
    config=ShardsConfig,
    output=SHARDS,
    run=run,
    inputs={"events": "folder of the events", "histories": "folder of the histories"},
    formats={"events": EVENTS, "histories": HISTORIES},
    prepare=check,
)


def cli(argv: Sequence[str] | None = None) -> int:
    """The job as a command."""
    return main(JOB, argv)


if __name__ == "__main__":
    sys.exit(cli())
