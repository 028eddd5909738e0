"""Checkpoints: the newest complete one counts, two are kept, nothing is pickled, another model's is refused."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from reclora_dist.contract.manifest import ContractError
from reclora_dist.contract.storage import Folder, StorageFullError
from reclora_dist.train.checkpoint import Checkpoint, CheckpointStore
from reclora_dist.train.engine import collect_state, load_parameters


def checkpoint(step: int) -> Checkpoint:
    state = {"parameter/w": torch.full((2, 3), float(step)), "exp_avg/w": torch.randn(2, 3)}
    best = {"parameter/w": torch.full((2, 3), float(step - 1))}
    return Checkpoint(step, state, best, {"best_auc": 0.1 * step, "best_step": step, "history": [{"step": step}]})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(Folder(str(tmp_path / "checkpoints")), "digest-of-config")


def test_what_was_saved_is_loaded(store: CheckpointStore) -> None:
    assert store.latest() is None
    saved = checkpoint(4)
    store.save(saved)
    found = store.latest()
    assert found is not None
    assert found.step == 4
    assert found.progress == saved.progress
    for ours, theirs in ((found.state, saved.state), (found.best, saved.best)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_no_best_yet_is_an_empty_best(store: CheckpointStore) -> None:
    store.save(Checkpoint(1, {"parameter/w": torch.ones(1)}, {}, {"best_auc": float("-inf")}))
    found = store.latest()
    assert found is not None
    assert found.best == {}
    assert found.progress["best_auc"] == float("-inf")


def test_only_safetensors_and_json_are_written(store: CheckpointStore) -> None:
    store.save(checkpoint(1))
    assert {name.rpartition(".")[2] for name in store.folder.files()} == {"safetensors", "json"}


def test_the_newest_two_are_kept(store: CheckpointStore) -> None:
    for step in (9, 10, 100, 1000):
        store.save(checkpoint(step))
    assert store.steps() == [100, 1000]
    assert {path.name for path in Path(store.folder.uri).iterdir()} == {"step-00000100", "step-00001000"}


def test_a_half_written_one_is_ignored_and_later_replaced(store: CheckpointStore) -> None:
    store.save(checkpoint(3))
    store.save(checkpoint(6))
    (Path(store.folder.uri) / "step-00000006" / "manifest.json").unlink()  # the kill came before the commit
    found = store.latest()
    assert found is not None
    assert found.step == 3
    store.save(checkpoint(6))
    assert store.steps() == [3, 6]


def test_one_of_another_config_or_input_is_refused(store: CheckpointStore) -> None:
    store.save(checkpoint(3))
    with pytest.raises(ContractError, match="written for config digest-of-co…, this run has other…: it is of another"):
        CheckpointStore(store.folder, "other").latest()


def test_damage_is_refused(store: CheckpointStore) -> None:
    store.save(checkpoint(3))
    file = Path(store.folder.uri) / "step-00000003" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ContractError, match=r"'state\.safetensors' has SHA-256"):
        store.latest()


def test_another_version_is_refused(store: CheckpointStore) -> None:
    store.save(checkpoint(3))
    file = Path(store.folder.uri) / "step-00000003" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(ContractError, match="version 99"):
        store.latest()


def test_cleared_leaves_nothing(store: CheckpointStore) -> None:
    store.save(checkpoint(3))
    store.clear()
    store.clear()
    assert store.latest() is None
    assert not Path(store.folder.uri).exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"parameter/weight": torch.zeros(3, 2)}, r"'bias' has shape None there and \(2,\) here"),
        (
            {"parameter/weight": torch.zeros(2, 2), "parameter/bias": torch.zeros(2)},
            r"'weight' has shape \(2, 2\) there",
        ),
        (
            {f"parameter/{name}": torch.zeros(2, 3) for name in ("weight", "extra")}
            | {"parameter/bias": torch.zeros(2)},
            r"'extra' has shape \(2, 3\) there and None here",
        ),
    ],
)
def test_the_state_of_another_model_is_refused(state: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint of another model: {words}.*"):
        load_parameters(nn.Linear(3, 2), state)


def damage(store: CheckpointStore, step: int, name: str = "state.safetensors") -> None:
    file = Path(store.folder.uri) / f"step-{step:08d}" / name
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_damaged_one_is_passed_over(store: CheckpointStore, name: str) -> None:
    store.save(checkpoint(3))
    store.save(checkpoint(6))
    damage(store, 6, name)
    said: list[str] = []
    found = store.latest(said.append)
    assert found is not None
    assert found.step == 3
    assert said[0].startswith("checkpoint of step 6 is damaged and passed over")
    damage(store, 3, name)
    with pytest.raises(ContractError):
        store.latest(said.append)


def test_as_many_are_kept_as_asked_for(store: CheckpointStore) -> None:
    generous = CheckpointStore(store.folder, store.config_digest, keep=3)
    for step in (1, 2, 3, 4):
        generous.save(checkpoint(step))
    assert generous.steps() == [2, 3, 4]


def test_one_is_written_beside_the_training_and_there_at_the_end(store: CheckpointStore) -> None:
    with store.writer(0.0, print) as writer:
        for step in (1, 2, 3):
            writer.submit(checkpoint(step))
    assert store.steps() == [2, 3]


class Failing(CheckpointStore):
    """Its storage fails a few times."""

    failures: ClassVar[list[OSError]] = []

    def save(self, checkpoint: Checkpoint) -> None:
        if self.failures:
            raise self.failures.pop()
        super().save(checkpoint)


def test_a_storage_that_fails_for_a_while_is_tried_again(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("reclora_dist.contract.storage.sleep", waits.append)
    Failing.failures[:] = [OSError("gone"), StorageFullError("no space left"), OSError("gone")]
    said: list[str] = []
    with Failing(store.folder, store.config_digest).writer(60.0, said.append) as writer:
        writer.submit(checkpoint(5))
    assert store.steps() == [5]
    assert waits == [1.0, 2.0, 4.0]
    assert said[0] == "checkpoint of step 5: gone; trying again in 1 s"


def test_a_storage_that_stays_away_ends_the_run_at_the_next_checkpoint(store: CheckpointStore) -> None:
    Failing.failures[:] = [OSError("gone for good")]
    with (
        pytest.raises(OSError, match="gone for good"),
        Failing(store.folder, store.config_digest).writer(0.0, print) as writer,
    ):
        writer.submit(checkpoint(5))
        writer.submit(checkpoint(6))
        pytest.fail("the next checkpoint tells what became of the one before")
    assert store.steps() == []


def test_a_checkpoint_is_small_beside_any_base(store: CheckpointStore) -> None:
    """Three numbers for every trainable parameter, and the best so far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 20)).requires_grad_(False)
    model[1].requires_grad_(True)
    state = collect_state(model, torch.optim.AdamW(model[1].parameters()))
    best = {name: value for name, value in state.items() if name.startswith("parameter/")}
    store.save(Checkpoint(1, state, best, {}))
    size = sum(path.stat().st_size for path in Path(store.folder.uri).rglob("*") if path.is_file())
    trainable = sum(parameter.numel() * 4 for parameter in model[1].parameters())
    assert size < 5 * trainable
