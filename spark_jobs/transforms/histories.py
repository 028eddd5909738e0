"""Events to the retrieved histories of their samples: Arrow in, Arrow out, many users at once."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.retrieval import Past, Similarity, retrieve

Log = dict[str, NDArray[Any]]


def histories(
    events: pa.Table, similarity: Similarity | None, config: RetrievalConfig, min_history: int, first: int = 0
) -> pa.Table:
    """The samples among the events, with their long and short histories, in the schema ``histories``.

    Args:
        events: sorted by user and order (schema ``events``); of a user's events the newest ``config.candidates``
            before the first sample must be there.
        similarity: scores of events for targets; None takes the newest.
        config: what to retrieve.
        min_history: events strictly before a sample that make it one.
        first: rows before this one are history only.
    """
    log: Log = {name: events[name].to_numpy() for name in ("sample_id", "user", "item", "time", "level")}
    places = log["sample_id"] & 0xFFFFFFFF
    starts, stops = before(log["user"], log["time"])
    samples = np.flatnonzero((places[stops] >= min_history) & (np.arange(len(places)) >= first))
    past = Past(log["item"], places, starts[samples], stops[samples], config.candidates)
    found = retrieve(similarity, past, log["item"][samples], (config.long, config.short), config.block)
    target = schema.histories(config.long, config.short)
    taken = events.take(pa.array(samples)).combine_chunks()
    columns = [taken[name] for name in target.names if name in events.column_names]
    for list_of in (_statistics(taken), *(_history(log, index) for index in found)):
        columns += list_of
    return pa.Table.from_arrays(columns, schema=target)


def before(users: NDArray[Any], times: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per event of logs in order of user and time: its user's first event, and the first not strictly before it."""
    place = np.arange(len(users))
    new_user = np.diff(users, prepend=-1) != 0
    new_time = new_user | (np.diff(times, prepend=0) != 0)
    return tuple(np.maximum.accumulate(np.where(new, place, 0)) for new in (new_user, new_time))  # type: ignore[return-value]


def _statistics(events: pa.Table) -> list[pa.Array]:
    counts = np.stack([events[name].to_numpy() for name in schema.STATISTICS], axis=1)
    return [pa.FixedSizeListArray.from_arrays(pa.array(counts.ravel(), pa.float32()), counts.shape[1])]


def _history(log: Log, index: NDArray[np.int32]) -> list[pa.Array]:
    """Items and levels, padded with 0 at the end, and real length of the histories ``index`` [T, length]."""
    real = index >= 0
    columns = []
    for name, kind in (("item", pa.int32()), ("level", pa.int8())):
        values = np.where(real, log[name][index], log[name].dtype.type(0)).ravel()
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values, kind), index.shape[1]))
    return [*columns, pa.array(real.sum(axis=1, dtype=np.int32))]
