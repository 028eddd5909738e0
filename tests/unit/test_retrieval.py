import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reclora_dist import retrieval


def unit_vectors(items: int, dimension: int, seed: int, distinct: int) -> np.ndarray:
    """Item vectors of length 1, row 0 zero; few distinct ones, so that ties happen."""
    pool = np.random.default_rng(seed).normal(size=(distinct, dimension))
    pool /= np.linalg.norm(pool, axis=1, keepdims=True)
    table = np.zeros((items + 1, dimension), np.float32)
    table[1:] = pool[np.arange(items) % distinct]
    return table


@st.composite
def logs(draw: st.DrawFn) -> dict:
    count = draw(st.integers(0, 40))
    items = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    targets = draw(st.integers(0, 10))
    return {
        "vectors": unit_vectors(items, draw(st.integers(1, 5)), int(rng.integers(1000)), draw(st.integers(1, items))),
        "items": rng.integers(1, items + 1, count),
        "times": np.sort(rng.integers(0, 15, count)),
        "targets": rng.integers(1, items + 1, targets),
        "target_times": rng.integers(-1, 17, targets),
    }


def by_hand(log: dict, row: int, k: int, strategy: str) -> list[int]:
    past = [j for j in range(len(log["times"])) if log["times"][j] < log["target_times"][row]]
    if strategy == "recent":
        return sorted(past)[-k:]
    vectors = log["vectors"].astype(np.float64)
    cosine = {j: round(float(vectors[log["items"][j]] @ vectors[log["targets"][row]]) * 2**30) for j in past}
    return sorted(sorted(past, key=lambda j: (-cosine[j], -j))[:k])


@given(logs(), st.integers(1, 12), st.integers(1, 7), st.sampled_from(["semantic", "recent"]))
def test_equals_a_sort_by_hand(log: dict, k: int, block: int, strategy: str) -> None:
    index, length = retrieval.retrieve(**log, k=k, strategy=strategy, block=block)
    assert index.dtype == length.dtype == np.int32
    assert index.shape == (len(log["targets"]), k)
    for row in range(len(log["targets"])):
        assert index[row, : length[row]].tolist() == by_hand(log, row, k, strategy)
        assert (index[row, length[row] :] == -1).all()


@given(logs(), st.integers(1, 12))
def test_nothing_at_or_after_the_sample_is_seen(log: dict, k: int) -> None:
    index, length = retrieval.retrieve(**log, k=k)
    for row, moment in enumerate(log["target_times"]):
        assert (log["times"][index[row, : length[row]]] < moment).all()


def test_short_history_is_the_head_of_the_ranking() -> None:
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 1000, 300))
    log = (
        unit_vectors(50, 8, 0, 50),
        rng.integers(1, 51, 300),
        times,
        rng.integers(1, 51, 20),
        rng.integers(0, 1000, 20),
    )
    ranked = retrieval.rank(*log, k=60)
    short, _ = retrieval.chronological(ranked[:, :10])
    assert np.array_equal(short, retrieval.retrieve(*log, k=10)[0])


def test_user_longer_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = unit_vectors(40, 6, 1, 15)
    items = rng.integers(1, 41, 500)
    args = (vectors, items, np.arange(500) // 3, items, np.arange(500) // 3)
    whole = retrieval.retrieve(*args, k=9, block=100)
    monkeypatch.setattr(retrieval, "_TILE", 37)
    tiled = retrieval.retrieve(*args, k=9, block=11)
    assert np.array_equal(whole[0], tiled[0]) and np.array_equal(whole[1], tiled[1])


def test_ties_prefer_the_newer_event() -> None:
    vectors = unit_vectors(3, 2, 0, 1)
    index, length = retrieval.retrieve(
        vectors, np.array([1, 2, 3, 1]), np.array([1, 1, 2, 5]), np.array([2]), np.array([5]), 2
    )
    assert index.tolist() == [[1, 2]] and length.tolist() == [2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": np.array([2, 1])}, "sorted by time"),
        ({"items": np.array([1, 9])}, "event item 9 has no vector"),
        ({"targets": np.array([-1])}, "target item -1 has no vector"),
        ({"k": 0}, "at least 1"),
        ({"target_times": np.array([1, 2])}, "each needs a time"),
    ],
)
def test_bad_input_is_named(change: dict, words: str) -> None:
    good = {
        "vectors": unit_vectors(3, 2, 0, 3),
        "items": np.array([1, 2]),
        "times": np.array([1, 2]),
        "targets": np.array([3]),
        "target_times": np.array([3]),
        "k": 2,
    }
    with pytest.raises(ValueError, match=words):
        retrieval.retrieve(**{**good, **change})
