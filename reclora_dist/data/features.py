"""Rows for serving: the features that a shard would hold for a user and a moment, for candidates asked at run time.

The whole log lies in memory as flat arrays (about 30 bytes per event), sorted once per user and once per item.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract.arrays import read_array
from reclora_dist.contract.categories import item_categories
from reclora_dist.contract.manifest import ContractError, Manifest, read_manifest
from reclora_dist.contract.parts import open_part, read_parts
from reclora_dist.contract.schema import EVENTS, VECTORS, text_shard
from reclora_dist.contract.storage import Folder
from reclora_dist.retrieval import Past, Similarity, check_grid, retrieve, similarity

_COLUMNS = ("sample_id", "user", "item", "time", "level", "label", "split")
_SHOWN = 10


class RequestError(ValueError):
    """A request that cannot be answered; the text names the offending value and the remedy."""


class UnknownUserError(RequestError):
    """The user is not in the log."""


class UnknownItemError(RequestError):
    """An item of the history or of the candidates is not in the log."""


class CandidatesError(RequestError):
    """There are no candidates."""


class HistoryError(RequestError):
    """There is no history before the moment asked for, or an event of it is malformed."""


class RatingError(RequestError):
    """A rating is not on the log's scale."""


class ProfileError(RequestError):
    """A profile names a field that users of this log do not have."""


class HistoryEvent(NamedTuple):
    """One event of an explicit history; ``time`` in milliseconds, or None where the order is the time."""

    item: str
    rating: float
    time: int | None = None


@dataclass(frozen=True)
class _Log:
    """All events, sorted by user and then by order; user u's are ``offsets[u]:offsets[u + 1]``."""

    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    levels: NDArray[np.int8]
    times: NDArray[np.int64]
    labels: NDArray[np.int8]
    counted: NDArray[np.bool_]

    @property
    def end(self) -> int:
        """The first moment after every event."""
        return int(self.times.max()) + 1 if len(self.times) else 0


@dataclass(frozen=True)
class _ItemCounts:
    """Events and likes of any item before any moment, by binary search over (item, rank of the time)."""

    clock: NDArray[np.int64]
    keys: NDArray[np.int64]
    likes: NDArray[np.int64]

    @classmethod
    def of(cls, log: _Log) -> "_ItemCounts":
        """Index the events of ``log`` that may be counted."""
        items, times, labels = log.items[log.counted], log.times[log.counted], log.labels[log.counted]
        clock = np.unique(times)
        keys = items.astype(np.int64) * (len(clock) + 1) + np.searchsorted(clock, times)
        order = np.argsort(keys, kind="stable")
        return cls(clock, keys[order], np.concatenate([[0], np.cumsum(labels[order], dtype=np.int64)]))

    def before(self, items: NDArray[np.int32], time: int) -> NDArray[np.float32]:
        """Events and likes of ``items`` [n] strictly before ``time``, float32 [n, 2]."""
        first = items.astype(np.int64) * (len(self.clock) + 1)
        low = np.searchsorted(self.keys, first)
        high = np.searchsorted(self.keys, first + np.searchsorted(self.clock, time))
        return np.stack([high - low, self.likes[high] - self.likes[low]], axis=1).astype(np.float32)


@dataclass(frozen=True)
class _Past:
    """What is known of one user just before a moment; ``counts`` are the events and likes of its statistics."""

    user: int
    fields: NDArray[np.int32]
    items: NDArray[np.int32]
    levels: NDArray[np.int8]
    times: NDArray[np.int64]
    counts: tuple[float, float]
    time: int


@dataclass(frozen=True)
class FeatureStore:
    """The log, the items and the item vectors, ready to give rows in the text shard schema.

    Attributes:
        users: position of each user id.
        items: position of each item id.
        titles: title of each item position; position 0 is empty.
    """

    users: Mapping[str, int]
    items: Mapping[str, int]
    titles: tuple[str, ...]
    _facts: Mapping[str, Any]
    _user_fields: NDArray[np.int32]
    _log: _Log
    _counts: _ItemCounts
    _vectors: NDArray[np.float32]
    _source: tuple[Folder, Manifest]
    _similarities: dict[RetrievalConfig, Similarity | None] = field(default_factory=dict)

    @classmethod
    def load(cls, events: Folder, vectors: Folder) -> "FeatureStore":
        """Read an events dataset and the vectors of its items.

        Raises:
            ContractError: a dataset is missing, damaged, of another version, or the two do not belong together.
        """
        manifest = read_manifest(events, EVENTS)
        if manifest.facts.get("previous"):
            raise ContractError(
                f"{events.uri!r} holds the events of {' to '.join(manifest.facts['days'])} and goes on from another "
                "dataset: the service needs all of them in one. Build the events of all days without --previous."
            )
        items = read_parts(events, manifest.select("items/"), ["item", "item_id", "title"])
        users = read_parts(events, manifest.select("users/"), ["user", "user_id", "fields"])
        log = _read_log(events, manifest, users.num_rows)
        return cls(
            users=_positions(users, "user"),
            items=_positions(items, "item"),
            titles=_titles(items),
            _facts=manifest.facts,
            _user_fields=_field_table(users, len(manifest.facts["user_fields"])),
            _log=log,
            _counts=_ItemCounts.of(log),
            _vectors=_read_vectors(vectors, items.num_rows),
            _source=(events, manifest),
        )

    def rows(
        self,
        candidates: Sequence[str],
        retrieval: RetrievalConfig,
        *,
        user: str | None = None,
        history: Sequence[HistoryEvent] | None = None,
        time: int | None = None,
        profile: Mapping[str, str] | None = None,
    ) -> pa.Table:
        """The rows of one user and many target items, in the order of ``candidates``.

        Either ``user`` (its logged events) or ``history`` (a user this log need not know, oldest event first) says
        what came before. Features are those of a shard at ``time``: only what lies strictly before it counts; without
        a time everything known does. ``profile`` gives or overrides user fields by name; a value the log has never
        seen counts as unknown. ``sample_id`` is the place of the candidate and ``label`` is 0.

        Returns:
            ``len(candidates)`` rows in the schema ``contract.schema.text_shard``.

        Raises:
            RequestError: the request cannot be answered; its subclasses say why.
        """
        if not candidates:
            raise CandidatesError("candidates is empty: name at least one item to score")
        targets = self._lookup(candidates, "candidates")
        past = self._past(user, history, time, self._fields(profile or {}))
        item_counts = self._counts.before(targets, past.time)
        counts = np.broadcast_to(np.array(past.counts, np.float32), item_counts.shape)
        return self._table(past, targets, np.concatenate([item_counts, counts], axis=1), retrieval)

    def first_seen(self) -> NDArray[np.int64]:
        """Time of the first event of each item position, int64 [items + 1]; the largest int64 where there is none."""
        first = np.full(len(self.titles), np.iinfo(np.int64).max)
        np.minimum.at(first, self._log.items, self._log.times)
        return first

    def seen(self, user: int, time: int) -> NDArray[np.int32]:
        """Items of a user position's events strictly before ``time``, int32 [events], oldest first."""
        log = self._log
        start, stop = log.offsets[user], log.offsets[user + 1]
        return log.items[start : start + np.searchsorted(log.times[start:stop], time)]

    def _past(
        self,
        user: str | None,
        history: Sequence[HistoryEvent] | None,
        time: int | None,
        profile: Mapping[int, int],
    ) -> _Past:
        if user is not None and history is None:
            return self._logged(user, time, profile)
        if user is None and history is not None:
            return self._given(history, time, profile)
        given = "both" if user is not None else "neither"
        raise HistoryError(f"{given} of user and history given: name a user of the log, or send a history, not both")

    def _logged(self, user_id: str, time: int | None, profile: Mapping[int, int]) -> _Past:
        if user_id not in self.users:
            raise UnknownUserError(f"user {user_id!r} is not in the log: send the user's history instead")
        user, log = self.users[user_id], self._log
        start, stop = int(log.offsets[user]), int(log.offsets[user + 1])
        moment = log.end if time is None else time
        stop = start + int(np.searchsorted(log.times[start:stop], moment))
        if start == stop:
            raise HistoryError(f"user {user_id!r} has no event before time {moment}: ask for a later time")
        seen = slice(start, stop)
        counted = log.counted[seen]
        counts = float(counted.sum()), float(log.labels[seen][counted].sum())
        fields = _overridden(self._user_fields[user], profile)
        return _Past(user, fields, log.items[seen], log.levels[seen], log.times[seen], counts, moment)

    def _given(self, history: Sequence[HistoryEvent], time: int | None, profile: Mapping[int, int]) -> _Past:
        if not history:
            raise HistoryError("history is empty: send at least one event, or name a user of the log")
        items = self._lookup([event.item for event in history], "history")
        levels = np.array([self._level(event) for event in history], np.int8)
        times, moment = self._moments(history, time)
        order = np.argsort(times, kind="stable")
        order = order[times[order] < moment]
        if not len(order):
            raise HistoryError(f"history has no event before time {moment}: send earlier events or a later time")
        likes = np.asarray(self._facts["level_likes"])[levels[order] - 1]
        fields = _overridden(np.zeros(self._user_fields.shape[1], np.int32), profile)
        counts = float(len(order)), float(likes.sum())
        return _Past(0, fields, items[order], levels[order], times[order], counts, moment)

    def _moments(self, history: Sequence[HistoryEvent], time: int | None) -> tuple[NDArray[np.int64], int]:
        """The times of an explicit history and the moment it is seen from."""
        times = [event.time for event in history if event.time is not None]
        if times and len(times) < len(history):
            item = next(event.item for event in history if event.time is None)
            raise HistoryError(
                f"history event of item {item!r} has no time, others have: give all events a time, or none"
            )
        moment = time if time is not None else max([self._log.end, *(t + 1 for t in times)])
        if not times:
            times = list(range(moment - len(history), moment))
        return np.array(times, np.int64), moment

    def _level(self, event: HistoryEvent) -> int:
        scale = self._facts["rating_levels"]
        found = np.flatnonzero(np.isclose(scale, event.rating, rtol=0.0, atol=1e-6))
        if not len(found):
            known = ", ".join(f"{level:g}" for level in scale)
            raise RatingError(f"rating {event.rating!r} of item {event.item!r} is not on the scale: use one of {known}")
        return int(found[0]) + 1

    def _lookup(self, ids: Sequence[str], where: str) -> NDArray[np.int32]:
        positions = [self.items.get(item, 0) for item in ids]
        if 0 in positions:
            unknown = list(dict.fromkeys(item for item, position in zip(ids, positions, strict=True) if not position))
            raise UnknownItemError(
                f"{where} holds {_listed(unknown)}, not in the log: leave out items it does not know"
            )
        return np.array(positions, np.int32)

    def _fields(self, profile: Mapping[str, str]) -> dict[int, int]:
        """Positions of a profile's values by the place of their field; 0 for values never seen."""
        known: Mapping[str, Sequence[str]] = self._facts["user_fields"]
        names = list(known)
        for name in profile:
            if name not in known:
                choice = f"use some of {', '.join(names)}" if names else "users of this log have none, leave it out"
                raise ProfileError(f"profile field {name!r} is unknown: {choice}")
        place = {name: {value: i for i, value in enumerate(known[name], 1)} for name in profile}
        return {names.index(name): place[name].get(value, 0) for name, value in profile.items()}

    def _table(
        self, past: _Past, targets: NDArray[np.int32], statistics: NDArray[np.float32], retrieval: RetrievalConfig
    ) -> pa.Table:
        n, fields = len(targets), self._user_fields.shape[1]
        schema = text_shard(fields, retrieval.long, retrieval.short)
        long, short = self._histories(past, targets, retrieval)
        columns: dict[str, Any] = {
            "sample_id": np.arange(n, dtype=np.int64),
            "user": np.full(n, past.user, np.int32),
            "item": targets,
            "time": np.full(n, past.time, np.int64),
            "label": np.zeros(n, np.int8),
            "user_fields": np.broadcast_to(past.fields, (n, fields)),
            "statistics": statistics,
            **_history("long", past, long),
            **_history("short", past, short),
        }
        return pa.Table.from_arrays([_array(columns[f.name], f.type) for f in schema], schema=schema)

    def _histories(
        self, past: _Past, targets: NDArray[np.int32], retrieval: RetrievalConfig
    ) -> list[NDArray[np.int32]]:
        """The past's events that each target gets to see, long and short, int32 [targets, length]."""
        if retrieval not in self._similarities:
            self._similarities[retrieval] = similarity(retrieval, self._vectors, self._categories(retrieval))
        events, n = len(past.items), len(targets)
        seen = Past(past.items, np.arange(events), np.zeros(n, int), np.full(n, events), retrieval.candidates)
        lengths = (retrieval.long, retrieval.short)
        return retrieve(self._similarities[retrieval], seen, targets, lengths, retrieval.block)

    def _categories(self, retrieval: RetrievalConfig) -> NDArray[np.int32] | None:
        return item_categories(*self._source, retrieval.category) if retrieval.strategy == "category" else None


def _history(name: str, past: _Past, index: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """The columns of one retrieved history."""
    real = index >= 0
    return {
        f"{name}_items": np.where(real, past.items[index], np.int32(0)),
        f"{name}_levels": np.where(real, past.levels[index], np.int8(0)),
        f"{name}_length": real.sum(axis=1, dtype=np.int32),
    }


def _listed(values: Sequence[str]) -> str:
    """A few values in full, the rest as a number."""
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ("item " if len(values) == 1 else "items ") + ", ".join(repr(v) for v in values[:_SHOWN]) + more


def _overridden(fields: NDArray[np.int32], profile: Mapping[int, int]) -> NDArray[np.int32]:
    result = fields.copy()
    for place, position in profile.items():
        result[place] = position
    return result


def _array(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """A vector, or a matrix as lists of fixed size (plain lists if it has no columns), as a column of type ``kind``."""
    if values.ndim == 1:
        return pa.array(values, kind)
    if not values.shape[1]:
        return pa.array([[]] * len(values), kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)


def _read_log(folder: Folder, manifest: Manifest, users: int) -> _Log:
    """All events, part by part; under a per-user split only training events are counted in statistics."""
    per_user = not manifest.facts["split_times"]
    parts = [_arrays(open_part(folder, e).read(columns=list(_COLUMNS))) for e in manifest.select("events/")]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(columns["sample_id"], kind="stable")
    user = columns["user"][order]
    return _Log(
        offsets=np.searchsorted(user, np.arange(users + 2)).astype(np.int64),
        items=columns["item"][order],
        levels=columns["level"][order],
        times=columns["time"][order],
        labels=columns["label"][order],
        counted=columns["train"][order] if per_user else np.ones(len(order), np.bool_),
    )


def _arrays(part: pa.Table) -> dict[str, NDArray[Any]]:
    arrays = {name: part.column(name).to_numpy() for name in _COLUMNS if name != "split"}
    split = part.column("split").combine_chunks().dictionary_encode()
    train = np.array([value == "train" for value in split.dictionary.to_pylist()], np.bool_)
    arrays["train"] = train[split.indices.to_numpy()] if len(part) else np.zeros(0, np.bool_)
    return arrays


def _positions(table: pa.Table, name: str) -> dict[str, int]:
    ids: Iterable[str] = table.column(f"{name}_id").to_pylist()
    return dict(zip(ids, table.column(name).to_pylist(), strict=True))


def _titles(items: pa.Table) -> tuple[str, ...]:
    titles = [""] * (items.num_rows + 1)
    for item, title in zip(items.column("item").to_pylist(), items.column("title").to_pylist(), strict=True):
        titles[item] = title
    return tuple(titles)


def _field_table(users: pa.Table, fields: int) -> NDArray[np.int32]:
    """Field positions by user position, int32 [users + 1, fields]; row 0 is all unknown."""
    table = np.zeros((users.num_rows + 1, fields), np.int32)
    flat = users.column("fields").combine_chunks().flatten().to_numpy()
    table[users.column("user").to_numpy()] = flat.reshape(users.num_rows, fields)
    return table


def _read_vectors(folder: Folder, items: int) -> NDArray[np.float32]:
    """Item vectors by position, float32 [items + 1, D]."""
    manifest = read_manifest(folder, VECTORS)
    vectors: NDArray[np.float32] = read_array(folder, manifest, "vectors")
    if vectors.shape[0] != items + 1:
        raise ContractError(
            f"{folder.uri!r} holds vectors of {vectors.shape[0] - 1} items, the events have {items}: they belong to "
            "another log. Run the embed stage for these events."
        )
    check_grid(vectors)
    return vectors
