"""Scoring with an adapter folder: batching, moving, and everything that does not belong together is refused."""

import copy as copies
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from sample_data import small_config, write_run

from reclora_dist.config.schema import BackboneConfig, Config, EngineConfig, LoraConfig, TinyConfig
from reclora_dist.contract.manifest import ContractError, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import ADAPTER, CRM, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import load_crm
from reclora_dist.evaluate.scorer import CPU_TOKENS, DEVICE_TOKENS, Scorer, feature_store, referenced, shuffled
from reclora_dist.lora.adapter import load_trained, read_adapter_config
from reclora_dist.train import stages
from reclora_dist.train.context import Context


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters of several kinds."""
    run = tmp_path_factory.mktemp("scorer") / "run"
    shutil.copytree(prepared, run)
    for name in ADAPTERS:
        stages.train_adapter(config(run), name, Context())
    return run


ADAPTERS = {
    "lora": LoraConfig(experts=1, rank=4, gate="none"),
    "reclora": LoraConfig(experts=4, rank=4, temperature=1.0),
    "id": LoraConfig(experts=3, rank=4, gate="id", head="offset"),
    "random": LoraConfig(experts=3, rank=4, gate="random", temperature=0.5, head="fusion"),
    "ilora": LoraConfig(experts=4, rank=4, mode="outputs", shared_gate=True, top_k=2, balance=0.1, temperature=1.0),
}


def config(run: Path) -> Config:
    return small_config(run, engine=EngineConfig(kind="torch"), adapters=ADAPTERS)


@pytest.fixture(scope="module")
def rows(run: Path) -> pa.Table:
    return split(run, "test")


def split(run: Path, name: str) -> pa.Table:
    shards = Folder(str(run / "shards"))
    return read_parts(shards, read_manifest(shards, SHARDS).select(f"text/split={name}/"))


def adapter(run: Path, name: str = "reclora") -> Folder:
    return Folder(str(run / "adapters" / name))


def file(folder: Folder, pattern: str) -> Path:
    """The one file that matches."""
    (found,) = Path(folder.uri).glob(pattern)
    return found


@pytest.fixture(scope="module")
def scorer(run: Path) -> Scorer:
    return Scorer.load(adapter(run))


@pytest.fixture(scope="module")
def scores(scorer: Scorer, rows: pa.Table) -> np.ndarray:
    return scorer.score(rows)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be spoilt."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_scores_are_probabilities_in_the_order_of_the_rows(scorer: Scorer, rows: pa.Table, scores: np.ndarray) -> None:
    assert scores.shape == (rows.num_rows,)
    assert scores.dtype == np.float64
    assert ((scores > 0) & (scores < 1)).all()
    order = np.random.default_rng(0).permutation(rows.num_rows)
    np.testing.assert_allclose(scorer.score(rows.take(pa.array(order))), scores[order], atol=1e-6)
    assert len(np.unique(scores.round(6))) > rows.num_rows / 2


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_batching_changes_nothing(scorer: Scorer, rows: pa.Table, scores: np.ndarray, size: int) -> None:
    few = rows.slice(3, 40)
    other = Scorer(scorer.model, scorer.config, scorer.collate, batch_size=size)
    np.testing.assert_allclose(other.score(few), scores[3:43], atol=1e-6)
    np.testing.assert_allclose(other.mixtures(few), scorer.mixtures(rows)[3:43], atol=1e-5)


def test_long_prompts_are_scored_few_at_a_time(scorer: Scorer, rows: pa.Table) -> None:
    """More of them on a GPU, where there is no bound by caches but one by memory."""
    batch = scorer.collate(rows.take(pa.array([0] * 2000)))
    for device, tokens in (("cpu", CPU_TOKENS), ("cuda", DEVICE_TOKENS), ("mps", DEVICE_TOKENS)):
        other = copies.copy(scorer)
        other.device = torch.device(device)
        passes = other._passes(batch)
        assert sorted(np.concatenate(passes)) == list(range(2000))
        sizes = [batch.take(torch.from_numpy(part)).size for part in passes]
        assert tokens - batch.input_ids.shape[1] < max(sizes) <= tokens


def test_no_row_is_no_score(scorer: Scorer, rows: pa.Table) -> None:
    assert scorer.score(rows.slice(0, 0)).shape == (0,)


def test_mixtures_are_one_per_row_and_matrix(scorer: Scorer, run: Path, rows: pa.Table) -> None:
    found = scorer.mixtures(rows.drop_columns(["short_items", "short_levels"]))
    assert found.shape == (rows.num_rows, 4, 4)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    plain = Scorer.load(adapter(run, "lora"))
    assert (plain.mixtures(rows) == np.ones((rows.num_rows, 4, 1))).all()


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_is_the_model_that_validation_chose(run: Path, name: str) -> None:
    """Loaded again, the adapter reaches the validation AUC that its manifest states."""
    rows = split(run, "validation")
    stated = read_manifest(adapter(run, name), ADAPTER).facts["validation_auc"]
    labels, found = rows["label"].to_numpy(), Scorer.load(adapter(run, name)).score(rows)
    pairs = found[labels == 1][:, None] - found[labels == 0][None]
    assert ((pairs > 0) + 0.5 * (pairs == 0)).mean() == pytest.approx(stated, abs=1e-3)


def test_the_folder_holds_no_pickle_and_says_what_it_is(run: Path) -> None:
    names = {re.sub("-[0-9a-f]{12}", "-*", path.name) for path in Path(adapter(run).uri).iterdir()}
    assert names == {
        "adapter_config-*.json", "adapter_model-*.safetensors", "crm_config-*.json", "crm-*.safetensors", "README.md",
        "manifest.json",
    }  # fmt: skip
    card = (Path(adapter(run).uri) / "README.md").read_text()
    assert "\n# Adapter `reclora`\n" in card
    assert "4 meta-LoRAs of rank 4 (weights mode, gate: crm) on q_proj, v_proj" in card
    assert "validation_auc" in card
    found, _ = read_adapter_config(adapter(run))
    assert found.lora == LoraConfig(experts=4, rank=4, temperature=1.0)
    weights = load_file(file(adapter(run), "adapter_model-*.safetensors"))
    assert all(".bank." in name or name.startswith("gates.") for name in weights)


def test_an_adapter_moves_together_with_its_run(copy: Path, tmp_path: Path, rows: pa.Table, scores: np.ndarray) -> None:
    moved = copy.rename(tmp_path / "elsewhere")
    scorer = Scorer.load(adapter(moved))
    np.testing.assert_array_equal(scorer.score(rows), scores)
    assert referenced(adapter(moved), scorer.config, "events").uri == str(moved / "events")


def test_an_adapter_away_from_its_run_says_what_is_missing(copy: Path, tmp_path: Path) -> None:
    alone = tmp_path / "a" / "b" / "reclora"
    shutil.copytree(adapter(copy).uri, alone)
    with pytest.raises(ValueError, match=r"backbone.* is not a model folder|has no manifest\.json"):
        Scorer.load(Folder(str(alone)))


def test_changed_events_are_refused(copy: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", seed=1)
    shutil.rmtree(copy / "events")
    shutil.copytree(tmp_path / "other" / "events", copy / "events")
    with pytest.raises(ContractError, match=r"adapter 'reclora' was trained with events .*…, but .* now holds"):
        Scorer.load(adapter(copy))


@pytest.mark.parametrize("name", ["adapter_model-*.safetensors", "adapter_config-*.json", "crm-*.safetensors"])
def test_a_flipped_byte_is_refused(copy: Path, name: str) -> None:
    damaged = file(adapter(copy), name)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ContractError, match=f"'{damaged.name}' has SHA-256"):
        Scorer.load(adapter(copy))


def test_an_interrupted_adapter_is_refused(copy: Path) -> None:
    (Path(adapter(copy).uri) / "manifest.json").unlink()
    with pytest.raises(ContractError, match=r"has no manifest\.json: the stage that writes 'reclora\.adapter' has not"):
        Scorer.load(adapter(copy))


def test_another_version_is_refused(copy: Path) -> None:
    file = Path(adapter(copy).uri) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    expected = f"version 1, but this release reads '{ADAPTER.name}' version {ADAPTER.version}"
    with pytest.raises(ContractError, match=expected):
        Scorer.load(adapter(copy))


@pytest.mark.parametrize("changes", [{"hidden": 16}, {"steps": 5}], ids=["other shapes", "other weights"])
def test_another_backbone_is_refused(copy: Path, changes: dict[str, int]) -> None:
    tiny = dataclasses.replace(config(copy).backbone.tiny, **changes)
    stages.train_backbone(dataclasses.replace(config(copy), backbone=BackboneConfig(tiny=tiny)))
    with pytest.raises(ContractError, match=r"was trained with backbone .*…, but '\.\./\.\./backbone' now holds"):
        Scorer.load(adapter(copy))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraConfig(experts=2, rank=4), r"has shape \(4, .*\) in the adapter and \(2, .*\) in the model"),
        (
            LoraConfig(experts=4, rank=4, gate="uniform"),
            r"'gates\..*' has shape .* in the adapter and None in the model",
        ),
    ],
)
def test_weights_of_another_config_are_refused(run: Path, lora: LoraConfig, words: str) -> None:
    crm = Folder(str(run / "crm"))
    model = stages.build_model(config(run), lora, load_crm(crm, read_manifest(crm, CRM)))
    weights = load_file(file(adapter(run), "adapter_model-*.safetensors"))
    with pytest.raises(
        ContractError, match=f"'here': .*{words}; the adapter was trained for another backbone or config"
    ):
        load_trained(model, weights, "here")


def test_labels_are_not_read(scorer: Scorer, rows: pa.Table) -> None:
    few = rows.slice(0, 5)
    liked = few.set_column(few.column_names.index("label"), "label", pa.array([1] * 5, pa.int8()))
    np.testing.assert_array_equal(scorer.score(liked), scorer.score(few))


def test_a_shuffle_leaves_no_row_at_its_place_and_loses_none(rows: pa.Table) -> None:
    ids = rows["sample_id"].to_numpy()
    found = shuffled(rows, seed=3)["sample_id"].to_numpy()
    assert sorted(found) == sorted(ids)
    assert not (found == ids).any()
    assert (found == shuffled(rows, seed=3)["sample_id"].to_numpy()).all()
    assert (found != shuffled(rows, seed=4)["sample_id"].to_numpy()).any()
    assert np.median(np.abs(np.argsort(np.argsort(found)) - np.argsort(np.argsort(ids)))) > rows.num_rows / 8, (
        "far away"
    )
    assert shuffled(rows.slice(0, 0), seed=3).num_rows == 0
    assert shuffled(rows.slice(0, 1), seed=3).num_rows == 1


@pytest.mark.parametrize("name", ["reclora", "id", "random", "ilora"])
def test_a_shuffled_gate_changes_scores_through_the_mixture_alone(run: Path, rows: pa.Table, name: str) -> None:
    scorer = Scorer.load(adapter(run, name))
    own, foreign = scorer.score(rows), scorer.score(rows, shuffled(rows, seed=0))
    np.testing.assert_allclose(scorer.score(rows, rows), own, atol=1e-6)
    assert (np.abs(foreign - own) > 1e-7).mean() > 0.5
    donors = rows.take(pa.array(np.full(rows.num_rows, 5)))
    no_text = donors.drop_columns(["short_items", "short_levels", "short_length"])
    np.testing.assert_array_equal(scorer.score(rows, no_text), scorer.score(rows, donors))
    with torch.no_grad():
        for bank in scorer.model.banks.values():
            bank.B.zero_()
    np.testing.assert_allclose(scorer.score(rows, shuffled(rows, seed=0)), scorer.score(rows), atol=1e-9)


def test_plain_lora_has_nothing_to_shuffle(run: Path, rows: pa.Table) -> None:
    plain = Scorer.load(adapter(run, "lora"))
    np.testing.assert_array_equal(plain.score(rows, shuffled(rows, seed=0)), plain.score(rows))


README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_program_scores_the_same_in_a_new_process(run: Path, scorer: Scorer) -> None:
    code = README.read_text().partition("## Use an adapter from Python")[2].split("```")[1].removeprefix("python")
    names = {
        "runs/demo/adapters/reclora": os.path.relpath(adapter(run).uri), "i000001": "i3", "i000002": "i5",
        "u0000001": "u2",
    }  # fmt: skip
    for theirs, ours in names.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    code += "\nassert not scorer.model.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = feature_store(adapter(run).uri, scorer.config).rows(["i3", "i5"], scorer.config.retrieval, user="u2")
    found = [float(word) for word in done.stdout.strip("[]\n ").split()]
    np.testing.assert_allclose(found, scorer.score(rows), atol=1e-6)


def test_the_backbone_may_lie_elsewhere_but_must_be_the_same(
    copy: Path, tmp_path: Path, rows: pa.Table, scores: np.ndarray
) -> None:
    moved = (copy / "backbone").rename(tmp_path / "model")
    with pytest.raises(ContractError, match=r"backbone' has no manifest\.json"):
        Scorer.from_pretrained(adapter(copy).uri)
    found = Scorer.from_pretrained(adapter(copy).uri, base=str(moved))
    np.testing.assert_array_equal(found.score(rows), scores)
    stages.train_backbone(dataclasses.replace(config(copy), backbone=BackboneConfig(tiny=TinyConfig(steps=2))))
    with pytest.raises(ContractError, match=r"was trained with backbone .*…, but .* now holds"):
        Scorer.from_pretrained(adapter(copy).uri, base=str(copy / "backbone"))


def test_a_bfloat16_backbone_scores_nearly_the_same(run: Path, rows: pa.Table, scores: np.ndarray) -> None:
    found = Scorer.from_pretrained(adapter(run).uri, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for name, p in found.model.backbone.named_parameters() if ".bank." not in name} == {torch.bfloat16}
    assert {p.dtype for p in found.model.crm.parameters()} == {torch.float32}
    np.testing.assert_allclose(found.score(rows), scores, atol=0.03)
    with pytest.raises(ValueError, match=r"dtype torch\.int8 is not supported: take torch\.float32 or torch\.bfloat16"):
        Scorer.from_pretrained(adapter(run).uri, dtype=torch.int8)
