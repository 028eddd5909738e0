"""Exported adapters: PEFT loads them and scores the same; what is no fixed LoRA for a user is refused."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from export_run import FACTS, assert_peft_scores_the_same, export, save_random, write_bert
from peft import PeftModel
from sample_data import small_config
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from reclora_dist.cli import export as command
from reclora_dist.config.schema import BackboneConfig, LoraConfig, RetrievalConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import ADAPTER
from reclora_dist.contract.storage import Folder
from reclora_dist.lora.adapter import read_adapter_config
from reclora_dist.lora.bank import Bank
from reclora_dist.lora.export import check_exportable, lora_pair, peft_tensors, stack_prefix
from reclora_dist.train import stages

PLAIN = LoraConfig(experts=1, rank=4, gate="none")
VARIANTS = {
    "plain": PLAIN,
    "weights": LoraConfig(experts=3, rank=4, alpha=10.0, gate="uniform"),
    "outputs": LoraConfig(experts=2, rank=4, alpha=10.0, mode="outputs", gate="uniform"),
}


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def filled(mode: str, experts: int = 3, rank: int = 6) -> Bank:
    torch.manual_seed(0)
    bank = Bank(5, 7, experts, rank, alpha=10.0, mode=mode)  # type: ignore[arg-type]
    torch.nn.init.normal_(bank.B)
    return bank


@pytest.mark.parametrize("mode", ["weights", "outputs"])
def test_a_pair_is_the_bank_under_its_mixture(mode: str) -> None:
    bank, x, mixture = filled(mode), torch.randn(1, 4, 5), torch.tensor([0.5, 0.2, 0.3])
    a, b = lora_pair(bank, mixture)
    torch.testing.assert_close(bank.scale * x @ a.T @ b.T, bank(x, mixture[None]))
    assert len(a) == 6, "one pair of rank 6, or three of rank 2 side by side"


def test_without_a_mixture_it_is_the_one_expert() -> None:
    bank, x = filled("weights", experts=1), torch.randn(1, 4, 5)
    a, b = lora_pair(bank, None)
    torch.testing.assert_close(bank.scale * x @ a.T @ b.T, bank(x, None))


def test_a_matrix_between_the_pair_is_folded_into_b() -> None:
    bank, m = filled("matrix", experts=1, rank=2), torch.randn(2, 2)
    a, b = lora_pair(bank, m.flatten())
    torch.testing.assert_close(b @ a, bank.B[0].T @ m @ bank.A[0])
    assert torch.equal(a, bank.A[0])


def test_each_matrix_has_its_own_mixture() -> None:
    banks = {"layers.0.q": filled("weights"), "layers.1.q": filled("weights")}
    mixture = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    tensors = peft_tensors(banks, mixture, "model.")
    for layer, expert in ((0, 0), (1, 2)):
        bank, name = banks[f"layers.{layer}.q"], f"base_model.model.model.layers.{layer}.q"
        assert torch.equal(tensors[f"{name}.lora_A.weight"], bank.A[expert])
        assert torch.equal(tensors[f"{name}.lora_B.weight"], bank.B[expert].T)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_scores_the_same_on_a_llama(run: Path, tmp_path: Path, name: str) -> None:
    adapter = save_random(run, VARIANTS[name])
    folder = export(adapter, tmp_path / "peft")
    scores = assert_peft_scores_the_same(adapter, folder, "u3")
    assert scores.std() > 1e-3
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "outputs"])
def test_peft_and_the_head_beside_it_score_the_same_on_a_bert(run: Path, tmp_path: Path, name: str) -> None:
    adapter = save_random(run, VARIANTS[name], write_bert(run))
    assert_peft_scores_the_same(adapter, export(adapter, tmp_path / "peft"), "u3")


def test_only_some_layers_may_be_adapted(run: Path, tmp_path: Path) -> None:
    adapter = save_random(run, PLAIN, dataclasses.replace(small_config(run).backbone, top_layers=1))
    folder = export(adapter, tmp_path / "peft")
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert_peft_scores_the_same(adapter, folder, "u3")


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        (LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8), "model."),
        (OPTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8), "model.decoder."),
    ],
)
def test_the_stack_is_found_in_the_model_around_it(tmp_path: Path, model: LlamaConfig, prefix: str) -> None:
    model.save_pretrained(tmp_path)
    assert stack_prefix(BackboneConfig(kind="causal"), str(tmp_path)) == prefix


def test_the_command_writes_the_folder_and_its_card(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = save_random(run, VARIANTS["weights"])
    monkeypatch.chdir(run)
    settings = ["export.adapter=adapters/some", "export.user=u3", "export.out=out/peft"]
    monkeypatch.setattr(sys, "argv", ["export", *settings])
    command.main()
    assert capsys.readouterr().out == f"export: {run}/out/peft\n"
    card = (run / "out" / "peft" / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "base_model": str(run / "backbone"),
        "library_name": "peft",
        "tags": ["recommendation", "lora", "reclora"],
    }
    manifest = read_manifest(Folder(adapter), ADAPTER)
    assert "# Adapter `some` of user `u3`" in card
    for digest in (manifest.content_digest, *manifest.parents.values()):
        assert digest in card


@pytest.mark.parametrize(
    ("changes", "retrieval", "words"),
    [
        ({"gate": "crm"}, "recent", r"gate 'crm': its mixture depends on the target item.*train one with gate=user"),
        ({"gate": "user"}, "semantic", r"retrieval\.strategy 'semantic': .* train with retrieval\.strategy=recent"),
        ({"gate": "uniform", "head": "offset"}, "recent", r"head 'offset': its score needs the CRM.*head=answers"),
        ({"gate": "uniform", "head": "fusion"}, "recent", r"head 'fusion': its score needs the CRM"),
    ],
)
def test_what_is_no_lora_of_a_user_is_refused(run: Path, changes: dict, retrieval: str, words: str) -> None:
    config = small_config(run, adapters={"some": LoraConfig(**changes)}, retrieval=RetrievalConfig(retrieval))
    with pytest.raises(ValueError, match=f"adapter 'some' has .*{words}"):
        check_exportable(stages.adapter_config(config, "some"))


@pytest.mark.parametrize("gate", ["user", "id", "random", "uniform", "none"])
def test_what_does_not_read_the_target_is_not_refused(run: Path, gate: str) -> None:
    lora = LoraConfig(gate=gate)  # type: ignore[arg-type]
    config = small_config(run, adapters={"some": lora}, retrieval=RetrievalConfig("recent"))
    check_exportable(stages.adapter_config(config, "some"))


@pytest.mark.parametrize(
    ("user", "out", "words"),
    [("nobody", "peft", "user 'nobody' is not in the log"), ("u3", "", "export.out is empty; give a folder to write")],
)
def test_bad_settings_are_refused(run: Path, tmp_path: Path, user: str, out: str, words: str) -> None:
    adapter = save_random(run, PLAIN)
    with pytest.raises(ValueError, match=words):
        command.export_user(command.ExportConfig(adapter, user, out and str(tmp_path / out)))
    assert not (tmp_path / "peft").exists()


def test_a_folder_with_other_files_is_left_alone(run: Path) -> None:
    adapter = save_random(run, PLAIN)
    before = {path: path.read_bytes() for path in Path(adapter).iterdir()}
    with pytest.raises(ValueError, match=r"holds 'adapter_config-.*', which no export wrote; give a folder of its own"):
        export(adapter, Path(adapter))
    assert {path: path.read_bytes() for path in Path(adapter).iterdir()} == before


def test_an_export_that_was_killed_is_not_loaded_and_can_be_made_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = save_random(run, PLAIN), tmp_path / "peft"
    write = Folder.write

    def dies(folder: Folder, name: str, content: bytes) -> None:
        if name == "README.md":
            raise KeyboardInterrupt
        write(folder, name, content)

    export(adapter, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write", dies)
        export(adapter, out)
    base = AutoModelForCausalLM.from_pretrained(run / "backbone")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(base, out)
    assert_peft_scores_the_same(adapter, export(adapter, out), "u3")


def values(record: object) -> list[object]:
    """All leaves of nested mappings and lists."""
    if isinstance(record, dict):
        return [leaf for value in record.values() for leaf in values(value)] or [record]
    if isinstance(record, list):
        return [leaf for value in record for leaf in values(value)] or [record]
    return [record]


def test_the_model_card_has_what_the_hub_reads_and_no_empty_field(run: Path) -> None:
    adapter = save_random(run, VARIANTS["weights"])
    card = (Path(adapter) / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    record = yaml.safe_load(head)
    assert record["base_model"] == "../../backbone"
    assert record["library_name"] == "reclora_dist"
    assert record["metrics"] == ["roc_auc"]
    (result,) = record["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "roc_auc", "name": "AUC", "value": FACTS["validation_auc"]}]
    assert "license" not in record, "that is for whoever publishes it"
    assert all(value not in (None, "", [], {}) for value in values(record))
    config, manifest = read_adapter_config(Folder(adapter))
    for digest in (*manifest.parents.values(), *(r.content_digest for r in config.references.values())):
        assert f"`{digest}`" in body
    for title in ("Use", "Training", "Validation", "Data", "Intended use", "Limits"):
        assert len(body.partition(f"## {title}\n")[2].partition("\n## ")[0].strip()) > 20, title
    assert "| best_step | 2 |" in body
    assert "| 2 | 0.7500 |" in body
