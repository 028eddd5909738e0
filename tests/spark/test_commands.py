"""The jobs as commands: python -m, spark-submit, killed and run again, up to date, help, metrics."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reclora_dist.contract.manifest import Manifest, read_manifest
from reclora_dist.contract.schema import RAW
from reclora_dist.contract.storage import Folder
from spark_jobs import build_events, synthesise, write_shards

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--config", '{"users": 4000}', "--set", "items=80", "--set", "events_per_user=40"]
LOCAL = ["--master", "local[2]", "--shuffle-partitions", "2"]


def environment(**changes: str) -> dict[str, str]:
    left_out = ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "PYSPARK_PYTHON")
    return {**{key: value for key, value in os.environ.items() if key not in left_out}, **changes}


def command(job: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"spark_jobs.{job}", *arguments]


def done(arguments: list[str], cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(
        arguments, cwd=cwd, capture_output=True, text=True, env=environment(**changes), timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def raw_of(folder: Path) -> Manifest:
    return read_manifest(Folder(str(folder)), RAW)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What an undisturbed ``python -m`` run wrote and printed."""
    folder = tmp_path_factory.mktemp("made")
    metrics = ["--metrics-file", str(folder / "metrics" / "job.prom")]
    shown = done(command("synthesise", *ARGUMENTS, *LOCAL, *metrics, "--out", str(folder / "raw")))
    return folder, shown.stdout + shown.stderr


def test_a_job_says_what_it_did_and_no_more(made: tuple[Path, str]) -> None:
    folder, shown = made
    lines = [line for line in shown.splitlines() if "jdk.incubator.vector" not in line]
    assert all(line.startswith("synthesise: ") for line in lines)
    assert 2 <= sum(" tasks" not in line for line in lines) <= 6, "besides how far it is, on a slow machine"
    assert "users 4,000" in shown
    metrics = (folder / "metrics" / "job.prom").read_text()
    assert (
        f'reclora_spark_rows{{job="synthesise",table="events"}} {float(raw_of(folder / "raw").rows("events/"))}'
        in metrics
    )
    assert 'reclora_spark_job_seconds{job="synthesise"}' in metrics


def test_spark_submit_takes_the_same_arguments(made: tuple[Path, str], tmp_path: Path, exhaustive: bool) -> None:
    if not exhaustive:
        pytest.skip("test_submitting does so with a wheel in place of a checkout: with --exhaustive only")
    submit = [
        str(Path(sys.executable).with_name("spark-submit")),
        "--master",
        "local[2]",
        "--conf",
        "spark.ui.enabled=false",
    ]
    submit += [str(ROOT / "spark_jobs" / "synthesise.py"), *ARGUMENTS, *LOCAL, "--out", str(tmp_path / "raw")]
    python = {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    shown = done(submit, tmp_path, **python)  # another folder: the job must find its package itself
    assert "on local[2]" in shown.stdout
    assert raw_of(tmp_path / "raw").content_digest == raw_of(made[0] / "raw").content_digest


def test_up_to_date_needs_no_java_and_little_time(made: tuple[Path, str], tmp_path: Path) -> None:
    prom = tmp_path / "job.prom"
    arguments = [*ARGUMENTS, *LOCAL, "--metrics-file", str(prom), "--out", str(made[0] / "raw")]
    began = time.monotonic()
    shown = done(command("synthesise", *arguments), PATH="/nowhere", JAVA_HOME="/nowhere")
    assert shown.stdout == "raw: up to date\n"
    assert time.monotonic() - began < 10
    assert 'table="events"' in prom.read_text()


def test_killed_in_the_middle_the_old_dataset_stays_and_the_rerun_is_whole(
    made: tuple[Path, str], run, tmp_path: Path
) -> None:
    folder = Folder(str(tmp_path / "raw"))
    old = run("synthesise", tmp_path / "raw", "users=30", "items=30")
    before = set(folder.files())
    again = command("synthesise", *ARGUMENTS, *LOCAL, "--out", folder.uri)
    with subprocess.Popen(
        again, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 200
        while process.poll() is None and not set(folder.files()) - before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was killed after its first file, before the commit"
    assert raw_of(tmp_path / "raw") == old
    assert all(folder.exists(entry.path) for entry in old.files)
    done(again)
    new = raw_of(tmp_path / "raw")
    assert new.content_digest == raw_of(made[0] / "raw").content_digest != old.content_digest
    assert set(folder.files()) == {"manifest.json", *[entry.path for entry in new.files]}, "leftovers are gone"


@pytest.mark.parametrize("job", [build_events, synthesise, write_shards])
def test_help_teaches_every_setting(job, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        job.cli(["--help"])
    told = capsys.readouterr().out
    wanted = {
        build_events: [
            "--raw",
            "source.kind=",
            "movielens_1m | ",
            "k_core=5",
            "keep users and items",
            "--metrics-port",
        ],
        synthesise: ["heavy_user=0.0", "share of all events", "popularity_exponent=0.6", "dirt=0.0", "by_day=false"],
        write_shards: ["--histories", "rows_per_file=400000", "text_train=0.08", "--driver-memory"],
    }[job]
    assert all(words in told for words in wanted)
