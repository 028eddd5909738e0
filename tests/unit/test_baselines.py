"""The running averages against their sentence, sample by sample."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.evaluate import baselines
from reclora_dist.evaluate.baselines import PRIOR, running_averages

LIKES = np.array([0, 0, 0, 0, 1, 1], np.float64)


def samples(rows: int, items: int, steps: int, seed: int) -> tuple[pa.Table, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    real = np.arange(steps) < rng.integers(0, steps + 1, rows)[:, None]
    events = rng.integers(0, 30, (rows, 2))
    statistics = np.stack([events[:, 0], events[:, 0] // 2, events[:, 1], events[:, 1] // 3], 1)
    columns = {
        "item": pa.array(rng.integers(1, items + 1, rows), pa.int32()),
        "statistics": pa.array(statistics.tolist(), pa.list_(pa.float32(), 4)),
        "long_items": pa.array((rng.integers(1, items + 1, real.shape) * real).tolist(), pa.list_(pa.int32(), steps)),
        "long_levels": pa.array((rng.integers(1, 6, real.shape) * real).tolist(), pa.list_(pa.int8(), steps)),
    }
    vectors = rng.normal(size=(items + 1, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[0] = 0
    return pa.table(columns), vectors


def one(row: dict[str, list[float]], vectors: npt.NDArray[np.float32], prior: float) -> float:
    weights, liked = 1.0, prior
    for item, level in zip(row["long_items"], row["long_levels"], strict=True):
        if level:
            cosine = float(vectors[int(item)] @ vectors[row["item"]])  # type: ignore[index]
            weights += max(0.0, cosine) ** 2
            liked += max(0.0, cosine) ** 2 * LIKES[int(level)]
    events, likes = row["statistics"][:2]
    return ((likes + PRIOR * prior) / (events + PRIOR) + liked / weights) / 2


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 8), items=st.integers(1, 6), steps=st.integers(1, 5), seed=st.integers(0, 1000))
def test_equals_the_sentence(rows: int, items: int, steps: int, seed: int) -> None:
    table, vectors = samples(rows, items, steps, seed)
    expected = [np.clip(one(row, vectors, 0.6), 1e-6, 1 - 1e-6) for row in table.to_pylist()]
    np.testing.assert_allclose(running_averages(table, vectors, LIKES, 0.6), expected, rtol=1e-5)


def test_a_score_is_the_same_whatever_rows_are_scored_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which later ones would tell it something; and in blocks, for memory."""
    table, vectors = samples(7, 5, 4, 0)
    alone = [running_averages(table.slice(row, 1), vectors, LIKES, 0.6)[0] for row in range(7)]
    monkeypatch.setattr(baselines, "BLOCK", 3)
    np.testing.assert_array_equal(running_averages(table, vectors, LIKES, 0.6), alone)


def test_nothing_known_gives_a_probability_inside_the_open_interval() -> None:
    table, vectors = samples(3, 4, 2, 0)
    empty = table.set_column(1, "statistics", pa.array([[0.0] * 4] * 3, pa.list_(pa.float32(), 4)))
    for name, kind in (("long_items", pa.int32()), ("long_levels", pa.int8())):
        place = empty.column_names.index(name)
        empty = empty.set_column(place, name, pa.array([[0, 0]] * 3, pa.list_(kind, 2)))
    scores = running_averages(empty, vectors, LIKES, 0.6)
    assert ((scores > 0) & (scores < 1)).all()
