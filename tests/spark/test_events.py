"""build_events: core, positions, order, label, split, tables."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from reclora_dist.contract import schema
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder
from spark_jobs.transforms import settle
from spark_jobs.transforms.core import k_core


def core_by_hand(log: list[tuple], k: int) -> list[tuple]:
    while True:
        users, items = Counter(e[0] for e in log), Counter(e[1] for e in log)
        kept = [e for e in log if users[e[0]] >= k and items[e[1]] >= k]
        if len(kept) == len(log):
            return log
        log = kept


def sparse_log(seed: int) -> list[tuple[str, str, int, int]]:
    """A log in which a k-core takes several rounds."""
    rng = np.random.default_rng(seed)
    pairs = {(int(u), int(i)) for u, i in zip(rng.zipf(1.3, 600) % 60, rng.zipf(1.2, 600) % 50, strict=True)}
    return [(f"u{u}", f"i{i}", int(rng.integers(1, 6)), int(rng.integers(0, 500))) for u, i in sorted(pairs)]


def test_core_positions_and_order(run, rows, csv, tmp_path: Path) -> None:
    log = sparse_log(0)
    left = core_by_hand(log, 4)
    assert 60 < len(left) < len(log)
    raw = csv.write(tmp_path / "raw", log)
    made = run("build_events", tmp_path / "out", *csv.settings, "k_core=4", "min_history=2", raw=raw)
    users = {row["user_id"]: row["user"] for row in rows(tmp_path / "out", made, "users/")}
    items = {row["item_id"]: row["item"] for row in rows(tmp_path / "out", made, "items/")}
    for table, place in ((users, 0), (items, 1)):
        first = {key: min(e[3] for e in left if e[place] == key) for key in {e[place] for e in left}}
        assert table == {key: n for n, key in enumerate(sorted(first, key=lambda key: (first[key], key)), 1)}
    expected = sorted((users[u], t * 1000, items[i], float(r)) for u, i, r, t in left)
    events = rows(tmp_path / "out", made, "events/")
    assert [(e["user"], e["time"], e["item"], e["rating"]) for e in events] == expected
    seen: Counter = Counter()
    for event in events:
        assert event["sample_id"] == event["user"] << 32 | seen[event["user"]]
        assert event["level"] == event["rating"] and event["label"] == (event["rating"] >= 4)
        seen[event["user"]] += 1
    assert made.facts["counts"]["k_core"] == made.facts["counts"]["events"] == len(left)


def test_a_core_on_a_cluster_keeps_one_round(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that hangs on a circle loses an event a round."""
    monkeypatch.setattr(settle, "is_local", lambda _: False)
    circle, kept = [("u0", "i0"), ("u0", "i1"), ("u1", "i0"), ("u1", "i1")], {}
    for rounds in (2, 5):
        chain = [(f"u{(n + 1) // 2 * 7}", f"i{n // 2 * 7}") for n in range(1, rounds + 1)]
        log, turns = spark.createDataFrame([*circle, *chain], ["user_id", "item_id"]), []
        left = k_core(log, 2, lambda turn, rows, turns=turns: turns.append((turn, rows)))
        assert turns == [(turn, 4 + rounds - turn) for turn in range(1, rounds + 1)]
        assert sorted(map(tuple, left.collect())) == circle
        kept[rounds] = len(spark.sparkContext._jsc.getPersistentRDDs())
        left.unpersist(blocking=True)
    assert kept[5] == kept[2]


@pytest.mark.parametrize("levels", ["[]", "[0.3,0.7]"])
def test_a_rating_at_the_threshold_is_a_like(run, rows, csv, tmp_path: Path, levels: str) -> None:
    log = [(f"u{u}", f"i{i}", (0.3, 0.7)[(u + i) % 2], 10 * i + u) for u in range(6) for i in range(8)]
    made = run(
        "build_events", tmp_path / "out", *csv.settings, f"rating_levels={levels}", "like_at_least=0.7", "k_core=0",
        "min_history=2", raw=csv.write(tmp_path / "raw", log),
    )  # fmt: skip
    assert made.facts["level_likes"] == [0, 1]
    events = rows(tmp_path / "out", made, "events/")
    assert [event["label"] for event in events] == [int(event["rating"] > 0.5) for event in events]
    assert [event["level"] for event in events] == [1 + event["label"] for event in events]


def test_tables_have_the_schemas_of_the_contract(finished) -> None:
    made, folder = finished.manifest("events", EVENTS), Folder(str(finished.folder / "events"))
    assert read_parts(folder, made.select("events/")).schema.equals(schema.events)
    assert read_parts(folder, made.select("items/")).schema.equals(schema.items(0))
    assert read_parts(folder, made.select("users/")).schema.equals(schema.users(0))
    assert made.select("quarantine/") == ()
    assert made.facts["rating_levels"] == [1, 2, 3, 4, 5] and made.facts["level_likes"] == [0, 0, 0, 1, 1]
    assert made.facts["user_fields"] == {} == made.facts["item_fields"]
    assert made.facts["split"] == finished.split
    assert len(made.facts["split_times"]) == (2 if finished.split == "global_time" else 0)


def test_split_and_training_counts(finished, rows) -> None:
    made, folder = finished.manifest("events", EVENTS), finished.folder / "events"
    events = rows(folder, made, "events/")
    times = {u: sorted(e["time"] for e in events if e["user"] == u) for u in {e["user"] for e in events}}
    samples = [e for e in events if sum(t < e["time"] for t in times[e["user"]]) >= 3]
    counts = Counter(e["split"] for e in samples)
    assert {name: made.facts["counts"][name] for name in schema.SPLITS} == counts
    if finished.split == "global_time":
        first, second = made.facts["split_times"]
        ordered = sorted(e["time"] for e in samples)
        assert first == ordered[int(0.8 * len(ordered))] and second == ordered[int(0.9 * len(ordered))]
        for event in events:
            place = (event["time"] >= first) + (event["time"] >= second)
            assert event["split"] == schema.SPLITS[place]
    else:
        for user in times:
            mine = [e for e in samples if e["user"] == user]
            n = len(mine)
            wanted = ["train" if r < 0.8 * n else "validation" if r < 0.9 * n else "test" for r in range(n)]
            assert [e["split"] for e in mine] == wanted
    seen = Counter(e["item"] for e in events if e["split"] == "train")
    assert all(row["train_events"] == seen[row["item"]] for row in rows(folder, made, "items/"))


def test_an_item_table_gives_titles_fields_and_text(run, rows, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    events = [(f"u{u}", f"i{i}", 1 + (u + i) % 2, 10 * u + i) for u in range(4) for i in range(5)]
    (raw / "e.csv").write_text("who,what,click,at\n" + "".join(f"{u},{i},{r - 1},{t}\n" for u, i, r, t in events))
    (raw / "i.csv").write_text(
        'what,name,kind,unused\ni0,Alpha,x,1\ni1,,y,1\ni2,Gamma,,1\ni3,"Delta, the ""last""",x,1\ni4,Epsilon,y,1\n'
    )
    (raw / "p.csv").write_text("who,town\nu0,Rome\nu1,Oslo\nu2,\n")
    made = run(
        "build_events", tmp_path / "out", "source.format=csv", "source.events=e.csv", "source.items=i.csv",
        "source.users=p.csv", "source.user=who", "source.item=what", "source.rating=click", "source.time=at",
        "source.title=name", "source.item_fields=[kind]", "source.user_fields=[town]", "source.time_unit=ms",
        "like_at_least=1", "k_core=0", "min_history=1", "item_text={title} is a {kind}.", "split=per_user",
        "fractions=[0.5,0.25,0.25]", raw=raw,
    )  # fmt: skip
    items = {row["item_id"]: row for row in rows(tmp_path / "out", made, "items/")}
    assert made.facts["item_fields"] == {"kind": ["x", "y"]} and made.facts["user_fields"] == {"town": ["Oslo", "Rome"]}
    assert made.facts["rating_levels"] == [0, 1] and made.facts["level_likes"] == [0, 1]
    assert made.facts["quarantine"] == {"item_without_title": 1}
    assert items["i1"]["title"] == "i1" and items["i1"]["text"] == "i1 is a y."
    assert items["i2"]["text"] == "Gamma is a unknown." and items["i2"]["fields"] == [0]
    assert items["i3"]["title"] == 'Delta, the "last"' and items["i3"]["fields"] == [1]
    users = {row["user_id"]: row["fields"] for row in rows(tmp_path / "out", made, "users/")}
    assert users == {"u0": [2], "u1": [1], "u2": [0], "u3": [0]}
    assert {row["time"] for row in rows(tmp_path / "out", made, "events/")} == {t for *_, t in events}
