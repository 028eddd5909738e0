"""A baseline that is never trained: two running averages, computed from counts strictly before each sample's time."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reclora_dist.data.collate import matrix

PRIOR = 5.0
"""Weight of the prior mean, in events."""

BLOCK = 4096
"""Rows whose vectors are in memory at the same time."""


def running_averages(
    rows: pa.Table, vectors: npt.NDArray[np.float32], level_likes: npt.NDArray[np.float64], prior: float
) -> npt.NDArray[np.float64]:
    """The item's like-rate so far plus the similarity-weighted like-rate of the user's history, halved.

    Args:
        rows: samples in the CRM shard schema.
        vectors: unit vectors by item position, float32 [items + 1, dimension].
        level_likes: 0 or 1 by rating level; entry 0 is padding.
        prior: share of likes among the training's samples; not that of the rows, of which later ones would tell earlier
            ones something.

    Returns:
        float64 [rows], between 0 and 1.
    """
    blocks = [rows.slice(start, BLOCK) for start in range(0, rows.num_rows, BLOCK)]
    return np.concatenate([np.zeros(0), *(_scores(block, vectors, level_likes, prior) for block in blocks)])


def _scores(
    rows: pa.Table, vectors: npt.NDArray[np.float32], level_likes: npt.NDArray[np.float64], prior: float
) -> npt.NDArray[np.float64]:
    statistics = matrix(rows, "statistics", np.float64)
    item_events, item_likes = statistics[:, 0], statistics[:, 1]
    items, levels = matrix(rows, "long_items", np.int64), matrix(rows, "long_levels", np.int64)
    similarity = np.einsum("rkd,rd->rk", vectors[items], vectors[rows["item"].to_numpy()], dtype=np.float64)
    weight = np.clip(similarity, 0, None) ** 2 * (levels > 0)
    taste = ((weight * level_likes[levels]).sum(1) + prior) / (weight.sum(1) + 1)
    item = (item_likes + PRIOR * prior) / (item_events + PRIOR)
    scores: npt.NDArray[np.float64] = np.clip((item + taste) / 2, 1e-6, 1 - 1e-6)
    return scores
