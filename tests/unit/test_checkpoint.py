"""Checkpoints: the newest complete one counts, two are kept, nothing is pickled, another model's is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from reclora_dist.contract.manifest import ContractError
from reclora_dist.contract.storage import Folder
from reclora_dist.train.checkpoint import Checkpoint, CheckpointStore
from reclora_dist.train.engine import load_parameters


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
