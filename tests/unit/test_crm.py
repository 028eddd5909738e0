"""SIM: two ways to the history vectors, DIN's attention as it is worded, statistics, switches."""

import dataclasses
from unittest import mock

import pytest
import torch
from crm_data import CONFIG, batch, model, part
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reclora_dist.crm import layers
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.inputs import Fields, item_fields_tensor, statistics_features
from reclora_dist.crm.layers import TargetAttention


def test_history_through_the_item_table_equals_the_direct_one() -> None:
    sim, rows = model(), batch(40)
    pairs = len(sim.inputs.item_fields) * sim.inputs.level.num_embeddings
    assert rows.items.numel() > pairs > part(rows, slice(0, 1)).items.numel()
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


def test_an_empty_history_is_a_zero_interest_and_a_changed_one_changes_the_score() -> None:
    sim, rows = model(), batch(30)
    empty = dataclasses.replace(rows, length=torch.zeros_like(rows.length))
    assert sim(empty).logit.isfinite().all()
    other = dataclasses.replace(rows, levels=torch.where(rows.levels > 0, 6 - rows.levels, 0))
    moved = (sim(other).logit - sim(rows).logit).abs() > 1e-6
    changed = (other.levels != rows.levels).any(1)
    assert torch.equal(moved, changed)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 4),
    steps=st.integers(0, 5),
    width=st.integers(1, 4),
    hidden=st.integers(1, 5),
    cached=st.integers(1, 12),
)
def test_attention_is_an_mlp_on_target_history_difference_and_product(
    size: int, steps: int, width: int, hidden: int, cached: int
) -> None:
    torch.manual_seed(0)
    attention = TargetAttention(width, [hidden, 3]).double()
    target, history = torch.randn(size, width).double(), torch.randn(size, steps, width).double()
    mask = torch.rand(size, steps) > 0.4
    t = target[:, None].expand_as(history)
    concatenated = torch.cat([t, history, t - history, t * history], dim=-1)
    weights = attention.rest(torch.relu(attention.first(concatenated))).squeeze(-1)
    expected = (torch.where(mask, weights, 0)[..., None] * history).sum(1)
    with mock.patch.object(layers, "CACHED_STEPS", cached):
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
