"""Days added one after the other give what all of them give at once."""

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sample_data import small_config

from reclora_dist.config.schema import PathsConfig, RetrievalConfig, TrainConfig
from reclora_dist.contract.arrays import add_array
from reclora_dist.contract.manifest import ContractError, Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS, SHARDS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.data.features import FeatureStore
from reclora_dist.evaluate.scorer import referenced
from reclora_dist.lora.adapter import read_adapter_config
from reclora_dist.ray_app.pipeline import run_stages
from reclora_dist.retrieval import on_grid
from spark_jobs.days import midnight, previous_of
from spark_jobs.privacy import KEY_VARIABLE

Runner = Callable[..., Manifest]
Event = tuple[str, str, int, int]
FIRST = 20_454  # 2026-01-01 in days since 1970
DAYS = [f"2026-01-0{n}" for n in range(1, 7)]
SECONDS = 86_400
SETTINGS = (
    "source.format=csv", "source.items=items.csv", "source.users=users.csv", "source.item_fields=[genre]",
    "source.user_fields=[city]", "rating_levels=[1,2,3,4,5]", "split=dates", 'cut_dates=["2026-01-04","2026-01-06"]',
    "k_core=0", "min_history=2", "keep=9",
)  # fmt: skip
RETRIEVAL = ("long=6", "short=3", "candidates=9")
SHARDING = ("rows_per_file=40", "rows_per_group=16", "text_train=0.3", "text_validation=0.5", "text_test=1", "add=true")


def log_of_days(seed: int = 0) -> list[list[Event]]:
    """Some users and items on every day, new ones on each, and times that tie."""
    rng = np.random.default_rng(seed)
    days = []
    for day in range(len(DAYS)):
        users = rng.choice(9 + 4 * day, 9, replace=False)
        found: dict[tuple[int, int], Event] = {}
        for user in users:
            for item in rng.choice(6 + 5 * day, int(rng.integers(1, 7)), replace=False):
                moment = (FIRST + day) * SECONDS + int(rng.integers(0, 40)) * 2_000
                found[user, item] = (f"u{user * 7 % 50}", f"i{item * 5 % 37}", int(rng.integers(1, 6)), moment)
        days.append(list(found.values()))
    return days


def write_raw(folder: Path, days: Sequence[Sequence[Event]]) -> Path:
    head = "user_id,item_id,rating,timestamp"
    for name, events in zip(DAYS, days, strict=True):
        place = folder / "events" / f"date={name}"
        place.mkdir(parents=True)
        (place / "part.csv").write_text("\n".join([head, *(",".join(map(str, event)) for event in events)]) + "\n")
    items = [f"i{n},Title {n},g{n * n % 5}" for n in range(37)]
    (folder / "items.csv").write_text("\n".join(["item_id,title,genre", *items]) + "\n")
    users = [f"u{n},c{n % 4}" for n in range(50)]
    (folder / "users.csv").write_text("\n".join(["user_id,city", *users]) + "\n")
    return folder


def write_vectors(events: Path, out: Path, known: int | None = None) -> Path:
    """Vectors of the first ``known`` items; the same for an item whatever the dataset."""
    made = read_manifest(Folder(str(events)), EVENTS)
    table = on_grid(np.random.default_rng(1).normal(size=(60, 6)).astype(np.float32))
    table = table[: (made.facts["items"] if known is None else known) + 1]
    table[0] = 0
    entry = add_array(Folder(str(out)), "vectors", table)
    commit(Folder(str(out)), Manifest(VECTORS.name, VECTORS.version, "", {"events": made.content_digest}, (entry,)))
    return out


def build(run: Runner, home: Path, raw: Path, days: Sequence[str], previous: Path | None = None, *more: str) -> Path:
    """Add some days; returns the folder of their events. The shards of all days lie in ``home/shards``."""
    name = days[-1]
    events, vectors, histories = (home / kind / name for kind in ("events", "vectors", "histories"))
    inputs = {"previous": previous} if previous else {}
    span = f'source.days=["{days[0]}","{days[-1]}"]'
    run("build_events", events, *SETTINGS, span, *more, raw=raw, **inputs)
    write_vectors(events, vectors)
    run("retrieve_history", histories, *RETRIEVAL, events=events, vectors=vectors)
    run("write_shards", home / "shards", *SHARDING, events=events, histories=histories)
    return events


def shards_of(home: Path) -> Manifest:
    return read_manifest(Folder(str(home / "shards")), SHARDS)


def one_by_one(run: Runner, home: Path, raw: Path, spans: Sequence[Sequence[str]]) -> None:
    events = None
    for days in spans:
        events = build(run, home, raw, days, events)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("days") / "raw", log_of_days())


@pytest.fixture(scope="module")
def whole(run: Runner, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All days in one build."""
    home = tmp_path_factory.mktemp("whole")
    build(run, home, raw, DAYS)
    return home


@pytest.fixture(scope="module")
def daily(run: Runner, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Day after day."""
    home = tmp_path_factory.mktemp("daily")
    one_by_one(run, home, raw, [[day] for day in DAYS])
    return home


def test_day_by_day_gives_the_shards_of_all_days_at_once(whole: Path, daily: Path) -> None:
    assert shards_of(daily).select("crm/split=test/day=2026-01-06/")
    assert shards_of(daily).content_digest == shards_of(whole).content_digest


def test_days_in_groups_give_the_same_shards(
    run: Runner, raw: Path, whole: Path, tmp_path: Path, exhaustive: bool
) -> None:
    if not exhaustive:
        pytest.skip("half a minute for the same code in other steps: with --exhaustive only")
    one_by_one(run, tmp_path, raw, [DAYS[:2], DAYS[2:3], DAYS[3:]])
    assert shards_of(tmp_path).content_digest == shards_of(whole).content_digest


@pytest.mark.parametrize(
    ("setting", "known"), [("recent", None), ("random", None), ("category", None), ("simhash", None), ("semantic", 4)]
)
def test_every_strategy_looks_back_over_the_days(
    run: Runner, whole: Path, daily: Path, tmp_path: Path, setting: str, known: int | None
) -> None:
    """With ``known`` most items came after the vectors were made: they are similar to nothing."""
    found = {}
    for home, days in ((whole, DAYS[-1:]), (daily, DAYS[-2:])):
        tables = []
        for day in days:
            events, out = home / "events" / day, tmp_path / home.name / day
            vectors = write_vectors(events, out / "vectors", known)
            made = run("retrieve_history", out, *RETRIEVAL, f"strategy={setting}", events=events, vectors=vectors)
            tables.append(read_parts(Folder(str(out)), made.select("histories/")))
        late = pa.concat_tables(tables)
        late = late.filter(pc.greater_equal(late["time"], midnight(DAYS[-2])))
        found[home] = late.sort_by("sample_id")
    assert found[daily].num_rows > 40
    assert found[daily].equals(found[whole])


def test_positions_and_texts_of_earlier_days_stay(daily: Path) -> None:
    tables = []
    for day in DAYS:
        folder = Folder(str(daily / "events" / day))
        manifest = read_manifest(folder, EVENTS)
        tables.append(read_parts(folder, manifest.select("items/"), ["item", "item_id", "text", "fields"]).to_pylist())
        assert len(tables[-1]) == manifest.facts["items"]
    for earlier, later in pairwise(tables):
        assert later[: len(earlier)] == earlier
    assert len(tables[-1]) > len(tables[0])


def test_old_runs_are_merged_so_that_few_are_searched(daily: Path) -> None:
    named = set()
    for day in DAYS:
        facts = read_manifest(Folder(str(daily / "events" / day)), EVENTS).facts
        named.add(len(facts["runs"]["state"]))
        assert len(facts["runs"]["vocabulary"]) <= 3
    assert max(named) <= 3
    assert 0 in named


def test_adding_the_last_days_again_changes_nothing(run: Runner, raw: Path, daily: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(daily, tmp_path / "daily"))
    build(run, home, raw, DAYS[-1:], home / "events" / DAYS[-2])
    assert shards_of(home).content_digest == shards_of(daily).content_digest


def test_an_event_that_comes_late_is_put_aside(run: Runner, daily: Path, tmp_path: Path) -> None:
    days = log_of_days()
    days[1] = [*days[1], ("u1", "i0", 5, FIRST * SECONDS + 5), ("u2", "i0", 4, (FIRST + 2) * SECONDS)]
    events = build(run, tmp_path, write_raw(tmp_path / "raw", days), DAYS[1:2], daily / "events" / DAYS[0])
    made, expected = (read_manifest(Folder(str(home)), EVENTS) for home in (events, daily / "events" / DAYS[1]))
    assert made.facts["quarantine"] == {"late_event": 2}
    assert made.facts["counts"]["read"] == made.facts["counts"]["events"] + 2
    assert made.select("events/") == expected.select("events/")
    assert made.select("state/") == expected.select("state/")


def test_a_day_between_cannot_be_left_out(run: Runner, raw: Path, daily: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the next day is 2026-01-03"):
        build(run, tmp_path, raw, DAYS[3:4], daily / "events" / DAYS[1])
    shutil.copytree(raw, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw" / "events" / "date=2026-01-02")
    with pytest.raises(ValueError, match="events/date=2026-01-02"):
        build(run, tmp_path, tmp_path / "raw", DAYS[:3])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("k_core=3", "k_core"),
        ("rating_levels=[]", "rating_levels"),
        ('cut_dates=["2026-01-04","soon"]', "soon"),
        ('cut_dates=["2026-01-04","2026-01-02"]', "ends before it starts"),
        ("split=global_time", "needs split=dates"),
    ],
)
def test_settings_without_meaning_by_days_are_refused(
    run: Runner, raw: Path, tmp_path: Path, setting: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build(run, tmp_path, raw, DAYS[:2], None, setting)


def test_settings_that_differ_from_the_days_before_are_refused(
    run: Runner, raw: Path, daily: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="settings differ"):
        build(run, tmp_path, raw, DAYS[2:3], daily / "events" / DAYS[1], "like_at_least=3")
    with pytest.raises(ValueError, match="candidates = 10"):
        histories = {"events": daily / "events" / DAYS[1], "vectors": daily / "vectors" / DAYS[1]}
        run("retrieve_history", tmp_path, "candidates=10", **histories)


def test_shards_of_a_day_between_cannot_be_left_out(run: Runner, daily: Path, tmp_path: Path) -> None:
    first, third = ({kind: daily / kind / day for kind in ("events", "histories")} for day in (DAYS[0], DAYS[2]))
    run("write_shards", tmp_path / "shards", *SHARDING, **first)
    with pytest.raises(ContractError, match="Add the days in between"):
        run("write_shards", tmp_path / "shards", *SHARDING, **third)


def test_histories_of_all_days_are_retrieved_with_the_same_settings(run: Runner, daily: Path, tmp_path: Path) -> None:
    first, second = ({kind: daily / kind / day for kind in ("events", "histories")} for day in DAYS[:2])
    run("write_shards", tmp_path / "shards", *SHARDING, **first)
    others = {**second, "histories": tmp_path / "histories"}
    run("retrieve_history", others["histories"], "long=7", *RETRIEVAL[1:], "strategy=recent", events=second["events"])
    with pytest.raises(ContractError, match="retrieved with other settings"):
        run("write_shards", tmp_path / "shards", *SHARDING, **others)


def test_the_key_of_user_ids_stays_from_day_to_day(
    run: Runner, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(day: int, **inputs: Path) -> None:
        settings = (*SETTINGS, f'source.days=["{DAYS[day]}","{DAYS[day]}"]', "privacy.hash_users=true")
        run("build_events", tmp_path / DAYS[day], *settings, raw=raw, **inputs)

    monkeypatch.setenv(KEY_VARIABLE, "the key of the first day")
    add(0)
    monkeypatch.setenv(KEY_VARIABLE, "another key of some length")
    with pytest.raises(ValueError, match=r"privacy\.hash_users and its key"):
        add(1, previous=tmp_path / DAYS[0])
    monkeypatch.setenv(KEY_VARIABLE, "the key of the first day")
    add(1, previous=tmp_path / DAYS[0])


def test_days_that_were_built_anew_are_not_taken_for_the_old_ones(daily: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(daily / "events", tmp_path / "events"))
    third = Folder(str(home / DAYS[2]))
    assert previous_of(third, read_manifest(third, EVENTS)) is not None
    shutil.rmtree(home / DAYS[1])
    shutil.copytree(home / DAYS[0], home / DAYS[1])
    with pytest.raises(ContractError, match="is not the dataset that"):
        previous_of(third, read_manifest(third, EVENTS))


def train(home: Path, run: Path) -> bytes:
    """Train in a run that has the last day's events and vectors; the shards of all days lie elsewhere.

    Returns:
        The weights of the CRM.
    """
    for part in ("events", "vectors"):
        shutil.copytree(home / part / DAYS[-1], run / part)
    few = {"crm_train": TrainConfig(batch_size=16), "lora_train": TrainConfig(batch_size=8)}
    config = small_config(
        run, paths=PathsConfig(str(run), str(home / "shards")), retrieval=RetrievalConfig(long=6, short=3), **few
    )
    run_stages(config, ("backbone", "crm", "adapter reclora"))
    adapter = Folder(str(run / "adapters" / "reclora"))
    shards = referenced(adapter, read_adapter_config(adapter)[0], "shards")
    assert read_manifest(shards, SHARDS).content_digest == shards_of(home).content_digest
    assert not (run / "shards").exists()
    (weights,) = run.glob("crm/*.safetensors")
    return weights.read_bytes()


def test_shards_of_days_train_the_model_that_one_build_trains(whole: Path, daily: Path, tmp_path: Path) -> None:
    assert train(daily, tmp_path / "daily") == train(whole, tmp_path / "whole")


def test_the_service_wants_all_days_in_one_dataset(daily: Path) -> None:
    day = DAYS[-1]
    with pytest.raises(ContractError, match="the service needs all of them in one"):
        FeatureStore.load(Folder(str(daily / "events" / day)), Folder(str(daily / "vectors" / day)))


def test_a_day_is_reported_by_what_it_added(run: Runner, whole: Path, daily: Path, tmp_path: Path) -> None:
    """Here after a report of all days, as if these had been the days before."""
    day, out = DAYS[-1], tmp_path / "quality"
    run("report_quality", out, "min_samples=[1,1,1]", events=whole / "events" / day, shards=whole / "shards")
    run("report_quality", out, "min_samples=[1,1,1]", events=daily / "events" / day, shards=daily / "shards")
    told = json.loads((out / "quality.json").read_text())
    made, shards = read_manifest(Folder(str(daily / "events" / day)), EVENTS), shards_of(daily)
    rows = made.rows("events/")
    assert [period["from"] for period in told["periods"]["rows"]] == [day]
    assert told["events"]["events"] == rows == sum(level["events"] for level in told["levels"])
    crm, text = (shards.rows(f"{kind}/split=test/day={day}/") for kind in ("crm", "text"))
    assert {split: (found["crm"], found["text"]) for split, found in told["samples"].items()} == {"test": (crm, text)}
    assert told["histories"]["long"]["count"] == crm
    all_rows = read_manifest(Folder(str(whole / "events" / day)), EVENTS).rows("events/")
    assert told["drift"]["row_change"] == round(rows / (all_rows / len(DAYS)) - 1, 6)


def test_deleted_users_leave_state_vocabulary_and_shards(run: Runner, raw: Path, daily: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(daily, tmp_path / "daily"))
    list_of = tmp_path / "delete.txt"
    list_of.write_text("u0\nu7\nu14\nnobody\n")
    for kind in ("shards", f"events/{DAYS[-1]}"):  # the last day has not come yet
        shutil.rmtree(home / kind)
    for day in DAYS[:-1]:
        inputs = {kind: home / kind / day for kind in ("events", "histories")}
        run("write_shards", home / "shards", *SHARDING, **inputs)
    events = build(run, home, raw, DAYS[-1:], home / "events" / DAYS[-2], f"privacy.delete={list_of}")
    made = read_manifest(Folder(str(events)), EVENTS)
    gone = set(made.facts["forgotten"])
    assert len(gone) >= 2
    assert made.facts["runs"] == {"state": [], "vocabulary": []}
    texts = [path.read_bytes() for path in events.rglob("*.arrow")]
    assert texts
    assert not any(b"u14" in text for text in texts)
    shards = shards_of(home)
    for entry in shards.files:
        users = read_parts(Folder(str(home / "shards")), [entry], ["user"])["user"].to_pylist()
        assert not gone & set(users)
    assert shards.rows() < shards_of(daily).rows()
