"""Logs that cannot be read, or from which nothing can be learnt: one clear message, and the old output stays whole."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from reclora_dist.contract.manifest import add_file, commit, read_manifest, verified
from reclora_dist.contract.schema import EVENTS, HISTORIES, VECTORS
from reclora_dist.contract.storage import Folder, StorageFullError
from spark_jobs import build_events, session

ROOT = Path(__file__).parents[2]
LOG = [(f"u{u}", f"i{i}", 1 + (u + i) % 5, 10 * i + u) for u in range(6) for i in range(8)]
LONG = [(f"u{u}", f"i{i}", 1 + (u + i) % 5, 10 * i + u) for u in range(90) for i in range(30)]
NAMES = ("user_id", "item_id", "rating", "timestamp")
SETTINGS = ("source.items=", "k_core=0", "min_history=2")


def table(log=LOG) -> pa.Table:
    return pa.table(dict(zip(NAMES, map(list, zip(*log, strict=True)), strict=True)))


def as_csv(log=LOG) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in [NAMES, *log]).encode()


def as_json() -> bytes:
    return "".join(json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in LOG).encode()


@pytest.fixture(scope="module")
def old(run, csv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    run("build_events", folder / "out", *csv.settings, *SETTINGS, raw=csv.write(folder / "raw", LOG))
    return folder / "out"


def whole(folder: Path) -> dict[str, bytes]:
    """The bytes of a dataset's files, each proved by the manifest."""
    here = Folder(str(folder))
    return {entry.path: verified(here, entry) for entry in read_manifest(here, EVENTS).files}


def refused(run, old: Path, tmp_path: Path, words: str, *settings: str) -> None:
    """Building the log in ``raw`` over a finished dataset is refused with ``words``; the dataset is as it was."""
    shutil.copytree(old, tmp_path / "out")
    before = whole(tmp_path / "out"), (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match=words) as caught:
        run("build_events", tmp_path / "out", *SETTINGS, *settings, raw=tmp_path / "raw")
    assert "\n" not in str(caught.value), "one message, not a stack"
    assert (whole(tmp_path / "out"), (tmp_path / "out" / "manifest.json").read_bytes()) == before


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """The folder of a log's event files; the first, a.parquet, is good."""
    folder = tmp_path / "raw" / "events"
    folder.mkdir(parents=True)
    pq.write_table(table(), folder / "a.parquet")
    return folder


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("raw/events", "lie in one another: choose an output folder beside the input"),
        ("raw", "lie in one another"),
        ("raw/events/new", "lie in one another"),
        ("shop", "holds 'notes.txt', which no writer of 'reclora.events' left there"),
    ],
)
def test_an_output_folder_with_files_of_others(
    events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, words: str
) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "notes.txt").write_text("the only copy")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    assert build_events.cli([*settings, "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / out)]) == 2
    assert words in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["0.parquet", "b.parquet"])
def test_a_file_that_is_not_parquet(run, old: Path, events: Path, tmp_path: Path, name: str) -> None:
    (events / name).write_bytes(as_csv())
    refused(run, old, tmp_path, rf"'events/{name}' in .* cannot be read as Parquet \(.*magic bytes.*\)\. Take it out")


def test_a_parquet_file_cut_short_or_damaged(run, old: Path, events: Path, tmp_path: Path) -> None:
    content = io.BytesIO()
    pq.write_table(table(), content, compression="none", use_dictionary=False)
    (events / "b.parquet").write_bytes(content.getvalue()[:-100])
    refused(run, old, tmp_path, r"'events/b.parquet' in .* cannot be read as Parquet")
    shutil.rmtree(tmp_path / "out")
    (events / "b.parquet").write_bytes(content.getvalue()[:40] + bytes([255]) * 400 + content.getvalue()[440:])
    refused(run, old, tmp_path, r"b\.parquet' cannot be read \(.+\): it is damaged, cut short, or unlike the other")


def test_a_folder_without_files(run, old: Path, events: Path, tmp_path: Path) -> None:
    (events / "a.parquet").rename(events / "_hidden.parquet")
    refused(run, old, tmp_path, "'events' in .* holds no file. Point source.path at the right folder")


def other(change: str) -> pa.Table:
    good = table()
    return {
        "renamed": good.rename_columns(["user_id", "item_id", "stars", "timestamp"]),
        "missing": good.drop_columns(["rating"]),
        "another type": good.set_column(2, "rating", good["rating"].cast(pa.string())),
    }[change]


@pytest.mark.parametrize(
    ("change", "kind"), [("renamed", "missing"), ("missing", "missing"), ("another type", "string")]
)
def test_parquet_files_with_other_columns(run, old: Path, events: Path, tmp_path: Path, change: str, kind: str) -> None:
    pq.write_table(other(change), events / "b.parquet")
    words = rf"column 'rating' differs between the files of 'events' in .*: int64 in 'events/a.parquet', {kind} in "
    refused(run, old, tmp_path, words + "'events/b.parquet'. Write all files with the same columns")


def test_parquet_files_of_other_precision(run, old: Path, events: Path, tmp_path: Path) -> None:
    good = table()
    for name, unit in (("a", "us"), ("b", "ns")):
        pq.write_table(
            good.set_column(3, "timestamp", good["timestamp"].cast(pa.timestamp(unit))), events / f"{name}.parquet"
        )
    words = r"column 'timestamp' differs between the files of 'events' in .*: timestamp in 'events/a.parquet', "
    refused(run, old, tmp_path, words + r"timestamp\[ns\] in 'events/b.parquet'. Write all files with the same columns")


def test_old_timestamps_are_read_beside_new_ones(run, events: Path, tmp_path: Path) -> None:
    good = table()
    moments = good.set_column(3, "timestamp", pc.multiply(good["timestamp"], 1_000_000).cast(pa.timestamp("us", "UTC")))
    pq.write_table(moments[:24], events / "a.parquet")
    pq.write_table(moments[24:], events / "b.parquet", use_deprecated_int96_timestamps=True)
    made = run("build_events", tmp_path / "out", *SETTINGS, raw=tmp_path / "raw")
    assert made.facts["counts"]["clean"] == len(LOG)


def test_a_profile_column_that_some_files_lack(run, old: Path, events: Path, tmp_path: Path) -> None:
    items = pa.table({"item_id": [f"i{i}" for i in range(8)], "title": ["t"] * 8, "kind": ["k"] * 8})
    (tmp_path / "raw" / "items").mkdir()
    pq.write_table(items[:4], tmp_path / "raw" / "items" / "a.parquet")
    pq.write_table(items[4:].drop_columns(["kind"]), tmp_path / "raw" / "items" / "b.parquet")
    words = r"column 'kind' differs between the files of 'items' in .*: string in 'items/a.parquet', missing in"
    refused(run, old, tmp_path, words, "source.items=items", "source.item_fields=[kind]")


def test_files_may_differ_in_what_is_not_read_and_in_how_it_is_stored(run, events: Path, tmp_path: Path) -> None:
    more = table([("u9", f"i{i}", 1 + i % 5, 500 + i) for i in range(8)])
    more = more.set_column(0, "user_id", more["user_id"].cast(pa.large_string()).dictionary_encode())
    pq.write_table(more.append_column("unused", pa.array(range(8))), events / "b.parquet")
    (events / "_SUCCESS").touch()
    made = run("build_events", tmp_path / "out", *SETTINGS, raw=tmp_path / "raw")
    assert made.facts["counts"]["clean"] == len(LOG) + 8 and made.facts["quarantine"] == {}


@pytest.mark.parametrize(("kind", "content"), [("csv", as_csv), ("json", as_json)])
def test_a_gzip_cut_short(run, old: Path, tmp_path: Path, kind: str, content) -> None:
    (tmp_path / "raw" / "events").mkdir(parents=True)
    file = tmp_path / "raw" / "events" / f"a.{kind}.gz"
    packed = gzip.compress(content())
    file.write_bytes(packed)
    assert run("build_events", tmp_path / "good", *SETTINGS, f"source.format={kind}", raw=tmp_path / "raw")
    file.write_bytes(packed[: len(packed) * 2 // 3])
    words = rf"a\.{kind}\.gz' cannot be read \(Unexpected end of input stream\): it is damaged, cut short"
    refused(run, old, tmp_path, words, f"source.format={kind}")


def test_csv_files_of_other_widths(run, old: Path, tmp_path: Path) -> None:
    (tmp_path / "raw" / "events").mkdir(parents=True)
    (tmp_path / "raw" / "events" / "a.csv").write_bytes(as_csv())
    (tmp_path / "raw" / "events" / "b.csv").write_text("user_id,item_id,rating\nu1,i1,3\n")
    words = (
        r"b\.csv' cannot be read \(Number of column in CSV header is not equal .* Header length: 3, schema size: 4\)"
    )
    refused(run, old, tmp_path, words, "source.format=csv")


@pytest.mark.parametrize(("rating", "label"), [(3, 0), (5, 1)])
def test_one_label_only(run, csv, old: Path, tmp_path: Path, rating: int, label: int) -> None:
    csv.write(tmp_path / "raw", [(user, item, rating, time) for user, item, _, time in LOG])
    words = (
        rf"samples have the label {label}, so nothing can be learnt: like_at_least = 4, and the ratings are {rating}\. "
    )
    refused(run, old, tmp_path, words + "Set like_at_least so that it parts them", *csv.settings)


def test_very_many_copies_of_one_event(run, rows, events: Path, tmp_path: Path, exhaustive: bool) -> None:
    """A million in CI, where plans are compiled."""
    copies = 1_000_000 if exhaustive else 100_000
    one = table([("u0", "i0", 1, 0)])
    pq.write_table(one.take([0] * copies), events / "b.parquet")
    made = run("build_events", tmp_path / "out", *SETTINGS, "max_quarantined=1", raw=tmp_path / "raw")
    assert made.facts["quarantine"] == {"duplicate_event": copies} and made.facts["counts"]["clean"] == len(LOG)
    (row,) = rows(tmp_path / "out", made, "quarantine/")
    assert row["rows"] == copies and json.loads(row["row"])["user_id"] == "u0"


def test_the_first_events_of_a_user_are_history_and_no_samples(run, rows, csv, tmp_path: Path) -> None:
    raw = csv.write(tmp_path / "raw", [*LOG, ("once", "i0", 5, 35)])
    made = run("build_events", tmp_path / "events", *csv.settings, "k_core=0", "min_history=1", raw=raw)
    user = {row["user_id"]: row["user"] for row in rows(tmp_path / "events", made, "users/")}["once"]
    assert [e["user"] for e in rows(tmp_path / "events", made, "events/")].count(user) == 1
    assert sum(made.facts["counts"][split] for split in ("train", "validation", "test")) == len(LOG) - 6
    found = run("retrieve_history", tmp_path / "histories", "strategy=recent", events=tmp_path / "events")
    samples = rows(tmp_path / "histories", read_manifest(Folder(str(tmp_path / "histories")), HISTORIES), "histories/")
    assert len(samples) == len(LOG) - 6 == sum(found.facts["counts"].values())
    assert user not in {sample["user"] for sample in samples} and min(s["long_length"] for s in samples) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda vectors: vectors[:-1], r"has vectors of shape \[8, 4\], but the log has 8 items, which takes 9 rows"),
        (
            lambda vectors: np.where(np.arange(9)[:, None] == 5, np.nan, vectors),
            r"item 5 is not on the grid \(finite",
        ),
    ],
)
def test_item_vectors_that_are_missing(run, write_vectors, old: Path, tmp_path: Path, change, words: str) -> None:
    folder = Folder(str(tmp_path / "vectors"))
    write_vectors(old, tmp_path / "vectors", 4)
    made = read_manifest(folder, VECTORS)
    content = io.BytesIO()
    np.save(content, change(np.load(tmp_path / "vectors" / made.files[0].path)).astype(np.float32))
    entry = add_file(folder, "vectors-000000000000.npy", content.getvalue())
    commit(folder, type(made)(made.format, made.version, made.config_digest, made.parents, (entry,), made.facts))
    with pytest.raises(ValueError, match=words):
        run("retrieve_history", tmp_path / "out", events=old, vectors=tmp_path / "vectors")
    assert Folder(str(tmp_path / "out")).files() == []


@contextmanager
def small_disk(folder: Path, size: str, inodes: int = 0) -> Iterator[Path]:
    """A file system of its own, of ``size``, at ``folder``; skips where it cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and mount(8)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_the_output(run, csv, old: Path, tmp_path: Path) -> None:
    raw = csv.write(tmp_path / "raw", LONG)
    with small_disk(tmp_path / "disk", "24k") as disk:
        shutil.copytree(old, disk / "out")
        before = whole(disk / "out")
        with pytest.raises(
            ValueError, match=r"^no space left on device writing '.*': free space or choose another folder$"
        ):
            run("build_events", disk / "out", *csv.settings, *SETTINGS, raw=raw)
        assert whole(disk / "out") == before
        assert not any(file.endswith(".partial") for file in Folder(str(disk / "out")).files())


def test_a_full_disk_at_the_commit(old: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        shutil.copytree(old, disk / "out")
        here = Folder(str(disk / "out"))
        before = whole(disk / "out")
        with pytest.raises(StorageFullError, match=r"no space left on device writing .*filler"):
            here.write("filler", bytes(1 << 20))
        with open(disk / "filler", "wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                os.write(file.fileno(), bytes(4096))
        with pytest.raises(StorageFullError, match=r"writing .*manifest.json': free space"):
            commit(here, read_manifest(here, EVENTS))
        assert whole(disk / "out") == before


def test_a_full_disk_under_the_scratch_files(csv, old: Path, tmp_path: Path) -> None:
    csv.write(tmp_path / "raw", [(f"u{u}", f"i{i}", 1 + (u + i) % 5, 10 * i + u) for u in range(90) for i in range(30)])
    shutil.copytree(old, tmp_path / "out")
    before = whole(tmp_path / "out")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYSPARK_")}
    arguments = ["--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out"), "--master", "local[2]"]
    arguments += [word for setting in (*csv.settings, *SETTINGS) for word in ("--set", setting)]
    with small_disk(tmp_path / "disk", "64k") as disk:
        arguments += ["--conf", f"spark.local.dir={disk}"]
        command = [sys.executable, "-m", "spark_jobs.build_events", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "jdk.incubator.vector" not in line]
    assert len(lines) == 1 and "no space left on device for Spark's scratch files" in lines[0], done.stderr
    assert whole(tmp_path / "out") == before


def test_a_scratch_folder_without_room_for_a_file(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "64k", inodes=1) as disk,
        pytest.raises(
            ValueError, match=rf"scratch files to '{disk}' \(No space left on device\): free space there, or"
        ),
    ):
        session.start("full", "local[2]", "1g", 2, {"spark.local.dir": str(disk)})
