"""Histories and shards: what a sample may see, and that every file holds what it should."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.parts import Rows, read_parts, write_part
from reclora_dist.contract.schema import EVENTS, HISTORIES, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.retrieval import Similarity, similarity
from spark_jobs.retrieve_history import COLUMNS
from spark_jobs.transforms import histories as module
from spark_jobs.transforms import shards
from spark_jobs.transforms.histories import histories
from spark_jobs.transforms.tasks import Task, read_with_past


def part_of(log: list[tuple[int, int, int]]) -> pa.Table:
    """An events part of (user, time, item), sorted as parts are; the level tells the event's order."""
    found, seen = [], Counter()
    for user, time, item in sorted(log):
        order = seen[user]
        found.append((user << 32 | order, user, item, time, 1.0, min(127, order + 1), 1, "train", 0, 0, order, order))
        seen[user] += 1
    columns = list(zip(*found, strict=True)) or [()] * len(schema.events)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema.events, strict=True)], schema=schema.events)


events_strategy = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(1, 6)), max_size=60, unique=True
)


def retrieved(
    events: pa.Table, own: np.ndarray, compared: Similarity | None, config: RetrievalConfig, min_history: int
) -> pa.Table:
    """The histories of all samples in one table, which may be empty."""
    none = schema.histories(config.long, config.short).empty_table()
    return pa.concat_tables([none, *histories(events, own, compared, config, min_history)])


@pytest.mark.parametrize("strategy", ["semantic", "recent"])
def test_histories_are_retrieved_in_tables_of_bounded_size(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = part_of([(user, time, 1 + (user * time) % 6) for user in range(1, 9) for time in range(30)])
    own = np.ones(events.num_rows, bool)
    config = RetrievalConfig(strategy=strategy, long=1000, short=10)
    compared = similarity(config, np.eye(7, 3, dtype=np.float32), None)
    whole = retrieved(events, own, compared, config, 3)
    monkeypatch.setattr(module, "LISTED_AT_ONCE", 50_000)
    some = list(histories(events, own, compared, config, 3))
    assert max(table.num_rows for table in some) == 50_000 // 1010
    assert pa.concat_tables(some).equals(whole)


@settings(deadline=None)
@given(events_strategy, st.sampled_from(["semantic", "recent"]), st.integers(1, 4))
def test_no_history_holds_an_event_at_or_after_its_sample(log: list, strategy: str, min_history: int) -> None:
    events = part_of(log)
    vectors = np.eye(7, 3, dtype=np.float32)
    config = RetrievalConfig(strategy=strategy, long=5, short=2, block=3)
    own = np.ones(events.num_rows, bool)
    made = retrieved(events, own, similarity(config, vectors, None), config, min_history)
    assert made.schema.equals(schema.histories(5, 2))
    by_user = {u: [e for e in events.to_pylist() if e["user"] == u] for u in (1, 2, 3)}
    for row in made.to_pylist():
        past = [e for e in by_user[row["user"]] if e["time"] < row["time"]]
        assert len(past) >= min_history
        for name, length in (("long", 5), ("short", 2)):
            real = row[f"{name}_length"]
            assert real == min(length, len(past))
            seen = [past[level - 1] for level in row[f"{name}_levels"][:real]]  # fails beyond the past
            assert [e["item"] for e in seen] == row[f"{name}_items"][:real]
            assert row[f"{name}_items"][real:] == row[f"{name}_levels"][real:] == [0] * (length - real)
    wanted = {
        e["sample_id"] for u in by_user.values() for e in u if sum(o["time"] < e["time"] for o in u) >= min_history
    }
    assert {row["sample_id"] for row in made.to_pylist()} == wanted


def all_events(finished, rows) -> list[dict]:
    return rows(finished.folder / "events", finished.manifest("events", EVENTS), "events/")


def test_histories_of_a_run_lie_before_their_samples(finished, rows) -> None:
    events = all_events(finished, rows)
    made = rows(finished.folder / "histories", finished.manifest("histories", HISTORIES), "histories/")
    by_user: dict[int, list[dict]] = {}
    for event in events:
        by_user.setdefault(event["user"], []).append(event)
    for row in made:
        past = {(e["item"], e["level"]) for e in by_user[row["user"]] if e["time"] < row["time"]}
        seen = list(zip(row["long_items"], row["long_levels"], strict=True))[: row["long_length"]]
        assert set(seen) <= past and len(set(seen)) == row["long_length"] == min(6, len(past))
        short = list(zip(row["short_items"], row["short_levels"], strict=True))[: row["short_length"]]
        assert set(short) <= set(seen)
    counts = Counter(row["split"] for row in made)
    assert finished.manifest("histories", HISTORIES).facts["counts"] == counts
    assert counts["test"] and len(made) == len({row["sample_id"] for row in made})


def test_statistics_count_what_was_known_before(finished, rows) -> None:
    events = all_events(finished, rows)
    known = [e for e in events if finished.split == "global_time" or e["split"] == "train"]
    made = finished.manifest("shards", SHARDS)
    for split in schema.SPLITS:
        for row in rows(finished.folder / "shards", made, f"crm/split={split}/"):
            earlier = [e for e in known if e["time"] < row["time"]]
            item = [e["label"] for e in earlier if e["item"] == row["item"]]
            user = [e["label"] for e in earlier if e["user"] == row["user"]]
            assert row["statistics"] == [len(item), sum(item), len(user), sum(user)]


def test_shards_join_events_and_histories_by_sample(finished, rows) -> None:
    made, folder = finished.manifest("shards", SHARDS), finished.folder / "shards"
    events = {e["sample_id"]: e for e in all_events(finished, rows)}
    past = {
        row["sample_id"]: row
        for row in rows(finished.folder / "histories", finished.manifest("histories", HISTORIES), "histories/")
    }
    found = []
    for split in schema.SPLITS:
        crm = {row["sample_id"]: row for row in rows(folder, made, f"crm/split={split}/")}
        text = rows(folder, made, f"text/split={split}/")
        for row in crm.values():
            event = events[row["sample_id"]]
            assert event["split"] == split
            assert all(row[name] == event[name] for name in ("user", "item", "time", "label"))
            assert all(row[name] == past[row["sample_id"]][name] for name in row if name.startswith("long_"))
        for row in text:
            assert {name: row[name] for name in crm[row["sample_id"]]} == crm[row["sample_id"]]
            assert all(row[name] == past[row["sample_id"]][name] for name in row if name.startswith("short_"))
        keys = {i: int(shards.text_key(np.array([i]), 0)[0]) for i in crm}
        few = {i for i, key in keys.items() if key < 0.25 * 2**64}
        wanted = {"train": few, "validation": set(sorted(keys, key=lambda i: keys[i])[:20]), "test": set(crm)}[split]
        assert {row["sample_id"] for row in text} == wanted
        assert len(text) == len(wanted) == made.facts["text"][split]
        assert made.facts["crm"][split] == len(crm)
        found += list(crm)
    assert sorted(found) == sorted(past)


@pytest.mark.parametrize("few", ["0.25", "30"])
@pytest.mark.parametrize("finished", ["global_time"], indirect=True)
def test_what_the_language_model_trains_on_can_be_kept_from_the_crm(
    run, rows, finished, tmp_path: Path, few: str
) -> None:
    inputs = {name: finished.folder / name for name in ("events", "histories")}
    made = run("write_shards", tmp_path, "apart=true", f"text_train={few}", "text_validation=20", **inputs)
    before = finished.manifest("shards", SHARDS)
    for split in schema.SPLITS:
        crm, text, whole = (
            {row["sample_id"] for row in rows(folder, manifest, f"{kind}/split={split}/")}
            for folder, manifest, kind in (
                (tmp_path, made, "crm"), (tmp_path, made, "text"), (finished.folder / "shards", before, "crm"),
            )
        )  # fmt: skip
        assert crm == (whole - text if split == "train" else whole)
        assert made.facts["crm"][split] == len(crm) and text <= whole and text


@pytest.mark.parametrize("finished", ["global_time"], indirect=True)
def test_apart_must_leave_the_crm_something(run, finished, tmp_path: Path) -> None:
    inputs = {name: finished.folder / name for name in ("events", "histories")}
    with pytest.raises(ValueError, match="leaves the CRM no sample"):
        run("write_shards", tmp_path, "apart=true", "text_train=1.0", **inputs)


def test_files_and_schemas(finished) -> None:
    made, folder = finished.manifest("shards", SHARDS), Folder(str(finished.folder / "shards"))
    train = made.select("crm/split=train/")
    assert len(train) == -(-made.facts["crm"]["train"] // 150)
    assert max(entry.rows for entry in train) < 1.5 * 150
    assert all(group <= 40 for entry in made.files for group in entry.row_groups)
    assert read_parts(folder, train).schema.equals(schema.crm_shard(0, 6))
    assert read_parts(folder, made.select("text/split=test/")).schema.equals(schema.text_shard(0, 6, 3))
    assert made.facts["rating_levels"] == [1, 2, 3, 4, 5] and (made.facts["long"], made.facts["short"]) == (6, 3)
    users = read_parts(folder, train, ["user"])["user"].to_numpy()
    assert (np.diff(users) < 0).any(), "rows are shuffled"


@pytest.mark.parametrize("finished", ["global_time"], indirect=True)
def test_recent_histories_need_no_vectors(run, rows, finished, tmp_path: Path) -> None:
    made = run("retrieve_history", tmp_path, "strategy=recent", "long=4", "short=2", events=finished.folder / "events")
    by_user: dict[int, list[dict]] = {}
    for event in all_events(finished, rows):
        by_user.setdefault(event["user"], []).append(event)
    for row in rows(tmp_path, made, "histories/"):
        past = [e["item"] for e in by_user[row["user"]] if e["time"] < row["time"]]
        assert row["long_items"][: row["long_length"]] == past[-4:]
        assert row["short_items"][: row["short_length"]] == past[-2:]


@settings(deadline=None)
@given(
    events_strategy,
    st.lists(st.integers(1, 59), max_size=6),
    st.integers(1, 6),
    st.sampled_from(["semantic", "recent"]),
)
def test_tasks_find_the_histories_of_the_whole_log_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, log: list, cuts: list[int], candidates: int, strategy: str
) -> None:
    """Users go on from task to task and from part to part; every task reads as much of the past as it may see."""
    events = part_of(log)
    if not events.num_rows:
        return
    folder = Folder(str(tmp_path_factory.mktemp("log")))
    middle = events.num_rows // 2
    parts = [events.slice(0, middle), events.slice(middle)]
    written = [write_part(folder, "events/", n, part, 4) for n, part in enumerate(parts) if part.num_rows]
    config = RetrievalConfig(strategy=strategy, long=5, short=2, block=3, candidates=candidates)
    compared = similarity(config, np.eye(7, 3, dtype=np.float32), None)
    whole = retrieved(events, np.ones(events.num_rows, bool), compared, config, 1)
    ends = sorted({cut for cut in cuts if cut < events.num_rows} | {events.num_rows})
    found = []
    for start, stop in pairwise([0, *ends]):
        rows, own = read_with_past(Rows(folder, written), Task(start, stop, 0), candidates, COLUMNS)
        assert own.sum() == stop - start
        found.append(retrieved(rows, own, compared, config, 1))
    assert pa.concat_tables(found).equals(whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_happens_at_or_after_a_sample_changes_nothing_in_its_row(
    run, build_all, csv, tmp_path: Path, seed: int
) -> None:
    """Shuffle users, items and ratings among all other events at its time or later; times tie."""
    rng = np.random.default_rng(seed)
    log = csv.tied(seed=seed)
    at = sorted(event[3] for event in log)[len(log) * (2 + seed) // 4]
    sample = next(event for event in log if event[3] == at)
    later = [n for n, event in enumerate(log) if event[3] >= at and event != sample]
    shuffled = list(log)
    columns = [rng.permutation([log[n][column] for n in later]).tolist() for column in range(3)]
    for n, user, item, rating in zip(later, *columns, strict=True):
        shuffled[n] = (user, item, rating, log[n][3])
    found = []
    for name, events in (("as_it_was", log), ("shuffled", shuffled)):
        csv.write(tmp_path / name / "raw", events)
        build_all(run, tmp_path / name, tmp_path / name / "raw", "global_time", "k_core=0")
        found.append(row_of(tmp_path / name, sample))
    assert found[0]["long_length"] > 3
    assert found[0] == found[1]


def row_of(home: Path, sample: tuple) -> dict:
    """The CRM row of an event, but for its place among events at the same time; items by their ids."""
    events, shards_of = (Folder(str(home / name)) for name in ("events", "shards"))
    made = read_manifest(events, EVENTS)
    tables = {name: read_parts(events, made.select(f"{name}s/")).to_pylist() for name in ("user", "item")}
    names = {name: {row[name]: row[f"{name}_id"] for row in rows} for name, rows in tables.items()}
    for row in read_parts(shards_of, read_manifest(shards_of, SHARDS).select("crm/")).to_pylist():
        key = (names["user"][row["user"]], names["item"][row["item"]], row["time"])
        if key == (sample[0], sample[1], sample[3] * 1000):
            seen = [names["item"][item] for item in row["long_items"][: row["long_length"]]]
            return {**row, "sample_id": 0, "user": 0, "item": 0, "long_items": seen}
    raise AssertionError(f"{sample} is no sample")
