"""Every kind of CRM: padding, order, gradients, the user's state, save and load, and that it learns."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from crm_data import CONFIG, WORDS, batch, model, part
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import write_run
from torch import Tensor

from reclora_dist.config.schema import CrmConfig, TrainConfig
from reclora_dist.contract.manifest import ContractError, Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import CRM, EVENTS, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.crm import sim
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.build import KINDS, Crm, add_crm, build_crm, load_crm, vocabulary_of
from reclora_dist.crm.dcnv2 import CrossNetwork
from reclora_dist.crm.deepfm import sum_of_products
from reclora_dist.crm.layers import last_step
from reclora_dist.crm.sasrec import Block
from reclora_dist.data.collate import crm_batch
from reclora_dist.evaluate.auc import auc_by_group

every_kind = pytest.mark.parametrize("kind", KINDS)


def of(kind: str, **changes: object) -> Crm:
    return model(dataclasses.replace(CONFIG, kind=kind, **changes))


@every_kind
@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 40), more=st.integers(0, 9), seed=st.integers(0, 99))
def test_what_stands_in_the_padding_does_not_matter(kind: str, size: int, more: int, seed: int) -> None:
    crm, rows = of(kind), batch(size, seed=seed)
    pad = torch.arange(6 + more) >= rows.length[:, None]
    items, levels = (torch.nn.functional.pad(value, (0, more)) for value in (rows.items, rows.levels))
    other = dataclasses.replace(rows, items=torch.where(pad, 7, items), levels=torch.where(pad, 3, levels))
    torch.testing.assert_close(crm(other).logit, crm(rows).logit)
    torch.testing.assert_close(crm(other).user_state, crm(rows).user_state)


@every_kind
@settings(max_examples=8, deadline=None)
@given(size=st.integers(2, 40), seed=st.integers(0, 99))
def test_a_sample_is_scored_without_regard_to_the_others(kind: str, size: int, seed: int) -> None:
    crm, rows = of(kind), batch(size, seed=seed)
    order = torch.randperm(size)[: size - 1]
    shuffled = CrmBatch(**{name: value[order] for name, value in vars(rows).items()})
    torch.testing.assert_close(crm(shuffled).logit, crm(rows).logit[order])
    torch.testing.assert_close(crm(shuffled).state, crm(rows).state[order])


@every_kind
def test_every_input_counts_and_the_widths_are_as_said(kind: str) -> None:
    crm, rows = of(kind), batch(30)
    rows = part(rows, rows.length > 0)
    found = crm(rows)
    assert found.state.shape == (len(rows), crm.state_width)
    assert found.user_state.shape == (len(rows), crm.user_state_width)
    for name in ("item", "user", "user_fields", "statistics", "items", "levels"):
        moved = crm(dataclasses.replace(rows, **{name: (getattr(rows, name) + 1) % 3 + 1})).logit
        assert not torch.isclose(moved, found.logit).all(), name


@every_kind
@pytest.mark.parametrize("rows", [0, 3])
def test_gradients_reach_every_parameter(kind: str, rows: int) -> None:
    crm = of(kind, item_rows=rows, user_rows=rows).train()
    assert crm.inputs.item.num_embeddings == (rows or WORDS.items) + 1
    crm(batch(60)).logit.square().sum().backward()
    missed = [name for name, p in crm.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missed


@every_kind
def test_the_users_state_does_not_read_the_target(kind: str) -> None:
    crm, rows = of(kind), batch(30)
    statistics = rows.statistics.clone()
    statistics[:, :2] += 5  # the item's own counts
    other = dataclasses.replace(rows, item=rows.item % 12 + 1, statistics=statistics)
    assert not torch.allclose(crm(other).state, crm(rows).state)
    assert torch.equal(crm(other).user_state, crm(rows).user_state)
    statistics[:, 2:] += 5
    assert not torch.allclose(crm(other).user_state, crm(rows).user_state)


@every_kind
def test_the_state_tells_which_items_were_liked_and_not_only_that_some_were(kind: str) -> None:
    crm, rows = of(kind), batch(1)
    items, levels = torch.tensor([[3, 8]]), torch.tensor([[5, 1]])
    rows = dataclasses.replace(rows, items=items, levels=levels, length=torch.tensor([2]))
    other = dataclasses.replace(rows, levels=levels.flip(1))
    assert not torch.allclose(crm(other).user_state, crm(rows).user_state)
    assert not torch.isclose(crm(other).logit, crm(rows).logit)


def test_the_users_state_costs_nothing_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(history: Tensor, mask: Tensor) -> Tensor:
        raise AssertionError("asked for")

    monkeypatch.setattr(sim, "masked_mean", mean)
    found = of("sim")(batch(3))
    with pytest.raises(AssertionError, match="asked for"):
        _ = found.user_state


@every_kind
def test_an_empty_history_has_finite_scores_and_gradients(kind: str) -> None:
    crm, rows = of(kind), batch(5)
    crm(dataclasses.replace(rows, length=torch.zeros_like(rows.length))).logit.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in crm.parameters())


FACTS = {
    "items": 12,
    "users": 6,
    "rating_levels": [1, 2, 3, 4, 5],
    "user_fields": {"a": ["x", "y"], "b": ["x", "y", "z"]},
    "item_fields": {"c": ["x", "y", "z"]},
}


def item_table(items: int) -> pa.Table:
    return pa.table({"item": list(range(1, items + 1)), "fields": [[i % 4] for i in range(items)]})


def saved(path: Path, config: CrmConfig = CONFIG) -> tuple[Crm, Folder]:
    torch.manual_seed(4)
    crm, folder = build_crm(config, FACTS, item_table(12)).eval(), Folder(str(path))
    files = add_crm(folder, crm, vocabulary_of(FACTS))
    commit(folder, Manifest(CRM.name, CRM.version, "", {}, tuple(files)))
    return crm, folder


@every_kind
def test_what_is_saved_is_loaded_and_equal_seeds_are_equal(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, kind=kind, item_rows=5)
    crm, folder = saved(tmp_path / "first", config)
    assert {path.suffix for path in (tmp_path / "first").iterdir()} == {".json", ".safetensors"}
    loaded = load_crm(folder, read_manifest(folder, CRM))
    assert type(loaded) is type(crm)
    assert not loaded.training
    assert loaded.config == config
    assert torch.equal(loaded(batch(20)).state, crm(batch(20)).state)
    again, _ = saved(tmp_path / "again", config)
    assert torch.equal(again(batch(20)).logit, crm(batch(20)).logit)


def test_a_damaged_crm_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    (weights,) = tmp_path.glob("crm-*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ContractError, match=f"'{weights.name}' has SHA-256"):
        load_crm(folder, read_manifest(folder, CRM))


@pytest.mark.parametrize("size", [1, 40])  # by the item, by the item table
@every_kind
def test_what_came_after_the_training_is_unknown(kind: str, size: int) -> None:
    crm, rows = of(kind), batch(size)
    for name, known in {"item": 12, "items": 12, "user": 6}.items():
        later = dataclasses.replace(rows, **{name: getattr(rows, name) + known + 1})
        unknown = dataclasses.replace(rows, **{name: torch.zeros_like(getattr(rows, name))})
        torch.testing.assert_close(crm(later).logit, crm(unknown).logit)
    later = dataclasses.replace(rows, user_fields=torch.tensor([[3, 4]]).expand(size, 2))
    unknown = dataclasses.replace(rows, user_fields=torch.tensor([[0, 0]]).expand(size, 2))
    torch.testing.assert_close(crm(later).logit, crm(unknown).logit)


@every_kind
def test_an_ignored_field_says_nothing(kind: str) -> None:
    config, rows = dataclasses.replace(CONFIG, kind=kind, ignore=("b", "c")), batch(40)
    crm = build_crm(config, FACTS, item_table(12)).eval()
    assert crm.inputs.fields.sizes.tolist() == [0]
    ignored = dataclasses.replace(rows, user_fields=rows.user_fields * torch.tensor([1, 0]))
    assert torch.equal(crm(ignored).logit, crm(rows).logit)
    read = dataclasses.replace(rows, user_fields=rows.user_fields * torch.tensor([0, 1]))
    assert not torch.equal(crm(read).logit, crm(rows).logit)


def test_a_field_to_ignore_exists() -> None:
    with pytest.raises(ValueError, match=r"crm.ignore names \['zip'\]: users of this log have the fields \['a', 'b'\]"):
        vocabulary_of(FACTS, ["zip", "a"])


@every_kind
def test_the_fields_of_a_later_item_are_read_from_the_item_table(kind: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, dataclasses.replace(CONFIG, kind=kind))
    crm = load_crm(folder, read_manifest(folder, CRM), item_table(15))
    crm.inputs.item.weight.data[11] = crm.inputs.item.weight.data[0]
    rows = batch(20)
    later, same, unknown = (  # the field of item 15 is that of item 11
        crm(dataclasses.replace(rows, item=torch.full_like(rows.item, item))).logit for item in (15, 11, 16)
    )
    torch.testing.assert_close(later, same)
    assert not torch.isclose(later, unknown).any()


def test_an_item_table_with_other_fields_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    items = pa.table({"item": [1], "fields": [[1, 2]]})
    with pytest.raises(ContractError, match="the items have 2 fields, the CRM was trained with 1"):
        load_crm(folder, read_manifest(folder, CRM), items)


def test_the_last_step_is_the_newest_real_one() -> None:
    steps = torch.arange(12.0).reshape(2, 3, 2)
    assert last_step(steps, torch.tensor([2, 3])).tolist() == [[2, 3], [10, 11]]
    assert last_step(steps, torch.tensor([0, 1])).tolist() == [[0, 0], [6, 7]]


def test_self_attention_sees_no_later_step() -> None:
    torch.manual_seed(0)
    block, steps = Block(4, 2, 0.0).eval(), torch.randn(3, 6, 4)
    other = steps.clone()
    other[:, 4] *= -1
    before, after = block(steps), block(other)
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert not torch.isclose(after[:, 4:], before[:, 4:]).all(-1).any()


def test_positions_count_from_the_newest_step_and_old_ones_share_the_last() -> None:
    crm, rows = of("sasrec", positions=4), batch(60)
    before = crm(rows).logit
    crm.get_parameter("position.weight").data[3] *= -1
    assert torch.equal(~torch.isclose(crm(rows).logit, before), rows.length > 3)


def test_the_factorisation_machine_sums_the_products_of_all_pairs() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(5, 4, 3)
    expected = sum(vectors[:, i] * vectors[:, j] for i in range(4) for j in range(i))
    torch.testing.assert_close(sum_of_products(vectors), expected)


def test_cross_layers_multiply_by_the_inputs() -> None:
    torch.manual_seed(0)
    cross, x0 = CrossNetwork(3, 2), torch.randn(4, 3)
    x1 = x0 * (x0 @ cross.layers[0].weight.T + cross.layers[0].bias) + x0
    x2 = x0 * (x1 @ cross.layers[1].weight.T + cross.layers[1].bias) + x1
    torch.testing.assert_close(cross(x0), x2)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, CrmBatch]]:
    """Users like topics; what they liked before and the target's topic tell what they will like."""
    run = tmp_path_factory.mktemp("planted")
    write_run(run, users=250, events=24, long=12)
    folder = Folder(str(run / "shards"))
    shards = read_manifest(folder, SHARDS)
    splits = {s: crm_batch(read_parts(folder, shards.select(f"crm/split={s}/"))) for s in ("train", "test")}
    return run, splits


@every_kind
def test_a_planted_rule_is_learnt(kind: str, planted: tuple[Path, dict[str, CrmBatch]]) -> None:
    run, splits = planted
    folder, train, test = Folder(str(run / "events")), splits["train"], splits["test"]
    events = read_manifest(folder, EVENTS)
    torch.manual_seed(0)
    config = CrmConfig(kind=kind, embedding=8, dnn=(32, 32), attention=(16,))
    crm = build_crm(config, events.facts, read_parts(folder, events.select("items/")))
    optimiser = torch.optim.AdamW(crm.parameters(), lr=5 * TrainConfig().lr)
    for _ in range(8):
        for rows in torch.randperm(len(train)).split(128):
            few = CrmBatch(**{name: value[rows] for name, value in vars(train).items()})
            loss = torch.nn.functional.binary_cross_entropy_with_logits(crm(few).logit, few.label)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        scores = crm.eval()(test).logit.double().numpy()
    (auc,) = auc_by_group(test.label.numpy(), scores, np.zeros(len(scores), np.int64), 1)
    assert auc > 0.7
