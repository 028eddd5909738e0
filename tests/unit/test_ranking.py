import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sample_data import write_run

from reclora_dist.config.schema import EvaluateConfig, RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import commit, read_manifest
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.storage import Folder
from reclora_dist.data.features import FeatureStore
from reclora_dist.evaluate.metrics import mean_interval, paired_difference
from reclora_dist.evaluate.ranking import CANDIDATES, candidate_rows, draw_candidates, ranking_values

CONFIG = EvaluateConfig(ranking_users=25, seed=3, bootstrap=200)
RETRIEVAL = RetrievalConfig("recent", long=8, short=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranking")
    write_run(path)
    return path


@pytest.fixture(scope="module")
def events(run: Path) -> pa.Table:
    folder = Folder(str(run / "events"))
    return read_parts(folder, read_manifest(folder, schema.EVENTS).select("events/"))


@pytest.fixture(scope="module")
def store(run: Path) -> FeatureStore:
    return load(run)


@pytest.fixture(scope="module")
def liked(events: pa.Table) -> pa.Table:
    return events.filter((pc.field("split") == "test") & (pc.field("label") == 1))


@pytest.fixture(scope="module")
def candidates(store: FeatureStore, liked: pa.Table) -> pa.Table:
    return draw_candidates(store, liked, CONFIG)


def load(run: Path) -> FeatureStore:
    return FeatureStore.load(Folder(str(run / "events")), Folder(str(run / "vectors")))


def with_events(run: Path, table: pa.Table) -> FeatureStore:
    """A store of the same users and items, but these events."""
    folder = Folder(str(run / "events"))
    made = read_manifest(folder, schema.EVENTS)
    files = [e for e in made.files if not e.path.startswith("events/")]
    commit(folder, dataclasses.replace(made, files=(*files, write_part(folder, "events/", 0, table, 500))))
    return load(run)


def lists(table: pa.Table) -> list[pa.Table]:
    return [table.slice(start, CANDIDATES) for start in range(0, table.num_rows, CANDIDATES)]


def test_a_list_has_the_next_liked_item_and_19_others_that_were_known_and_new_to_the_user(
    candidates: pa.Table, events: pa.Table, liked: pa.Table
) -> None:
    assert candidates.schema.equals(schema.candidates)
    assert candidates.num_rows == CONFIG.ranking_users * CANDIDATES
    for own in lists(candidates):
        user, time = own["user"][0].as_py(), own["time"][0].as_py()
        first = liked.filter(pc.field("user") == user).sort_by("sample_id").slice(0, 1)
        assert own.filter(pc.field("label") == 1)["item"].to_pylist() == first["item"].to_pylist()
        for name in ("sample_id", "user", "time"):
            assert own[name].unique().to_pylist() == first[name].to_pylist()
        others = set(own.filter(pc.field("label") == 0)["item"].to_pylist())
        assert len(others) == CANDIDATES - 1
        until = events.filter((pc.field("user") == user) & (pc.field("time") <= time))["item"].to_pylist()
        assert not others & set(until)
        assert others <= set(events.filter(pc.field("time") < time)["item"].to_pylist())
    assert len(candidates["sample_id"].unique()) == CONFIG.ranking_users, "one list per user"
    places = np.flatnonzero(candidates["label"].to_numpy()) % CANDIDATES
    assert len(np.unique(places)) > 5, "the place tells nothing"


def test_lists_depend_on_the_seed_and_not_on_the_order_of_the_samples(
    store: FeatureStore, liked: pa.Table, candidates: pa.Table
) -> None:
    shuffled = liked.take(np.random.default_rng(0).permutation(len(liked)))
    assert draw_candidates(store, shuffled, CONFIG).equals(candidates)
    assert not draw_candidates(store, liked, dataclasses.replace(CONFIG, seed=4)).equals(candidates)
    more = draw_candidates(store, liked, dataclasses.replace(CONFIG, ranking_users=1000))
    assert len(more) > len(candidates)
    kept = more.filter(pc.is_in(more["sample_id"], candidates["sample_id"]))
    assert kept.equals(candidates), "a list is the same whoever else is ranked"


def test_later_events_change_neither_list_nor_rows(tmp_path: Path, liked: pa.Table, events: pa.Table) -> None:
    write_run(tmp_path)
    before = load(tmp_path)
    for user in liked["user"].unique().to_pylist()[::12]:
        first = liked.filter(pc.field("user") == user).sort_by("sample_id").slice(0, 1)
        time = first["time"][0].as_py()
        drawn = draw_candidates(before, first, CONFIG)
        columns = {name: events[name].to_numpy().copy() for name in ("item", "level", "label")}
        later = events["time"].to_numpy() > time
        assert later.sum() > 20
        columns["item"][later] = columns["item"][later] % 40 + 1
        columns["level"][later] = 6 - columns["level"][later]
        columns["label"][later] = 1 - columns["label"][later]
        changed = events
        for name, values in columns.items():
            field = events.schema.field(name)
            changed = changed.set_column(changed.column_names.index(name), field, pa.array(values, field.type))
        after = with_events(tmp_path, changed)
        assert draw_candidates(after, first, CONFIG).equals(drawn)
        assert candidate_rows(after, drawn, RETRIEVAL).equals(candidate_rows(before, drawn, RETRIEVAL))


def test_rows_are_what_the_service_builds_for_each_candidate(store: FeatureStore, candidates: pa.Table) -> None:
    semantic = RetrievalConfig("semantic", long=8, short=4)
    rows = candidate_rows(store, candidates, semantic)
    assert rows.schema.equals(schema.text_shard(1, 8, 4))
    assert rows.select(candidates.column_names).equals(candidates)
    names = {position: name for name, position in store.items.items()}
    for own, found in list(zip(lists(candidates), lists(rows), strict=True))[:5]:
        asked = [names[item] for item in own["item"].to_pylist()]
        served = store.rows(asked, semantic, user=f"u{own['user'][0].as_py()}", time=own["time"][0].as_py())
        assert found.drop_columns(["sample_id", "label"]).equals(served.drop_columns(["sample_id", "label"]))
    assert len(set(map(tuple, lists(rows)[0]["short_items"].to_pylist()))) > 1, "a history for each candidate"


def log_of(rows: list[tuple[int, int, int]]) -> pa.Table:
    """Liked events of (user, item, time), in order of user and time."""
    orders: dict[int, int] = {}
    table = []
    for user, item, time in rows:
        order = orders[user] = orders.get(user, -1) + 1
        split = "test" if time >= 100 else "train"
        table.append((user << 32 | order, user, item, time, 5.0, 5, 1, split, 0, 0, 0, 0))
    columns = zip(zip(*table, strict=True), schema.events, strict=True)
    return pa.table([pa.array(values, field.type) for values, field in columns], schema=schema.events)


def test_only_a_new_item_with_a_past_and_19_others_makes_a_list(tmp_path: Path) -> None:
    write_run(tmp_path)
    known = [(9, item, 10 + item) for item in range(1, 21)]
    rows = [
        (1, 1, 50), (1, 1, 100), (1, 30, 100),  # an item again; then a new one, 19 known items to rank it among
        (2, 31, 100),  # nothing before it
        (3, 1, 50), (3, 2, 50), (3, 32, 100),  # 18 known items left
        (4, 1, 50), (4, 33, 100), (4, 34, 100),  # equal times: both are new, the first counts
        *known,
    ]  # fmt: skip
    store = with_events(tmp_path, log_of(rows))
    liked = log_of(rows).filter(pc.field("split") == "test")
    drawn = draw_candidates(store, liked, CONFIG)
    own = drawn.filter(pc.field("label") == 1)
    assert list(zip(own["user"].to_pylist(), own["item"].to_pylist(), strict=True)) == [(1, 30), (4, 33)]
    assert set(lists(drawn)[0]["item"].to_pylist()) == {30, *range(2, 21)}
    assert set(lists(drawn)[1]["item"].to_pylist()) == {33, *range(2, 21)}, "34 was not known, it came at that time"
    with pytest.raises(ValueError, match="ranking_users is 25, but no user has a liked sample of a new item"):
        draw_candidates(store, liked.filter(pc.field("user") == 3), CONFIG)


def scored(rank_of_own: int, tied: int = 0) -> np.ndarray:
    """Scores of a list whose first item has this rank, with so many others at the same score behind it."""
    scores = np.full(CANDIDATES, 0.1)
    scores[0] = 0.5
    scores[1:rank_of_own] = 0.9
    scores[rank_of_own : rank_of_own + tied] = 0.5
    return scores


def values_of(*scores: np.ndarray) -> dict[str, np.ndarray]:
    labels = np.tile(np.arange(CANDIDATES) == 0, len(scores)).astype(np.int8)
    return ranking_values(np.concatenate(scores), labels)


def test_metrics_equal_the_definitions() -> None:
    found = values_of(*[scored(rank) for rank in (1, 2, 5, 6, 20)])
    np.testing.assert_allclose(found["hit_ratio_at_1"], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(found["ndcg_at_5"], [1, 0.630930, 0.386853, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found["mrr"], [1, 1 / 2, 1 / 5, 1 / 6, 1 / 20])


def test_ties_count_as_broken_at_random() -> None:
    found = values_of(scored(1, tied=1), scored(5, tied=2), np.full(CANDIDATES, 0.3))
    np.testing.assert_allclose(found["hit_ratio_at_1"], [1 / 2, 0, 1 / 20])
    np.testing.assert_allclose(found["mrr"], [3 / 4, (1 / 5 + 1 / 6 + 1 / 7) / 3, np.mean(1 / np.arange(1, 21))])
    np.testing.assert_allclose(found["ndcg_at_5"][:2], [(1 + 1 / np.log2(3)) / 2, 1 / np.log2(6) / 3])


def test_a_random_scorer_is_as_good_as_a_constant_one() -> None:
    rng = np.random.default_rng(0)
    found = values_of(*rng.random((20_000, CANDIDATES)))
    constant = values_of(np.zeros(CANDIDATES))
    for metric, values in found.items():
        assert values.mean() == pytest.approx(constant[metric][0], abs=0.01)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 40 scores are NaN"):
        values_of(scored(1), np.where(np.arange(CANDIDATES) == 3, np.nan, 0.1))


def test_the_mean_and_its_interval_are_those_of_users() -> None:
    values = (np.arange(400) % 4 == 0).astype(np.float64)
    interval = mean_interval(values, CONFIG)
    assert interval.mean == 0.25
    spread = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert interval.low == pytest.approx(0.25 - spread, abs=0.012)
    assert interval.high == pytest.approx(0.25 + spread, abs=0.012)
    labels, users = np.arange(400).astype(np.int8) % 2, np.arange(400, dtype=np.int32)
    a, b = np.random.default_rng(0).random((2, 400))
    accuracy = [((scores > 0.5) == labels).astype(np.float64) for scores in (a, b)]
    paired = paired_difference(labels, a, b, users, CONFIG, "acc")
    found = mean_interval(accuracy[0] - accuracy[1], CONFIG)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high)), "the same resamples"
