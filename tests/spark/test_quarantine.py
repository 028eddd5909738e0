"""Every kind of bad row is put aside with its reason, and nothing else is lost."""

from collections import Counter
from pathlib import Path

import pytest

from reclora_dist.contract.manifest import Manifest, read_manifest
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder

GOOD = [(f"u{u}", f"i{i}", 1 + (u * i) % 5, 100 - 7 * i + u) for u in range(6) for i in range(8)]
"""Times fall with the item number: events of a user are out of order in the file."""

BAD = {
    "missing_user_id": [",i1,3,50"],
    "missing_item_id": ["u1,,3,50", "u1,  ,3,51"],
    "missing_rating": ["u1,i1,,52"],
    "unparseable_rating": ["u1,i1,good,53", "u1,i1,NaN,54", "u1,i1,Infinity,55"],
    "rating_not_in_levels": ["u1,i1,3.5,56", "u1,i1,9,57"],
    "missing_time": ["u1,i1,3,"],
    "unparseable_time": ["u1,i1,3,yesterday"],
    "unknown_item": ["u1,i77,3,58"],
    "malformed_row": ["u1,i1,3", "u1,i1,3,59,extra"],
    "duplicate_event": ["u2,i3,1,81", "u2,i3,2,81", "u2,i3,2,81"],
}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dirty")
    lines = ["user_id,item_id,rating,timestamp", *[",".join(map(str, row)) for row in GOOD]]
    (folder / "events.csv").write_text("\n".join([*lines, *[row for rows in BAD.values() for row in rows]]) + "\n")
    items = ["item_id,title", *[f"i{i},Title {i}" for i in range(7)], "i7,", ",Nothing", "i0,Again", "i1,a,b"]
    (folder / "items.csv").write_text("\n".join(items) + "\n")
    return folder


SETTINGS = (
    "source.format=csv", "source.events=events.csv", "source.items=items.csv", "rating_levels=[1,2,3,4,5]", "k_core=0",
    "min_history=2",
)  # fmt: skip
EVENT_COUNTS = {reason: len(rows) for reason, rows in BAD.items()}
COUNTS = {**EVENT_COUNTS, "item_without_title": 1, "duplicate_item": 1}
COUNTS["missing_item_id"] += 1
COUNTS["malformed_row"] += 1


@pytest.fixture(scope="module")
def built(run, dirty: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("built")
    return out, run("build_events", out, *SETTINGS, raw=dirty)


def test_reasons_rows_and_counts(rows, built: tuple[Path, Manifest]) -> None:
    out, made = built
    assert made.facts["quarantine"] == COUNTS
    table = rows(out, made, "quarantine/")
    found: Counter = Counter()
    for row in table:
        found[row["reason"]] += row["rows"]
    assert found == COUNTS
    assert sorted(row["rows"] for row in table if row["reason"] == "duplicate_event") == [1, 2], "equal rows are one"
    assert {row["table"] for row in table} == {"events", "items"}
    assert any("yesterday" in row["row"] for row in table if row["reason"] == "unparseable_time")
    assert any("extra" in row["row"] for row in table if row["reason"] == "malformed_row")
    assert made.facts["counts"]["read"] == len(GOOD) + sum(EVENT_COUNTS.values())
    assert made.facts["counts"]["clean"] == len(GOOD)


def test_good_rows_stay_the_first_duplicate_among_them(rows, built: tuple[Path, Manifest]) -> None:
    out, made = built
    items = {row["item"]: row for row in rows(out, made, "items/")}
    users = {row["user"]: row["user_id"] for row in rows(out, made, "users/")}
    found = [
        (users[e["user"]], items[e["item"]]["item_id"], int(e["rating"]), e["time"] // 1000)
        for e in rows(out, made, "events/")
    ]
    assert sorted(found) == sorted(GOOD)
    assert {row["item_id"]: row["title"] for row in items.values()} == {
        **{f"i{i}": f"Title {i}" for i in range(7)}, "i7": "i7",
    }  # fmt: skip


def test_too_many_bad_rows_leave_the_old_output(run, dirty: Path, built: tuple[Path, Manifest]) -> None:
    out, old = built
    before = {file: (out / file).read_bytes() for file in Folder(str(out)).files()}
    with pytest.raises(ValueError, match=r"17 of 65 event rows \(26.2%\) are bad, max_quarantined = 0.1 \("):
        run("build_events", out, *SETTINGS, "max_quarantined=0.1", raw=dirty)
    assert {file: (out / file).read_bytes() for file in Folder(str(out)).files()} == before
    assert read_manifest(Folder(str(out)), EVENTS) == old


def test_without_a_clock_file_order_counts_and_a_repeated_pair_is_a_duplicate(run, rows, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    # Two files: the order of their names is the order of the log.
    (tmp_path / "raw" / "b.csv").write_text("ID,Name,Rating\n2,Late,it was ok\n1,First,liked it\n")
    lines = ["ID,Name,Rating", "9,Rating,This user doesn't have any rating", "1,First,it was amazing"]
    ratings = ["it was ok" if n == 5 else "really liked it" for n in range(12)]
    lines += [f'{user},"Book {n}, #{n}",{ratings[n]}' for user in (1, 2) for n in range(12)]
    lines += ["1,Odd,superb", ",X,liked it"]
    (tmp_path / "raw" / "a.csv").write_text("\n".join(lines) + "\n")
    made = run(
        "build_events", tmp_path / "out", "source.kind=goodreads", "k_core=0", "min_history=1", "split=per_user",
        raw=tmp_path / "raw",
    )  # fmt: skip
    assert made.facts["quarantine"] == {
        "user_without_ratings": 1, "duplicate_event": 1, "unparseable_rating": 1, "missing_user_id": 1,
    }  # fmt: skip
    items = {row["item"]: row["title"] for row in rows(tmp_path / "out", made, "items/")}
    events = rows(tmp_path / "out", made, "events/")
    titles = [[items[e["item"]] for e in events if e["user"] == user] for user in (1, 2)]
    assert titles[0] == ["First", *[f"Book {n}, #{n}" for n in range(12)]]
    assert titles[1] == [*[f"Book {n}, #{n}" for n in range(12)], "Late"]
    assert [e["rating"] for e in events if items[e["item"]] in ("First", "Late")] == [5, 2]
