"""An adapter that starts from another one of the run, or learns what that one says in place of the labels."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from sample_data import small_config
from small_model import model, text_batch
from torch.nn import functional as F

from reclora_dist.cli.compose import load
from reclora_dist.config.check import check_config
from reclora_dist.config.schema import Config, EngineConfig, LoraConfig
from reclora_dist.config.targets import adapter_target
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import ADAPTER, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.data.collate import TEXT_COLUMNS
from reclora_dist.evaluate.scorer import Scorer
from reclora_dist.lora import adapter
from reclora_dist.lora.adapter import read_weights, start_from
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.model import RecLora
from reclora_dist.train import stages
from reclora_dist.train.context import Context
from reclora_dist.train.stages import text_loss
from reclora_dist.train.states import ask_teacher

ONE = LoraConfig(experts=1, rank=2, gate="none")
MANY = LoraConfig(experts=4, rank=2, gate_hidden=5, temperature=1.0)
ADAPTERS = {
    "lora": dataclasses.replace(ONE, head="blend"),
    "distilled": dataclasses.replace(MANY, start="lora", teacher="lora", train={"epochs": 1, "lr": 1e-3}),
}


def trained(lora: LoraConfig, encoder: bool = False) -> RecLora:
    """A model with weights that no initialisation gives."""
    found = model(lora, encoder)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return found


def weights(source: RecLora) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in source.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("lora", [MANY, dataclasses.replace(MANY, gate="uniform"), dataclasses.replace(MANY, top_k=1)])
def test_experts_that_start_from_one_pair_say_what_it_says(
    lora: LoraConfig, encoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "START_NOISE", 0.0)
    source, started = trained(ONE, encoder).eval(), model(lora, encoder).eval()
    batch = text_batch()
    assert not torch.allclose(started(batch), source(batch))
    start_from(started, weights(source), seed=0)
    torch.testing.assert_close(started(batch), source(batch))


def test_experts_that_start_from_one_pair_differ_a_little_so_that_the_gate_learns() -> None:
    source, started = trained(ONE), model(MANY).train()
    start_from(started, weights(source), seed=0)
    for name, bank in started.banks.items():
        pair = source.banks[name]
        assert torch.equal(bank.A, pair.A.expand_as(bank.A))
        noise = ((bank.B - pair.B).std() / pair.B.std()).item()
        assert 0.05 < noise < 0.15
    text_loss(started(text_batch()), text_batch()).backward()
    assert started.gates is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in started.gates.parameters())
    again = model(MANY)
    start_from(again, weights(source), seed=0)
    assert all(torch.equal(value, weights(started)[name]) for name, value in weights(again).items())


def test_an_adapter_of_the_same_form_is_taken_over_whole() -> None:
    source, started = trained(MANY), model(MANY)
    start_from(started, weights(source), seed=0)
    assert all(torch.equal(value, weights(source)[name]) for name, value in weights(started).items())


def test_the_identity_between_a_and_b_says_what_one_pair_says() -> None:
    """Whatever CFLoRA's gate reads, at first."""
    source = trained(ONE).eval()
    started = model(LoraConfig(experts=1, rank=2, mode="matrix", gate_hidden=5)).eval()
    start_from(started, weights(source), seed=0)
    torch.testing.assert_close(started(text_batch()), source(text_batch()))


def test_what_a_teacher_says_is_learned_like_a_label() -> None:
    torch.manual_seed(0)
    logits, batch = torch.randn(4, 2), text_batch()
    sure = dataclasses.replace(batch, taught=batch.label)
    torch.testing.assert_close(text_loss(logits, sure), text_loss(logits, batch))
    probability = torch.tensor([0.9, 0.2, 0.5, 0.4])
    expected = F.binary_cross_entropy_with_logits(logits[:, 1] - logits[:, 0], probability)
    torch.testing.assert_close(text_loss(logits, dataclasses.replace(batch, taught=probability)), expected)


def test_probabilities_stay_with_their_samples() -> None:
    batch = dataclasses.replace(text_batch(), taught=torch.tensor([0.1, 0.2, 0.3, 0.4]))
    taken = batch.take(torch.tensor([2, 0])).packed().to("cpu")
    assert taken.taught is not None
    assert taken.crm.sample_id.tolist() == [2, 0]
    assert torch.equal(taken.taught, torch.tensor([0.3, 0.1]))


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher and its pupil, trained."""
    home = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("distil") / "run"))
    stages.train_all(config(home), list(ADAPTERS), Context())
    return home


def config(run: Path, **lora_train: Any) -> Config:
    base = small_config(run, engine=EngineConfig(kind="torch"), adapters=ADAPTERS)
    return dataclasses.replace(base, lora_train=dataclasses.replace(base.lora_train, **lora_train))


def test_the_teachers_probabilities_are_its_scores(run: Path) -> None:
    shards = Folder(str(run / "shards"))
    entries = read_manifest(shards, SHARDS).select("text/split=train/")
    teacher = Folder(str(run / "adapters/lora"))
    rows = read_parts(shards, entries, list(TEXT_COLUMNS))
    answers = ask_teacher(teacher, shards, entries, Context())
    assert len(answers.ids) == rows.num_rows
    (found,) = answers.of(torch.tensor(rows["sample_id"].to_pylist()))
    torch.testing.assert_close(found.double(), torch.from_numpy(Scorer.load(teacher).score(rows)), atol=1e-6, rtol=0)


def test_training_batches_carry_them_and_validation_batches_do_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation is by the labels: the teacher is not asked about those samples."""
    seen: list[TextBatch] = []
    loss, scores = stages.text_loss, stages._text_scores

    def remember(logits: torch.Tensor, batch: TextBatch) -> torch.Tensor:
        assert batch.taught is not None
        seen.append(batch)
        return loss(logits, batch)

    def judge(judged: torch.nn.Module, batch: TextBatch) -> torch.Tensor:
        assert batch.taught is None
        return scores(judged, batch)

    monkeypatch.setattr(stages, "text_loss", remember)
    monkeypatch.setattr(stages, "_text_scores", judge)
    home = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(home / "adapters/distilled")
    asked: list[pa.Table] = []
    score = Scorer.score

    def scored(scorer: Scorer, rows: pa.Table, donors: pa.Table | None = None) -> Any:
        asked.append(rows)
        return score(scorer, rows, donors)

    monkeypatch.setattr(Scorer, "score", scored)
    stages.train_adapter(config(home), "distilled", Context())
    trained_on = torch.cat([batch.crm.sample_id for batch in seen])
    said = pa.concat_tables(asked)["sample_id"].to_pylist()
    assert len(set(said)) == len(said)
    assert set(trained_on.tolist()) <= set(said)
    labels, probabilities = (torch.cat([getattr(batch, name) for batch in seen]) for name in ("label", "taught"))
    assert labels.unique().tolist() == [0, 1]
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_the_pupil_begins_as_its_start_and_is_made_again_when_that_is(run: Path, tmp_path: Path) -> None:
    pupil = Folder(str(run / "adapters/distilled"))
    manifest = read_manifest(pupil, ADAPTER)
    assert (
        manifest.parents["adapters/lora"] == read_manifest(Folder(str(run / "adapters/lora")), ADAPTER).content_digest
    )
    assert adapter_target(config(run), "distilled").is_current
    ours, theirs = read_weights(pupil), read_weights(Folder(str(run / "adapters/lora")))
    card = (run / "adapters/distilled/README.md").read_text()
    assert "It started from the weights of `lora`. It learned the probabilities that `lora` gives" in card
    assert manifest.parents["adapters/lora"] in card
    name = next(name for name in theirs if name.endswith("bank.A"))
    assert F.cosine_similarity(ours[name].mean(0).flatten(), theirs[name].flatten(), dim=0) > 0.9
    home = Path(shutil.copytree(run, tmp_path / "run"))
    stages.train_adapter(config(home, lr=1e-4), "lora", Context())
    assert not adapter_target(config(home, lr=1e-4), "distilled").is_current


def test_settings_of_its_own_are_all_that_counts(run: Path) -> None:
    assert config(run).training("distilled").epochs == 1
    assert config(run).training("lora") == config(run).lora_train
    for changes, same in (({"lr": 7e-3}, True), ({"epochs": 9}, True), ({"clip": 0.5}, False)):
        assert adapter_target(config(run, **changes), "distilled").is_current is same, changes
        assert not adapter_target(config(run, **changes), "lora").is_current


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start": "x"}, "adapters.x.start names 'x'; adapters listed before 'x': lora, uniform, reclora"),
        ({"teacher": "lorra"}, "adapters.x.teacher names 'lorra'; adapters listed before 'x': lora, uniform, reclora"),
        ({"start": "lora", "rank": 4}, "experts = 16, mode 'weights', rank 4, alpha 16 cannot start from it"),
        ({"start": "lora", "alpha": 8.0}, "adapters.x.start 'lora' has experts = 1, mode 'weights', rank 8, alpha 16;"),
        ({"start": "reclora"}, "adapters.x.start 'reclora' has experts = 8, mode 'weights', rank 8, alpha 16;"),
        ({"start": "lora", "mode": "outputs", "experts": 4}, "experts = 4, mode 'outputs', rank 8, alpha 16 cannot"),
        ({"train": {"lrr": 1}}, "adapters.x.train: config lrr = 1: no such key; did you mean 'lr'?"),
        ({"train": {"epochs": 1.5}}, "adapters.x.train: config epochs = 1.5: input should be a valid integer"),
        ({"train": {"epochs": 0}}, "adapters.x.train.epochs 0 must be at least 1"),
        ({"train": {"micro_tokens": 9}}, "adapters.x.train.micro_tokens 9 holds no prompt of prompt.max_tokens"),
    ],
)
def test_what_cannot_be_a_start_a_teacher_or_a_setting_is_refused(changes: dict[str, Any], words: str) -> None:
    base = load()
    adapters = {**base.adapters, "x": dataclasses.replace(LoraConfig(), **changes)}
    with pytest.raises(ValueError, match=re.escape(words)):
        check_config(dataclasses.replace(base, adapters=adapters))
