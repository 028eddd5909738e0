"""Events and histories to training files: CRM shards of all samples, text shards of those the language model gets."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa

from reclora_dist.config.schema import ShardsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import MANIFEST, ContractError, FileEntry, Manifest, digest, read_manifest
from reclora_dist.contract.schema import EVENTS, HISTORIES, SHARDS
from reclora_dist.contract.storage import Folder
from spark_jobs.stage import Inputs, Job, Output, main, say

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from spark_jobs.transforms.shards import Shape

Counts = Counter[tuple[str, str]]
"""Rows per split and day."""

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
    by_days = "days" in inputs.manifests["events"].facts
    if by_days and max(config.text.values()) > 1:
        raise ValueError(f"events built by days take shares of text samples (at most 1), not numbers: {config.text}")
    if config.add and not by_days:
        raise ValueError("add=true adds days; these events were not built by days (split=dates)")
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
    from spark_jobs.transforms.profiles import Profiles

    events, past = inputs.manifests["events"], inputs.manifests["histories"]
    entries, folder = past.select("histories/"), inputs.folders["histories"]
    shape = shards.Shape(len(events.facts["user_fields"]), past.facts["long"], past.facts["short"])
    old = _there(spark, config, inputs, out, shape) if config.add else []
    by_days = "days" in events.facts
    crm, text, limits = _counts(spark, config, past, folder, by_days)
    layout = shards.Layout(config.seed, by_days, _files(crm, config), _files(text, config), limits, config.apart)
    first_users = events.facts["first_users"]
    profiles = Profiles(inputs.folders["events"], events.select("users/"), first_users, shape.user_fields)
    cut = partial(shards.blocks, folder, entries, profiles, layout, shape)
    blocks = each_part(spark, len(entries), cut, shards.BLOCK)

    def write(key: tuple[pa.Scalar, ...], found: pa.Table) -> pa.Table:  # Spark reads these hints: no partial here
        return shards.assemble(out, shape, config.rows_per_group, config.seed, key, found)

    files = collect_entries(blocks.groupBy(*shards.KEY).applyInArrow(write, ENTRY))
    _verify(files, {"crm": crm, "text": text})
    new = {shards.prefix(kind, *key) for kind, found in (("crm", crm), ("text", text)) for key in found}
    files += [entry for entry in old if entry.path.rsplit("/", 1)[0] + "/" not in new]
    facts = _facts(events, past, files)
    say("write_shards", f"CRM {facts['crm']}, text {facts['text']}")
    return Output(files, facts)


def _there(spark: "SparkSession", config: ShardsConfig, inputs: Inputs, out: Folder, shape: "Shape") -> list[FileEntry]:
    """The files of the days that are in ``out`` already, without the users who are to be forgotten.

    Raises:
        ContractError: they were written or retrieved with other settings, or for other days before these.
    """
    from spark_jobs.parts import ENTRY, collect_entries, each_part
    from spark_jobs.transforms.shards import without

    if not out.exists(MANIFEST):
        return []
    events, there = inputs.manifests["events"], read_manifest(out, SHARDS)
    known = there.parents["events"]
    if known not in (*events.facts["ancestors"][-1:], events.content_digest):
        raise ContractError(
            f"{out.uri!r} ends with the days of events {known[:12]}…, which these do not go on from. Add the days in "
            "between first, or write to another folder."
        )
    if there.config_digest != digest(config):
        raise ContractError(f"{out.uri!r} was written with other settings; use those, or write to another folder.")
    if there.facts.get("retrieval") != inputs.manifests["histories"].config_digest:
        raise ContractError(
            f"{out.uri!r} holds histories that were retrieved with other settings, or by an earlier release. Run "
            "retrieve_history with the settings of the days before, or write all days to another folder."
        )
    gone = sorted(set(events.facts["forgotten"]) - set(there.facts["forgotten"]))
    if not gone:
        return list(there.files)
    work = partial(without, out, there.files, np.array(gone), shape, config.rows_per_group)
    return collect_entries(each_part(spark, len(there.files), work, ENTRY))


def _counts(
    spark: "SparkSession", config: ShardsConfig, past: Manifest, folder: Folder, by_days: bool
) -> tuple[Counts, Counts, dict[str, int]]:
    """Per split and day how many samples the CRM gets, and how many the language model; per split the largest text key
    among these (-1: none).
    """
    from spark_jobs.parts import each_part
    from spark_jobs.transforms import shards

    rows, entries = past.facts["counts"], past.select("histories/")
    limits = {split: shards.limit(asked, rows[split]) for split, asked in config.text.items()}
    find = partial(shards.keys_below, folder, entries, config, limits, by_days)
    found = each_part(spark, len(entries), find, shards.KEYS).collect()
    crm, text = (Counter[tuple[str, str]]() for _ in range(2))
    for row in found:
        crm[row["split"], row["day"]] += row["samples"]
        text[row["split"], row["day"]] += row["rows"]
    for split, asked in config.text.items():
        if asked > 1 and text[split, ""] > asked:
            text[split, ""] = round(asked)
            keys = np.frombuffer(b"".join(row["keys"] for row in found if row["split"] == split), np.uint64)
            limits[split] = int(np.partition(keys, text[split, ""] - 1)[text[split, ""] - 1])
    if config.apart:
        crm.subtract({key: rows for key, rows in text.items() if key[0] == "train"})
        if rows["train"] and not sum(count for (split, _), count in crm.items() if split == "train"):
            raise ValueError(f"apart=true with text_train = {config.text_train} leaves the CRM no sample to train on")
    return crm, text, limits


def _files(rows: Counts, config: ShardsConfig) -> dict[tuple[str, str], int]:
    """Files per split and day, equal but for the chance of a hash."""
    return {key: max(1, -(-count // config.rows_per_file)) for key, count in rows.items()}


def _facts(events: Manifest, past: Manifest, files: Sequence[FileEntry]) -> dict[str, Any]:
    rows = {
        kind: {split: _rows(files, f"{kind}/split={split}/") for split in schema.SPLITS} for kind in ("crm", "text")
    }
    facts = {name: events.facts[name] for name in (*COPIED, "forgotten") if name in events.facts}
    if "days" in events.facts:
        facts["retrieval"] = past.config_digest
    return {**facts, **{name: past.facts[name] for name in ("long", "short", "strategy")}, **rows}


def _rows(files: Sequence[FileEntry], prefix: str) -> int:
    return sum(entry.rows for entry in files if entry.path.startswith(prefix))


def _verify(files: Sequence[FileEntry], counts: Mapping[str, Counts]) -> None:
    """Every sample must have arrived in its files."""
    from spark_jobs.transforms.shards import prefix

    for kind, wanted in counts.items():
        for key, rows in wanted.items():
            place = prefix(kind, *key)
            found = _rows(files, place)
            if found != rows:
                raise ContractError(
                    f"{place} has {found} rows, not {rows}: events and histories do not hold the same samples. Run "
                    "retrieve_history on these events."
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


def cli(argv: Sequence[str] | None = None, keep: bool = False) -> int:
    """The job as a command; ``keep`` leaves Spark running for the next one."""
    return main(JOB, argv, keep)


if __name__ == "__main__":
    sys.exit(cli())
