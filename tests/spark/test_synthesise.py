import dataclasses
from pathlib import Path

import numpy as np
import pytest

from reclora_dist.config.schema import SynthesiseConfig
from spark_jobs.stage import Inputs
from spark_jobs.synthesise import check
from spark_jobs.transforms import generator

SMALL = SynthesiseConfig(users=80, items=60, events_per_user=20)


def log_of(config: SynthesiseConfig) -> dict[str, np.ndarray]:
    world = generator.world(config)
    logs = [generator.user_events(config, world, user) for user in range(config.users)]
    joined = {key: np.concatenate([log[key] for log in logs]) for key in logs[0]}
    return {**joined, "user": np.repeat(np.arange(config.users), [len(log["item"]) for log in logs])}


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


def test_activity_and_popularity_have_long_tails() -> None:
    config = SynthesiseConfig()
    log = log_of(config)
    per_user, per_item = np.bincount(log["user"]), np.bincount(log["item"], minlength=config.items)
    assert 0.8 * config.events_per_user < per_user.mean() < 1.2 * config.events_per_user
    assert per_user.max() > 4 * np.median(per_user)
    assert per_item.max() > 3 * np.median(per_item)
    assert per_item.min() >= 5


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
    words = [set(title.split()[:2]) for title in world.items["title"].to_pylist()]
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


@pytest.mark.parametrize(
    ("change", "words"),
    [({"users": 0}, "users = 0"), ({"drift": 1.5}, "drift = 1.5"), ({"noise": -1.0}, "noise = -1.0")],
)
def test_sizes_that_make_no_log(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(dataclasses.replace(SMALL, **change), Inputs({}))
