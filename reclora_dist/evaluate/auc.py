"""The area under the ROC curve from midranks; numpy alone, so that training workers load no metrics library."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def auc_by_group(
    labels: NDArray[np.generic], scores: NDArray[np.generic], codes: NDArray[np.int64], groups: int
) -> Floats:
    """AUC of each group's rows, ties count half (Mann-Whitney U over the pairs of a 1 and a 0).

    Args:
        labels: 0 or 1, [n].
        scores: higher for label 1, [n].
        codes: group of each row, 0 to ``groups`` - 1, [n].
        groups: how many there are.

    Returns:
        [groups]; NaN for a group without both labels.
    """
    order = np.lexsort((scores, codes))
    codes, scores, likes = codes[order], scores[order], labels[order].astype(np.float64)
    starts = tie_starts(codes, scores)
    sizes = np.diff(np.append(starts, len(codes)))
    first = np.searchsorted(codes, np.arange(groups))
    midranks = np.repeat(starts + (sizes - 1) / 2, sizes) - first[codes]
    positive, negative, ranks = (sums(codes, rows, groups) for rows in (likes, 1 - likes, likes * midranks))
    return ratio(ranks - positive * (positive - 1) / 2, positive * negative)


def tie_starts(*keys: NDArray[np.generic]) -> NDArray[np.int64]:
    """Where runs of equal keys start in sorted columns [n]."""
    changed = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return np.concatenate(([0], np.flatnonzero(changed) + 1))


def sums(cells: NDArray[np.int64], rows: Floats, count: int) -> Floats:
    """Sums of ``rows`` [n] by cell [count]."""
    return np.bincount(cells, weights=rows, minlength=count).astype(np.float64, copy=False)


def ratio(above: Floats, below: Floats) -> Floats:
    """Quotients, NaN where the divisor is not positive."""
    quotient = np.full(above.shape, np.nan)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient
