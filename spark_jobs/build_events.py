"""Raw logs to canonical events, items and users: bad rows put aside with reasons, k-core, positions, label, split."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # spark-submit runs this file by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from reclora_dist.config.schema import EventsConfig
from reclora_dist.contract.manifest import MANIFEST
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder
from spark_jobs.days import Before, check_days, check_follows
from spark_jobs.privacy import read_privacy
from spark_jobs.sources.layout import fingerprint, tables
from spark_jobs.stage import Inputs, Job, Output, main

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def prepare(config: EventsConfig, inputs: Inputs) -> tuple[EventsConfig, Inputs]:
    """Find the raw log (``--raw``, else ``source.path``), whom to hide, and take a fingerprint of both.

    Where they lie is no setting.

    Raises:
        ValueError: no path is given, or a file is missing there, or there is no key that can be used.
    """
    check_days(config)
    folder = inputs.folders.get("raw", Folder(config.source.path))
    if not folder.uri:
        raise ValueError("where is the raw log? Give --raw, or set source.path")
    privacy = read_privacy(config.privacy, config.source.user)
    parents = {**inputs.parents, "raw": privacy.fingerprint(fingerprint(config.source, folder))}
    places = {} if folder.exists(MANIFEST) else {name: folder.child(name) for name in tables(config.source, folder)}
    before = _before(inputs)
    if before:
        check_follows(config, privacy, before)
    source, settings = replace(config.source, path=""), replace(config.privacy, key_file="", delete="")
    return replace(config, source=source, privacy=settings), replace(
        inputs, folders={**inputs.folders, "raw": folder.absolute()}, parents=parents, privacy=privacy, tables=places
    )


def run(spark: "SparkSession", config: EventsConfig, inputs: Inputs, out: Folder) -> Output:
    """Build the events dataset in ``out`` (see ``transforms.events``)."""
    from spark_jobs.transforms.events import build

    return build(spark, config, inputs.folders["raw"], out, inputs.privacy, _before(inputs))


def _before(inputs: Inputs) -> Before | None:
    if "previous" not in inputs.folders:
        return None
    return Before.open(inputs.folders["previous"], inputs.manifests["previous"])


JOB = Job(
    name="build_events",
    summary=__doc__,
    config=EventsConfig,
    output=EVENTS,
    run=run,
    inputs={
        "raw": "folder of the raw log (default: the setting source.path)",
        "previous": "split=dates: folder of the events of the days before, which this build goes on from",
    },
    optional=frozenset({"raw", "previous"}),
    formats={"previous": EVENTS},
    prepare=prepare,
)


def cli(argv: Sequence[str] | None = None, keep: bool = False) -> int:
    """The job as a command; ``keep`` leaves Spark running for the next one."""
    return main(JOB, argv, keep)


if __name__ == "__main__":
    sys.exit(cli())
