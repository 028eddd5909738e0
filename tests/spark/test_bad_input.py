"""What cannot be used gets one clear message, and nothing is written."""

import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reclora_dist.contract.manifest import ContractError, add_file, commit, read_manifest
from reclora_dist.contract.schema import VECTORS
from reclora_dist.contract.storage import Folder
from spark_jobs import retrieve_history, session, synthesise
from spark_jobs.arguments import properties, settings

EVENTS = [(f"u{u}", f"i{i}", 1 + (u + i) % 5, 10 * i + u) for u in range(5) for i in range(8)]


@pytest.fixture
def raw(csv, tmp_path: Path) -> Path:
    return csv.write(tmp_path / "raw", EVENTS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["source.events=clicks.csv"], "has no 'clicks.csv', which a columns log consists of; it holds: events.csv"),
        (["source.kind=movielens_1m"], r"has no 'ratings.dat', which a movielens_1m log"),
        (
            ["source.rating=stars"],
            "no column 'stars'; there are: user_id, item_id, rating, timestamp. Set source.rating",
        ),
        (["source.user_fields=[age]"], r"source.user_fields = \['age'\] needs a table of users: set source.users"),
        (["source.items=events.csv"], "'events.csv' in .* has no column 'title'"),
        (["fractions=[0.5,0.1,0.1]"], r"fractions = \[0.5, 0.1, 0.1\]: .* must add up to 1"),
        (["item_text={title} by {author}"], r"names 'author'; items have: title"),
        (["item_text={title"], "is no template"),
        (["k_core=9"], "no event is left after cleaning and the k-core"),
        (["min_history=20"], "no event has min_history = 20 earlier ones"),
        (["min_history=7", "split=per_user"], "the validation split has no sample"),
        (["kcore=3"], "no such key; did you mean 'k_core'"),
        (["k_core=many"], "config k_core = 'many'"),
    ],
)
def test_events_that_cannot_be_built(run, csv, raw: Path, tmp_path: Path, changes: list[str], words: str) -> None:
    base = ["k_core=0", "min_history=2"]
    with pytest.raises(ValueError, match=words):
        run("build_events", tmp_path / "out", *csv.settings, *base, *changes, raw=raw)
    assert Folder(str(tmp_path / "out")).files() == []


def test_no_path_at_all(run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"where is the raw log\? Give --raw"):
        run("build_events", tmp_path / "out")


def test_a_column_of_the_wrong_type_is_named(run, tmp_path: Path) -> None:
    events = pa.table({"user_id": ["a"], "item_id": [[1, 2]], "rating": [1.0], "timestamp": [1]})
    pq.write_table(events, tmp_path / "events.parquet")
    with pytest.raises(
        ValueError, match=r"column 'item_id' of .* has type array<bigint>, which cannot serve as source.item"
    ):
        run("build_events", tmp_path / "out", "source.events=events.parquet", "source.items=", raw=tmp_path)


def test_ratings_that_are_no_scale(run, csv, tmp_path: Path) -> None:
    raw = csv.write(tmp_path / "raw", [("u", f"i{n}", n / 7, n) for n in range(70)])
    with pytest.raises(ValueError, match="more than 64 distinct ratings"):
        run("build_events", tmp_path / "out", *csv.settings, "rating_levels=[]", "k_core=0", raw=raw)


def test_an_empty_log(run, csv, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the log has no event"):
        run("build_events", tmp_path / "out", *csv.settings, raw=csv.write(tmp_path / "raw", []))


def copied(finished, tmp_path: Path) -> Path:
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


only_global = pytest.mark.parametrize("finished", ["global_time"], indirect=True)


@only_global
def test_datasets_that_do_not_belong_together(run, build_all, write_vectors, csv, finished, tmp_path: Path) -> None:
    here = copied(finished, tmp_path)
    other = csv.write(tmp_path / "other", EVENTS)
    run("build_events", here / "events", *csv.settings, "k_core=0", "min_history=2", raw=other)
    with pytest.raises(ContractError, match=r"was made from events .*, not from these .*Run `embed` on these events"):
        run("retrieve_history", tmp_path / "h", events=here / "events", vectors=here / "vectors")
    with pytest.raises(ContractError, match="Run retrieve_history on these events"):
        run("write_shards", tmp_path / "s", events=here / "events", histories=here / "histories")


@only_global
def test_a_flipped_byte_is_found_on_the_executor(run, finished, tmp_path: Path) -> None:
    here = copied(finished, tmp_path)
    for name, job, inputs in (
        ("events", "retrieve_history", ("events", "vectors")),
        ("vectors", "retrieve_history", ("events", "vectors")),
        ("histories", "write_shards", ("events", "histories")),
    ):
        file = next(path for path in sorted((here / name).rglob("*")) if path.suffix in (".arrow", ".parquet", ".npy"))
        whole = file.read_bytes()
        file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
        with pytest.raises(Exception) as caught:  # Spark wraps what executors raise
            run(job, tmp_path / "out", **{key: here / key for key in inputs})
        told = str(caught.value) if isinstance(caught.value, ContractError) else session.cause(caught.value)
        assert file.name in told and "its bytes changed after it was written" in told
        file.write_bytes(whole)


@only_global
def test_missing_and_foreign_manifests(run, finished, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"has no manifest.json: the stage that writes 'reclora.events'"):
        run("retrieve_history", tmp_path / "out", "strategy=recent", events=tmp_path / "nothing")
    with pytest.raises(ContractError, match=r"holds format 'reclora.histories' version 3"):
        run("retrieve_history", tmp_path / "out", "strategy=recent", events=finished.folder / "histories")
    with pytest.raises(ValueError, match="give --vectors, or set strategy=recent"):
        run("retrieve_history", tmp_path / "out", events=finished.folder / "events")


@only_global
def test_vectors_of_another_number_of_items(run, finished, tmp_path: Path) -> None:
    here = copied(finished, tmp_path)
    folder = Folder(str(here / "vectors"))
    old = read_manifest(folder, VECTORS)
    content = io.BytesIO()
    np.save(content, np.zeros((23, 8), np.float32))
    entry = add_file(folder, "vectors-000000000000.npy", content.getvalue())
    commit(folder, dataclasses.replace(old, files=(entry,)))
    with pytest.raises(ContractError, match=r"has vectors of shape \[23, 8\], but the log has 25 items"):
        run("retrieve_history", tmp_path / "out", events=here / "events", vectors=here / "vectors")


@only_global
@pytest.mark.parametrize(
    ("job", "change", "words"),
    [
        ("retrieve_history", "long=0", "long = 0, short = 10"),
        ("retrieve_history", "strategy=best", "config strategy = 'best'"),
        ("write_shards", "rows_per_file=0", "rows_per_file = 0"),
        ("write_shards", "text_test=-1", "not negative"),
    ],
)
def test_settings_out_of_range(run, finished, tmp_path: Path, job: str, change: str, words: str) -> None:
    name = {"retrieve_history": "vectors", "write_shards": "histories"}[job]
    inputs = {key: finished.folder / key for key in ("events", name)}
    with pytest.raises(ValueError, match=words):
        run(job, tmp_path / "out", change, **inputs)


def test_texts_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config file 'nowhere\.json' cannot be read"):
        settings("nowhere.json", [])
    with pytest.raises(ValueError, match="--config is not JSON"):
        settings("{k_core: }", [])
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not a JSON object"):
        settings(str(tmp_path / "c.json"), [])
    with pytest.raises(ValueError, match=r"write it as dotted\.key=value"):
        settings("{}", ["k_core"])
    with pytest.raises(ValueError, match="write it as property=value"):
        properties(["spark.x"])


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesise.cli(["--out", str(tmp_path), "--set", "user=3"]) == 2
    told = capsys.readouterr().err
    assert told == "synthesise: error: config user = 3: no such key; did you mean 'users'?\n"
    assert retrieve_history.cli(["--out", str(tmp_path), "--events", str(tmp_path)]) == 2
    assert "has no manifest.json" in capsys.readouterr().err
