"""Stages that a sibling run has made already: linked into a run's folder instead of made again."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config
from reclora_dist.config.targets import Target
from reclora_dist.contract.manifest import digest, is_current, read_manifest
from reclora_dist.contract.schema import ADAPTER
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app.pipeline import STATE, Stage, plan, raw_path
from spark_jobs import build_events, report_quality, retrieve_history, synthesise, write_shards
from spark_jobs.stage import open_inputs

# Spark stage: its job, the config section and the folder of its output.
_SPARK = {
    "synthesise": (synthesise.JOB, "synthesise", "raw"),
    "events": (build_events.JOB, "events", "events"),
    "histories": (retrieve_history.JOB, "retrieval", "histories"),
    "shards": (write_shards.JOB, "shards", "shards"),
    "quality": (report_quality.JOB, "quality", "quality"),
}


def reuse_stages(config: Config, siblings: Sequence[str]) -> list[str]:
    """Link into the run what other runs have made from the same settings and the same inputs.

    What counts as the same is what the pipeline itself asks before it skips a stage: digest of the settings and content
    digests of the parents. So a wrong link is impossible, and a missing one costs time only. Files are hard links
    (copies, where the file system has none): no stage changes a file in place. The manifest comes last.

    Args:
        siblings: run folders on a local file system, the likeliest first; one may be at work right now.

    Returns:
        Names of the stages that were linked.

    Raises:
        ValueError: a run folder is on a remote file system.
    """
    taken = []
    for stage in plan(config):
        target = _target(config, stage)
        if target is None or target.is_current or (config.study.split == "training" and _is_trained(stage)):
            continue
        name = Path(target.folder.local()).relative_to(Folder(config.paths.run).local()).as_posix()
        donors = (Folder(sibling).child(name) for sibling in siblings)
        donor = next((d for d in donors if is_current(d, target.format, target.config_digest, target.parents)), None)
        if donor and _link(donor, target):
            taken.append(stage.name)
    _forget(config, taken)
    return taken


def _forget(config: Config, stages: Sequence[str]) -> None:
    """Take away what the run itself once measured of stages that are another run's now."""
    home = Folder(config.paths.run)
    if stages and home.exists(STATE):
        state = json.loads(home.read(STATE))
        state["seconds"] = {name: value for name, value in state.get("seconds", {}).items() if name not in stages}
        home.write(STATE, json.dumps(state, indent=1).encode())


def _is_trained(stage: Stage) -> bool:
    """Whether the stage trains a model: what it costs is not reused where that is the question."""
    return stage.name.partition(" ")[0] in ("crm", "adapter")


def _target(config: Config, stage: Stage) -> Target | None:
    """What the stage is to make; None where its inputs are not there yet or are refused (the pipeline will say it)."""
    with contextlib.suppress(ValueError):
        return stage.target(config) if stage.target else _spark_target(config, stage.name)
    return None


def _spark_target(config: Config, stage: str) -> Target:
    job, section, output = _SPARK[stage]
    places = {name: raw_path(config) if name == "raw" else folder(config, name).uri for name in job.inputs}
    places.pop("previous", None)  # the pipeline builds a log in one go
    inputs = open_inputs(job, places)
    settings, inputs = job.prepare(getattr(config, section), inputs)
    return Target(folder(config, output), job.output, digest(settings), inputs.parents)


def _link(donor: Folder, target: Target) -> bool:
    """Whether the donor is still what it was, and its files are the target's now."""
    manifest = read_manifest(donor, target.format)
    if digest([manifest.config_digest, dict(manifest.parents)]) != target.digest:
        return False  # it is being made anew
    if target.format == ADAPTER:  # the card is in no manifest, and none is better than that of another adapter
        from reclora_dist.lora.adapter import CARD  # which loads torch

        (target.folder.local() / CARD).unlink(missing_ok=True)
    for entry in manifest.files:
        source, place = donor.local() / entry.path, target.folder.local() / entry.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(source, place)
        except OSError:  # no hard links here, or too many of this file
            shutil.copyfile(source, place)
    target.commit(manifest.files, manifest.facts)
    return True
