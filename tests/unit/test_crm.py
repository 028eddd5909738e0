"""SIM: two ways to the history vectors, padding, DIN's attention as it is worded, statistics, save and load."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reclora_dist.config.schema import CrmConfig
from reclora_dist.contract.manifest import ContractError, Manifest, commit, read_manifest
from reclora_dist.contract.schema import CRM
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.build import add_crm, build_crm, load_crm, vocabulary_of
from reclora_dist.crm.layers import Fields, TargetAttention
from reclora_dist.crm.sim import Sim, Vocabulary, item_fields_tensor, statistics_features

CONFIG = CrmConfig(embedding=4, attention=(6, 5), dnn=(8, 7), user_id=True)
WORDS = Vocabulary(items=12, users=6, levels=5, user_fields=(2, 3), item_fields=(3, 4))


def model(config: CrmConfig = CONFIG) -> Sim:
    torch.manual_seed(0)
    fields = torch.stack([torch.randint(0, 4, (13,)), torch.randint(0, 5, (13,))], 1)
    fields[0] = 0
    found = Sim(config, WORDS, fields)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found.eval()


def batch(size: int, steps: int = 6, seed: int = 1) -> CrmBatch:
    torch.manual_seed(seed)
    length = torch.randint(0, steps + 1, (size,))
    real = torch.arange(steps) < length[:, None]
    return CrmBatch(
        sample_id=torch.arange(size),
        item=torch.randint(1, 13, (size,)),
        user=torch.randint(0, 7, (size,)),
        label=torch.randint(0, 2, (size,)).float(),
        user_fields=torch.stack([torch.randint(0, 3, (size,)), torch.randint(0, 4, (size,))], 1),
        statistics=torch.tensor([9, 3, 7, 2]) * torch.randint(0, 9, (size, 1)).float(),  # likes are events too
        items=torch.randint(1, 13, (size, steps)) * real,
        levels=torch.randint(1, 6, (size, steps)) * real,
        length=length,
    )


def part(rows: CrmBatch, index: slice) -> CrmBatch:
    return CrmBatch(**{name: value[index] for name, value in vars(rows).items()})


def test_history_through_the_item_table_equals_the_direct_one() -> None:
    sim, rows = model(), batch(40)
    assert rows.items.numel() > len(sim.item_fields) > part(rows, slice(0, 1)).items.numel()
    together = sim(rows)
    alone = [sim(part(rows, slice(i, i + 1))) for i in range(len(rows))]
    torch.testing.assert_close(torch.cat([one.state for one in alone]), together.state)
    torch.testing.assert_close(torch.cat([one.logit for one in alone]), together.logit)


def test_both_ways_have_the_same_gradients() -> None:
    def gradients(batches: list[CrmBatch]) -> dict[str, Tensor]:
        sim = model()
        for rows in batches:
            sim(rows).logit.square().sum().backward()
        return {name: p.grad for name, p in sim.named_parameters() if p.grad is not None}

    rows = batch(40)
    table, direct = gradients([rows]), gradients([part(rows, slice(i, i + 1)) for i in range(40)])
    assert table.keys() == direct.keys()
    for name, value in table.items():
        torch.testing.assert_close(value, direct[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("size", [1, 40])
def test_what_stands_in_the_padding_does_not_matter(size: int) -> None:
    sim, rows = model(), batch(size)
    pad = torch.arange(6) >= rows.length[:, None]
    other = dataclasses.replace(rows, items=torch.where(pad, 7, rows.items), levels=torch.where(pad, 3, rows.levels))
    torch.testing.assert_close(sim(other).logit, sim(rows).logit)
    wider = dataclasses.replace(
        rows,
        items=torch.nn.functional.pad(rows.items, (0, 5)),
        levels=torch.nn.functional.pad(rows.levels, (0, 5)),
    )
    torch.testing.assert_close(sim(wider).logit, sim(rows).logit)


def test_an_empty_history_is_a_zero_interest_and_a_changed_one_changes_the_score() -> None:
    sim, rows = model(), batch(30)
    empty = dataclasses.replace(rows, length=torch.zeros_like(rows.length))
    assert sim(empty).logit.isfinite().all()
    other = dataclasses.replace(rows, levels=torch.where(rows.levels > 0, 6 - rows.levels, 0))
    moved = (sim(other).logit - sim(rows).logit).abs() > 1e-6
    changed = (other.levels != rows.levels).any(1)
    assert torch.equal(moved, changed)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 4), steps=st.integers(1, 5), width=st.integers(1, 4), hidden=st.integers(1, 5))
def test_attention_is_an_mlp_on_target_history_difference_and_product(
    size: int, steps: int, width: int, hidden: int
) -> None:
    torch.manual_seed(0)
    attention = TargetAttention(width, [hidden, 3]).double()
    target, history = torch.randn(size, width).double(), torch.randn(size, steps, width).double()
    mask = torch.rand(size, steps) > 0.4
    t = target[:, None].expand_as(history)
    concatenated = torch.cat([t, history, t - history, t * history], dim=-1)
    weights = attention.rest(torch.relu(attention.first(concatenated))).squeeze(-1)
    expected = (torch.where(mask, weights, 0)[..., None] * history).sum(1)
    torch.testing.assert_close(attention(target, history, mask), expected)


def test_fields_do_not_share_rows() -> None:
    fields = Fields((2, 3), 4)
    assert fields.table.num_embeddings == 7
    torch.testing.assert_close(fields(torch.tensor([[2, 3]]))[0], fields.table.weight[[2, 6]].flatten())
    assert Fields((), 4)(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0)


def test_statistics_are_log_counts_smoothed_rates_and_their_logits() -> None:
    counts = torch.tensor([[0.0, 0.0, 30.0, 15.0], [10.0, 10.0, 1e6, 0.0]])
    found = statistics_features(counts)
    assert found.shape == (2, 6)
    torch.testing.assert_close(found[:, :2], torch.log1p(counts[:, [0, 2]]) / 5)
    torch.testing.assert_close(found[0, 2:4], torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(found[1, 2], torch.tensor(0.75))
    torch.testing.assert_close(found[:, 4:], torch.logit(found[:, 2:4]))
    assert found.isfinite().all()


@pytest.mark.parametrize("setting", ["user_id", "statistics"])
def test_switches_take_an_input_away(setting: str) -> None:
    on, off = (model(dataclasses.replace(CONFIG, **{setting: value})) for value in (True, False))
    assert on.dnn[0].in_features - off.dnn[0].in_features == (4 if setting == "user_id" else 6)
    rows, name = batch(20), "user" if setting == "user_id" else "statistics"
    changed = dataclasses.replace(rows, **{name: getattr(rows, name).flip(0)})
    assert not torch.allclose(on(changed).logit, on(rows).logit)
    assert torch.equal(off(changed).logit, off(rows).logit)


def test_the_item_table_is_by_position_with_a_padding_row() -> None:
    table = item_fields_tensor([[5, 1], [6, 2]], [3, 1])
    assert table.tolist() == [[0, 0], [6, 2], [0, 0], [5, 1]]


def test_what_is_saved_is_loaded_and_damage_is_refused(tmp_path: Path) -> None:
    facts = {
        "items": 12,
        "users": 6,
        "rating_levels": [1, 2, 3, 4, 5],
        "user_fields": {"a": ["x", "y"], "b": ["x", "y", "z"]},
        "item_fields": {"c": ["x", "y", "z"]},
    }
    items = pa.table({"item": list(range(1, 13)), "fields": [[i % 4] for i in range(12)]})
    sim = build_crm(CONFIG, facts, items).eval()
    folder, vocabulary = Folder(str(tmp_path)), vocabulary_of(facts)
    files = add_crm(folder, sim, vocabulary)
    commit(folder, Manifest(CRM.name, CRM.version, "", {}, tuple(files)))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = load_crm(folder, read_manifest(folder, CRM))
    assert not loaded.training
    assert loaded.config == CONFIG
    rows = batch(20)
    assert torch.equal(loaded(rows).state, sim(rows).state)
    (weights,) = tmp_path.glob("crm-*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ContractError, match=f"'{weights.name}' has SHA-256"):
        load_crm(folder, read_manifest(folder, CRM))
