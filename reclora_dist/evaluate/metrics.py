"""Metrics of probabilities against binary labels, with confidence intervals that resample users.

Rows of one user are not independent, so the bootstrap draws whole users. A resample is a vector of user weights, and
every metric is a function of such weights: nothing is copied or sorted again per resample. The point value is that of
weights of one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reclora_dist.config.schema import EvaluateConfig
from reclora_dist.evaluate.auc import Floats, auc_by_group, ratio, sums, tie_starts

METRICS = ("auc", "gauc", "logloss", "acc", "ece")
"""AUC, AUC per user (weighted by rows), mean log loss (nats), accuracy at 0.5, expected calibration error."""

SMALLEST = 1e-7
"""Log loss counts a probability as at least this far from 0 and 1."""

_BLOCK_ELEMENTS = 1 << 22

Statistic = Callable[[Floats], Floats]
"""User weights [resamples, users] to metric values [resamples]; NaN where a resample leaves the metric undefined."""


@dataclass(frozen=True)
class Interval:
    """A point value (``mean``) and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Sample:
    """Checked input: labels 0.0 or 1.0, probabilities, dense user codes, all [n]; number of users; number of bins."""

    labels: Floats
    scores: Floats
    codes: NDArray[np.int64]
    users: int
    bins: int

    def per_user(self, rows: Floats) -> Floats:
        """Sums of per-row values [n] by user [users]."""
        return sums(self.codes, rows, self.users)


def binary_metrics(
    labels: NDArray[np.int8], scores: Floats, users: NDArray[np.int32], config: EvaluateConfig
) -> dict[str, Interval]:
    """All of ``METRICS`` for one model.

    Args:
        labels: 0 or 1, [n].
        scores: probabilities of label 1, [n].
        users: user of each row, [n].
        config: number and seed of the resamples, calibration bins.

    Returns:
        An interval per metric. ``gauc`` is NaN if no user has both labels; with a single user low and high are the
        point value. Resamples without both labels are left out of the interval of ``auc``. The interval of ``ece``
        leans upwards, as resampling adds to the gaps.

    Raises:
        ValueError: wrong shapes, no rows, one label only, a label that is not 0 or 1, a score that is not in [0, 1].
    """
    sample = _check(labels, scores, users, config)
    statistics = {metric: _STATISTICS[metric](sample) for metric in METRICS}
    draws = {metric: np.concatenate(values) for metric, values in _resample(sample, statistics, config).items()}
    return {metric: _interval(_point(statistics[metric], sample), draws[metric]) for metric in METRICS}


def paired_difference(
    labels: NDArray[np.int8],
    scores_a: Floats,
    scores_b: Floats,
    users: NDArray[np.int32],
    config: EvaluateConfig,
    metric: str = "auc",
) -> Interval:
    """Metric of model a minus that of model b on the same rows, both on the same resamples of users.

    Raises:
        ValueError: the metric is not one of ``METRICS``, or the input is one that ``binary_metrics`` refuses.
    """
    if metric not in _STATISTICS:
        raise ValueError(f"metric {metric!r} is unknown; choose one of {', '.join(METRICS)}")
    a, b = (_check(labels, scores, users, config) for scores in (scores_a, scores_b))
    statistics = {"a": _STATISTICS[metric](a), "b": _STATISTICS[metric](b)}
    draws = _resample(a, statistics, config)
    difference = np.concatenate(draws["a"]) - np.concatenate(draws["b"])
    return _interval(_point(statistics["a"], a) - _point(statistics["b"], b), difference)


def mean_interval(values: Floats, config: EvaluateConfig) -> Interval:
    """Mean of one value per user [users]; means of equally many users are taken over the same resamples."""
    sample = _Sample(values, values, np.arange(len(values)), len(values), config.calibration_bins)
    draws = _resample(sample, {"mean": _row_mean(sample, values)}, config)["mean"]
    return _interval(float(values.mean()), np.concatenate(draws))


def _check(labels: NDArray[np.int8], scores: Floats, users: NDArray[np.int32], config: EvaluateConfig) -> _Sample:
    shapes = {np.shape(labels), np.shape(scores), np.shape(users)}
    if len(shapes) != 1 or len(np.shape(labels)) != 1 or not np.size(labels):
        raise ValueError(f"labels, scores and users have shapes {sorted(shapes)}; give one row each per sample")
    _check_labels(labels)
    _check_scores(np.asarray(scores))
    if config.bootstrap < 1 or config.calibration_bins < 1:
        raise ValueError(f"bootstrap={config.bootstrap}, calibration_bins={config.calibration_bins}: give at least 1")
    known, codes = np.unique(users, return_inverse=True)
    return _Sample(labels.astype(np.float64), scores.astype(np.float64), codes, len(known), config.calibration_bins)


def _check_labels(labels: NDArray[np.int8]) -> None:
    found = np.unique(labels)
    if not np.isin(found, (0, 1)).all():
        raise ValueError(f"labels hold {found[~np.isin(found, (0, 1))][:5].tolist()}; give 0 or 1")
    if len(found) == 1:
        raise ValueError(f"all {len(labels)} labels are {found[0]}: AUC is undefined; take a split with both labels")


def _check_scores(scores: Floats) -> None:
    missing = np.count_nonzero(~np.isfinite(scores))
    if missing:
        raise ValueError(f"{missing} of {len(scores)} scores are NaN or infinite; check the model's training")
    outside = np.count_nonzero((scores < 0) | (scores > 1))
    if outside:
        raise ValueError(
            f"{outside} of {len(scores)} scores lie outside [0, 1] ({scores.min():g} to {scores.max():g}); "
            "give probabilities, not logits"
        )


def _interval(point: float, draws: Floats) -> Interval:
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return Interval(point, float("nan"), float("nan"))
    low, high = np.quantile(defined, (0.025, 0.975))
    return Interval(point, float(low), float(high))


def _resample(sample: _Sample, statistics: dict[str, Statistic], config: EvaluateConfig) -> dict[str, list[Floats]]:
    """Values of each statistic over all resamples, block by block."""
    values: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in _weights(sample, config):
        for name, statistic in statistics.items():
            values[name].append(statistic(weights))
    return values


def _weights(sample: _Sample, config: EvaluateConfig) -> Iterator[Floats]:
    """How often each resample draws each user, [resamples of a block, users]; set by the seed and the sizes alone."""
    generator = np.random.default_rng(config.seed)
    block = max(1, _BLOCK_ELEMENTS // len(sample.labels))
    for start in range(0, config.bootstrap, block):
        size = min(block, config.bootstrap - start)
        drawn = generator.integers(sample.users, size=(size, sample.users))
        drawn += np.arange(size)[:, None] * sample.users
        counts = np.bincount(drawn.ravel(), minlength=size * sample.users)
        yield counts.reshape(size, sample.users).astype(np.float64)


def _auc(sample: _Sample) -> Statistic:
    order = np.argsort(sample.scores)
    likes, codes = sample.labels[order], sample.codes[order]
    starts = tie_starts(sample.scores[order])

    def statistic(weights: Floats) -> Floats:
        """AUC of each resample; ties count half."""
        rows = weights[:, codes]
        positive = np.add.reduceat(rows * likes, starts, axis=1)
        negative = np.add.reduceat(rows * (1 - likes), starts, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2
        return ratio(np.einsum("rg,rg->r", positive, below), positive.sum(axis=1) * negative.sum(axis=1))

    return statistic


def _gauc(sample: _Sample) -> Statistic:
    auc = auc_by_group(sample.labels, sample.scores, sample.codes, sample.users)
    rows = np.where(np.isnan(auc), 0.0, sample.per_user(np.ones_like(sample.labels)))
    total = rows * np.nan_to_num(auc)
    return lambda weights: ratio(weights @ total, weights @ rows)


def _row_mean(sample: _Sample, values: Floats) -> Statistic:
    sums, rows = sample.per_user(values), sample.per_user(np.ones_like(values))
    return lambda weights: ratio(weights @ sums, weights @ rows)


def _logloss(sample: _Sample) -> Statistic:
    right = np.where(sample.labels == 1, sample.scores, 1 - sample.scores)
    return _row_mean(sample, -np.log(np.clip(right, SMALLEST, 1 - SMALLEST)))


def _acc(sample: _Sample) -> Statistic:
    return _row_mean(sample, ((sample.scores > 0.5) == (sample.labels == 1)).astype(np.float64))


def _ece(sample: _Sample) -> Statistic:
    edges = np.linspace(0, 1, sample.bins + 1)
    slots = sample.bins + 1  # a score of exactly 1 has a bin of its own, as in torchmetrics
    cells = sample.codes * slots + np.searchsorted(edges, sample.scores, side="right") - 1
    gaps = sums(cells, sample.labels - sample.scores, sample.users * slots).reshape(sample.users, slots)
    rows = sample.per_user(np.ones_like(sample.labels))
    return lambda weights: ratio(np.abs(weights @ gaps).sum(axis=1), weights @ rows)


_STATISTICS: dict[str, Callable[[_Sample], Statistic]] = {
    "auc": _auc,
    "gauc": _gauc,
    "logloss": _logloss,
    "acc": _acc,
    "ece": _ece,
}


def _point(statistic: Statistic, sample: _Sample) -> float:
    """The metric on the rows as they are."""
    return float(statistic(np.ones((1, sample.users)))[0])
