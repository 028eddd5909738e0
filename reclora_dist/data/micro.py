"""How the rows of a step are divided among forward passes."""

import numpy as np
from numpy.typing import NDArray

from reclora_dist.data.plan import part

Rows = NDArray[np.int64]


def by_rows(rows: int, passes: int) -> list[Rows]:
    """``rows`` rows in stored order, in nearly equal parts."""
    parts = (part(rows, passes, index) for index in range(passes))
    return [np.arange(begin, begin + size) for begin, size in parts]


def by_tokens(lengths: NDArray[np.int64], budget: int) -> list[Rows]:
    """Rows of similar lengths together: as few passes as hold at most ``budget`` tokens each, padding included.

    Raises:
        ValueError: a row alone is longer than the budget.
    """
    order = np.argsort(-lengths, kind="stable")
    if len(order) and lengths[order[0]] > budget:
        raise ValueError(f"a prompt has {lengths[order[0]]} tokens, more than micro_tokens = {budget}: raise it")
    passes, start = [], 0
    while start < len(order):
        stop = start + budget // int(lengths[order[start]])
        passes.append(order[start:stop])
        start = stop
    return passes


def by_sum(lengths: NDArray[np.int64], budget: int) -> list[Rows]:
    """Rows in stored order: a pass takes as many as have at most ``budget`` tokens together, without padding.

    Raises:
        ValueError: a row alone is longer than the budget.
    """
    passes: list[list[int]] = [[]]
    held = 0
    for row, length in enumerate(lengths.tolist()):
        if length > budget:
            raise ValueError(f"a prompt has {length} tokens, more than micro_tokens = {budget}: raise it")
        if held + length > budget:
            passes.append([])
            held = 0
        passes[-1].append(row)
        held += length
    return [np.array(rows, np.int64) for rows in passes]


def spread(passes: list[Rows], count: int) -> list[Rows]:
    """The same rows in ``count`` passes, the largest divided first; some are empty if there are too few rows."""
    passes = list(passes)
    while len(passes) < count:
        largest = max(range(len(passes)), key=lambda index: len(passes[index]))
        passes[largest : largest + 1] = np.array_split(passes[largest], 2)
    return passes
