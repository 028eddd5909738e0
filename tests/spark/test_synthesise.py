import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from reclora_dist.config.schema import SynthesiseConfig
from reclora_dist.contract.manifest import MANIFEST, Manifest, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS, RAW
from reclora_dist.contract.storage import Folder
from spark_jobs import quality
from spark_jobs.stage import Inputs
from spark_jobs.synthesise import check
from spark_jobs.transforms import generator, plan

SMALL = SynthesiseConfig(users=80, items=60, events_per_user=20)


def log_of(config: SynthesiseConfig) -> dict[str, np.ndarray]:
    log = plan.plan_of(config)
    pieces = [generator.events(log, generator.world(config), piece) for piece in range(log.pieces)]
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


def test_the_log_is_complete_and_clean() -> None:
    log = log_of(SMALL)
    pairs = set(zip(log["user"].tolist(), log["item"].tolist(), strict=True))
    assert len(pairs) == len(log["user"]), "a user rates an item once"
    assert set(np.unique(log["rating"])) <= {1, 2, 3, 4, 5}
    assert log["time"].min() >= generator.START
    assert log["time"].max() < generator.START + SMALL.days * 86_400
    for user in range(SMALL.users):
        times = log["time"][log["user"] == user] - generator.START
        assert (np.diff(times) > 0).all()
        assert times.min() < 0.5 * SMALL.days * 86_400 < times.max(), "active over the whole period"


def test_the_published_probability_is_the_best_prediction_and_hides_the_noise() -> None:
    config = dataclasses.replace(SMALL, users=4000, items=400, noise=0.0)
    log = log_of(config)
    probability = generator.events_table(log, truth=True)["probability"].to_numpy()
    assert "probability" not in generator.events_table(log).column_names
    for low in np.arange(0, 1, 0.2):  # calibrated in every fifth
        there = (probability >= low) & (probability < low + 0.2)
        liked = (log["rating"] >= 4)[there]
        assert liked.mean() == pytest.approx(probability[there].mean(), abs=4 * 0.5 / len(liked) ** 0.5)
    assert (log_of(dataclasses.replace(config, noise=1.0))["truth"] == log["truth"]).all()


def test_without_personal_tastes_all_users_like_the_same() -> None:
    log = log_of(dataclasses.replace(SMALL, personal=0.0))
    for item in range(SMALL.items):
        assert np.ptp(log["truth"][log["item"] == item]) == pytest.approx(0, abs=1e-12)


def test_activity_and_popularity_have_long_tails() -> None:
    config = SynthesiseConfig()
    log = log_of(config)
    per_user, per_item = np.bincount(log["user"]), np.bincount(log["item"], minlength=config.items)
    assert 0.8 * config.events_per_user < per_user.mean() < 1.2 * config.events_per_user
    assert per_user.max() > 4 * np.median(per_user)
    assert per_item.max() > 3 * np.median(per_item)
    assert per_item.min() >= 5


@pytest.mark.parametrize("exponent", [1.5, 2.5])
def test_the_tail_of_activity_has_the_given_exponent(exponent: float) -> None:
    config = SynthesiseConfig(users=500_000, items=10**9, days=10_000, activity_exponent=exponent)
    count = plan.activity(config, 0, config.users)
    slope = np.log10((count > 5000).sum() / (count > 500).sum())
    assert slope == pytest.approx(-exponent, abs=0.2)
    assert count.min() == config.events_per_user // 3
    assert (count[1000:1010] == plan.activity(config, 1000, 1010)).all(), "whoever asks"


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_popularity_falls_with_rank_by_the_given_exponent(exponent: float) -> None:
    config = SynthesiseConfig(users=20_000, items=2000, events_per_user=10, popularity_exponent=exponent)
    count = np.sort(np.bincount(log_of(config)["item"], minlength=config.items))[::-1]
    ranks = np.arange(50, 1000)  # who has seen the first ones does not draw them again
    slope = np.polyfit(np.log(ranks), np.log(count[ranks]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)


def test_a_heavy_user_has_its_share_and_the_others_what_they_had() -> None:
    config = dataclasses.replace(SMALL, users=6000, heavy_user=0.4)
    check(config, Inputs({}))
    log, without = log_of(config), log_of(dataclasses.replace(config, heavy_user=0.0))
    count = np.bincount(log["user"])
    assert count[0] == pytest.approx(0.4 * len(log["user"]), abs=1) and count[0] > plan.PIECE_EVENTS
    assert (count[1:] == np.bincount(without["user"])[1:]).all()
    heavy = {key: values[log["user"] == 0] for key, values in log.items()}
    assert (np.diff(heavy["time"]) > 0).all(), "every event has a second of its own"
    assert heavy["time"][0] < generator.START + 86_400 < generator.START + 59 * 86_400 < heavy["time"][-1]
    style = generator.world(config).style[heavy["item"]]
    liked = [(heavy["rating"][style == kind] >= 4).mean() for kind in range(config.styles)]
    assert max(liked) - min(liked) > 0.3, "it has tastes, too"


def test_parts_of_a_large_log_are_large() -> None:
    def rows_per_part(events: int, **changes: bool) -> float:
        log = plan.Plan(SynthesiseConfig(users=events // 60, **changes), events, 0)
        parts = [log.pieces_of(part) for part in range(log.parts)]
        assert [piece for part in parts for piece in part] == list(range(log.pieces))
        return events / log.parts

    assert rows_per_part(90_000) == 45_000
    assert rows_per_part(100_000_000) == pytest.approx(1_000_000, rel=0.05)
    assert rows_per_part(100_000_000, by_day=True) == pytest.approx(4_000_000, rel=0.05)


def test_any_piece_of_the_item_table_is_the_same() -> None:
    whole = generator.items_table(SMALL, 0, 60)
    assert pa.concat_tables([generator.items_table(SMALL, 0, 17), generator.items_table(SMALL, 17, 60)]) == whole


def test_style_is_planted_deeper_than_topic_and_no_title_shows_it() -> None:
    config = SynthesiseConfig(users=400)
    world, log = generator.world(config), log_of(config)
    like = (log["rating"] >= 4).astype(float)

    def told_by(part: np.ndarray) -> float:
        """Correlation of a like with the user's other likes among items of the same kind."""
        key = log["user"] * 100 + part[log["item"]]
        others = np.bincount(key)[key] - 1
        rate = (np.bincount(key, like)[key] - like + 0.5) / (others + 1)
        return float(np.corrcoef(rate, like)[0, 1])

    assert told_by(world.style) > 1.5 * told_by(world.topic) > 0.2
    words = [set(title.split()[:2]) for title in generator.items_table(config, 0, config.items)["title"].to_pylist()]
    for topic in range(config.topics):
        used = set.union(*[w for w, t in zip(words, world.topic, strict=True) if t == topic])
        assert used <= set(generator.topic_words(topic)[1])
    by_style = [{w for ws, s in zip(words, world.style, strict=True) if s == style for w in ws} for style in range(2)]
    assert len(by_style[0] & by_style[1]) > 0.8 * len(by_style[0])


def test_tastes_drift() -> None:
    still, moving = (log_of(dataclasses.replace(SMALL, drift=drift, noise=0.0)) for drift in (0.0, 1.0))
    early = still["time"] < generator.START + 5 * 86_400
    late = still["time"] > generator.START + 55 * 86_400
    change = np.abs(still["logit"] - moving["logit"])
    assert change[early].mean() < 0.3 * change[late].mean()


def test_topics_beyond_the_written_ones_have_words() -> None:
    name, words = generator.topic_words(40)
    assert name == "topic 41" and len(words) == 8 == len(generator.topic_words(41)[1])


def test_tables_and_manifest(run, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("users=80", "items=60", "events_per_user=20")
    first = run("synthesise", tmp_path / "a", *settings)
    again = run("synthesise", tmp_path / "b", *settings)
    other = run("synthesise", tmp_path / "c", *settings, "seed=1")
    assert first.content_digest == again.content_digest != other.content_digest
    assert first.rows("users/") == 80 and first.rows("items/") == 60
    event = rows(tmp_path / "a", first, "events/")[0]
    assert list(event) == ["user_id", "item_id", "rating", "timestamp"]
    assert list(rows(tmp_path / "a", first, "items/")[0]) == ["item_id", "title", "topic"]
    assert list(rows(tmp_path / "a", first, "users/")[0]) == ["user_id", "age_band", "region"]


SEVERAL = {"users": 3000, "items": 400, "events_per_user": 20, "days": 20, "heavy_user": 0.3, "dirt": 0.02}
"""Two pieces of users and one of the heavy user's time."""


def assignments(**changes: object) -> list[str]:
    return [f"{key}={value}" for key, value in {**SEVERAL, **changes}.items()]


def table_of(folder: Path, prefix: str) -> pa.Table:
    made = read_manifest(Folder(str(folder)), RAW)
    return read_parts(Folder(str(folder)), made.select(prefix))


def test_the_log_does_not_depend_on_cores(run, tmp_path: Path) -> None:
    here = run("synthesise", tmp_path / "here", *assignments())
    assert len(here.select("events/")) == 3
    command = [sys.executable, "-m", "spark_jobs.synthesise", "--config", json.dumps(SEVERAL)]
    command += ["--master", "local[1]", "--shuffle-partitions", "1", "--out", str(tmp_path / "there")]
    subprocess.run(command, check=True, timeout=200, cwd=Path(__file__).parents[2])
    assert read_manifest(Folder(str(tmp_path / "there")), RAW).content_digest == here.content_digest


def test_events_by_day(run, tmp_path: Path) -> None:
    run("synthesise", tmp_path / "whole", *assignments(dirt=0))
    made = run("synthesise", tmp_path / "days", *assignments(dirt=0, by_day=True))
    names = ["timestamp", "user_id", "item_id", "rating"]
    whole, by_day = (table_of(tmp_path / name, "events/").select(names) for name in ("whole", "days"))
    assert by_day.sort_by([(name, "ascending") for name in names]) == whole.sort_by([(n, "ascending") for n in names])
    folders = {Path(entry.path).parent.name for entry in made.select("events/")}
    assert len(folders) == 21, "20 days that begin in the evening"
    for folder in folders:
        days = np.unique(table_of(tmp_path / "days", f"events/{folder}/")["timestamp"].to_numpy() // 86_400)
        assert [f"date={np.datetime64(int(day), 'D')}" for day in days] == [folder]


TABLES = (
    "source.items=items", "source.users=users", "source.item_fields=[topic]", "source.user_fields=[age_band,region]",
    "rating_levels=[1,2,3,4,5]", "k_core=0", "min_history=1",
)  # fmt: skip


@pytest.fixture(scope="module", params=["one dataset", "files by day"])
def dirty(request: pytest.FixtureRequest, run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A dirty log and the events built from it; files by day have no manifest, as somebody else's have none."""
    folder = tmp_path_factory.mktemp("dirty")
    made = run("synthesise", folder / "raw", *assignments(by_day=request.param == "files by day"))
    if request.param == "files by day":
        (folder / "raw" / MANIFEST).unlink()
    run("build_events", folder / "events", *TABLES, raw=folder / "raw")
    return folder, made


OTHER_TABLES = (quality.DUPLICATE_ITEM, quality.DUPLICATE_USER, quality.ITEM_WITHOUT_TITLE)


def test_every_planted_bad_row_is_found_and_no_other(dirty: tuple[Path, Manifest]) -> None:
    folder, made = dirty
    built = read_manifest(Folder(str(folder / "events")), EVENTS)
    told = {text for name, text in vars(quality).items() if name.isupper() and isinstance(text, str)}
    reasons = told - {quality.MALFORMED_ROW, quality.DELETED, quality.LATE_EVENT}
    assert set(made.facts["dirt"]) == reasons and min(made.facts["dirt"].values()) >= 4
    assert built.facts["quarantine"] == made.facts["dirt"]
    counts = built.facts["counts"]
    assert counts["read"] == made.rows("events/") == made.facts["counts"]["events"]
    in_other_tables = sum(rows for reason, rows in made.facts["dirt"].items() if reason in OTHER_TABLES)
    assert counts["read"] == counts["clean"] + sum(built.facts["quarantine"].values()) - in_other_tables
    assert counts["clean"] == counts["events"] == plan.plan_of(SynthesiseConfig(**SEVERAL)).events


def test_the_good_rows_of_a_dirty_log_are_the_clean_log(rows, dirty: tuple[Path, Manifest]) -> None:
    folder, _ = dirty
    built = read_manifest(Folder(str(folder / "events")), EVENTS)
    users, items = (
        {row[kind]: row[f"{kind}_id"] for row in rows(folder / "events", built, f"{kind}s/")}
        for kind in ("user", "item")
    )
    found = Counter(
        (users[event["user"]], items[event["item"]], event["time"] // 1000, event["rating"])
        for event in rows(folder / "events", built, "events/")
    )
    clean = generator.events_table(log_of(SynthesiseConfig(**{**SEVERAL, "dirt": 0.0})))
    columns = [clean[name].to_pylist() for name in ("user_id", "item_id", "timestamp", "rating")]
    assert found == Counter(zip(*columns, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"users": 0}, "users = 0"),
        ({"drift": 1.5}, "drift = 1.5"),
        ({"noise": -1.0}, "noise = -1.0"),
        ({"days": 0}, "days = 0"),
        ({"activity_exponent": 1.0}, "activity_exponent = 1.0 must lie in 1.05 to 100"),
        ({"popularity_exponent": 2.0}, "popularity_exponent = 2.0"),
        ({"dirt": -0.1}, "dirt = -0.1"),
        ({"heavy_user": 1.0}, "heavy_user = 1.0"),
        ({"heavy_user": 0.5, "users": 1}, "needs users of at least 2"),
        ({"heavy_user": 0.9, "users": 20_000, "days": 30}, r"user 1 [\d,]+ events, .*Lower heavy_user or raise days"),
    ],
)
def test_sizes_that_make_no_log(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(dataclasses.replace(SMALL, **change), Inputs({}))
