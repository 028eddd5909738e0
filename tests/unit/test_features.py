import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from reclora_dist.backbone.tiny import train_tokenizer
from reclora_dist.config.schema import PromptConfig, RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import ContractError, FileEntry, Format, Manifest, add_file, commit, read_manifest
from reclora_dist.contract.parts import write_part
from reclora_dist.contract.storage import Folder
from reclora_dist.data.collate import TextCollator
from reclora_dist.data.features import (
    CandidatesError,
    FeatureStore,
    HistoryError,
    HistoryEvent,
    ProfileError,
    RatingError,
    RequestError,
    UnknownItemError,
    UnknownUserError,
)
from reclora_dist.data.prompts import PromptBuilder
from reclora_dist.retrieval import on_grid

USERS, ITEMS, DIMENSION = 7, 12, 3
LEVELS = [0.5, 1.0, 2.5, 4.0]
LIKES = [0, 0, 0, 1]
SEMANTIC = RetrievalConfig("semantic", long=5, short=2, block=3)


def log(seed: int = 0) -> list[dict]:
    """Events with many equal times, in (user, order) order."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, USERS + 1):
        times = np.sort(rng.integers(0, 40, rng.integers(3, 15)))
        for order, time in enumerate(times.tolist()):
            level = int(rng.integers(1, len(LEVELS) + 1))
            split = schema.SPLITS[int(rng.integers(3))]
            row = {"sample_id": user << 32 | order, "user": user, "item": int(rng.integers(1, ITEMS + 1)), "time": time}
            row |= {"rating": LEVELS[level - 1], "level": level, "label": LIKES[level - 1], "split": split}
            rows.append(row | dict.fromkeys(schema.STATISTICS, 0))  # the store counts for itself
    return rows


def publish(folder: Folder, format: Format, files: list[FileEntry], facts: dict) -> None:
    commit(folder, Manifest(format.name, format.version, "config", {}, tuple(files), facts))


def write_events(folder: Folder, rows: list[dict], split_times: list[int], fields: int = 2) -> None:
    users = [{"user": u, "user_id": f"u{u}", "fields": [u % 3, u % 2][:fields]} for u in range(1, USERS + 1)]
    items = [
        {
            "item": i,
            "item_id": f"i{i}",
            "title": f"Title {i}",
            "text": "",
            "fields": [],
            **dict.fromkeys(("train_events", "events", "likes"), 1),
        }
        for i in range(1, ITEMS + 1)
    ]
    late = [row for row in rows if row["user"] > 4]
    early = [row for row in rows if row["user"] <= 4]
    files = [
        # parts are not in the order of the users: a part's number is a Spark partition
        write_part(folder, "events/", 0, pa.Table.from_pylist(late, schema.events), 5),
        write_part(folder, "events/", 1, pa.Table.from_pylist(early, schema.events), 5),
        write_part(folder, "users/", 0, pa.Table.from_pylist(users, schema.users(fields)), 100),
        write_part(folder, "items/", 0, pa.Table.from_pylist(items, schema.items(0)), 100),
    ]
    facts = {"rating_levels": LEVELS, "level_likes": LIKES, "split_times": split_times, "users": USERS, "items": ITEMS}
    facts |= {"user_fields": dict([("gender", ["F", "M"]), ("age", ["old"])][:fields]), "item_fields": {}}
    publish(folder, schema.EVENTS, files, facts)


def write_vectors(folder: Folder, items: int = ITEMS) -> np.ndarray:
    vectors = on_grid(np.random.default_rng(1).normal(size=(items + 1, DIMENSION)))
    vectors[0] = 0
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    publish(folder, schema.VECTORS, [add_file(folder, "vectors-0.npy", buffer.getvalue())], {"dimension": DIMENSION})
    return vectors


def folders(root: Path, split_times: list[int], fields: int = 2) -> tuple[Folder, Folder]:
    events, vectors = Folder(str(root / "events")), Folder(str(root / "vectors"))
    write_events(events, log(), split_times, fields)
    write_vectors(vectors)
    return events, vectors


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.load(*folders(tmp_path_factory.mktemp("global"), [20, 30]))


@pytest.fixture(scope="module")
def per_user(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.load(*folders(tmp_path_factory.mktemp("per_user"), []))


def expected_statistics(user: int, item: int, time: int, train_only: bool) -> list[float]:
    past = [row for row in log() if row["time"] < time and (row["split"] == "train" or not train_only)]
    of_item, of_user = [r for r in past if r["item"] == item], [r for r in past if r["user"] == user]
    return [len(of_item), sum(r["label"] for r in of_item), len(of_user), sum(r["label"] for r in of_user)]


def expected_history(past: list[dict], target: int, k: int) -> tuple[list[int], list[int], int]:
    """Items, levels and length of the k events most similar to the target, ties: newer first; oldest first."""
    vectors = on_grid(np.random.default_rng(1).normal(size=(ITEMS + 1, DIMENSION))).astype(float)
    cosine = [vectors[r["item"]] @ vectors[target] for r in past]
    best = sorted(sorted(range(len(past)), key=lambda i: (cosine[i], i), reverse=True)[:k])
    pad = [0] * (k - len(best))
    return [past[i]["item"] for i in best] + pad, [past[i]["level"] for i in best] + pad, len(best)


@pytest.mark.parametrize("train_only", [False, True])
def test_every_logged_event_gets_its_point_in_time_features(
    store: FeatureStore, per_user: FeatureStore, train_only: bool
) -> None:
    used = per_user if train_only else store
    for row in log():
        past = [r for r in log() if r["user"] == row["user"] and r["time"] < row["time"]]
        if not past:
            continue
        table = used.rows([f"i{row['item']}"], SEMANTIC, user=f"u{row['user']}", time=row["time"])
        assert table.schema.equals(schema.text_shard(2, 5, 2))
        (found,) = table.to_pylist()
        items, levels, length = expected_history(past, row["item"], 5)
        short_items, short_levels, short_length = expected_history(past, row["item"], 2)
        assert found == {
            "sample_id": 0,
            "user": row["user"],
            "item": row["item"],
            "time": row["time"],
            "label": 0,
            "user_fields": [row["user"] % 3, row["user"] % 2],
            "statistics": expected_statistics(row["user"], row["item"], row["time"], train_only),
            "long_items": items,
            "long_levels": levels,
            "long_length": length,
            "short_items": short_items,
            "short_levels": short_levels,
            "short_length": short_length,
        }


@pytest.mark.parametrize("fields", [0, 1])
def test_rows_have_the_user_fields_that_the_log_has_or_none(tmp_path: Path, fields: int) -> None:
    events, vectors = folders(tmp_path, [20, 30], fields)
    used = FeatureStore.load(events, vectors)
    table = used.rows(["i1", "i7", "i2"], SEMANTIC, user="u5")
    assert table.schema.equals(schema.text_shard(fields, 5, 2))
    assert table["user_fields"].to_pylist() == [[5 % 3][:fields]] * 3
    titles = [f"Title {i}" for i in range(ITEMS + 1)]
    known = read_manifest(events, schema.EVENTS).facts["user_fields"]
    prompts = PromptBuilder(PromptConfig(), train_tokenizer(titles, 300), titles, LEVELS, known, causal=True)
    batch = TextCollator(prompts)(table)
    assert batch.crm.user_fields.shape == (3, fields)
    assert len(batch.input_ids) == 3


def test_rows_follow_the_candidates_even_twice(store: FeatureStore) -> None:
    table = store.rows(["i9", "i2", "i9"], SEMANTIC, user="u3")
    assert table["item"].to_pylist() == [9, 2, 9]
    assert table["sample_id"].to_pylist() == [0, 1, 2]
    assert table.slice(0, 1).drop_columns("sample_id").equals(table.slice(2, 1).drop_columns("sample_id"))


def test_without_time_all_events_count(store: FeatureStore) -> None:
    after = max(row["time"] for row in log()) + 1
    table = store.rows(["i4"], SEMANTIC, user="u1")
    assert table["time"].to_pylist() == [after]
    assert table["statistics"].to_pylist() == [expected_statistics(1, 4, after, False)]


def test_recent_strategy_takes_the_newest(store: FeatureStore) -> None:
    newest = [row["item"] for row in log() if row["user"] == 2][-3:]
    table = store.rows(["i1"], RetrievalConfig("recent", long=3, short=1), user="u2")
    assert table["long_items"].to_pylist() == [newest]
    assert table["short_items"].to_pylist() == [newest[-1:]]


def test_a_users_own_log_sent_as_history_gives_the_same_features(store: FeatureStore) -> None:
    events = [HistoryEvent(f"i{r['item']}", r["rating"], r["time"]) for r in log() if r["user"] == 5]
    named = store.rows(["i1", "i7"], SEMANTIC, user="u5", time=25)
    sent = store.rows(["i1", "i7"], SEMANTIC, history=events, time=25, profile={"gender": "M", "age": "old"})
    assert sent["user"].to_pylist() == [0, 0]
    assert sent.drop_columns("user").equals(named.drop_columns("user"))


def test_history_without_times_counts_in_the_order_given(store: FeatureStore) -> None:
    events = [HistoryEvent("i3", 4.0), HistoryEvent("i8", 0.5)]
    table = store.rows(["i1"], RetrievalConfig("recent", long=3, short=1), history=events)
    assert table["long_items"].to_pylist() == [[3, 8, 0]]
    assert table["long_levels"].to_pylist() == [[4, 1, 0]]
    assert table["statistics"].to_pylist()[0][2:] == [2.0, 1.0]
    assert table["user_fields"].to_pylist() == [[0, 0]]


def test_history_out_of_order_is_sorted_and_nothing_is_lost(store: FeatureStore) -> None:
    events = [HistoryEvent("i3", 4.0, 30), HistoryEvent("i8", 0.5, 10), HistoryEvent("i5", 1.0, 30)]
    table = store.rows(["i1"], RetrievalConfig("recent", long=3, short=1), history=events, time=31)
    assert table["long_items"].to_pylist() == [[8, 3, 5]]


def test_newest_event_of_a_sent_history_is_seen_without_time(store: FeatureStore) -> None:
    table = store.rows(["i1"], SEMANTIC, history=[HistoryEvent("i3", 4.0, 10**12)])
    assert table["time"].to_pylist() == [10**12 + 1]
    assert table["long_length"].to_pylist() == [1]


def test_profile_overrides_and_new_values_are_unknown(store: FeatureStore) -> None:
    table = store.rows(["i1"], SEMANTIC, user="u1", profile={"gender": "X"})
    assert table["user_fields"].to_pylist() == [[0, 1]]


GOOD = [HistoryEvent("i1", 4.0)]
REFUSED = {
    "unknown user": ({"user": "nobody"}, UnknownUserError, "'nobody' is not in the log: send the user's history"),
    "unknown item": ({"history": [HistoryEvent("?", 4.0)]}, UnknownItemError, "history holds item '?', not in the log"),
    "empty history": ({"history": []}, HistoryError, "history is empty: send at least one event"),
    "no history": ({}, HistoryError, "neither of user and history given"),
    "user and history": ({"user": "u1", "history": GOOD}, HistoryError, "both of user and history given"),
    "too early": ({"user": "u1", "time": -5}, HistoryError, "user 'u1' has no event before time -5"),
    "history too late": (
        {"history": [HistoryEvent("i1", 4.0, 9)], "time": 9},
        HistoryError,
        "history has no event before time 9",
    ),
    "some times": (
        {"history": [HistoryEvent("i1", 4.0, 9), HistoryEvent("i2", 4.0)]},
        HistoryError,
        "item 'i2' has no",
    ),
    "off the scale": ({"history": [HistoryEvent("i1", 3.0)]}, RatingError, "3.0 of item 'i1' is not on the scale: use"),
    "NaN rating": ({"history": [HistoryEvent("i1", float("nan"))]}, RatingError, "use one of 0.5, 1, 2.5, 4"),
    "unknown field": (
        {"user": "u1", "profile": {"sex": "F"}},
        ProfileError,
        "'sex' is unknown: use some of gender, age",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_value_and_the_remedy(store: FeatureStore, case: str) -> None:
    request, kind, words = REFUSED[case]
    with pytest.raises(kind) as refusal:
        store.rows(["i1"], SEMANTIC, **request)
    assert words in str(refusal.value)
    assert isinstance(refusal.value, RequestError)
    assert isinstance(refusal.value, ValueError)


def test_candidates_are_refused_if_none_or_unknown(store: FeatureStore) -> None:
    with pytest.raises(CandidatesError, match="candidates is empty: name at least one item"):
        store.rows([], SEMANTIC, user="u1")
    many = [f"x{n}" for n in range(20)]
    with pytest.raises(UnknownItemError, match=r"'x0', .*'x9' and 10 more, not in the log"):
        store.rows(["i1", *many, "x0"], SEMANTIC, user="u1")


def test_vectors_of_another_log_are_refused(tmp_path: Path) -> None:
    events, vectors = folders(tmp_path, [20, 30])
    write_vectors(vectors, ITEMS + 1)
    with pytest.raises(ContractError, match="holds vectors of 13 items, the events have 12"):
        FeatureStore.load(events, vectors)


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    events, vectors = folders(tmp_path, [20, 30])
    name = next(name for name in events.files("events") if name.endswith(".parquet"))
    content = bytearray(events.read(name))
    content[len(content) // 2] ^= 1
    events.write(name, bytes(content))
    with pytest.raises(ContractError, match="bytes changed after it was written"):
        FeatureStore.load(events, vectors)
