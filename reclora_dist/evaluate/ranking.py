"""iLoRA's task: find the next item that a user likes among 20, the others drawn at random (arXiv 2408.10159).

A list is drawn once, from what was known at the sample's time, and is the same whoever scores it. Its rows are those
that the service builds for the user at that time.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.config.schema import EvaluateConfig, RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.data.features import FeatureStore
from reclora_dist.evaluate.auc import Floats

CANDIDATES = 20
"""Items in a list: the next one and 19 others."""

RANKING_METRICS = ("hit_ratio_at_1", "ndcg_at_5", "mrr")
"""HitRatio@1; NDCG@5, with one item to find 1 / log2(rank + 1) up to rank 5, else 0; the mean reciprocal rank."""


class _Sample(NamedTuple):
    sample_id: int
    user: int
    item: int
    time: int


def draw_candidates(store: FeatureStore, liked: pa.Table, config: EvaluateConfig) -> pa.Table:
    """Lists to rank for at most ``config.ranking_users`` users, in the schema ``contract.schema.candidates``.

    A user's list belongs to the first liked sample whose item is new to the user. The other 19 items are drawn, all
    with the same chance, from those that had an event of anybody before the sample's time and none of this user before
    or at that time. A user who has no such sample with something before it and 19 items to draw from has no list.
    ``config.seed`` draws users and items; a list depends on no event after its sample.

    Args:
        liked: ``sample_id``, ``user``, ``item``, ``time`` of samples with label 1.

    Returns:
        20 rows per list, in random order within it; the lists by ``sample_id``.

    Raises:
        ValueError: no user has a list.
    """
    first_seen = store.first_seen()
    found = (_first_list(store, first_seen, own, config.seed) for own in _by_user(liked, config.seed))
    lists = sorted(islice((drawn for drawn in found if drawn), config.ranking_users))
    if not lists:
        raise ValueError(
            f"evaluate.ranking_users is {config.ranking_users}, but no user has a liked sample of a new item and "
            f"{CANDIDATES - 1} other items to rank it among: take a larger log, or 0"
        )
    rows = [(s.sample_id, s.user, s.time, item, int(item == s.item)) for s, items in lists for item in items]
    columns = zip(zip(*rows, strict=True), schema.candidates.types, strict=True)
    return pa.table([pa.array(values, kind) for values, kind in columns], schema=schema.candidates)


def _by_user(liked: pa.Table, seed: int) -> Iterator[list[_Sample]]:
    """The samples of each user, oldest first; the users in random order."""
    ordered = np.stack([liked[name].to_numpy() for name in _Sample._fields])
    ordered = ordered[:, np.argsort(ordered[0])]
    users, starts = np.unique(ordered[1], return_index=True)
    stops = np.append(starts[1:], ordered.shape[1])
    for user in np.random.default_rng(seed).permutation(len(users)):
        yield [_Sample(*sample) for sample in ordered[:, starts[user] : stops[user]].T.tolist()]


def _first_list(
    store: FeatureStore, first_seen: NDArray[np.int64], samples: Sequence[_Sample], seed: int
) -> tuple[_Sample, list[int]] | None:
    for sample in samples:
        past = store.seen(sample.user, sample.time)
        if not len(past) or sample.item in past:
            continue
        known = first_seen < sample.time
        known[store.seen(sample.user, sample.time + 1)] = False
        others = np.flatnonzero(known)
        if len(others) >= CANDIDATES - 1:
            random = np.random.default_rng([seed, sample.sample_id])
            drawn = random.choice(others, CANDIDATES - 1, replace=False)
            return sample, random.permutation([sample.item, *drawn]).tolist()
    return None


def candidate_rows(store: FeatureStore, candidates: pa.Table, retrieval: RetrievalConfig) -> pa.Table:
    """What models read of each candidate: rows in the text shard schema, with ``sample_id`` and ``label`` of the list.

    Histories are retrieved for each candidate, from the user's events strictly before the list's time.
    """
    users, items = _ids(store.users, candidates["user"]), _ids(store.items, candidates["item"])
    parts = []
    for start in range(0, candidates.num_rows, CANDIDATES):
        own = candidates.slice(start, CANDIDATES)
        names = [items[item] for item in own["item"].to_pylist()]
        parts.append(store.rows(names, retrieval, user=users[own["user"][0].as_py()], time=own["time"][0].as_py()))
    rows = pa.concat_tables(parts)
    for name in ("sample_id", "label"):
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), candidates[name])
    return rows


def _ids(positions: Mapping[str, int], wanted: pa.ChunkedArray) -> dict[int, str]:
    """The ids of some positions."""
    chosen = set(wanted.to_pylist())
    return {position: name for name, position in positions.items() if position in chosen}


def ranking_values(scores: Floats, labels: NDArray[np.int8]) -> dict[str, Floats]:
    """Every metric of every list, float64 [lists].

    Equal scores count as broken at random: a list has the mean of the metric over the ranks that its item may get. A
    model that gives all candidates one score has a HitRatio@1 of 1/20.

    Args:
        scores: of lists one after the other, higher for the item to find, [lists x 20].
        labels: 1 for that item, else 0, [lists x 20].

    Raises:
        ValueError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are NaN or infinite; check the model")
    lists, own = scores.reshape(-1, CANDIDATES), scores[labels == 1][:, None]
    better, tied = (lists > own).sum(axis=1), (lists == own).sum(axis=1)
    ranks = np.arange(1, CANDIDATES + 1)
    gains = ((ranks == 1).astype(np.float64), (ranks <= 5) / np.log2(ranks + 1), 1 / ranks)
    sums = [np.concatenate([[0.0], np.cumsum(gain)]) for gain in gains]
    means = [(total[better + tied] - total[better]) / tied for total in sums]
    return dict(zip(RANKING_METRICS, means, strict=True))
