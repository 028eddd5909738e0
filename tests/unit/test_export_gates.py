"""Exports under the gates that differ from user to user and do not read the target item."""

import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from export_run import assert_peft_scores_the_same, export, save_random, write_bert

from reclora_dist.config.schema import LoraConfig
from reclora_dist.lora.bank import Bank
from reclora_dist.lora.export import lora_pair

MODES = {
    "weights": {"experts": 3, "mode": "weights"},
    "outputs": {"experts": 2, "mode": "outputs"},
    "matrix": {"experts": 1, "mode": "matrix"},
}


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def lora(gate: Literal["user", "id", "random"], mode: str, **more: object) -> LoraConfig:
    return LoraConfig(rank=4, alpha=10.0, gate=gate, temperature=1.0, **MODES[mode], **more)  # type: ignore[arg-type]


def test_the_pair_of_matrix_mode_is_its_bank() -> None:
    torch.manual_seed(0)
    bank, x, mixture = Bank(5, 7, 1, 3, 10.0, "matrix"), torch.randn(1, 4, 5), torch.randn(9)  # type: ignore[arg-type]
    torch.nn.init.normal_(bank.B)
    a, b = lora_pair(bank, mixture)
    torch.testing.assert_close(bank.scale * x @ a.T @ b.T, bank(x, mixture[None]))


@pytest.mark.parametrize(
    ("gate", "mode"),
    [
        ("user", "weights"),
        ("user", "outputs"),
        ("user", "matrix"),
        ("id", "weights"),
        ("id", "outputs"),
        ("random", "weights"),
    ],
)
def test_peft_scores_what_we_score_for_each_user(
    run: Path, tmp_path: Path, gate: Literal["user", "id", "random"], mode: str
) -> None:
    adapter = save_random(run, lora(gate, mode))
    exported = {user: export(adapter, tmp_path / user, user) for user in ("u3", "u4")}
    for user, folder in exported.items():
        assert_peft_scores_the_same(adapter, folder, user)
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in exported.values())
    assert one != other, "users differ"


def test_a_shared_gate_and_top_k_are_exported_too(run: Path, tmp_path: Path) -> None:
    adapter = save_random(run, lora("user", "weights", shared_gate=True, top_k=2))
    assert_peft_scores_the_same(adapter, export(adapter, tmp_path / "peft", "u3"), "u3")


def test_an_encoder_is_exported_with_its_head(run: Path, tmp_path: Path) -> None:
    adapter = save_random(run, lora("user", "weights"), write_bert(run))
    scores = assert_peft_scores_the_same(adapter, export(adapter, tmp_path / "peft", "u3"), "u3")
    assert np.ptp(scores) > 1e-3


def test_a_user_must_be_named(run: Path, tmp_path: Path) -> None:
    adapter = save_random(run, lora("user", "weights"))
    with pytest.raises(ValueError, match=r"export\.user is empty, but gate 'user' differs from user to user"):
        export(adapter, tmp_path / "peft")
