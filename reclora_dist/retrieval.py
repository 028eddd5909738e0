"""Which events of a user's past a sample gets to see: the most similar to the target item, or the newest.

Spark jobs and the scoring service both call this module, so a history is the same in training and in serving.
Cosines are taken in float64 and rounded to 2**-30: the ranking then depends neither on the block size nor on the BLAS.
Equal cosines count the newer event as the better one.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["semantic", "recent"]

_TILE = 4096
"""Events of the past compared at a time; with ``block`` it bounds the memory of a step whatever the user's length."""

_SCALE = float(2**30)
_NOTHING = np.iinfo(np.int64).min


def rank(
    vectors: NDArray[np.float32],
    items: NDArray[Any],
    times: NDArray[Any],
    targets: NDArray[Any],
    target_times: NDArray[Any],
    k: int,
    strategy: Strategy = "semantic",
    block: int = 512,
) -> NDArray[np.int32]:
    """The ``k`` best events strictly before each target's time, best first.

    Args:
        vectors: float32 [items + 1, D], row 0 zero, other rows of length 1 (may be memory-mapped).
        items, times: one user's events, integers [N], sorted by time.
        targets, target_times: target items and moments, integers [T].
        k: events per target.
        strategy: ``semantic`` ranks by cosine to the target (ties: newer first), ``recent`` by time.
        block: targets per matrix product.

    Returns:
        int32 [T, k]: indices into the user's events, -1 where the past is shorter than ``k``.

    Raises:
        ValueError: ``times`` is not sorted, an item has no vector, or ``k`` or ``block`` is below 1.
    """
    _check(vectors, items, times, targets, target_times, k, block)
    past = np.searchsorted(times, target_times, side="left")
    best = np.full((len(targets), k), -1, np.int32)
    for start in range(0, len(targets), block):
        rows = slice(start, start + block)
        if strategy == "recent":
            newest = past[rows, None] - 1 - np.arange(k)
            best[rows] = np.where(newest >= 0, newest, -1)
        else:
            best[rows] = _most_similar(vectors, items, targets[rows], past[rows], k)
    return best


def chronological(ranked: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ranked indices [T, k] re-sorted oldest first with -1 at the end, and how many are real, int32 [T]."""
    absent = np.iinfo(np.int32).max
    ascending = np.sort(np.where(ranked < 0, absent, ranked), axis=1)
    index = np.where(ascending == absent, -1, ascending).astype(np.int32)
    return index, (index >= 0).sum(axis=1, dtype=np.int32)


def retrieve(
    vectors: NDArray[np.float32],
    items: NDArray[Any],
    times: NDArray[Any],
    targets: NDArray[Any],
    target_times: NDArray[Any],
    k: int,
    strategy: Strategy = "semantic",
    block: int = 512,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The history of each target: its ``k`` best events (see ``rank``) oldest first.

    Returns:
        index: int32 [T, k], ascending indices into the user's events, padded with -1 at the end.
        length: int32 [T], how many are real.

    Raises:
        ValueError: as ``rank``.
    """
    return chronological(rank(vectors, items, times, targets, target_times, k, strategy, block))


def _most_similar(
    vectors: NDArray[np.float32], items: NDArray[Any], targets: NDArray[Any], past: NDArray[np.int64], k: int
) -> NDArray[np.int32]:
    wanted = vectors[targets].astype(np.float64)
    best = np.full((len(targets), k), _NOTHING, np.int64)
    for start, tile in _tiles(items, int(past.max(initial=0))):
        cosines = np.clip(wanted @ vectors[tile].astype(np.float64).T, -1.0, 1.0)
        index = np.arange(start, start + len(tile))
        # One integer holds cosine and index: no two are equal, and a higher index wins among equal cosines.
        keys = (np.rint(cosines * _SCALE).astype(np.int64) << 32) | index
        keys[index >= past[:, None]] = _NOTHING
        both = np.concatenate([best, keys], axis=1)
        best = np.partition(both, both.shape[1] - k, axis=1)[:, -k:]
    best = np.sort(best, axis=1)[:, ::-1]
    return np.where(best == _NOTHING, -1, best & 0xFFFFFFFF).astype(np.int32)


def _tiles(items: NDArray[Any], stop: int) -> Iterator[tuple[int, NDArray[Any]]]:
    for start in range(0, stop, _TILE):
        yield start, items[start : min(start + _TILE, stop)]


def _check(
    vectors: NDArray[np.float32],
    items: NDArray[Any],
    times: NDArray[Any],
    targets: NDArray[Any],
    target_times: NDArray[Any],
    k: int,
    block: int,
) -> None:
    if k < 1 or block < 1:
        raise ValueError(f"k = {k} and block = {block} must be at least 1")
    if len(items) != len(times) or len(targets) != len(target_times):
        raise ValueError(
            f"{len(items)} items with {len(times)} times, {len(targets)} targets with {len(target_times)} times: "
            "each needs a time"
        )
    if len(times) > 1 and bool((np.diff(times) < 0).any()):
        raise ValueError("the user's events must be sorted by time")
    for name, ids in (("event", items), ("target", targets)):
        if len(ids) and (ids.min() < 0 or ids.max() >= len(vectors)):
            bad = int(ids.max() if ids.max() >= len(vectors) else ids.min())
            raise ValueError(
                f"{name} item {bad} has no vector (the table has items 1 to {len(vectors) - 1}): "
                "embed the items of this log again"
            )
