"""Users on a delete list leave no trace, hashed ones no readable id, and the key appears nowhere."""

import base64
import dataclasses
import hmac
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reclora_dist.config.load import build, override
from reclora_dist.config.schema import EventsConfig, PrivacyConfig
from reclora_dist.contract.manifest import Manifest, digest, is_current
from reclora_dist.contract.schema import EVENTS
from reclora_dist.contract.storage import Folder
from reclora_dist.data.features import FeatureStore
from spark_jobs import build_events, stage
from spark_jobs.privacy import KEY_VARIABLE, Privacy, read_privacy
from spark_jobs.sources.open import open_log
from spark_jobs.transforms.private import private

ROOT = Path(__file__).parents[2]
KEY = "correct-horse-battery-staple-7731"
GONE = "leaver-5150@example.org"
"""Who is deleted: first in the files, with rows of every kind, an item and a town that nobody else has."""

EVENTS_OF_OTHERS = [f"user-{u},i{i},{1 + (u * i) % 5},{500 + 70 * i + u}" for u in range(9) for i in range(8)]
BAD_OF_OTHERS = [
    "user-1,i1,good,53",
    "user-1,i1,3",
    ",user-2,3,50",
    "user-3,i1,9,51",
    "user-4,i3,1,714",
    "user-1,i7,,2",
]
EVENTS_OF_GONE = [
    *[f"{GONE},i{i},{1 + i % 5},{3 * i}" for i in range(8)], f"{GONE},only-his,5,40", f"{GONE},only-his,4,41",
    f"{GONE},i1,bad,1", f"{GONE},i1,3", f"{GONE},i1,3,59,extra", f"{GONE},i1,2,3", f"{GONE},i77,,",
]  # fmt: skip
TOWNS = [f"user-{u},{'Rome' if u % 2 else 'Oslo'}" for u in range(9)]
SETTINGS = (
    "source.format=csv", "source.events=events.csv", "source.items=", "source.users=users.csv",
    "source.user_fields=[town]", "rating_levels=[1,2,3,4,5]", "k_core=0", "min_history=2",
)  # fmt: skip


def write_log(folder: Path, events: list[str], users: list[str]) -> Path:
    folder.mkdir()
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,rating,timestamp", *events]) + "\n")
    (folder / "users.csv").write_text("\n".join(["user_id,town", *users]) + "\n")
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [*EVENTS_OF_GONE[:9], *EVENTS_OF_OTHERS[:40], *EVENTS_OF_GONE[9:], *EVENTS_OF_OTHERS[40:], *BAD_OF_OTHERS]
    towns = [f"{GONE},Atlantis", f"{GONE},Lemuria", *TOWNS]
    return write_log(tmp_path_factory.mktemp("log") / "raw", rows, towns)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same log, had there never been that user."""
    folder = tmp_path_factory.mktemp("without") / "raw"
    return write_log(folder, [*EVENTS_OF_OTHERS, *BAD_OF_OTHERS], TOWNS)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    (tmp_path / "user.key").write_text(f"{KEY}\n")
    return tmp_path / "user.key"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    (tmp_path / "delete.txt").write_text(f"{GONE}\nwas-never-here\n")
    return tmp_path / "delete.txt"


def hashed(user: str) -> str:
    return hmac.new(KEY.encode(), user.encode(), "sha256").hexdigest()[:32]


def shards_of(run, folder: Path, raw: Path, *settings: str) -> list[Manifest]:
    """Events, histories and shards below ``folder``."""
    events, histories, shards = (folder / name for name in ("events", "histories", "shards"))
    return [
        run("build_events", events, *SETTINGS, *settings, raw=raw),
        run("retrieve_history", histories, "strategy=recent", "long=5", "short=3", events=events),
        run("write_shards", shards, "text_train=0.5", events=events, histories=histories),
    ]


def everything(folder: Path) -> bytes:
    """The bytes of all files below a folder, and all values of those that are compressed."""
    found = [str(path.relative_to(folder)).encode() for path in folder.rglob("*")]
    for path in (path for path in folder.rglob("*") if path.is_file()):
        found.append(path.read_bytes())
        if path.suffix == ".parquet":
            found.append(json.dumps(pq.read_table(path).to_pylist()).encode())
    return b"\n".join(found)


@pytest.mark.parametrize("hide", [False, True])
def test_no_trace_of_a_deleted_user_is_left(
    run, rows, log: Path, without: Path, key: Path, listed: Path, tmp_path: Path, hide: bool, exhaustive: bool
) -> None:
    if not hide and not exhaustive:
        pytest.skip("half a minute for the same code with fewer steps: with --exhaustive only")
    settings = ["privacy.hash_users=true", f"privacy.key_file={key}"] if hide else []
    shards_of(run, tmp_path / "run", log, *settings)
    traces = [word.encode() for word in (GONE, hashed(GONE), "only-his", "Atlantis", "Lemuria")]
    seen = [word in everything(tmp_path / "run") for word in traces]
    assert seen == [not hide, hide, True, True, True], "the search finds what is there"
    settings.append(f"privacy.delete={listed}")
    made = shards_of(run, tmp_path / "run", log, *settings)
    left = everything(tmp_path / "run")
    assert not any(word in left for word in traces) and KEY.encode() not in left
    assert made[0].facts["counts"]["deleted"] == len(EVENTS_OF_GONE)
    for name in ("user", "item"):
        table = rows(tmp_path / "run" / "events", made[0], f"{name}s/")
        assert sorted(row[name] for row in table) == list(range(1, made[0].facts[f"{name}s"] + 1))
    never = shards_of(run, tmp_path / "never", without, *settings)
    assert [m.files for m in made] == [m.files for m in never]
    assert [m.content_digest for m in made[1:]] == [m.content_digest for m in never[1:]]
    counts = {**made[0].facts["counts"], "deleted": 0}
    events = dataclasses.replace(made[0], facts={**made[0].facts, "counts": counts})
    assert events.content_digest == never[0].content_digest, "but for the number of removed rows"


def test_no_readable_id_is_left_when_ids_are_hashed(
    run, rows, write_vectors, log: Path, key: Path, tmp_path: Path
) -> None:
    made = run("build_events", tmp_path / "e", *SETTINGS, "privacy.hash_users=true", f"privacy.key_file={key}", raw=log)
    assert b"user-" not in everything(tmp_path / "e") and GONE.encode() not in everything(tmp_path / "e")
    names = {hashed(user) for user in [GONE, *[f"user-{u}" for u in range(9)]]}
    assert {row["user_id"] for row in rows(tmp_path / "e", made, "users/")} == names
    table = rows(tmp_path / "e", made, "quarantine/")
    shown = {row["reason"]: json.loads(row["row"]) for row in table if row["table"] == "events"}
    assert shown["duplicate_event"]["user_id"] in (hashed(GONE), hashed("user-4"))
    suspect = {"malformed_row", "missing_user_id", "unparseable_rating", "rating_not_in_levels", "missing_rating"}
    assert suspect <= set(shown) and all(shown[reason] == {"file": "events.csv"} for reason in suspect)
    assert sum(row["rows"] for row in table) == sum(made.facts["quarantine"].values())
    write_vectors(tmp_path / "e", tmp_path / "v")
    store = FeatureStore.load(Folder(str(tmp_path / "e")), Folder(str(tmp_path / "v")))
    assert set(store.users) == names, "the service knows users by their hashed id"


def test_a_generated_log_is_hashed_as_well(run, rows, key: Path, tmp_path: Path) -> None:
    (tmp_path / "leave").write_text("u0000003\n")
    run("synthesise", tmp_path / "raw", "users=12", "items=20", "events_per_user=15")
    settings = ("privacy.hash_users=true", f"privacy.key_file={key}", f"privacy.delete={tmp_path / 'leave'}")
    made = run("build_events", tmp_path / "out", *settings, "k_core=0", "min_history=2", raw=tmp_path / "raw")
    names = {hashed(f"u{n:07}") for n in range(1, 13)}
    found = {row["user_id"] for row in rows(tmp_path / "out", made, "users/")}
    assert found == names - {hashed("u0000003")} and made.facts["counts"]["deleted"] > 0


def test_a_record_that_cannot_be_parsed_tells_no_id(run, rows, listed: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    names = ("user_id", "item_id", "rating", "timestamp")
    lines = [json.dumps(dict(zip(names, row.split(","), strict=True))) for row in EVENTS_OF_OTHERS]
    lines += [f'{{"item_id": "i1", "user_id": "{GONE}", "rating": ', json.dumps({"user_id": "user-1", "rating": GONE})]
    (tmp_path / "raw" / "events.json").write_text("\n".join(lines) + "\n")
    settings = ("source.format=json", "source.events=events.json", "source.items=", "k_core=0", "min_history=2")
    made = run("build_events", tmp_path / "out", *settings, f"privacy.delete={listed}", raw=tmp_path / "raw")
    assert made.facts["quarantine"] == {"malformed_row": 1, "missing_item_id": 1}
    assert GONE.encode() not in everything(tmp_path / "out")


def prepared(log: Path, *settings: str) -> tuple[EventsConfig, stage.Inputs]:
    config = build(EventsConfig, override({}, [*SETTINGS, *settings]))
    return build_events.prepare(config, stage.Inputs({"raw": Folder(str(log))}))


def state(log: Path, *settings: str) -> tuple[str, dict[str, str]]:
    config, inputs = prepared(log, *settings)
    return digest(config), dict(inputs.parents)


def test_a_changed_key_or_list_makes_the_events_out_of_date(
    run, log: Path, key: Path, listed: Path, tmp_path: Path
) -> None:
    settings = ["privacy.hash_users=true", f"privacy.key_file={key}", f"privacy.delete={listed}"]
    run("build_events", tmp_path / "out", *SETTINGS, *settings, raw=log)
    assert is_current(Folder(str(tmp_path / "out")), EVENTS, *state(log, *settings))
    moved = [*settings[:1], f"privacy.key_file={key.rename(tmp_path / 'k')}", f"privacy.delete={tmp_path / 'd'}"]
    (tmp_path / "d").write_text(f"was-never-here\r\n{GONE}\r\n\r\n")
    assert is_current(Folder(str(tmp_path / "out")), EVENTS, *state(log, *moved)), "where they lie is no setting"
    found = [state(log), state(log, *moved), state(log, *moved[:2])]
    (tmp_path / "d").write_text(f"{GONE}\nuser-1\n")
    found.append(state(log, *moved))
    (tmp_path / "d").write_text("")
    found.append(state(log, *moved))
    (tmp_path / "k").write_text(KEY.upper())
    found.append(state(log, *moved))
    assert len({json.dumps(each) for each in found}) == len(found)


def test_lists_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"17\n4")
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf17\r\n 4 \r\n\r\n")
    (tmp_path / "ids.csv").write_bytes(b'who,why\n"17","asked, twice"\n4,\n,x\n')
    pq.write_table(pa.table({"who": pa.array([17, None, 4])}), tmp_path / "ids.parquet")
    for name in ("ids.txt", "ids", "ids.csv", "ids.parquet"):
        found = read_privacy(PrivacyConfig(delete=str(tmp_path / name)), "who")
        assert found.deleted == {"17", "4"}, name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["hash_users=true"], rf"needs a key: name its file in privacy\.key_file, or set {KEY_VARIABLE}"),
        (
            ["hash_users=true", "key_file=short"],
            r"the file named in privacy\.key_file has 6 bytes, which can be guessed",
        ),
        (
            ["hash_users=true", f"key_file={KEY}"],
            r"privacy\.key_file cannot be read \(No such file or directory\): name",
        ),
        (["key_file=short"], "ids would stay as they are: set privacy.hash_users=true"),
        (["delete=nowhere.txt"], r"privacy\.delete = 'nowhere\.txt' cannot be read \(No such file or directory\)"),
        (
            ["delete=other.csv"],
            r"has no column 'user_id'; there are: who, why\. Name the column of ids as source\.user",
        ),
        (["delete=short.parquet"], r"'short\.parquet' cannot be read as Parquet"),
        (["delete=floats.parquet"], r"has ids of type double: write them as text or integers"),
        (["delete=latin"], r"is no UTF-8 text: give one id per line"),
        (["hash_user=true"], r"did you mean 'privacy\.hash_users'"),
    ],
)
def test_secrets_that_cannot_be_used(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    for name, content in {
        "short": b"secret\n", "short.parquet": b"secret\n", "other.csv": b"who,why\n", "latin": b"M\xfcller\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"user_id": [1.0]}), tmp_path / "floats.parquet")
    with pytest.raises(ValueError, match=words) as caught:
        prepared(log, *[f"privacy.{setting}" for setting in settings])
    assert KEY not in str(caught.value) and "secret" not in str(caught.value)


def test_a_list_of_everybody(run, csv, tmp_path: Path) -> None:
    raw = csv.write(tmp_path / "raw", [("u1", "i1", 3, 1), ("u1", "i2", 5, 2)])
    (tmp_path / "delete").write_text("u1\n")
    with pytest.raises(ValueError, match=r"the log has no event: look at .* privacy\.delete"):
        run("build_events", tmp_path / "out", *csv.settings, f"privacy.delete={tmp_path / 'delete'}", raw=raw)


def test_key_and_deleted_ids_stay_out_of_plans(spark, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    privacy = Privacy(KEY.encode(), frozenset([GONE]))
    source = build(EventsConfig, override({}, SETTINGS)).source
    hidden = private(open_log(spark, source, Folder(str(log))), privacy)
    for frame in (hidden.events, hidden.users):
        frame.groupBy("user_id").count().explain(extended=True)
    told = capsys.readouterr().out
    assert "Parsed Logical Plan" in told and "MapInArrow" in told
    for word in (KEY, KEY.encode().hex(), base64.b64encode(KEY.encode()).decode(), GONE):
        assert word not in told + repr(privacy) + repr(stage.Inputs({}, privacy=privacy))


def test_the_key_is_in_no_file_and_no_output_of_a_job(log: Path, listed: Path, tmp_path: Path) -> None:
    out, spark_log = tmp_path / "run", tmp_path / "spark"
    spark_log.mkdir()
    arguments = ["--raw", str(log), "--out", str(out / "events"), "--master", "local[2]", "--shuffle-partitions", "2"]
    wanted = (*SETTINGS, "privacy.hash_users=true", f"privacy.delete={listed}")
    arguments += [word for setting in wanted for word in ("--set", setting)]
    logged = {"enabled": "true", "dir": spark_log.as_uri(), "compress": "false"}
    arguments += [word for name, value in logged.items() for word in ("--conf", f"spark.eventLog.{name}={value}")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYSPARK_")}
    done = subprocess.run(
        [sys.executable, "-m", "spark_jobs.build_events", *arguments, "--metrics-file", str(out / "job.prom")],
        cwd=ROOT, capture_output=True, env={**environment, KEY_VARIABLE: KEY}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = everything(out) + everything(spark_log) + done.stdout + done.stderr
    assert b"SparkListenerSQLExecutionStart" in found and hashed("user-1").encode() in found
    for word in (KEY.encode(), KEY.encode().hex().encode(), base64.b64encode(KEY.encode()), GONE.encode()):
        assert word not in found


def test_the_documented_command_gives_the_id_to_ask_the_service_with(key: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    command = re.search(r"^python -c '[^']*'.*$", page, re.MULTILINE)
    assert command
    words = shlex.split(command[0])[1:]
    told = subprocess.run([sys.executable, *words[:-1], "user-1"], cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout.strip() == hashed("user-1"), told.stderr
