"""Resumable checkpoints: safetensors and JSON, no pickle; the newest complete one counts."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from reclora_dist.contract.manifest import ContractError, Manifest, add_file, commit, read_manifest, verified
from reclora_dist.contract.schema import CHECKPOINT
from reclora_dist.contract.storage import Folder, patiently


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
    keep: int = 2

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then drop all but the newest ``keep``."""
        place = self.folder.child(_name(checkpoint.step))
        files = [add_file(place, "state.safetensors", save(dict(checkpoint.state)))]
        if checkpoint.best:
            files.append(add_file(place, "best.safetensors", save(dict(checkpoint.best))))
        facts = {"step": checkpoint.step, "progress": dict(checkpoint.progress)}
        commit(place, Manifest(CHECKPOINT.name, CHECKPOINT.version, self.config_digest, {}, tuple(files), facts))
        for step in self.steps()[: -self.keep]:
            self.folder.fs.rm(self.folder.path(_name(step)), recursive=True)

    @contextlib.contextmanager
    def writer(self, patience: float, say: Callable[[str], None]) -> Iterator["Writer"]:
        """Saves checkpoints beside the training; at the end of the block all of them are written.

        Args:
            patience: seconds for which a writing that fails is tried again.
            say: takes a line about a writing that failed.

        Raises:
            OSError: the storage failed for longer than that; raised at the next checkpoint or at the end.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as pool:
            writer = Writer(self, pool, patience, say)
            yield writer
            writer.wait()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = {name.partition("/")[0] for name in self.folder.files() if name.endswith("/manifest.json")}
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def latest(self, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none.

        Args:
            say: takes a line about one that is passed over, because it is damaged.

        Raises:
            ContractError: all are damaged, or it is of another model, config or input.
        """
        damage = None
        for step in reversed(self.steps()):
            try:
                return self._read(step)
            except Damaged as error:
                damage = error
                say(f"checkpoint of step {step} is damaged and passed over: {error}")
        if damage:
            raise damage
        return None

    def _read(self, step: int) -> Checkpoint:
        place = self.folder.child(_name(step))
        try:
            manifest = read_manifest(place, CHECKPOINT)
            tensors = {entry.path: load(verified(place, entry)) for entry in manifest.files}
        except (ContractError, SafetensorError) as error:
            raise Damaged(str(error)) from error
        if manifest.config_digest != self.config_digest:
            raise ContractError(
                f"{place.uri!r} was written for config {manifest.config_digest[:12]}…, this run has "
                f"{self.config_digest[:12]}…: it is of another model or data. Use another run folder or delete it."
            )
        best = tensors.get("best.safetensors", {})
        return Checkpoint(step, tensors["state.safetensors"], best, manifest.facts["progress"])

    def clear(self) -> None:
        """Remove every checkpoint; the stage's output is complete."""
        if self.folder.exists(""):
            self.folder.fs.rm(self.folder.path(), recursive=True)


class Damaged(ContractError):
    """A checkpoint's files are not what its manifest says."""


class Writer:
    """Writes one checkpoint at a time, in a thread of its own."""

    def __init__(
        self, store: CheckpointStore, pool: ThreadPoolExecutor, patience: float, say: Callable[[str], None]
    ) -> None:
        self._store, self._pool, self._patience, self._say = store, pool, patience, say
        self._pending: Future[None] | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Write ``checkpoint`` soon; waits for the one before, and raises what went wrong there."""
        self.wait()
        self._pending = self._pool.submit(self._save, checkpoint)

    def wait(self) -> None:
        """Return when everything is written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _save(self, checkpoint: Checkpoint) -> None:
        patiently(
            lambda: self._store.save(checkpoint),
            self._patience,
            lambda failure: self._say(f"checkpoint of step {checkpoint.step}: {failure}"),
        )


def _name(step: int) -> str:
    return f"step-{step:08d}"
