"""Fixed-length columns as one binary column: a shuffle then copies a row's histories instead of walking its lists."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def pack(table: pa.Table, fields: Sequence[pa.Field]) -> pa.Array:
    """The columns ``fields`` (numbers, or lists of them of fixed length) of each row as bytes, one after the other."""
    pieces = [_bytes(table[field.name].combine_chunks(), field) for field in fields]
    joined = np.ascontiguousarray(np.concatenate(pieces, axis=1))
    kind = pa.binary(joined.shape[1])
    return pa.Array.from_buffers(kind, len(joined), [None, pa.py_buffer(joined)]).cast(pa.binary())


def unpack(column: pa.Array, fields: Sequence[pa.Field]) -> dict[str, pa.Array]:
    """The columns that ``pack`` packed."""
    widths = [_width(field) for field in fields]
    data = column.cast(pa.binary(sum(widths)))
    whole = np.frombuffer(data.buffers()[1], np.uint8, len(data) * sum(widths), data.offset * sum(widths))
    cuts = np.cumsum([0, *widths])
    rows = whole.reshape(len(data), sum(widths))
    return {f.name: _array(rows[:, a:b], f) for f, a, b in zip(fields, cuts[:-1], cuts[1:], strict=True)}


def _scalar(field: pa.Field) -> pa.DataType:
    return field.type.value_type if pa.types.is_fixed_size_list(field.type) else field.type


def _width(field: pa.Field) -> int:
    count = field.type.list_size if pa.types.is_fixed_size_list(field.type) else 1
    return int(count * _scalar(field).bit_width // 8)


def _bytes(column: pa.Array, field: pa.Field) -> NDArray[np.uint8]:
    flat = column.flatten() if pa.types.is_fixed_size_list(field.type) else column
    return np.ascontiguousarray(flat.to_numpy()).view(np.uint8).reshape(len(column), _width(field))


def _array(rows: NDArray[np.uint8], field: pa.Field) -> pa.Array:
    kind = _scalar(field)
    values = pa.array(np.ascontiguousarray(rows).reshape(-1).view(kind.to_pandas_dtype()), kind)
    if pa.types.is_fixed_size_list(field.type):
        return pa.FixedSizeListArray.from_arrays(values, field.type.list_size)
    return values
