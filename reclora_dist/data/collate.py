"""Tables of shard rows to tensors: ``CrmBatch`` for the CRM, ``TextBatch`` for the language model on top of it."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from reclora_dist.contract.schema import STATISTICS
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.data.prompts import PromptBuilder
from reclora_dist.lora.batch import TextBatch

CRM_COLUMNS = (
    "sample_id",
    "user",
    "item",
    "label",
    "user_fields",
    "statistics",
    "long_items",
    "long_levels",
    "long_length",
)
"""Columns that ``crm_batch`` reads."""

TEXT_COLUMNS = (*CRM_COLUMNS, "short_items", "short_levels", "short_length")
"""Columns that ``TextCollator`` reads."""


def crm_batch(table: pa.Table) -> CrmBatch:
    """Tensors of the CRM from rows in the CRM or the text shard schema.

    Raises:
        ValueError: a column is missing or holds nulls.
    """
    return CrmBatch(
        sample_id=_vector(table, "sample_id", np.int64),
        item=_vector(table, "item", np.int64),
        user=_vector(table, "user", np.int64),
        label=_vector(table, "label", np.float32),
        user_fields=torch.from_numpy(matrix(table, "user_fields", np.int64)),
        statistics=torch.from_numpy(matrix(table, "statistics", np.float32, len(STATISTICS))),
        items=torch.from_numpy(matrix(table, "long_items", np.int64)),
        levels=torch.from_numpy(matrix(table, "long_levels", np.int64)),
        length=_vector(table, "long_length", np.int64),
    )


def column(table: pa.Table, name: str) -> pa.Array:
    """One column as a single array.

    Raises:
        ValueError: the column is missing or holds nulls.
    """
    if name not in table.column_names:
        raise ValueError(
            f"column {name!r} is missing, the table has {table.column_names}: read all columns of the shard"
        )
    chunked = table.column(name)
    if chunked.null_count:
        raise ValueError(f"column {name!r} holds {chunked.null_count} nulls: rebuild the shards")
    return chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()


def matrix(table: pa.Table, name: str, dtype: Any, width: int | None = None) -> NDArray[Any]:
    """A fixed-size list column as a writable [rows, width] array.

    Raises:
        ValueError: the column is missing, holds nulls, is no fixed-size list, or has another width than asked for.
    """
    array = column(table, name)
    size = list_size(array, name)
    if width is not None and size != width:
        raise ValueError(f"column {name!r} has lists of {size}, not of {width}: rebuild the shards with this release")
    flat = array.flatten()  # unlike .values it respects the offset of a sliced array
    if flat.null_count:
        raise ValueError(f"column {name!r} holds {flat.null_count} nulls in its lists: rebuild the shards")
    return np.array(flat.to_numpy(zero_copy_only=False), dtype=dtype).reshape(len(array), size)


def list_size(array: pa.Array, name: str) -> int:
    """Length of the lists of a column: fixed by its type, or 0 where all of its lists are empty.

    Raises:
        ValueError: lists of variable length.
    """
    if pa.types.is_fixed_size_list(array.type):
        return int(array.type.list_size)
    if pa.types.is_list(array.type) and not len(array.flatten()):
        return 0
    raise ValueError(f"column {name!r} has type {array.type}, not a fixed-size list: rebuild the shards")


def _vector(table: pa.Table, name: str, dtype: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(column(table, name).to_numpy(zero_copy_only=False), dtype=dtype))


class TextCollator:
    """Words and pads the prompts of text shard rows."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self.prompts = prompts

    def __call__(self, table: pa.Table) -> TextBatch:
        """Rows in the text shard schema to a batch.

        Raises:
            ValueError: a column is missing or holds nulls, the table is empty, or a row names an unknown item.
        """
        if not table.num_rows:
            raise ValueError("a text batch needs at least one row: the table is empty")
        crm = crm_batch(table)
        input_ids, lengths = self._padded(self._rows(table))
        mask = np.arange(input_ids.shape[1])[None, :] < lengths[:, None]
        return TextBatch(
            crm,
            torch.from_numpy(input_ids),
            torch.from_numpy(mask.astype(np.int64)),
            torch.from_numpy(lengths - 1),
        )

    def _rows(self, table: pa.Table) -> list[list[int]]:
        items, levels = matrix(table, "short_items", np.int64), matrix(table, "short_levels", np.int64)
        lengths = column(table, "short_length").to_pylist()
        targets = column(table, "item").to_numpy(zero_copy_only=False)
        self.prompts.prepare(np.union1d(items, targets))
        rows = zip(
            matrix(table, "user_fields", np.int64).tolist(),
            items.tolist(),
            levels.tolist(),
            lengths,
            targets.tolist(),
            strict=True,
        )
        return [self.prompts.tokens(f, i[:n], lv[:n], target) for f, i, lv, n, target in rows]

    def _padded(self, rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token rows to int64 [B, L], padded at the end, and their lengths int64 [B]."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        padded = np.full((len(rows), int(lengths.max())), self.prompts.pad, dtype=np.int64)
        mask = np.arange(padded.shape[1])[None, :] < lengths[:, None]
        padded[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        return padded, lengths
