import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_calibration_error

from reclora_dist.config.schema import EvaluateConfig
from reclora_dist.evaluate.auc import auc_by_group
from reclora_dist.evaluate.metrics import METRICS, Interval, binary_metrics, paired_difference

CONFIG = EvaluateConfig(bootstrap=50, calibration_bins=10)


@dataclasses.dataclass(frozen=True)
class Rows:
    labels: np.ndarray
    scores: np.ndarray
    users: np.ndarray


@st.composite
def rows(draw):
    """Rows with both labels, many ties and scores at the ends of the interval."""
    size = draw(st.integers(2, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size).filter(lambda found: len(set(found)) == 2))
    levels = draw(st.sampled_from([1, 3, 10, 1000]))
    scores = draw(st.lists(st.integers(0, levels), min_size=size, max_size=size))
    users = draw(st.lists(st.integers(-2, 5), min_size=size, max_size=size))
    return Rows(np.array(labels, np.int8), np.array(scores) / levels, np.array(users, np.int32))


def naive_auc(labels, scores):
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).sum() + (positive[:, None] == negative).sum() / 2
    return wins / (len(positive) * len(negative)) if len(positive) and len(negative) else np.nan


def naive_gauc(labels, scores, users):
    parts = [(naive_auc(labels[users == u], scores[users == u]), (users == u).sum()) for u in np.unique(users)]
    known = [(auc, size) for auc, size in parts if not np.isnan(auc)]
    return sum(auc * size for auc, size in known) / sum(size for _, size in known) if known else np.nan


def naive_logloss(labels, scores):
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    return -np.mean([np.log(p) if y else np.log(1 - p) for y, p in zip(labels, clipped, strict=True)])


def naive_ece(labels, scores, bins):
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges, scores, side="right")
    inside = [place == b for b in np.unique(place)]
    return sum(mask.mean() * abs(labels[mask].mean() - scores[mask].mean()) for mask in inside)


def naive(rows):
    return {
        "auc": naive_auc(rows.labels, rows.scores),
        "gauc": naive_gauc(rows.labels, rows.scores, rows.users),
        "logloss": naive_logloss(rows.labels, rows.scores),
        "acc": ((rows.scores > 0.5) == rows.labels).mean(),
        "ece": naive_ece(rows.labels, rows.scores, CONFIG.calibration_bins),
    }


def noisy(seed=0, users=200, per_user=20, strength=1.5):
    """A model of moderate skill; every user leans its own way, so rows of one user are not independent."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(users), per_user).astype(np.int32)
    truth = rng.normal(0, 1, users)[codes] + strength * rng.normal(0, 1, len(codes))
    labels = (rng.random(len(codes)) < 1 / (1 + np.exp(-truth))).astype(np.int8)
    return Rows(labels, 1 / (1 + np.exp(-truth + rng.normal(0, 1, len(codes)))), codes)


@settings(max_examples=150, deadline=None)
@given(rows())
def test_point_values_equal_the_definitions(rows):
    found = binary_metrics(rows.labels, rows.scores, rows.users, CONFIG)
    assert tuple(found) == METRICS
    for metric, expected in naive(rows).items():
        assert found[metric].mean == pytest.approx(expected, abs=1e-9, nan_ok=True), metric


@given(rows())
def test_auc_of_single_precision_is_that_of_its_pairs(rows):
    labels, scores = rows.labels.astype(np.float32), rows.scores.astype(np.float32)
    (found,) = auc_by_group(labels, scores, np.zeros(len(labels), np.int64), 1)
    assert found == pytest.approx(naive_auc(labels, scores), abs=1e-12)


def test_point_values_are_those_of_torchmetrics():
    """Scores off the edges of the bins; numpy's and torch's differ in the last bit."""
    rows = noisy()
    found = binary_metrics(rows.labels, rows.scores, rows.users, CONFIG)
    scores, labels = torch.from_numpy(rows.scores), torch.from_numpy(rows.labels.astype(np.int64))
    assert found["auc"].mean == pytest.approx(float(binary_auroc(scores, labels)), abs=1e-6)
    assert found["acc"].mean == pytest.approx(float(binary_accuracy(scores, labels)), abs=1e-6)
    ece = binary_calibration_error(scores, labels, n_bins=CONFIG.calibration_bins, norm="l1")
    assert found["ece"].mean == pytest.approx(float(ece), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 3))
def test_a_resample_weighs_users_as_if_their_rows_were_repeated(rows, seed):
    """One resample: the interval shrinks to its value, which must be that of the repeated rows."""
    config = dataclasses.replace(CONFIG, bootstrap=1, seed=seed)
    known = np.unique(rows.users)
    drawn = np.random.default_rng(seed).integers(len(known), size=(1, len(known)))[0]
    parts = [np.flatnonzero(rows.users == known[place]) for place in drawn]
    take = np.concatenate(parts)
    again = np.concatenate([np.full(len(part), i) for i, part in enumerate(parts)])
    expected = naive(Rows(rows.labels[take], rows.scores[take], again))
    found = binary_metrics(rows.labels, rows.scores, rows.users, config)
    for metric in METRICS:
        assert found[metric].low == pytest.approx(expected[metric], abs=1e-9, nan_ok=True), metric


def test_blocks_do_not_change_the_resamples(monkeypatch):
    rows = noisy(users=30)
    whole = binary_metrics(rows.labels, rows.scores, rows.users, CONFIG)
    monkeypatch.setattr("reclora_dist.evaluate.metrics._BLOCK_ELEMENTS", 7 * len(rows.labels))
    assert binary_metrics(rows.labels, rows.scores, rows.users, CONFIG) == whole


def test_the_seed_sets_the_interval():
    rows = noisy()
    first, again = (binary_metrics(rows.labels, rows.scores, rows.users, CONFIG) for _ in range(2))
    other = binary_metrics(rows.labels, rows.scores, rows.users, dataclasses.replace(CONFIG, seed=1))
    assert first == again
    assert other["auc"].mean == first["auc"].mean
    assert other["auc"].low != first["auc"].low


def test_intervals_hold_their_point_value_and_narrow_with_more_users():
    few, many = (binary_metrics(r.labels, r.scores, r.users, CONFIG) for r in (noisy(users=50), noisy(users=2000)))
    for metric in ("auc", "gauc", "logloss", "acc"):
        assert few[metric].low < few[metric].mean < few[metric].high
        assert many[metric].high - many[metric].low < (few[metric].high - few[metric].low) / 3


def test_coverage_of_the_clustered_interval():
    """A metric that is constant per user: resampling rows would cover far less than 95 %, resampling users does."""
    inside = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(60), 30)
        right = (rng.random(60) < 0.7)[users]
        labels = rng.integers(0, 2, len(users)).astype(np.int8)
        scores = np.where(right, labels, 1 - labels) * 0.5 + 0.25
        found = binary_metrics(labels, scores, users, dataclasses.replace(CONFIG, bootstrap=300))["acc"]
        inside += found.low <= 0.7 <= found.high
    assert 0.88 <= inside / 120 <= 0.99


def test_difference_is_paired():
    rows = noisy()
    better = np.clip(rows.scores + 0.02 * (rows.labels * 2.0 - 1), 0, 1)
    found = paired_difference(rows.labels, better, rows.scores, rows.users, CONFIG)
    alone = binary_metrics(rows.labels, rows.scores, rows.users, CONFIG)["auc"]
    points = [naive_auc(rows.labels, scores) for scores in (better, rows.scores)]
    assert found.mean == pytest.approx(points[0] - points[1], abs=1e-9)
    assert found.low > 0
    assert found.high - found.low < (alone.high - alone.low) / 3


@pytest.mark.parametrize("metric", METRICS)
def test_difference_of_a_model_to_itself_is_zero_and_swapping_negates(metric):
    rows = noisy(users=40)
    other = rows.scores**2
    assert paired_difference(rows.labels, other, other, rows.users, CONFIG, metric) == Interval(0.0, 0.0, 0.0)
    forth = paired_difference(rows.labels, rows.scores, other, rows.users, CONFIG, metric)
    back = paired_difference(rows.labels, other, rows.scores, rows.users, CONFIG, metric)
    assert (forth.mean, forth.low, forth.high) == pytest.approx((-back.mean, -back.high, -back.low), abs=1e-12)


def test_one_user_gives_an_interval_of_no_width():
    found = binary_metrics(np.array([0, 1], np.int8), np.array([0.1, 0.8]), np.array([3, 3], np.int32), CONFIG)
    assert found["auc"] == found["gauc"] == Interval(1.0, 1.0, 1.0)


def test_gauc_is_nan_if_no_user_has_both_labels():
    found = binary_metrics(np.array([0, 1], np.int8), np.array([0.1, 0.8]), np.array([3, 4], np.int32), CONFIG)
    assert np.isnan([found["gauc"].mean, found["gauc"].low, found["gauc"].high]).all()
    assert found["auc"].mean == 1.0


@pytest.mark.parametrize(
    ("labels", "scores", "users", "message"),
    [
        ([1, 1], [0.1, 0.2], [1, 1], "all 2 labels are 1: AUC is undefined"),
        ([0, 2], [0.1, 0.2], [1, 1], r"labels hold \[2\]; give 0 or 1"),
        ([0, 1, 1], [np.nan, np.inf, 0.5], [1, 1, 2], "2 of 3 scores are NaN or infinite"),
        ([0, 1], [-3.0, 0.5], [1, 1], r"1 of 2 scores lie outside \[0, 1\] \(-3 to 0.5\); give probabilities"),
        ([0, 1], [0.5], [1, 1], r"have shapes \[\(1,\), \(2,\)\]"),
        ([], [], [], r"have shapes \[\(0,\)\]"),
    ],
)
def test_bad_input_is_named(labels, scores, users, message):
    with pytest.raises(ValueError, match=message):
        binary_metrics(np.array(labels, np.int8), np.array(scores), np.array(users, np.int32), CONFIG)


def test_unknown_metric_and_no_resamples_are_named():
    rows = noisy(users=5)
    with pytest.raises(ValueError, match="metric 'f1' is unknown; choose one of auc, gauc"):
        paired_difference(rows.labels, rows.scores, rows.scores, rows.users, CONFIG, "f1")
    with pytest.raises(ValueError, match="bootstrap=0"):
        binary_metrics(rows.labels, rows.scores, rows.users, dataclasses.replace(CONFIG, bootstrap=0))
