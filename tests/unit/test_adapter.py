"""What an adapter folder and a CRM folder hold, whatever moment their writer dies at."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sample_data import small_config

from reclora_dist.config.schema import Config
from reclora_dist.contract.manifest import Format, Manifest, read_manifest, verified
from reclora_dist.contract.schema import ADAPTER, CRM
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import load_crm
from reclora_dist.lora.adapter import CARD, AdapterIdentity, load_adapter, save_adapter
from reclora_dist.lora.model import RecLora
from reclora_dist.train import stages


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def model(config: Config, name: str, seed: int) -> RecLora:
    """An adapter's model with weights that no training gave."""
    crm = Folder(config.paths.run).child("crm")
    found = stages.build_model(config, config.adapters[name], load_crm(crm, read_manifest(crm, CRM))).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return found


def save(config: Config, name: str, seed: int) -> Folder:
    """Save an adapter of such weights."""
    run = Folder(config.paths.run)
    trained = {key: p.detach() for key, p in model(config, name, seed).named_parameters() if p.requires_grad}
    folder, crm = run.child(f"adapters/{name}"), run.child("crm")
    parents = {"backbone": read_manifest(run.child("backbone"), stages.backbone_target(config).format).content_digest}
    identity = AdapterIdentity(f"config {seed}", parents)
    facts = {"steps": 3, "best_step": 2, "validation_auc": 0.75, "history": [{"step": 2, "validation_auc": 0.75}]}
    save_adapter(folder, stages.adapter_config(config, name), trained, (crm, read_manifest(crm, CRM)), identity, facts)
    return folder


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours catches it."""


def dies_before(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], object]) -> bool:
    """Do ``work``, but die before its ``number``-th file is written; whether it died."""
    written = []
    write = Folder.write

    def counted(folder: Folder, name: str, content: bytes) -> None:
        if len(written) == number:
            raise Killed(name)
        written.append(name)
        write(folder, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", counted)
        try:
            work()
        except Killed:
            return True
    return False


def whole(folder: Folder, expected: Format) -> Manifest:
    """The manifest of a folder all of whose files are as it says."""
    manifest = read_manifest(folder, expected)
    assert all(verified(folder, entry) for entry in manifest.files)
    return manifest


def test_an_adapter_is_the_old_one_or_the_new_one_whenever_its_writer_dies(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = small_config(run), []
    new = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, answer=" So:"))
    for number in range(10):
        folder = save(config, "reclora", seed=0)
        died = dies_before(monkeypatch, number, lambda: save(new, "reclora", seed=1))
        identity = whole(folder, ADAPTER).config_digest
        found.append(identity)
        loaded, read = load_adapter(folder)
        seed = 0 if identity == "config 0" else 1
        assert read.prompt == (config, new)[seed].prompt
        expected = model(config, "reclora", seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        if not died:
            break
        if seed == 1:
            assert not folder.exists(CARD), "no card is better than that of another adapter"
    assert found == ["config 0"] * 5 + ["config 1"] * 2, "4 files, the manifest, the card"
    assert len(folder.files()) == 6, "nothing of the old one is left"


def test_a_crm_is_the_old_one_or_the_new_one_whenever_its_writer_dies(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(run)
    folder = Folder(str(run / "crm"))
    before = whole(folder, CRM)
    changed = dataclasses.replace(
        config,
        crm=dataclasses.replace(config.crm, dnn=(32, 16)),
        crm_train=dataclasses.replace(config.crm_train, epochs=1, checkpoint_every=1000),
    )
    original = stages.CheckpointStore.save
    monkeypatch.setattr(stages.CheckpointStore, "save", lambda *_: None)  # its files are not counted
    for number in range(3):
        assert dies_before(monkeypatch, number, lambda: stages.train_crm(changed, stages.Context()))
        assert whole(folder, CRM) == before
        assert load_crm(folder, before).state_width == 32
    monkeypatch.setattr(stages.CheckpointStore, "save", original)
    stages.train_crm(changed, stages.Context())
    assert load_crm(folder, whole(folder, CRM)).state_width == 16
    assert len(folder.files()) == 3
