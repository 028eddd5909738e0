"""What a histogram, value → how many have it, says of a distribution; whole numbers in, so that nothing is lost."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

PERCENTILES = (0, 10, 25, 50, 75, 90, 99, 100)
DIGITS = 6
"""Decimal places of a reported share or mean."""

Histogram = Mapping[int, int]


def share(part: float, whole: float) -> float | None:
    """``part`` of ``whole``; none of nothing."""
    return round(part / whole, DIGITS) if whole else None


def mean(histogram: Histogram) -> float | None:
    """The mean value."""
    return share(sum(value * count for value, count in histogram.items()), sum(histogram.values()))


def percentiles(histogram: Histogram) -> dict[str, int]:
    """``p50`` is the smallest value that at least half of all have or stay below, and so on."""
    values = sorted(histogram)
    below = list(accumulate(histogram[value] for value in values))
    ranks = {p: max(1, -(-p * below[-1] // 100)) for p in PERCENTILES} if values else {}
    return {f"p{p}": values[bisect_left(below, rank)] for p, rank in ranks.items()}


def doubling(histogram: Histogram) -> list[dict[str, int]]:
    """How many values (from 1) lie in 1, 2 to 3, 4 to 7, ..., up to the largest value."""
    largest = max([1, *histogram])
    return binned(histogram, [2**power for power in range(largest.bit_length())], largest)


def even(histogram: Histogram, largest: int, most: int = 20) -> list[dict[str, int]]:
    """How many values lie in each of at most ``most`` ranges of equal width from 0 to ``largest``."""
    return binned(histogram, list(range(0, largest + 1, -(-(largest + 1) // most))), largest)


def binned(histogram: Histogram, starts: Sequence[int], largest: int) -> list[dict[str, int]]:
    """Ranges ``from`` ... ``to`` (inclusive) and how many values lie in them.

    Args:
        histogram: the values.
        starts: where each range starts, ascending.
        largest: where the last one ends.
    """
    ends = [*(start - 1 for start in starts[1:]), largest]
    return [
        {"from": low, "to": high, "count": sum(count for value, count in histogram.items() if low <= value <= high)}
        for low, high in zip(starts, ends, strict=True)
    ]


def top_share(histogram: Histogram, percent: int) -> float | None:
    """Share of the sum of all values that the largest ``percent`` % of them (at least one) have."""
    left = max(1, -(-percent * sum(histogram.values()) // 100))
    total = 0
    for value in sorted(histogram, reverse=True):
        taken = min(left, histogram[value])
        total, left = total + value * taken, left - taken
    return share(total, sum(value * count for value, count in histogram.items()))


def spread(histogram: Histogram) -> dict[str, Any]:
    """Count, mean and percentiles."""
    return {"count": sum(histogram.values()), "mean": mean(histogram), **percentiles(histogram)}
