"""However a step's samples are divided, and whoever asked the CRM about them, the same adapter is trained."""

import dataclasses
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from sample_data import small_config
from torch import Tensor

from reclora_dist.config.schema import Config, EngineConfig, LoraConfig
from reclora_dist.contract.manifest import add_file, commit, read_manifest
from reclora_dist.contract.schema import ADAPTER, CRM, EVENTS, SHARDS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.build import load_crm
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch
from reclora_dist.data.plan import SequentialPlan, row_groups
from reclora_dist.data.readers import read_batches
from reclora_dist.evaluate.scorer import text_collator
from reclora_dist.train import stages
from reclora_dist.train.context import Context
from reclora_dist.train.data import Data
from reclora_dist.train.states import ask_crm

LORA = LoraConfig(experts=3, rank=2, temperature=1.0, gate_dropout=0.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "micro-batches of other sizes": {"lora_train": {"micro_batch": 24}},
    "a token budget": {"lora_train": {"micro_tokens": 900}},
    "packing": {"lora_train": {"packing": True}},
    "packing by a token budget": {"lora_train": {"packing": True, "micro_tokens": 700}},
    "layers run again in the backward pass": {"backbone": {"gradient_checkpointing": True}},
    "stored answers of the CRM": {"reader": {"crm_states": "stored"}},
    "nothing ahead": {"reader": {"prefetch": 0}},
    "petastorm": {"reader": {"kind": "petastorm"}},
}
EXACT = {"nothing ahead", "petastorm"}


def config(run: Path, **changes: Mapping[str, Any]) -> Config:
    base = small_config(run, engine=EngineConfig(kind="torch"), adapters={"reclora": LORA})
    parts = {name: dataclasses.replace(getattr(base, name), **change) for name, change in changes.items()}
    return dataclasses.replace(base, **parts)


def trained(prepared: Path, run: Path, **changes: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shutil.copytree(prepared, run)
    stages.train_adapter(config(run, **changes), "reclora", Context())
    folder = run / "adapters" / "reclora"
    return load_file(*folder.glob("adapter_model-*.safetensors")), dict(
        read_manifest(Folder(str(folder)), ADAPTER).facts
    )


@pytest.fixture(scope="module")
def plain(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return trained(prepared, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("name", VARIANTS)
def test_how_the_work_is_done_does_not_change_what_is_trained(
    prepared: Path, tmp_path: Path, plain: tuple[dict[str, Tensor], dict[str, Any]], name: str
) -> None:
    weights, facts = trained(prepared, tmp_path / "run", **VARIANTS[name])
    expected, expected_facts = plain
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        if name in EXACT:
            assert torch.equal(value, expected[key]), key
        torch.testing.assert_close(value, expected[key], atol=2e-5, rtol=1e-4, msg=key)
    assert facts["validation_auc"] == pytest.approx(expected_facts["validation_auc"], abs=1e-3)


def test_such_settings_leave_outputs_up_to_date_and_checkpoints_usable(prepared: Path) -> None:
    from reclora_dist.config.targets import adapter_target, crm_target

    base = config(prepared)
    own = adapter_target(base, "reclora").digest
    for changes in VARIANTS.values():
        assert adapter_target(config(prepared, **changes), "reclora").digest == own
    other = dataclasses.replace(base, ray=dataclasses.replace(base.ray, workers=7), engine=EngineConfig(zero_stage=3))
    assert crm_target(other).digest == crm_target(base).digest
    assert adapter_target(other, "reclora").digest == own
    smaller = {"reclora": dataclasses.replace(LORA, train={"micro_batch": 8})}
    assert adapter_target(dataclasses.replace(base, adapters=smaller), "reclora").digest == own
    balanced = [
        dataclasses.replace(settings, adapters={"reclora": dataclasses.replace(LORA, balance=0.1)})
        for settings in (base, *(config(prepared, lora_train={name: 4}) for name in ("micro_batch", "micro_tokens")))
    ]
    digests = {adapter_target(settings, "reclora").digest for settings in balanced}
    assert len(digests) == 3, "the balance is that of a forward pass, so with it another size trains another adapter"
    longer = config(prepared, lora_train={"epochs": 2})
    assert adapter_target(longer, "reclora").digest != own


@pytest.mark.parametrize("name", ["events", "vectors"])
def test_an_adapter_is_outdated_by_whatever_it_refers_to(prepared: Path, tmp_path: Path, name: str) -> None:
    """The service, too, refuses an adapter beside other events or vectors than those of its training."""
    from reclora_dist.config.targets import adapter_target

    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    before = adapter_target(config(run), "reclora").digest
    folder, form = Folder(str(run / name)), {"events": EVENTS, "vectors": VECTORS}[name]
    made = read_manifest(folder, form)
    commit(folder, dataclasses.replace(made, files=(*made.files, add_file(folder, "more.json", b"{}"))))
    assert adapter_target(config(run), "reclora").digest != before


def test_the_crms_stored_answers_are_those_it_gives(prepared: Path) -> None:
    settings = config(prepared)
    crm = load_crm(Folder(str(prepared / "crm")), read_manifest(Folder(str(prepared / "crm")), CRM))
    for gate in ("crm", "user"):
        model = stages.build_model(settings, dataclasses.replace(LORA, gate=gate), crm)
        folder = Folder(str(prepared / "shards"))
        entries = read_manifest(folder, SHARDS).select("text/")
        answers = ask_crm(model, folder, entries, Context())
        assert len(answers.ids) == sum(entry.rows for entry in entries) > 100
        (table,) = read_batches(folder, entries[:1], SequentialPlan(row_groups(entries[:1]), 9999), CRM_COLUMNS)
        batch = crm_batch(table).take(torch.tensor([5, 3, 3]))
        state, logit, user_state = answers.of(batch.sample_id)
        with torch.no_grad():
            asked = crm(batch)
        torch.testing.assert_close((state, logit), (asked.state, asked.logit))
        if gate == "user":
            torch.testing.assert_close(user_state, asked.user_state)
        assert user_state.shape[1] == (0 if gate == "crm" else crm.user_state_width)
    with pytest.raises(KeyError, match="not asked about sample -1"):
        answers.of(torch.tensor([-1]))


class Together(Context):
    """Workers that are threads of this process."""

    values: ClassVar[dict[int, Any]]
    barrier: ClassVar[threading.Barrier]

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank] = value
        self.barrier.wait(60)
        found = [self.values[rank] for rank in range(self.world)]
        self.barrier.wait(60)
        return found


class Untrained:
    model = torch.nn.Linear(1, 1)


def test_a_token_budget_bounds_the_validation_on_all_workers(prepared: Path) -> None:
    """Every row is scored once; a worker with fewer or shorter rows makes as many passes as the others."""
    shards = read_manifest(Folder(str(prepared / "shards")), SHARDS)
    groups = row_groups(shards.select("text/split=validation/"))
    rows, world = sum(group.rows for group in groups), 7
    assert {SequentialPlan(groups, 24, rank, world).steps for rank in range(world)} == {1, 2}
    settings = config(prepared, lora_train={"batch_size": 6 * world, "micro_tokens": 300})
    collate = text_collator(
        stages.adapter_config(settings, "reclora"), Folder(str(prepared / "events")), str(prepared / "backbone")
    )
    Together.values, Together.barrier = {}, threading.Barrier(world)
    seen: dict[int, list[Any]] = {rank: [] for rank in range(world)}

    def score(rank: int, batch: Any) -> Tensor:
        seen[rank].append(batch)
        return batch.crm.item.float()

    def auc(rank: int) -> float:
        context = Together(rank, world)
        data = Data(settings, shards, "text", TEXT_COLUMNS, collate, settings.lora_train, context)
        return data.auc(Untrained(), lambda _, batch: score(rank, batch))  # type: ignore[arg-type]

    with ThreadPoolExecutor(world) as pool:
        (found,) = set(pool.map(auc, range(world)))
    assert len({len(batches) for batches in seen.values()}) == 1
    assert max(batch.size for batches in seen.values() for batch in batches) <= 300
    (whole,) = read_batches(
        Folder(str(prepared / "shards")),
        shards.select("text/split=validation/"),
        SequentialPlan(groups, rows),
        TEXT_COLUMNS,
    )
    scores, labels = whole["item"].to_numpy(), whole["label"].to_numpy()
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert found == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_batches_of_all_workers_are_the_step(prepared: Path) -> None:
    """Three workers share steps of 64 samples, whose shares sum to what a mean over all rows needs."""
    settings = config(prepared)
    shards = read_manifest(Folder(str(prepared / "shards")), SHARDS)
    ids, shares = [], []
    for rank in range(3):
        data = Data(settings, shards, "crm", CRM_COLUMNS, crm_batch, settings.crm_train, Context(rank, 3))
        first = next(data.batches(0, 0))
        ids += [int(i) for batch, _ in first for i in batch.sample_id]
        shares += [share for _, share in first]
    assert len(set(ids)) == 64
    assert [round(share * 64 / 3) for share in shares] == [22, 21, 21]
    assert sum(shares) == pytest.approx(3)
