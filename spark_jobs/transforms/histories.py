"""One part of events to the retrieved histories of its samples: Arrow in, Arrow out."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.retrieval import chronological, rank

Log = dict[str, NDArray[Any]]


def histories(
    events: pa.Table, vectors: NDArray[np.float32] | None, config: RetrievalConfig, min_history: int
) -> pa.Table:
    """The samples of a part with their long and short histories, in the schema ``histories``.

    Args:
        events: whole users, sorted by user and order (schema ``events``).
        vectors: float32 [items + 1, D]; only the strategy ``recent`` does without.
        config: what to retrieve.
        min_history: events strictly before a sample that make it one.
    """
    target = schema.histories(config.long, config.short)
    tables = [_of_user(user, log, vectors, config, target, min_history) for user, log in _users(events)]
    return pa.concat_tables([target.empty_table(), *tables])


def _users(events: pa.Table) -> Iterator[tuple[pa.Table, Log]]:
    numbers = {name: events[name].to_numpy() for name in ("user", "item", "time", "level")}
    user = numbers["user"]
    cuts = [0, *(np.flatnonzero(np.diff(user)) + 1).tolist(), len(user)]
    for start, stop in pairwise(cuts):
        if stop > start:
            yield events.slice(start, stop - start), {name: values[start:stop] for name, values in numbers.items()}


def _of_user(
    events: pa.Table,
    log: Log,
    vectors: NDArray[np.float32] | None,
    config: RetrievalConfig,
    target: pa.Schema,
    min_history: int,
) -> pa.Table:
    earlier = np.searchsorted(log["time"], log["time"], side="left")
    samples = np.flatnonzero(earlier >= min_history)
    moments, items = log["time"][samples], log["item"][samples]
    table = np.zeros((int(log["item"].max()) + 1, 1), np.float32) if vectors is None else vectors
    k = max(config.long, config.short)
    ranked = rank(table, log["item"], log["time"], items, moments, k, config.strategy, config.block)
    columns = [events[name].take(pa.array(samples)).combine_chunks() for name in target.names[:6]]
    for length in (config.long, config.short):
        columns += _history(log, ranked[:, :length], length)
    return pa.Table.from_arrays(columns, schema=target)


def _history(log: Log, ranked: NDArray[np.int32], length: int) -> list[pa.Array]:
    """Items and levels, padded with 0 at the end, and real length of the histories in ``ranked`` [T, length]."""
    index, real = chronological(ranked)
    columns = []
    for name, kind in (("item", pa.int32()), ("level", pa.int8())):
        values = np.where(index < 0, 0, log[name][index]).ravel()
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values, kind), length))
    return [*columns, pa.array(real)]
