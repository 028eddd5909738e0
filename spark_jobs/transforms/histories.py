"""Events to the retrieved histories of their samples: Arrow in, Arrow out, many users at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.runs import Run
from reclora_dist.retrieval import Past, Similarity, retrieve
from spark_jobs.transforms.user_states import few, past_of

Log = dict[str, NDArray[Any]]

LISTED_AT_ONCE = 1 << 22
"""Entries of histories that are retrieved together, padding included: some 100 MB."""

_LOG = ("user", "item", "time", "level")


def histories(
    events: pa.Table,
    own: NDArray[np.bool_],
    similarity: Similarity | None,
    config: RetrievalConfig,
    min_history: int,
) -> Iterator[pa.Table]:
    """The samples among the events, with their long and short histories, in the schema ``histories``.

    They come in order, fewer at a time the longer the histories are.

    Args:
        events: sorted by user and order (schema ``events``); of a user's events the newest ``config.candidates``
            before the first sample must be there.
        own: which rows may be samples; the others are history only.
        similarity: scores of events for targets; None takes the newest.
        config: what to retrieve.
        min_history: events strictly before a sample that make it one.
    """
    log: Log = {name: events[name].to_numpy() for name in ("sample_id", *_LOG)}
    places = log["sample_id"] & 0xFFFFFFFF
    starts, stops = before(log["user"], log["time"])
    samples = np.flatnonzero((places[stops] >= min_history) & own)
    lengths = config.long, config.short
    step = max(1, LISTED_AT_ONCE // sum(lengths))
    for some in (samples[start : start + step] for start in range(0, len(samples), step)):
        past = Past(log["item"], places, starts[some], stops[some], config.candidates)
        found = retrieve(similarity, past, log["item"][some], lengths, config.block)
        yield _table(events.take(pa.array(some)).combine_chunks(), log, found, schema.histories(*lengths))
        del found  # not beside the next ones


def _table(samples: pa.Table, log: Log, found: Sequence[NDArray[np.int32]], target: pa.Schema) -> pa.Table:
    columns = [samples[name] for name in target.names if name in samples.column_names]
    for list_of in (_statistics(samples), *(_history(log, index) for index in found)):
        columns += list_of
    return pa.Table.from_arrays(columns, schema=target)


def with_state(
    events: pa.Table, own: NDArray[np.bool_], state: Sequence[Run], keep: int
) -> Iterator[tuple[pa.Table, NDArray[np.bool_]]]:
    """The events with what the days before know of their users in front of each user's, a few users at a time.

    Args:
        events: sorted by user and order.
        own: a mark of each event.
        state: runs of users' states, newest first.
        keep: events in a state, at most.

    Yields:
        Events, and their marks; those of the days before have none.
    """
    column = events["user"].to_numpy()
    users = np.unique(column)
    for some in few(users, state, keep):
        start, stop = np.searchsorted(column, users[some][0]), np.searchsorted(column, users[some][-1], "right")
        yield _behind_state(events.slice(start, stop - start), own[start:stop], state, users[some])


def _behind_state(
    events: pa.Table, own: NDArray[np.bool_], state: Sequence[Run], users: NDArray[Any]
) -> tuple[pa.Table, NDArray[np.bool_]]:
    past = past_of(state, users.astype(np.int64))
    columns = {"sample_id": past["user"] << 32 | past["place"], **{name: past[name] for name in _LOG}}
    older = pa.table({name: pa.array(column, events.schema.field(name).type) for name, column in columns.items()})
    both = pa.concat_tables([older, events], promote_options="default")
    order = np.argsort(both["sample_id"].to_numpy(), kind="stable")
    marks = np.concatenate([np.zeros(older.num_rows, bool), own])
    return both.take(pa.array(order)), marks[order]


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
