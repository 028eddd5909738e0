"""States of users: what is known of each at the end of a day, and their events as they were before the next one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reclora_dist.contract import schema
from reclora_dist.contract.parts import Rows
from reclora_dist.contract.runs import Run, find, take
from spark_jobs.transforms.profiles import Profiles

EVENTS_AT_ONCE = 4_000_000
"""Kept events of users that are looked at together: some hundred megabytes."""

_LOG = ("sample_id", "user", "item", "time", "level", "label", "user_likes")


def whole_users(log: Rows, part: int) -> dict[str, NDArray[Any]] | None:
    """The rows of all users whose first row lies in a part; None if there is no such user."""
    own = log.range_of(part)
    before = log.read(own.start - 1, own.start, ["user"])["user"][0].as_py() if part else -1
    tables = [log.read(own.start, own.stop, _LOG)]
    last = tables[0]["user"][-1].as_py()
    if last == before:
        return None
    for following in range(part + 1, log.parts):
        more = log.read(log.range_of(following).start, log.range_of(following).stop, _LOG)
        tables.append(more.filter(pc.equal(more["user"], last)))
        if tables[-1].num_rows < more.num_rows:
            break
    table = pa.concat_tables(tables)
    table = table.filter(pc.not_equal(table["user"], before))
    return {name: table[name].to_numpy() for name in _LOG}


def few(users: NDArray[Any], runs: Sequence[Run], keep: int) -> list[slice]:
    """The users in stretches that have about EVENTS_AT_ONCE kept events together, or are one user.

    Args:
        users: ascending.
        runs: states of the days before, newest first.
        keep: kept events of a user, at most.
    """
    size = np.ones(len(users), np.int64)
    if runs:
        place, rows = take(runs, find(runs, users.astype(np.int64)), ["events"])
        size[place] += np.minimum(rows["events"].to_numpy(), keep)
    group = np.cumsum(size) // EVENTS_AT_ONCE
    cuts = [*np.flatnonzero(np.diff(group, prepend=-1)).tolist(), len(users)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]


def states(log: dict[str, NDArray[Any]], profiles: Profiles, limit: int, older: Sequence[Run]) -> pa.Table:
    """One row per user: position, events and likes so far, fields, and the newest ``limit`` events, oldest first.

    Args:
        log: events of this build in order of user and place.
        older: runs of the days before, newest first.
    """
    users, first = np.unique(log["user"], return_index=True)
    last = np.append(first[1:], len(log["user"])) - 1
    place = log["sample_id"] & 0xFFFFFFFF
    newest = np.repeat(log["time"][last], last - first + 1) == log["time"]
    likes = log["user_likes"][last] + np.add.reduceat(log["label"] * newest, first, dtype=np.int64)
    events = place[last] + 1
    flat = {"user": log["user"].astype(np.int64), "place": place}
    flat |= {name: log[name] for name in ("item", "time", "level")}
    if older:
        past = past_of(older, users.astype(np.int64))
        flat = {name: np.concatenate([past[name], values]) for name, values in flat.items()}
    wanted = flat["place"] >= events[np.searchsorted(users, flat["user"])] - limit
    order = np.lexsort((flat["place"], flat["user"]))
    order = order[wanted[order]]
    ends = pa.array(np.searchsorted(flat["user"][order], users, "right"), pa.int32())
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
    lists = [pa.ListArray.from_arrays(offsets, pa.array(flat[name][order])) for name in ("item", "time", "level")]
    whole = pa.table([users, events, likes, profiles.of(users), *lists], names=schema.state.names)
    return whole.cast(schema.state)


def past_of(runs: Sequence[Run], users: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The kept events of some users, flat: user, place in its log, item, time and level of each.

    Args:
        runs: states, newest first.
        users: ascending.
    """
    _, rows = take(runs, find(runs, users))
    lists = {name: rows[f"{name}s"].combine_chunks() for name in ("item", "time", "level")}
    length = lists["item"].value_lengths().to_numpy()
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    flat = {name: found.flatten().to_numpy() for name, found in lists.items()}
    start = rows["events"].to_numpy() - length
    return flat | {
        "user": np.repeat(rows["user"].to_numpy(), length),
        "place": np.repeat(start, length) + within,
    }
