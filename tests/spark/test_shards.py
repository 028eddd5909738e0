"""Histories and shards: what a sample may see, and that every file holds what it should."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclora_dist.config.schema import RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS, HISTORIES, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.retrieval import similarity
from spark_jobs.transforms import shards
from spark_jobs.transforms.histories import histories


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


@settings(deadline=None)
@given(events_strategy, st.sampled_from(["semantic", "recent"]), st.integers(1, 4))
def test_no_history_holds_an_event_at_or_after_its_sample(log: list, strategy: str, min_history: int) -> None:
    events = part_of(log)
    vectors = np.eye(7, 3, dtype=np.float32)
    config = RetrievalConfig(strategy=strategy, long=5, short=2, block=3)
    own = np.ones(events.num_rows, bool)
    made = histories(events, own, similarity(config, vectors, None), config, min_history)
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
