"""The demo's pipeline in small, started as a user does; a module of its own, so that several tests import it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SETTINGS = (
    "synthesise.users=120", "synthesise.items=60", "synthesise.events_per_user=30", "spark.shuffle_partitions=2",
    "retrieval.long=12", "retrieval.short=4", "embed.dimension=8", "prompt.max_tokens=128",
    "shards.text_train=0.2", "shards.text_validation=150", "shards.text_test=200",
    "backbone.tiny.hidden=32", "backbone.tiny.layers=2", "backbone.tiny.heads=2", "backbone.tiny.vocabulary=400",
    "backbone.tiny.steps=10", "backbone.tiny.batch_size=8", "backbone.tiny.sequence=64",
    "crm.embedding=8", "crm.dnn=[32,32]", "crm.attention=[16]",
    "crm_train.batch_size=64", "crm_train.epochs=2", "crm_train.checkpoint_every=5",
    "adapters.uniform.experts=4", "adapters.reclora.experts=4",
    "lora_train.batch_size=32", "lora_train.epochs=1", "lora_train.checkpoint_every=2",
    "evaluate.bootstrap=100", "ray.object_store_mib=100",
)  # fmt: skip
"""Overrides that make the demo small; everything else is the demo's."""


@dataclass(frozen=True)
class Finished:
    """A run that went to its end, and what the terminal showed."""

    run: Path
    output: str


def command(name: str, run: Path) -> list[str]:
    """``python -m reclora_dist.cli.NAME`` on a run folder."""
    return [sys.executable, "-u", "-m", f"reclora_dist.cli.{name}", *SETTINGS, f"paths.run={run}"]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, but with no cluster to join."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | more


def finish(name: str, run: Path) -> Finished:
    """Run a command to its end."""
    done = subprocess.run(
        command(name, run), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return Finished(run, done.stdout)


def digests(run: Path) -> dict[str, str]:
    """Content digest of every dataset of a run."""
    found = sorted(run.rglob("manifest.json"))
    return {str(path.parent.relative_to(run)): json.loads(path.read_text())["content_digest"] for path in found}
