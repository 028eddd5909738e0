"""Resumable checkpoints: safetensors and JSON, no pickle; the newest complete one counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from reclora_dist.contract.manifest import ContractError, Manifest, add_file, commit, read_manifest, verified
from reclora_dist.contract.schema import CHECKPOINT
from reclora_dist.contract.storage import Folder

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """A training run after ``step`` updates: engine state, best parameters so far, and the loop's progress."""

    step: int
    state: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    progress: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one training run, ``step-N`` folders below ``folder``: one config, one set of inputs."""

    folder: Folder
    config_digest: str

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop all but the newest ``KEEP``."""
        place = self.folder.child(_name(checkpoint.step))
        files = [add_file(place, "state.safetensors", save(dict(checkpoint.state)))]
        if checkpoint.best:
            files.append(add_file(place, "best.safetensors", save(dict(checkpoint.best))))
        facts = {"step": checkpoint.step, "progress": dict(checkpoint.progress)}
        commit(place, Manifest(CHECKPOINT.name, CHECKPOINT.version, self.config_digest, {}, tuple(files), facts))
        for step in self.steps()[:-KEEP]:
            self.folder.fs.rm(self.folder.path(_name(step)), recursive=True)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = {name.partition("/")[0] for name in self.folder.files() if name.endswith("/manifest.json")}
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; None where there is none.

        Raises:
            ContractError: it is damaged, or of another model, config or input.
        """
        steps = self.steps()
        if not steps:
            return None
        place = self.folder.child(_name(steps[-1]))
        manifest = read_manifest(place, CHECKPOINT)
        if manifest.config_digest != self.config_digest:
            raise ContractError(
                f"{place.uri!r} was written for config {manifest.config_digest[:12]}…, this run has "
                f"{self.config_digest[:12]}…: it is of another model or data. Use another run folder or delete it."
            )
        tensors = {entry.path: load(verified(place, entry)) for entry in manifest.files}
        best = tensors.get("best.safetensors", {})
        return Checkpoint(steps[-1], tensors["state.safetensors"], best, manifest.facts["progress"])

    def clear(self) -> None:
        """Remove every checkpoint; the stage's output is complete."""
        if self.folder.exists(""):
            self.folder.fs.rm(self.folder.path(), recursive=True)


def _name(step: int) -> str:
    return f"step-{step:08d}"
