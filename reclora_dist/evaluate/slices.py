"""Parts of a split that are reported on their own: by what training knew of the item and the user, and by history.

Nothing is scored again: a slice is a mask over rows that have their scores already.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reclora_dist.config.schema import EvaluateConfig
from reclora_dist.evaluate.auc import Floats
from reclora_dist.evaluate.metrics import METRICS, Interval, binary_metrics, paired_difference

FEWEST_ROWS = 20
"""A slice of fewer rows is counted, not measured."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Training:
    """What training knew.

    ``item_events`` int64 [items + 1] are the events of each item position in the training split; ``users`` bool
    [users + 1] says of each user position whether training had a sample of the user; ``like_rate`` is the share of
    likes among its samples.
    """

    item_events: NDArray[np.int64]
    users: Mask
    like_rate: float


@dataclass(frozen=True)
class Rows:
    """The rows of a split: ``labels`` int8, ``users`` and ``items`` int32, ``history`` (earlier events), all [n]."""

    labels: NDArray[np.int8]
    users: NDArray[np.int32]
    items: NDArray[np.int32]
    history: NDArray[np.float32]


def slices(rows: Rows, training: Training, config: EvaluateConfig) -> dict[str, Mask]:
    """All slices by name; those of items, of users and of history each partition the rows."""
    known = training.users[rows.users]
    return {
        **item_slices(training.item_events[rows.items], config.rare),
        "new_users": ~known,
        "known_users": known,
        **history_slices(rows.history, config.history_bands),
    }


def item_slices(train_events: NDArray[np.int64], rare: int) -> dict[str, Mask]:
    """Rows by the training events [n] of their item: none, 1 to ``rare``, more."""
    unseen, few = train_events == 0, train_events <= rare
    return {"unseen_items": unseen, "rare_items": few & ~unseen, "other_items": ~few & ~unseen}


def history_slices(history: NDArray[np.float32], bounds: Sequence[int]) -> dict[str, Mask]:
    """Rows by the number of earlier events [n]: below the first bound, from each bound to the next, from the last."""
    if not bounds:
        return {}
    bands = {f"history_below_{bounds[0]}": history < bounds[0]}
    bands |= {f"history_{low}_to_{high - 1}": (history >= low) & (history < high) for low, high in pairwise(bounds)}
    return bands | {f"history_from_{bounds[-1]}": history >= bounds[-1]}


def slice_metrics(
    rows: Rows, scores: Mapping[str, Floats], masks: Mapping[str, Mask], config: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """Per slice and model ``rows``, ``users`` and every metric of ``METRICS`` as JSON.

    A metric is null where it is undefined; all are in a slice of one label or of fewer than ``FEWEST_ROWS`` rows.
    """
    return {
        name: {model: _measured(rows, values, mask, config) for model, values in scores.items()}
        for name, mask in masks.items()
    }


def slice_differences(
    rows: Rows,
    scores: Mapping[str, Floats],
    masks: Mapping[str, Mask],
    pairs: Sequence[tuple[str, str]],
    config: EvaluateConfig,
) -> Iterator[dict[str, Any]]:
    """Paired differences of AUC and log loss in every slice that can be measured, as JSON; the better model first."""
    for name, mask in masks.items():
        for better, than in pairs if _measurable(rows.labels[mask]) else ():
            for metric in ("auc", "logloss"):
                interval = paired_difference(
                    rows.labels[mask], scores[better][mask], scores[than][mask], rows.users[mask], config, metric
                )
                yield {"slice": name, "better": better, "than": than, "metric": metric, **(as_json(interval) or {})}


def as_json(interval: Interval) -> dict[str, float | None] | None:
    """An interval as JSON has it: null where the value, or one of its ends, is undefined."""
    if isnan(interval.mean):
        return None
    return {name: None if isnan(value) else value for name, value in asdict(interval).items()}


def from_json(found: Mapping[str, float | None]) -> Interval:
    """The interval that ``as_json`` wrote."""
    mean, low, high = (float("nan") if (value := found[key]) is None else value for key in ("mean", "low", "high"))
    return Interval(mean, low, high)


def _measured(rows: Rows, scores: Floats, mask: Mask, config: EvaluateConfig) -> dict[str, Any]:
    labels, users = rows.labels[mask], rows.users[mask]
    counts = {"rows": len(labels), "users": len(np.unique(users))}
    if not _measurable(labels):
        return counts | dict.fromkeys(METRICS)
    found = binary_metrics(labels, scores[mask], users, config)
    return counts | {metric: as_json(interval) for metric, interval in found.items()}


def _measurable(labels: NDArray[np.int8]) -> bool:
    return len(labels) >= FEWEST_ROWS and labels.min() != labels.max()
