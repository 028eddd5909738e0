"""Events and histories to training files: CRM shards of all samples, text shards of those the language model gets."""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pyarrow as pa

from reclora_dist.config.schema import ShardsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import ContractError, Manifest
from reclora_dist.contract.schema import EVENTS, HISTORIES, SHARDS
from reclora_dist.contract.storage import Folder
from spark_jobs.stage import Inputs, Job, Output, main, say

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COPIED = ("rating_levels", "level_likes", "user_fields", "item_fields", "users", "items", "split", "min_history")
"""Facts of the events that readers of shards need, too."""


def check(config: ShardsConfig, inputs: Inputs) -> tuple[ShardsConfig, Inputs]:
    """Refuse sizes that make no files, and histories of other events.

    Raises:
        ValueError: as said.
        ContractError: the histories were made from another events dataset.
    """
    if config.rows_per_file < 1 or config.rows_per_group < 0:
        raise ValueError(
            f"rows_per_file = {config.rows_per_file} starts at 1, rows_per_group = {config.rows_per_group} at 0"
        )
    if min(config.text.values()) < 0:
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
    entries, folder = past.select("histories/"), inputs.folders["histories"]
    shape = shards.Shape(len(events.facts["user_fields"]), past.facts["long"], past.facts["short"])
    text, limits = _text(spark, config, past, folder)
    crm = past.facts["counts"]
    layout = shards.Layout(config.seed, _files(crm, config), _files(text, config), limits)
    profiles = shards.Profiles(inputs.folders["events"], events.select("users/"), shape.user_fields)
    cut = partial(shards.blocks, folder, entries, profiles, layout, shape)
    blocks = each_part(spark, len(entries), cut, shards.BLOCK)

    def write(key: tuple[pa.Scalar, ...], found: pa.Table) -> pa.Table:  # Spark reads these hints: no partial here
        return shards.assemble(out, shape, config.rows_per_group, config.seed, key, found)

    files = collect_entries(blocks.groupBy(*shards.KEY).applyInArrow(write, ENTRY))
    facts = _facts(events, past, crm, text)
    _verify(files, facts)
    say("write_shards", f"CRM {facts['crm']}, text {facts['text']}")
    return Output(files, facts)


def _text(
    spark: "SparkSession", config: ShardsConfig, past: Manifest, folder: Folder
) -> tuple[dict[str, int], dict[str, int]]:
    """Per split: how many samples the language model gets, and the largest text key among them (-1: none)."""
    import numpy as np

    from spark_jobs.parts import each_part
    from spark_jobs.transforms import shards

    rows, entries = past.facts["counts"], past.select("histories/")
    limits = {split: shards.limit(asked, rows[split]) for split, asked in config.text.items()}
    find = partial(shards.keys_below, folder, entries, config, limits)
    found = each_part(spark, len(entries), find, shards.KEYS).collect()
    text = {}
    for split, asked in config.text.items():
        parts = [row for row in found if row["split"] == split]
        text[split] = sum(row["rows"] for row in parts)
        if asked > 1 and text[split] > asked:
            text[split] = round(asked)
            keys = np.frombuffer(b"".join(row["keys"] for row in parts), np.uint64)
            limits[split] = int(np.partition(keys, text[split] - 1)[text[split] - 1])
    return text, limits


def _files(rows: Mapping[str, int], config: ShardsConfig) -> dict[str, int]:
    """Files per split, equal but for the chance of a hash."""
    return {split: max(1, -(-rows[split] // config.rows_per_file)) for split in schema.SPLITS}


def _facts(events: Manifest, past: Manifest, crm: Mapping[str, int], text: Mapping[str, int]) -> dict[str, Any]:
    return {
        **{name: events.facts[name] for name in COPIED},
        **{name: past.facts[name] for name in ("long", "short", "strategy")},
        "crm": {split: crm[split] for split in schema.SPLITS},
        "text": dict(text),
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
