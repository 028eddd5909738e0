"""Top-K retrieval of many samples of many users in one pass, exact, in memory that no user's length bounds."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reclora_dist.retrieval.select import Chosen, select
from reclora_dist.retrieval.similarity import Similarity

_PAIRS = 1 << 18
"""Scores computed at a time: 1 MiB, which a processor's cache holds."""

_TILE = 16_384
"""Events of one user compared at a time."""


@dataclass(frozen=True)
class Past:
    """Users' events one after the other, and what each target may see of them.

    Attributes:
        items, places: item and place in its user's log of every event, integers [N], oldest first within a user.
        starts, stops: per target [T] the first event of its user, and the first that is not strictly before the target.
            The targets of a user stand together, in order of ``stops``.
        window: a target sees no more than this many of the newest events before it.
    """

    items: NDArray[Any]
    places: NDArray[Any]
    starts: NDArray[Any]
    stops: NDArray[Any]
    window: int


def retrieve(
    similarity: Similarity | None, past: Past, targets: NDArray[Any], lengths: tuple[int, ...], block: int = 512
) -> list[NDArray[np.int32]]:
    """The histories of each target: its best events, oldest first, one matrix per length.

    Args:
        similarity: scores of events for targets; None takes the newest events.
        past: the events, and what each target may see.
        targets: target items, integers [T].
        lengths: numbers of events; equal scores count the newer event as the better one.
        block: targets of one user per matrix product.

    Returns:
        For every length k int32 [T, k]: ascending indices into ``past.items``, -1 at the end where there are fewer.

    Raises:
        ValueError: a length or ``block`` is below 1, or the arrays do not fit together.
    """
    _check(past, targets, lengths, block)
    longest = max(lengths)
    if similarity is None:
        return [_newest(past, k) for k in lengths]
    index = np.full((len(targets), longest), -1, np.int32)
    value = np.full((len(targets), longest), -np.inf, np.float32)
    for batch in _batches(past, block):
        rows, found = batch.nearest(similarity, past, targets, longest)
        index[rows], value[rows] = found
    return [_best_of(index, value, k) for k in lengths]


def _best_of(index: NDArray[np.int32], value: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    if k == index.shape[1]:
        return index
    place, _ = select(value, k)
    return np.where(place < 0, np.int32(-1), np.take_along_axis(index, place, axis=1))


def _newest(past: Past, k: int) -> NDArray[np.int32]:
    first = np.maximum(past.stops - min(k, past.window), past.starts)[:, None]
    index = first + np.arange(k)
    return np.where(index < past.stops[:, None], index, -1).astype(np.int32)


@dataclass(frozen=True)
class _Batch:
    """Blocks of alike shape: first target and number of targets of each, first event, and their common shape."""

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    low: NDArray[np.int64]
    height: int
    width: int

    def nearest(
        self, similarity: Similarity, past: Past, targets: NDArray[Any], k: int
    ) -> tuple[NDArray[np.int64], Chosen]:
        """Rows of the result, and what belongs there."""
        row = self.first[:, None] + np.arange(self.height)
        real = np.arange(self.height) < self.count[:, None]
        row = np.where(real, row, self.first[:, None])
        best: Chosen | None = None
        for start in reversed(range(0, self.width, _TILE)):
            tile = self._tile(similarity, past, targets, row, start, min(_TILE, self.width - start), k)
            best = tile if best is None else _merged(tile, best, k)
        assert best is not None
        keep = real.ravel()
        return row.ravel()[keep], (best[0][keep], best[1][keep])

    def _tile(
        self, similarity: Similarity, past: Past, targets: NDArray[Any], row: NDArray[np.int64], start: int, width: int,
        k: int,
    ) -> Chosen:  # fmt: skip
        column = (self.low + start)[:, None] + np.arange(width)
        event = np.minimum(column, len(past.items) - 1)
        scores = similarity(targets[row], past.items[event], past.places[event])
        end = past.stops[row]
        begin = np.maximum(past.starts[row], end - past.window)
        _hide(scores, begin - column[:, :1], end - column[:, :1])
        place, value = select(scores.reshape(-1, width), k, (end - begin).ravel())
        base = np.repeat(self.low + start, self.height)[:, None]
        return np.where(place < 0, -1, place + base).astype(np.int32), value


def _hide(scores: NDArray[np.float32], begin: NDArray[np.int64], end: NDArray[np.int64]) -> None:
    """Set to -inf what lies outside the columns ``begin`` to ``end`` [B, T] of each row; most columns lie inside."""
    width = scores.shape[-1]
    left, right = int(np.clip(begin.max(), 0, width)), int(np.clip(end.min(), 0, width))
    for columns, outside in (
        (slice(0, left), np.arange(left) < begin[..., None]),
        (slice(right, width), np.arange(right, width) >= end[..., None]),
    ):
        np.copyto(scores[..., columns], np.float32(-np.inf), where=outside)


def _merged(older: Chosen, newer: Chosen, k: int) -> Chosen:
    """The best of two selections; the newer events stand behind, where they win ties."""
    both = np.concatenate([older[0], newer[0]], axis=1)
    place, value = select(np.concatenate([older[1], newer[1]], axis=1), k)
    return np.where(place < 0, np.int32(-1), np.take_along_axis(both, place, axis=1)), value


def _batches(past: Past, block: int) -> Iterator[_Batch]:
    """All targets, in batches of blocks: targets of one user against the events that any of them sees."""
    first, count, low, high = _blocks(past, block)
    height, width = _rounded(count), _rounded(high - low)
    order = np.lexsort((width, height))
    shape = np.stack([height[order], width[order]], axis=1)
    begins = np.flatnonzero((np.diff(shape, axis=0, prepend=-1) != 0).any(axis=1))
    for begin, end in pairwise([*begins.tolist(), len(order)]):
        rows, columns = (int(n) for n in shape[begin])
        step = max(1, _PAIRS // (rows * min(columns, _TILE)))
        for start in range(begin, end, step):
            chosen = order[start : min(start + step, end)]
            yield _Batch(first[chosen], count[chosen], low[chosen], rows, columns)


def _blocks(past: Past, block: int) -> tuple[NDArray[np.int64], ...]:
    """First target, targets, first and last event of each block; targets without a past are in none."""
    seen = np.flatnonzero(past.stops > past.starts)
    user = past.starts[seen]
    head = np.flatnonzero(np.diff(user, prepend=-1))
    run = np.arange(len(seen)) - np.repeat(head, np.diff(head, append=len(seen)))
    follows = np.diff(seen, prepend=-2) == 1
    head = np.flatnonzero((run % block == 0) | ~follows)
    count = np.diff(head, append=len(seen))
    first, last = seen[head], seen[head] + count - 1
    low = np.maximum(past.starts[first], past.stops[first] - past.window)
    return first, count, low.astype(np.int64), past.stops[last].astype(np.int64)


def _rounded(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sizes rounded up to three significant bits, so that there are few different ones."""
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(size, 1))) - 2, 0)).astype(np.int64)
    rounded: NDArray[np.int64] = -(-size // step) * step
    return rounded


def _check(past: Past, targets: NDArray[Any], lengths: tuple[int, ...], block: int) -> None:
    if min(lengths) < 1 or block < 1 or past.window < 1:
        raise ValueError(f"lengths = {lengths}, block = {block} and window = {past.window} must be at least 1")
    if len(past.items) != len(past.places) or not len(targets) == len(past.starts) == len(past.stops):
        raise ValueError(
            f"{len(past.items)} events with {len(past.places)} places, {len(targets)} targets with {len(past.starts)} "
            f"starts and {len(past.stops)} stops: each needs one"
        )
    same_user = np.diff(past.starts) == 0
    if bool((np.diff(past.stops)[same_user] < 0).any()):
        raise ValueError("the targets of a user must be in order of time")
