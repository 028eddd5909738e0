import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from fsspec.implementations.arrow import ArrowFSWrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from reclora_dist.contract.manifest import (
    MANIFEST,
    ContractError,
    FileEntry,
    Format,
    Manifest,
    add_file,
    check_output,
    commit,
    digest,
    file_entry,
    is_current,
    read_manifest,
    verified,
)
from reclora_dist.contract.storage import Folder, StorageFullError

THINGS = Format("test.things", 2)


def published(folder, content=b"one", parents=None, config="c0", facts=None):
    entry = add_file(folder, f"part-{digest(content.hex())[:12]}", content, [2, 1])
    return commit(folder, Manifest(THINGS.name, THINGS.version, config, parents or {}, (entry,), facts or {}))


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "things"))


def rewrite(folder, **changes):
    """Change fields of a manifest on disk as an editor would."""
    raw = json.loads(folder.read(MANIFEST))
    folder.write(MANIFEST, json.dumps({**raw, **changes}).encode())


def test_a_manifest_reads_back_as_written(folder):
    written = published(folder, parents={"events": "abc"}, facts={"levels": [1, 2.5], "users": {"gender": ["F", "M"]}})
    read = read_manifest(folder, THINGS)
    assert read.content_digest == written.content_digest
    assert dataclasses.replace(read, facts=dict(read.facts)) == written
    assert read.rows() == 3
    assert verified(folder, read.files[0]) == b"one"


def test_a_missing_manifest_is_refused(folder):
    with pytest.raises(ContractError, match=r"things' has no manifest.json: the stage that writes 'test.things'"):
        read_manifest(folder, THINGS)


@pytest.mark.parametrize("expected", [Format("test.things", 3), Format("test.others", 2)])
def test_another_version_or_format_is_refused(folder, expected):
    published(folder)
    with pytest.raises(ContractError, match=f"version 2, but this release reads '{expected.name}'.*Rebuild"):
        read_manifest(folder, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not JSON"), (b"[1]", "is not a JSON object"), (b'{"format": "test.things', "is not JSON")],
)
def test_a_garbled_manifest_is_refused(folder, content, message):
    folder.write(MANIFEST, content)
    with pytest.raises(ContractError, match=message):
        read_manifest(folder, THINGS)


@pytest.mark.parametrize("field", ["files", "facts", "parents", "config_digest"])
def test_a_lost_field_is_named(folder, field):
    published(folder)
    raw = json.loads(folder.read(MANIFEST))
    del raw[field]
    folder.write(MANIFEST, json.dumps(raw).encode())
    with pytest.raises(ContractError, match=f"manifest.json lacks or garbles '{field}'"):
        read_manifest(folder, THINGS)


@pytest.mark.parametrize("changes", [{"facts": {"min_history": 9}}, {"files": []}, {"content_digest": "0" * 64}])
def test_an_edited_manifest_is_refused(folder, changes):
    published(folder, facts={"min_history": 5})
    rewrite(folder, **changes)
    with pytest.raises(ContractError, match=r"does not match its entries .* edited or damaged"):
        read_manifest(folder, THINGS)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_any_flipped_byte_is_seen(content, data):
    folder = Folder(f"memory://flip-{digest(content.hex())[:16]}")
    entry = add_file(folder, "part", content)
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[place] ^= data.draw(st.integers(1, 255))
    assert verified(folder, entry) == content
    folder.write("part", bytes(damaged))
    with pytest.raises(ContractError, match=r"'part' has SHA-256 .* its bytes changed"):
        verified(folder, entry)


@pytest.mark.parametrize("content", [b"on", b"one!", b""])
def test_a_cut_or_longer_file_is_refused(folder, content):
    entry = add_file(folder, "part", b"one")
    folder.write("part", content)
    with pytest.raises(ContractError, match="changed after it was written"):
        verified(folder, entry)


def test_a_missing_file_is_named(folder):
    manifest = published(folder)
    folder.delete(manifest.files[0].path)
    with pytest.raises(ContractError, match=f"'{manifest.files[0].path}' is named in manifest.json but missing"):
        verified(folder, manifest.files[0])


def test_commit_removes_what_it_does_not_name(folder):
    old = published(folder, b"one")
    folder.write("left/by/a/dead/run.partial", b"half")
    new = published(folder, b"two")
    assert old.files[0].path != new.files[0].path
    assert folder.files() == sorted([MANIFEST, new.files[0].path])


def test_commit_leaves_what_is_not_ours(folder):
    foreign = ["notes.txt", "events/2026/raw.parquet", "part-00000-2fd5e1b0-c000.snappy.parquet"]
    for name in foreign:
        folder.write(name, b"the only copy")
    published(folder, b"one")
    new = published(folder, b"two")
    assert folder.files() == sorted([MANIFEST, new.files[0].path, *foreign])


@pytest.mark.parametrize("place", ["", "/events", "/events/new"])
def test_an_output_beside_its_inputs_only(tmp_path, place):
    raw, shop = Folder(str(tmp_path / "shop" / "events")), tmp_path / "shop"
    raw.write("a.csv", b"a")
    (tmp_path / "link").symlink_to(shop)
    for root in (shop, tmp_path / "link"):
        with pytest.raises(ContractError, match=r"'.*' \(raw\) lie in one another: choose an output folder beside"):
            check_output(Folder(f"{root}{place}"), THINGS, {"raw": raw})
    check_output(Folder(f"{shop}/events2"), THINGS, {"raw": raw})


def test_an_output_over_foreign_files_is_refused(folder):
    folder.write("left/part-00000-0123456789ab.parquet", b"by a killed run")
    folder.write("manifest.json.0123abcd.partial", b"by a killed run")
    folder.write("report.html", b"fixed")
    check_output(folder, THINGS, {}, {"report.html"})
    folder.write("notes.txt", b"foreign")
    with pytest.raises(ContractError, match=r"holds 'notes.txt', which no writer of .* left there: choose an empty"):
        check_output(folder, THINGS, {}, {"report.html"})
    folder.write(MANIFEST, b'{"format": "something else"}')
    with pytest.raises(ContractError, match=r"holds 'manifest\.json'"):
        check_output(folder, THINGS, {}, {"report.html", "notes.txt"})
    folder.write(MANIFEST, b"{damaged")
    check_output(folder, THINGS, {}, {"report.html", "notes.txt"})
    published(folder)
    check_output(folder, THINGS, {})


def test_until_the_commit_the_old_dataset_is_whole(folder):
    old = published(folder, b"one")
    add_file(folder, "part-new", b"two")
    read = read_manifest(folder, THINGS)
    assert read.content_digest == old.content_digest
    assert verified(folder, read.files[0]) == b"one"


def test_a_failed_write_leaves_the_old_manifest(folder, monkeypatch):
    old = published(folder, b"one")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    before = folder.files()
    with pytest.raises(
        StorageFullError, match=r"no space left on device writing .*manifest.json'.*choose another folder"
    ):
        commit(folder, dataclasses.replace(old, facts={"new": 1}))
    assert folder.files() == before
    assert read_manifest(folder, THINGS).content_digest == old.content_digest


WRITER = """
import itertools, sys
from reclora_dist.contract.manifest import Manifest, add_digested, commit
from reclora_dist.contract.storage import Folder
folder = Folder(sys.argv[1])
for turn in itertools.count():
    content = bytes([turn % 256]) * 200_000
    entry = add_digested(folder, f"part-{turn % 7}.bin", content)
    commit(folder, Manifest("test.things", 2, f"c{turn}", {}, (entry,), {"turn": turn}))
    print(turn, flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.003, 0.011])
def test_a_kill_at_any_moment_leaves_a_whole_dataset(folder, wait):
    """SIGKILL a process that publishes in a loop: whatever is there reads back, and the next commit tidies up."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, folder.uri], stdout=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = read_manifest(folder, THINGS)
    assert found.facts["turn"] >= 2
    assert verified(folder, found.files[0]) == bytes([found.facts["turn"] % 256]) * 200_000
    published(folder, b"next")
    assert len(folder.files()) == 2


def test_current_means_same_config_and_same_parents(folder):
    published(folder, parents={"events": "e1"}, config="c1")
    assert is_current(folder, THINGS, "c1", {"events": "e1"})
    assert not is_current(folder, THINGS, "c2", {"events": "e1"})
    assert not is_current(folder, THINGS, "c1", {"events": "e2"})
    assert not is_current(folder, THINGS, "c1", {})
    assert not is_current(folder, Format("test.things", 3), "c1", {"events": "e1"})
    assert not is_current(folder.child("elsewhere"), THINGS, "c1", {"events": "e1"})


def test_the_content_digest_tells_contents_not_their_making():
    one, two = file_entry("a", b"1", [1]), file_entry("b", b"2", [1])
    made = Manifest("f", 1, "config", {"events": "x"}, (one, two), {"k": 1})
    assert made.content_digest == Manifest("f", 1, "other", {}, (two, one), {"k": 1}).content_digest
    others = [
        dataclasses.replace(made, facts={"k": 2}),
        dataclasses.replace(made, files=(one,)),
        dataclasses.replace(made, version=2),
        dataclasses.replace(made, files=(one, file_entry("b", b"3", [1]))),
    ]
    assert len({m.content_digest for m in [made, *others]}) == 5


def test_select_and_rows_by_prefix():
    files = tuple(FileEntry(path, groups, 0, "") for path, groups in (("b/1", (3,)), ("a/2", (1, 1)), ("a/1", (5,))))
    manifest = Manifest("f", 1, "c", {}, files)
    assert [entry.path for entry in manifest.select("a/")] == ["a/1", "a/2"]
    assert manifest.rows("a/") == 7
    assert manifest.rows() == 10
    assert manifest.rows("none/") == 0


def test_digest_is_that_of_the_value_whatever_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest(THINGS) == digest({"name": "test.things", "version": 2})
    with pytest.raises(TypeError, match="cannot take a digest of set"):
        digest({"a": {1, 2}})


def test_the_contract_holds_on_another_file_system():
    folder = Folder("memory://things")
    old = published(folder, b"one")
    new = published(folder, b"two")
    assert folder.files() == sorted([MANIFEST, new.files[0].path])
    assert old.content_digest != read_manifest(folder, THINGS).content_digest
    with pytest.raises(ValueError, match="is not a local folder"):
        folder.local()


class Interrupted(ArrowFSWrapper):
    """HDFS as a local folder, where a file is written in place and ``error`` comes half-way."""

    protocol, cachable, error = "hdfs", False, None

    def __init__(self, **_):
        super().__init__(fs=LocalFileSystem())

    def pipe_file(self, path, value, **more):
        super().pipe_file(path, value[: len(value) // 2] if self.error else value, **more)
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [OSError("datanode lost"), SystemExit("killed")])
def test_a_write_that_is_interrupted_on_hdfs_leaves_the_old_file(folder, monkeypatch, error):
    monkeypatch.setattr(Folder, "fs", Interrupted())
    old = published(folder, b"one")
    new = published(folder, b"two")
    assert folder.files() == sorted([MANIFEST, new.files[0].path])
    monkeypatch.setattr(Interrupted, "error", error)
    with pytest.raises(type(error)):
        folder.write(MANIFEST, b"{}" * 99)
    assert old.content_digest != read_manifest(folder, THINGS).content_digest == new.content_digest
    assert len(folder.files()) == 2 + isinstance(error, SystemExit)


def test_an_absolute_folder_is_the_same_from_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published(Folder("runs/things").absolute())
    relative, absolute = Folder("runs/things"), Folder("runs/things").absolute()
    monkeypatch.chdir("/")
    assert absolute.exists(MANIFEST) and not relative.exists(MANIFEST)
    assert Folder("s3://bucket/things").absolute() == Folder("s3://bucket/things")


@pytest.mark.parametrize(
    ("here", "there", "spelt"),
    [
        ("/runs/02/events", "/runs/02/vectors", "../vectors"),
        ("/runs/02/events", "/runs/01/events", "../../01/events"),
        ("/runs/02", "/runs/02/events", "./events"),
        ("s3://bucket/runs/02/events", "s3://bucket/runs/01/events", "../../01/events"),
        ("/runs/02/events", "s3://bucket/runs/01/events", "s3://bucket/runs/01/events"),
        ("memory://runs/events", "s3://runs/vectors", "s3://runs/vectors"),
    ],
)
def test_a_folder_on_the_same_file_system_is_named_by_a_relative_path_that_leads_there(here, there, spelt):
    assert Folder(here).relative(Folder(there)) == spelt
    assert Folder(here).resolve(spelt) == Folder(there)
