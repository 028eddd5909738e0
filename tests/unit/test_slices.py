import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_data import small_config, write_run

from reclora_dist.config.schema import Config, EvaluateConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import commit, read_manifest
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.metrics import METRICS, Interval, binary_metrics, paired_difference
from reclora_dist.evaluate.slices import (
    FEWEST_ROWS,
    Rows,
    Training,
    as_json,
    from_json,
    history_slices,
    item_slices,
    slice_differences,
    slice_metrics,
    slices,
)
from reclora_dist.ray_app import evaluate
from reclora_dist.ray_app.evaluate import read_training
from reclora_dist.telemetry.meters import NullMeters

CONFIG = EvaluateConfig(bootstrap=20, rare=3, history_bands=(10, 30))


def rows(size=200, seed=0):
    rng = np.random.default_rng(seed)
    draw = [rng.integers(0, high, size) for high in (2, 15, 9, 60)]
    kinds = (np.int8, np.int32, np.int32, np.float32)
    return Rows(*[values.astype(kind) for values, kind in zip(draw, kinds, strict=True)])


def scores(names="ab"):
    return {name: np.random.default_rng(place).random(200) for place, name in enumerate(names)}


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=50),
    st.lists(st.integers(1, 200), max_size=5, unique=True).map(sorted),
    st.integers(1, 250),
)
def test_bands_and_kinds_of_items_partition_the_rows(numbers, bounds, rare):
    history = history_slices(np.array(numbers, np.float32), bounds)
    items = item_slices(np.array(numbers), rare)
    assert len(items) == 3
    assert len(history) == (len(bounds) + 1 if bounds else 0)
    for masks in (items, history) if bounds else (items,):
        np.testing.assert_array_equal(np.sum(list(masks.values()), axis=0), 1)


def test_bounds_belong_to_the_slice_that_names_them():
    items = item_slices(np.array([0, 1, 20, 21]), rare=20)
    assert {name: np.flatnonzero(mask).tolist() for name, mask in items.items()} == {
        "unseen_items": [0], "rare_items": [1, 2], "other_items": [3],
    }  # fmt: skip
    bands = history_slices(np.array([0, 9, 10, 29, 30, 99, 100, 5000], np.float32), (10, 30, 100))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in bands.items()} == {
        "history_below_10": [0, 1], "history_10_to_29": [2, 3], "history_30_to_99": [4, 5], "history_from_100": [6, 7],
    }  # fmt: skip


def test_items_and_users_are_looked_up_by_position():
    found = Rows(*[np.array(v) for v in ([0, 1, 0], [1, 2, 2], [3, 1, 2], [0, 0, 0])])
    training = Training(np.array([0, 7, 2, 0]), np.array([False, True, False]), 0.5)
    masks = slices(found, training, CONFIG)
    assert [masks[name].tolist() for name in ("unseen_items", "rare_items", "other_items", "new_users")] == [
        [True, False, False], [False, False, True], [False, True, False], [False, True, True],
    ]  # fmt: skip


def test_a_slice_has_the_metrics_of_its_rows():
    found, values = rows(), scores()
    mask = found.items > 4
    measured = slice_metrics(found, values, {"some": mask}, CONFIG)["some"]
    assert list(measured) == ["a", "b"]
    expected = binary_metrics(found.labels[mask], values["b"][mask], found.users[mask], CONFIG)
    assert (measured["b"]["rows"], measured["b"]["users"]) == (mask.sum(), len(np.unique(found.users[mask])))
    assert {metric: from_json(measured["b"][metric]) for metric in METRICS} == expected
    difference = next(slice_differences(found, values, {"some": mask}, [("a", "b")], CONFIG))
    paired = paired_difference(found.labels[mask], values["a"][mask], values["b"][mask], found.users[mask], CONFIG)
    assert from_json(difference) == paired
    assert [difference[key] for key in ("slice", "better", "than", "metric")] == ["some", "a", "b", "auc"]


@pytest.mark.parametrize("mask", ["no row", "one label", "few rows"])
def test_a_slice_that_cannot_be_measured_is_counted(mask):
    found, values = rows(), scores()
    few = np.arange(200) < FEWEST_ROWS - 1
    assert len(np.unique(found.labels[few])) == 2
    chosen = {"no row": np.zeros(200, bool), "one label": found.labels == 1, "few rows": few}[mask]
    measured = slice_metrics(found, values, {"some": chosen}, CONFIG)["some"]["a"]
    users = len(np.unique(found.users[chosen]))
    assert measured == {"rows": chosen.sum(), "users": users} | dict.fromkeys(METRICS)
    assert not list(slice_differences(found, values, {"some": chosen}, [("a", "b")], CONFIG))


def test_a_metric_that_is_undefined_is_null():
    found, values = rows(), scores()
    alone = Rows(found.labels, np.arange(200, dtype=np.int32), found.items, found.history)
    measured = slice_metrics(alone, values, {"all": np.ones(200, bool)}, CONFIG)["all"]["a"]
    assert measured["gauc"] is None, "no user has both labels"
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    nan = float("nan")
    assert as_json(Interval(0.5, nan, nan)) == {"mean": 0.5, "low": None, "high": None}
    assert np.isnan(from_json({"mean": 0.5, "low": None, "high": None}).low)


def test_known_users_are_those_of_the_training_rows_whatever_part_they_lie_in(tmp_path: Path) -> None:
    write_run(tmp_path, users=12)
    folder = Folder(str(tmp_path / "shards"))
    made = read_manifest(folder, schema.SHARDS)
    prefix = "crm/split=train/"
    rows = read_parts(folder, made.select(prefix))
    kept = [rows.filter(np.isin(rows["user"].to_numpy(), users)) for users in ([2, 3], [11])]
    parts = [write_part(folder, prefix, place, part, 5) for place, part in enumerate(kept)]
    others = [entry for entry in made.files if not entry.path.startswith(prefix)]
    commit(folder, dataclasses.replace(made, files=(*others, *parts)))
    training = read_training(small_config(tmp_path))
    assert np.flatnonzero(training.users).tolist() == [2, 3, 11]
    assert len(training.users) == 13
    assert training.like_rate == pytest.approx(np.mean(pa.concat_tables(kept)["label"].to_numpy()))
    assert training.item_events.tolist() == [0] + [1] * 40


def test_what_is_undefined_is_null_and_what_cannot_be_judged_names_model_and_split() -> None:
    rows = pa.table({"label": pa.array([0, 1], pa.int8()), "user": pa.array([1, 2], pa.int32())})
    config, meters = Config(evaluate=EvaluateConfig(bootstrap=5)), NullMeters()
    found = evaluate._metrics(config, rows, {"lora": np.array([0.2, 0.7])}, "test", meters)
    assert found["lora"]["gauc"] is None, "no user has both labels"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    with pytest.raises(ValueError, match=r"^lora on the test split: "):
        evaluate._metrics(config, rows, {"lora": np.array([0.2, np.nan])}, "test", meters)
