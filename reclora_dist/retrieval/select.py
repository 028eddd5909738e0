"""The best columns of each row of a score matrix, without sorting it."""

import math

import numpy as np
from numpy.typing import NDArray

STRIDE = 8
"""Rows longer than this times k are first cut down to what reaches a bound taken from every eighth column."""

_LEAST = np.finfo(np.float32).min

Chosen = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Columns int32 [R, k], ascending, padded with -1 at the end, and their scores float32 [R, k], padded with -inf."""


def select(scores: NDArray[np.float32], k: int, finite: NDArray[np.int64] | None = None) -> Chosen:
    """The ``k`` best columns of each row [R, L]; among equal scores the higher column wins, and -inf never does.

    ``finite`` [R], where it is known, bounds the finite scores of each row: rows of up to ``k`` need no selection.
    """
    if scores.shape[1] > STRIDE * k:
        return _select_wide(scores, k)
    return _to_front(scores, np.flatnonzero(_best(scores, k, finite)), k)


def _select_wide(scores: NDArray[np.float32], k: int) -> Chosen:
    """Keep what reaches a bound that about 2 k columns reach, and select among those."""
    chosen = scores >= _bound(scores, k)
    flat = np.flatnonzero(chosen)
    missed = np.flatnonzero(_counts(flat, scores.shape) < k)
    if len(missed):
        chosen[missed] = _best(scores[missed], k)
        flat = np.flatnonzero(chosen)
    most = int(_counts(flat, scores.shape).max(initial=0))
    columns, values = _to_front(scores, flat, max(most, k))
    if most <= k:
        return columns, values
    place, value = _to_front(values, np.flatnonzero(_best(values, k)), k)
    return np.where(place < 0, np.int32(-1), np.take_along_axis(columns, place, axis=1)), value


def _bound(scores: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """A score per row [R, 1] that most likely at least ``k`` columns reach: an order statistic of every eighth one."""
    sample = scores[:, ::STRIDE]
    expected = k / STRIDE
    cut = max(0, sample.shape[1] - math.ceil(expected + 3 * math.sqrt(expected)) - 1)
    return np.maximum(np.partition(sample, cut, axis=1)[:, cut : cut + 1], _LEAST)


def _best(scores: NDArray[np.float32], k: int, finite: NDArray[np.int64] | None = None) -> NDArray[np.bool_]:
    """The ``k`` best of each row, fewer where fewer are finite."""
    rows, width = scores.shape
    floor = np.full((rows, 1), _LEAST)
    if width > k:
        full = slice(None) if finite is None or (finite > k).all() else np.flatnonzero(finite > k)
        floor[full, 0] = np.maximum(np.partition(scores[full], width - k, axis=1)[:, width - k], _LEAST)
    chosen = scores >= floor
    surplus = _counts(np.flatnonzero(chosen), scores.shape) - k
    tied = np.flatnonzero(surplus > 0)
    if len(tied):
        chosen[tied] &= ~_oldest_ties(scores[tied], floor[tied], surplus[tied, None])
    return chosen


def _oldest_ties(
    scores: NDArray[np.float32], floor: NDArray[np.float32], surplus: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The first ``surplus`` columns of each row whose score is just the floor."""
    ties = scores == floor
    oldest: NDArray[np.bool_] = ties & (np.cumsum(ties, axis=1, dtype=np.int32) <= surplus)
    return oldest


def _counts(flat: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """How many of the ascending flat places lie in each row."""
    return np.diff(np.searchsorted(flat, np.arange(shape[0] + 1) * shape[1]))


def _to_front(scores: NDArray[np.float32], flat: NDArray[np.int64], k: int) -> Chosen:
    """The columns at the flat places (at most ``k`` a row), row by row to the front."""
    rows, width = scores.shape
    count = _counts(flat, scores.shape)
    columns = (flat - np.repeat(np.arange(rows) * width, count)).astype(np.int32)
    if (count == k).all():
        return columns.reshape(-1, k), scores.ravel()[flat].reshape(-1, k)
    index = np.full((rows, k), -1, np.int32)
    value = np.full((rows, k), -np.inf, np.float32)
    real = np.arange(k) < count[:, None]
    index[real], value[real] = columns, scores.ravel()[flat]
    return index, value
