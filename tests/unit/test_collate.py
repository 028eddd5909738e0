"""crm_batch and TextCollator: tables of any chunking to the same tensors."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reclora_dist.config.schema import PromptConfig
from reclora_dist.contract.schema import text_shard
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, CrmBatch, TextCollator, crm_batch, matrix
from reclora_dist.data.prompts import PromptBuilder

LONG, SHORT, ITEMS, FIELDS = 6, 3, 9, 2


def table(rows: int, fields: int = FIELDS, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    schema = text_shard(fields, LONG, SHORT)
    length = rng.integers(0, LONG + 1, rows)
    items = np.where(np.arange(LONG) < length[:, None], rng.integers(1, ITEMS, (rows, LONG)), 0)
    levels = np.where(items > 0, rng.integers(1, 4, (rows, LONG)), 0)
    columns: dict[str, Any] = {
        "sample_id": rng.permutation(rows) + (5 << 32),
        "user": rng.integers(1, 100, rows),
        "item": rng.integers(1, ITEMS, rows),
        "time": np.arange(rows),
        "label": rng.integers(0, 2, rows),
        "user_fields": rng.integers(0, 3, (rows, fields)),
        "statistics": rng.integers(0, 1000, (rows, 4)),
        "long_items": items,
        "long_levels": levels,
        "long_length": length,
        "short_items": items[:, :SHORT],
        "short_levels": levels[:, :SHORT],
        "short_length": np.minimum(length, SHORT),
    }
    return pa.table([pa.array(columns[f.name].tolist(), f.type) for f in schema], schema=schema)


def collator(**config: Any) -> TextCollator:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "Will": 2, "?": 3, "<s>": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>")
    titles = ["", *(f"Title {'long ' * i}{i}" for i in range(1, ITEMS))]
    fields = {"gender": ["F", "M"], "age": ["old", "young"]}
    return TextCollator(PromptBuilder(PromptConfig(**config), wrapped, titles, [1, 2, 3], fields, causal=True))


def assert_same(one: CrmBatch, other: CrmBatch) -> None:
    for name, tensor in vars(one).items():
        assert torch.equal(tensor, getattr(other, name)), name
        assert tensor.dtype == getattr(other, name).dtype


def test_shapes_types_and_values() -> None:
    rows = table(17)
    batch = crm_batch(rows)
    assert len(batch) == 17
    for name in ("sample_id", "item", "user", "length"):
        assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (torch.int64, (17,))
    assert (batch.label.dtype, batch.statistics.dtype) == (torch.float32, torch.float32)
    for name, source in (("user_fields", "user_fields"), ("items", "long_items"), ("levels", "long_levels")):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).tolist() == rows[source].to_pylist()
    assert batch.sample_id.tolist() == rows["sample_id"].to_pylist()
    assert batch.label.tolist() == rows["label"].to_pylist()
    assert batch.statistics.tolist() == rows["statistics"].to_pylist()
    assert batch.length.tolist() == rows["long_length"].to_pylist()


@given(st.integers(1, 30), st.data())
def test_chunks_and_slices_change_nothing(rows: int, data: st.DataObject) -> None:
    whole = table(40)
    start = data.draw(st.integers(0, 40 - rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    window = whole.slice(start, rows)
    pieces = [window.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    fresh = whole.take(list(range(start, start + rows)))
    assert_same(crm_batch(pa.concat_tables(pieces)), crm_batch(fresh))
    assert_same(crm_batch(window), crm_batch(fresh))


def test_tensors_belong_to_the_batch() -> None:
    rows = table(5)
    batch = crm_batch(rows)
    for tensor in vars(batch).values():
        tensor.zero_()
    assert rows.equals(table(5))


def test_a_log_without_user_fields() -> None:
    for rows in (table(7, fields=0), pa.concat_tables([table(3, 0), table(4, 0)])):
        assert crm_batch(rows).user_fields.shape == (7, 0)


def test_an_empty_table_is_an_empty_crm_batch() -> None:
    batch = crm_batch(table(0))
    assert (len(batch), batch.items.shape) == (0, (0, LONG))


def test_the_columns_named_are_enough() -> None:
    assert_same(crm_batch(table(6).select(CRM_COLUMNS)), crm_batch(table(6)))
    collator()(table(6).select(TEXT_COLUMNS))


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("label", pa.array([1, None], pa.int8()), "'label' holds 1 nulls"),
        ("long_items", pa.array([[1] * LONG, None], pa.list_(pa.int32(), LONG)), "'long_items' holds 1 nulls"),
        ("long_items", pa.array([[1] * 5 + [None], [1] * 6], pa.list_(pa.int32(), LONG)), "holds 1 nulls in its lists"),
        ("long_items", pa.array([[1], [1, 2]], pa.list_(pa.int32())), "not a fixed-size list"),
        ("statistics", pa.array([[1.0] * 3] * 2, pa.list_(pa.float32(), 3)), "'statistics' has lists of 3, not of 4"),
    ],
)
def test_bad_columns_are_named(name: str, column: pa.Array, words: str) -> None:
    rows = table(2)
    with pytest.raises(ValueError, match=words):
        crm_batch(rows.set_column(rows.schema.get_field_index(name), name, column))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"column 'statistics' is missing, the table has \['sample_id'"):
        crm_batch(table(2).drop_columns("statistics"))


@pytest.mark.parametrize("max_tokens", [40, 256])
def test_text_rows_are_padded_prompts(max_tokens: int) -> None:
    rows, collate = table(25), collator(profile="A {age} {gender}.", max_tokens=max_tokens)
    batch = collate(rows)
    assert len(batch) == 25
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.last.dtype == torch.int64
    fields = matrix(rows, "user_fields", np.int64)
    expected = []
    for i, row in enumerate(rows.to_pylist()):
        n = row["short_length"]
        expected.append(
            collate.prompts.tokens(fields[i].tolist(), row["short_items"][:n], row["short_levels"][:n], row["item"])
        )
    assert batch.input_ids.shape == batch.attention_mask.shape == (25, max(map(len, expected)))
    for i, tokens in enumerate(expected):
        assert batch.input_ids[i, : len(tokens)].tolist() == tokens
        assert set(batch.input_ids[i, len(tokens) :].tolist()) <= {collate.prompts.pad}
        assert int(batch.attention_mask[i].sum()) == len(tokens) == int(batch.last[i]) + 1
        assert batch.attention_mask[i, : len(tokens)].all()
    assert_same(batch.crm, crm_batch(rows))
    assert torch.equal(batch.label, batch.crm.label)


def test_text_batches_of_sliced_tables() -> None:
    rows, collate = table(20), collator()
    whole, part = collate(rows.take([7, 8, 9])), collate(pa.concat_tables([rows.slice(7, 1), rows.slice(8, 2)]))
    assert torch.equal(whole.input_ids, part.input_ids) and torch.equal(whole.last, part.last)


def test_batches_move() -> None:
    batch = collator()(table(3)).to("meta")
    assert {t.device.type for t in (batch.input_ids, batch.attention_mask, batch.last, batch.crm.items)} == {"meta"}


def test_an_empty_or_foreign_text_table_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        collator()(table(0))
    rows = table(2)
    foreign = rows.set_column(rows.schema.get_field_index("item"), "item", pa.array([1, ITEMS], pa.int32()))
    with pytest.raises(ValueError, match=f"item {ITEMS} is not in its table of {ITEMS}"):
        collator()(foreign)
