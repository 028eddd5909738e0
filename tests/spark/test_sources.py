"""Every layout on small files, and the real logs where they are."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reclora_dist.config.load import build, override
from reclora_dist.config.schema import SourceConfig
from reclora_dist.contract.storage import Folder
from spark_jobs.sources.layout import fingerprint
from spark_jobs.sources.open import open_log
from spark_jobs.sources.raw import CORRUPT, PLACE, RawLog

DATA = Path(__file__).parents[3] / "shared" / "data"


def opened(spark, folder: Path, *settings: str) -> RawLog:
    return open_log(spark, build(SourceConfig, override({}, settings)), Folder(str(folder)))


def values(frame, *names: str) -> list[tuple]:
    return [tuple(row[name] for name in names) for row in frame.orderBy(PLACE).collect()]


def test_movielens_1m(spark, tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::10::5::978300760\n2::11::3::978300761\nbroken\n")
    (tmp_path / "movies.dat").write_bytes(
        "Les Misérables (1995)".join(["10::", "::Drama|Musical\n"]).encode("latin-1") + b'11::"Quoted" (1999)::Comedy\n'
    )
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::99::16::70072\n")
    log = opened(spark, tmp_path, "kind=movielens_1m")
    assert values(log.events, "user_id", "item_id", "rating", "time_ms")[:2] == [
        ("1", "10", "5", 978300760000), ("2", "11", "3", 978300761000),
    ]  # fmt: skip
    assert [row[CORRUPT] for row in log.events.collect()] == [None, None, "broken"]
    assert values(log.items, "item_id", "title", "genre") == [
        ("10", "Les Misérables (1995)", "Drama|Musical"), ("11", '"Quoted" (1999)', "Comedy"),
    ]  # fmt: skip
    assert values(log.users, "user_id", "gender", "age", "job", "zip") == [
        ("1", "female", "under 18", "K-12 student", "48067"), ("2", "male", "99", "self-employed", "70072"),
    ]  # fmt: skip


def test_movielens_100k(spark, tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t5\t891717742\n")
    flags = [0] * 19
    flags[1] = flags[16] = 1
    (tmp_path / "u.item").write_bytes(f"242|Café (1996)||||{'|'.join(map(str, flags))}\n".encode("latin-1"))
    log = opened(spark, tmp_path, "kind=movielens_100k")
    assert values(log.events, "user_id", "item_id", "rating", "time_ms")[1] == ("186", "302", "5", 891717742000)
    assert values(log.items, "item_id", "title", "genre") == [("242", "Café (1996)", "Action|Thriller")]
    assert log.users is None and log.user_fields == ()
    (tmp_path / "u.user").write_text("196|49|M|writer|55105\n")
    log = opened(spark, tmp_path, "kind=movielens_100k")
    assert values(log.users, "user_id", "gender", "age", "job", "zip") == [("196", "male", "49", "writer", "55105")]
    assert log.user_fields == ("gender", "age", "job", "zip")


def test_movielens_25m(spark, tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,296,4.5,1147880044\n")
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n296,"American President, The (1995)",Comedy|Drama\n')
    log = opened(spark, tmp_path, "kind=movielens_25m")
    assert values(log.events, "user_id", "item_id", "rating", "time_ms") == [("1", "296", "4.5", 1147880044000)]
    assert values(log.items, "title", "genre") == [("American President, The (1995)", "Comedy|Drama")]


@pytest.mark.parametrize("layout", ["json", "parquet", "csv"])
def test_columns_in_every_format(spark, tmp_path: Path, layout: str) -> None:
    table = pa.table(
        {
            "u": ["a", None], "i": pa.array([7, 8], pa.int32()), "r": pa.array([True, False]),
            "t": pa.array([1_600_000_000, 1_600_000_001], pa.timestamp("s", tz="UTC")),
        }
    )  # fmt: skip
    (tmp_path / "log").mkdir()
    if layout == "parquet":
        pq.write_table(table, tmp_path / "log" / "x.parquet")
    elif layout == "json":
        rows = [{"u": "a", "i": 7, "r": True, "t": "2020-09-13T12:26:40Z"}, {"i": 8, "r": False, "t": 1600000001}]
        (tmp_path / "log" / "x.json").write_text("\n".join([*map(json.dumps, rows), "{broken"]) + "\n")
    else:
        (tmp_path / "log" / "x.csv").write_text("u,i,r,t\na,7,True,2020-09-13 12:26:40\n,8,FALSE,1600000001.0\n")
    log = opened(
        spark, tmp_path, f"format={layout}", "events=log", "items=", "user=u", "item=i", "rating=r", "time=t"
    )  # fmt: skip
    ratings = (1, 0) if layout == "parquet" else ("1", "0")  # what is stored as a number stays one
    assert values(log.events, "user_id", "item_id", "rating", "time_ms")[:2] == [
        ("a", "7", ratings[0], 1_600_000_000_000), (None, "8", ratings[1], 1_600_000_001_000),
    ]  # fmt: skip
    if layout == "json":
        assert values(log.events, CORRUPT)[2] == ("{broken",)


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_nanoseconds_in_parquet(spark, tmp_path: Path, zone: str | None) -> None:
    moments = [1_600_000_000_123_456_789, 1_600_000_000_123_999_999, -1, None]
    table = pa.table(
        {"u": list("abcd"), "i": list("wxyz"), "r": [1, 2, 3, 4], "t": pa.array(moments, pa.timestamp("ns", zone))}
    )
    pq.write_table(table.append_column("unused", table["t"]), tmp_path / "log.parquet")
    log = opened(
        spark, tmp_path, "format=parquet", "events=log.parquet", "items=", "user=u", "item=i", "rating=r", "time=t"
    )  # fmt: skip
    assert values(log.events, "time_ms") == [(1_600_000_000_123,), (1_600_000_000_123,), (-1,), (None,)]


def test_csv_files_with_other_columns_are_refused(run, csv, tmp_path: Path) -> None:
    (tmp_path / "raw" / "events").mkdir(parents=True)
    (tmp_path / "raw" / "events" / "a.csv").write_text("user_id,item_id,rating,timestamp\nu,i,1,2\n")
    (tmp_path / "raw" / "events" / "b.csv").write_text("item_id,user_id,rating,timestamp\nu,i,1,2\n")
    with pytest.raises(Exception, match="CSV header does not conform to the schema"):
        run("build_events", tmp_path / "out", "source.format=csv", "source.items=", raw=tmp_path / "raw")


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    source = SourceConfig(kind="movielens_25m")
    for name in ("ratings.csv", "movies.csv", "unrelated.csv"):
        (tmp_path / name).write_text("a\n")
    before = fingerprint(source, Folder(str(tmp_path)))
    (tmp_path / "unrelated.csv").write_text("changed\n")
    assert fingerprint(source, Folder(str(tmp_path))) == before
    (tmp_path / "ratings.csv").write_text("changed\n")
    assert fingerprint(source, Folder(str(tmp_path))) != before


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent: the test needs that data set")
    return DATA / name


def test_real_movielens_100k(run, tmp_path: Path) -> None:
    made = run("build_events", tmp_path, "source.kind=movielens_100k", "k_core=0", raw=real("ml-100k"))
    counts = made.facts["counts"]
    assert (counts["read"], counts["events"], made.facts["users"], made.facts["items"]) == (100_000, 100_000, 943, 1682)
    assert made.facts["quarantine"] == {} and made.facts["rating_levels"] == [1, 2, 3, 4, 5]
    samples = [counts[split] for split in ("train", "validation", "test")]
    assert abs(samples[0] / sum(samples) - 0.8) < 0.01 and abs(samples[2] / sum(samples) - 0.1) < 0.01


def test_real_goodreads(run, tmp_path: Path) -> None:
    settings = ("source.kind=goodreads", "rating_levels=[1,2,3,4,5]", "split=per_user", "k_core=0")
    made = run("build_events", tmp_path, *settings, raw=real("goodreads"))
    reasons, counts = made.facts["quarantine"], made.facts["counts"]
    assert reasons["user_without_ratings"] > 1000
    assert counts["clean"] == counts["read"] - sum(reasons.values())
    assert counts["clean"] == counts["events"] == 231_779
