"""Every strategy against an oracle in plain Python: what a sample sees, tie rules included."""

import functools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.retrieval import Past, Semantic, Similarity, check_grid, nearest, on_grid, retrieve, similarity
from reclora_dist.retrieval.select import STRIDE, select

STRATEGIES = ("semantic", "recent", "random", "category", "simhash")


def vectors_of(items: int, dimension: int, seed: int, distinct: int) -> np.ndarray:
    """Item vectors on the grid, row 0 zero; few distinct ones, so that ties happen."""
    pool = on_grid(np.random.default_rng(seed).normal(size=(distinct, dimension)))
    table = np.zeros((items + 1, dimension), np.float32)
    table[1:] = pool[np.arange(items) % distinct]
    return table


@st.composite
def logs(draw: st.DrawFn) -> tuple[Past, np.ndarray, np.ndarray, np.ndarray]:
    """Some users' events, a sample of them as targets, item vectors and categories."""
    items = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = draw(st.lists(st.integers(0, 25), max_size=5))
    starts, stops, places = [], [], []
    for first, count in zip(np.cumsum([0, *counts]), counts, strict=False):
        times = np.sort(rng.integers(0, 12, count))
        kept = draw(st.integers(0, 100))
        places += range(kept, kept + count)  # older events of the user may have been dropped
        for event in np.flatnonzero(rng.random(count) < 0.7):
            starts.append(first)
            stops.append(first + int(np.searchsorted(times, times[event])))
    log = rng.integers(1, items + 1, sum(counts))
    targets = rng.integers(1, items + 1, len(starts))
    past = Past(log, np.array(places, int), np.array(starts, int), np.array(stops, int), draw(st.integers(1, 30)))
    return (
        past,
        targets,
        vectors_of(items, 4, int(rng.integers(99)), draw(st.integers(1, items))),
        rng.integers(0, 3, items + 1).astype(np.int32),
    )


def mix(value: int) -> int:
    """MurmurHash3's finaliser."""
    value = (value ^ value >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ value >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ value >> 16


def oracle(config: RetrievalConfig, vectors: np.ndarray, categories: np.ndarray) -> Callable[[int, int, int], float]:
    """The score of an event (item, place) for a target item, in plain Python."""
    rows = [[int(x * 4096) for x in row] for row in vectors.tolist()]
    planes = np.random.default_rng(config.seed).normal(size=(vectors.shape[1], config.bits)).T.tolist()

    @functools.cache
    def bits(item: int) -> list[bool]:
        return [math.fsum(a * b for a, b in zip(vectors[item].tolist(), plane, strict=True)) > 0 for plane in planes]

    scores: dict[str, Callable[[int, int, int], float]] = {
        "semantic": lambda target, item, place: sum(a * b for a, b in zip(rows[target], rows[item], strict=True)),
        "recent": lambda target, item, place: place,
        "random": lambda target, item, place: mix(mix(target ^ config.seed) ^ mix(mix(item) ^ place)) >> 8,
        "category": lambda target, item, place: 0 if categories[target] == categories[item] else -math.inf,
        "simhash": lambda target, item, place: sum(a == b for a, b in zip(bits(target), bits(item), strict=True)),
    }
    return scores[config.strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(deadline=None)
@given(logs(), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
def test_equals_a_sort_in_plain_python(strategy: str, log: tuple, long: int, short: int, block: int, seed: int) -> None:
    past, targets, vectors, categories = log
    config = RetrievalConfig(strategy=strategy, seed=seed)  # type: ignore[arg-type]
    found = retrieve(similarity(config, vectors, categories), past, targets, (long, short), block)
    score = oracle(config, vectors, categories)
    for k, index in zip((long, short), found, strict=True):
        assert index.dtype == np.int32 and index.shape == (len(targets), k)
        for row, target in enumerate(targets.tolist()):
            seen = range(max(past.starts[row], past.stops[row] - past.window), past.stops[row])
            ranked = [(score(target, int(past.items[j]), int(past.places[j])), j) for j in seen]
            best = sorted((pair for pair in ranked if pair[0] > -math.inf), reverse=True)[:k]
            expected = sorted(j for _, j in best)
            assert index[row].tolist() == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_long_logs_in_tiles_and_blocks(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors, items = vectors_of(40, 6, 1, 15), rng.integers(1, 41, 3000)
    stops = np.arange(3000) // 3 * 3
    past = Past(items, np.arange(3000), np.zeros(3000, int), stops, 2500)
    config = RetrievalConfig(strategy=strategy)  # type: ignore[arg-type]
    scores = similarity(config, vectors, rng.integers(0, 3, 41).astype(np.int32))
    whole = retrieve(scores, past, items, (60, 9), 128)
    monkeypatch.setattr(nearest, "_TILE", 370)
    monkeypatch.setattr(nearest, "_PAIRS", 5000)
    for one, other in zip(whole, retrieve(scores, past, items, (60, 9), 11), strict=True):
        assert np.array_equal(one, other)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 2000), st.sampled_from([2, 50, 10**6]))
def test_select_equals_a_sort(seed: int, k: int, width: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (4, width)).astype(np.float32)
    scores[rng.random((4, width)) < rng.choice([0.0, 0.5, 0.99])] = -np.inf
    if rng.random() < 0.3:
        scores[:, ::STRIDE] += levels  # what the bound is taken from says nothing about the rest
    index, value = select(scores, k)
    for row in range(4):
        best = sorted(((s, c) for c, s in enumerate(scores[row].tolist()) if s > -math.inf), reverse=True)[:k]
        expected = sorted(c for _, c in best)
        assert index[row].tolist() == expected + [-1] * (k - len(expected))
        assert value[row, : len(expected)].tolist() == scores[row, expected].tolist()
        assert (value[row, len(expected) :] == -np.inf).all()


def test_scores_do_not_depend_on_the_shape_of_the_product() -> None:
    """Exact arithmetic: one pair at a time, all at once, and in integers."""
    vectors = vectors_of(300, 257, 0, 300)
    items = np.arange(301)
    whole = Semantic(vectors)(items, items, items)
    steps = np.rint(vectors * 4096).astype(np.int64)
    assert np.array_equal(whole, (steps @ steps.T / 2.0**24).astype(np.float32))
    for item in (0, 1, 150, 300):
        alone = Semantic(vectors)(items[item : item + 1], items[item : item + 1], items[item : item + 1])
        assert alone[0, 0] == whole[item, item]


@given(st.integers(1, 512), st.integers(0, 2**32 - 1))
def test_the_grid_keeps_directions_and_lengths(dimension: int, seed: int) -> None:
    unit = np.random.default_rng(seed).normal(size=(20, dimension))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    table = on_grid(unit)
    check_grid(table)
    assert table.dtype == np.float32
    assert ((table.astype(np.float64) ** 2).sum(axis=1) <= 1).all()
    assert np.abs(table - unit).max() < 1 / 4096 + np.sqrt(dimension) / 8192
    assert on_grid(np.zeros((1, dimension))).max() == 0


@pytest.mark.parametrize("bad", [[0.1, 0.2], [1.0, 0.5], [np.nan, 0.0], [np.inf, 0.0]])
def test_vectors_off_the_grid_are_named(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="vector of item 2 is not on the grid"):
        check_grid(np.array([[0, 0], [0.5, 0.25], bad], np.float32))


@pytest.mark.parametrize("strategy", ["semantic", "simhash", "category"])
def test_a_strategy_without_what_it_compares_is_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=f"strategy = {strategy} compares"):
        similarity(RetrievalConfig(strategy=strategy), None, None)  # type: ignore[arg-type]


def scores() -> Similarity:
    return Semantic(vectors_of(3, 2, 0, 3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stops": np.array([2, 1])}, "in order of time"),
        ({"places": np.array([0])}, "each needs one"),
        ({"starts": np.array([0])}, "each needs one"),
        ({"window": 0}, "at least 1"),
    ],
)
def test_a_past_that_does_not_fit_is_refused(change: dict, words: str) -> None:
    good = {"items": np.array([1, 2]), "places": np.arange(2), "starts": np.array([0, 0]), "stops": np.array([1, 2])}
    past = Past(**{**good, "window": 9, **change})
    with pytest.raises(ValueError, match=words):
        retrieve(scores(), past, np.array([1, 2]), (2,))


def test_lengths_below_one_are_refused() -> None:
    past = Past(np.array([1]), np.array([0]), np.array([0]), np.array([1]), 5)
    with pytest.raises(ValueError, match="at least 1"):
        retrieve(scores(), past, np.array([1]), (5, 0))


def test_memory_is_bounded_by_the_block_not_by_the_user() -> None:
    """Some samples of a user of 200,000 events, all of them candidates: their scores alone would take 160 MB."""
    events, rng = 200_000, np.random.default_rng(0)
    vectors, items = vectors_of(1000, 16, 0, 1000), rng.integers(1, 1001, events)
    stops = np.arange(0, events, 1000) + 1000
    past = Past(items, np.arange(events), np.zeros(len(stops), int), stops, events)
    tracemalloc.start()
    retrieve(Semantic(vectors), past, items[::1000], (60,), 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20
