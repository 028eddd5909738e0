"""The jobs under spark-submit with our wheel and no checkout: on a real standalone cluster, and on a local master."""

import json
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from standalone_cluster import QUICK, Standalone, outside, page, standalone, until

from reclora_dist.contract.manifest import Manifest, read_manifest
from reclora_dist.contract.schema import EVENTS, HISTORIES, RAW, SHARDS
from reclora_dist.contract.storage import Folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONF = ROOT / "cluster" / "spark"
SUBMIT = str(Path(sys.executable).with_name("spark-submit"))
FORMATS = {"raw": RAW, "events": EVENTS, "histories": HISTORIES, "shards": SHARDS}
JOBS = ("build_events", "retrieve_history", "write_shards")
SYNTHESISE = ("users=300", "items=60", "events_per_user=30")
BUILD = ("k_core=0",)
RETRIEVE = ("strategy=recent", "long=6", "short=3")
SMALL = {
    "spark.executor.cores": "1",
    "spark.executor.memory": "512m",
    "spark.executor.pyspark.memory": "1g",
    "spark.sql.shuffle.partitions": "4",
    "spark.cores.max": "2",
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.executor.heartbeatInterval": "2s",
    "spark.network.timeout": "600s",
    "spark.python.authenticate.socketTimeout": "120s",
    "spark.speculation": "true",
    "spark.speculation.interval": "20ms",
    "spark.speculation.task.duration.threshold": "20ms",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.defaultJavaOptions": QUICK,
    "spark.executor.defaultJavaOptions": QUICK,
}
"""A machine of two cores that is perhaps busy; no task before both executors are there. A core with nothing to do takes
a task that the other one is at as well.
"""

PROBE = """
import json, sys, time
from pathlib import Path
import spark_jobs
from spark_jobs import session

def where(batches, go=Path(sys.argv[1])):
    import os, time, pyarrow as pa
    deadline = time.monotonic() + 120
    while not go.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    import spark_jobs
    for batch in batches:
        told = {"file": os.path.abspath(spark_jobs.__file__), "folder": os.getcwd(), "path": sys.path}
        yield pa.record_batch({"told": [json.dumps(told)]})

spark = session.start("probe", "local", "1g", 4, {})
rows = spark.range(0, 4, 1, 4).mapInArrow(where, "told string").collect()
told = {"imported": spark_jobs.__file__, "tasks": [json.loads(row.told) for row in rows]}
Path(sys.argv[2]).write_text(json.dumps(told))
spark.stop()
"""
"""A job whose tasks wait for the file of its first argument, and tell from where they import our package."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("submitting")


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    bin = Path(sys.executable).parent
    command = ["make", "--no-print-directory", "-o", ".venv/.ready", "wheel", f"BIN={bin}", f"DIST={folder}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside())
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


@pytest.fixture(scope="module")
def python(folder: Path) -> str:
    """A Python with the libraries of this one, but without our package, however that is installed here."""
    script = folder / "python"
    libraries = sysconfig.get_path("purelib")
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{libraries}" exec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    command = [str(script), "-c", "import pyspark, pyarrow, spark_jobs"]
    failed = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=outside())
    assert "No module named 'spark_jobs'" in failed.stderr
    return str(script)


@pytest.fixture(scope="module")
def entries(folder: Path, wheel: Path) -> Path:
    """The jobs' entry files of the wheel, alone, as a cluster's driver gets them."""
    with zipfile.ZipFile(wheel) as archive:
        jobs = [
            name for name in archive.namelist() if re.fullmatch(r"spark_jobs/(synth|build|retr|write)\w+\.py", name)
        ]
        archive.extractall(folder / "entries", jobs)
    (folder / "entries" / "spark_jobs" / "probe.py").write_text(PROBE)
    return folder / "entries" / "spark_jobs"


@pytest.fixture(scope="module")
def cluster(folder: Path, python: str) -> Iterator[Standalone]:
    with standalone(folder / "cluster", CONF) as started:
        yield started


@dataclass(frozen=True)
class Submit:
    """spark-submit on the cluster, as the scripts call it, with our tuning for a small machine."""

    cluster: Standalone
    folder: Path
    wheel: Path
    python: str

    @property
    def environment(self) -> dict[str, str]:
        return {**self.cluster.environment, "PYSPARK_PYTHON": self.python, "EVENT_LOG": (self.folder / "log").as_uri()}

    def properties(self) -> Path:
        (self.folder / "log").mkdir(exist_ok=True)
        target = self.folder / "small.conf"
        lines = [f"{key} {value}" for key, value in SMALL.items()]
        target.write_text("\n".join([(CONF / "spark-defaults.conf").read_text(), *lines, ""]))
        return target

    def command(self, entry: Path, *arguments: str) -> list[str]:
        options = ["--master", self.cluster.url, "--properties-file", str(self.properties()), "--load-spark-defaults"]
        log = f"spark.eventLog.dir={self.environment['EVENT_LOG']}"
        return [SUBMIT, *options, "--py-files", str(self.wheel), "--conf", log, str(entry), *arguments]

    def script(self, job: str, *arguments: str) -> str:
        """Through cluster/spark/standalone.sh; the driver runs in a checkout, the executors do not."""
        chosen = {"MASTER": self.cluster.url, "WHEEL": str(self.wheel), "PROPERTIES": str(self.properties())}
        path = {"PATH": f"{Path(SUBMIT).parent}:{self.environment['PATH']}"}
        return self._done([str(CONF / "standalone.sh"), job, *arguments], {**self.environment, **chosen, **path})

    def alone(self, entry: Path, *arguments: str) -> str:
        """Neither driver nor executors have a checkout."""
        return self._done(self.command(entry, *arguments), self.environment)

    def _done(self, command: list[str], environment: dict[str, str]) -> str:
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def submit(cluster: Standalone, folder: Path, wheel: Path, python: str) -> Submit:
    return Submit(cluster, folder, wheel, python)


def choose(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="module")
def generated(entries: Path, wheel: Path, python: str, folder: Path) -> None:
    """A log in ``folder / "run" / "raw"``, by spark-submit on a local master."""
    shutil.copy(entries / "synthesise.py", folder)
    command = [SUBMIT, "--master", "local[2]", "--py-files", str(wheel), "synthesise.py", *choose(*SYNTHESISE)]
    done = subprocess.run(
        [*command, "--out", "run/raw"], cwd=folder, capture_output=True, text=True, env=outside(PYSPARK_PYTHON=python)
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def submitted(generated: None, submit: Submit, entries: Path, folder: Path) -> str:
    """What the jobs on the cluster printed; their results lie in ``folder / "run"``, named by relative paths."""
    counts = ["--metrics-file", "metrics/build_events.prom"]
    told = submit.script("build_events", "--raw", "run/raw", *choose(*BUILD), *counts, "--out", "run/events")
    told += submit.alone(
        entries / "retrieve_history.py", "--events", "run/events", *choose(*RETRIEVE), "--out", "run/histories"
    )
    inputs = ("--events", "run/events", "--histories", "run/histories")
    return told + submit.alone(entries / "write_shards.py", *inputs, "--out", "run/shards")


def result(folder: Path, name: str) -> Manifest:
    return read_manifest(Folder(str(folder / name)), FORMATS[name])


def test_without_a_checkout_all_is_written_as_with_one(submitted: str, folder: Path, run, tmp_path: Path) -> None:
    """By a local master the raw log, by the cluster the rest."""
    run("synthesise", tmp_path / "raw", *SYNTHESISE)
    run("build_events", tmp_path / "events", *BUILD, raw=tmp_path / "raw")
    run("retrieve_history", tmp_path / "histories", *RETRIEVE, events=tmp_path / "events")
    run("write_shards", tmp_path / "shards", events=tmp_path / "events", histories=tmp_path / "histories")
    for name in FORMATS:
        assert result(folder / "run", name).content_digest == result(tmp_path, name).content_digest, name


def test_a_job_on_the_cluster_says_where_it_runs(submitted: str, cluster: Standalone) -> None:
    assert submitted.count(f" on {cluster.url} after ") == 3
    lines = submitted.splitlines()
    assert {line.split(":")[0] for line in lines} == set(JOBS)


def test_the_jobs_own_counts_are_written(submitted: str, folder: Path) -> None:
    told = (folder / "metrics" / "build_events.prom").read_text()
    rows = result(folder / "run", "events").rows("events/")
    assert f'reclora_spark_rows{{job="build_events",table="events"}} {float(rows)}' in told


def events(log: Path) -> list[dict[str, Any]]:
    """The events of an application, from its compressed log files."""
    files = sorted(log.glob("events_*"))
    assert files and all(file.suffix == ".zstd" for file in files), "kept, and compressed"
    text = b"".join(pa.input_stream(str(file), compression="zstd").read() for file in files)
    return [json.loads(line) for line in text.splitlines()]


def test_the_event_logs_are_kept_and_tell_that_both_workers_worked(
    submitted: str, folder: Path, cluster: Standalone
) -> None:
    logs = [events(log) for log in (folder / "log").glob("eventlog_v2_app-*")]
    names = {event["App Name"] for log in logs for event in log if event["Event"] == "SparkListenerApplicationStart"}
    assert names >= {f"reclora {job}" for job in JOBS}
    for log in logs:  # what comes after it is the end of a task that had another copy
        assert "SparkListenerApplicationEnd" in {event["Event"] for event in log}
    worked = set()
    for log in logs:
        ended = [event for event in log if event["Event"] == "SparkListenerTaskEnd"]
        ran = {event["Task Info"]["Executor ID"] for event in ended}
        for event in log:
            if event["Event"] == "SparkListenerExecutorAdded" and event["Executor ID"] in ran:
                worked.add(re.match(r"http://[\d.:]+", event["Executor Info"]["Log Urls"]["stdout"])[0])
    assert worked == set(cluster.workers)


def test_some_tasks_ran_on_both_workers_at_once(submitted: str, folder: Path) -> None:
    """So the digests above are of what the first to end wrote, with the other one on its way."""
    ended = [
        event["Task Info"]
        for log in (folder / "log").glob("eventlog_v2_app-*")
        for event in events(log)
        if event["Event"] == "SparkListenerTaskEnd"
    ]
    assert any(task["Speculative"] for task in ended)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def probed(submit: Submit, entries: Path, folder: Path) -> dict[str, Any]:
    """The web pages of cluster and driver while a job ran, and from where driver and executors import our package."""
    driver, cluster = f"http://127.0.0.1:{free_port()}", submit.cluster
    command = submit.command(entries / "probe.py", str(folder / "go"), str(folder / "told.json"))
    once = ("--conf", "spark.speculation=false")  # each task tells of the worker that it was given to
    command[1:1] = ["--conf", f"spark.ui.port={driver.rpartition(':')[2]}", *once]
    with (
        (folder / "probe.log").open("w+") as log,
        subprocess.Popen(command, cwd=folder, env=submit.environment, stdout=log, stderr=log) as process,
    ):
        try:
            executors = f"{driver}/metrics/executors/prometheus/"
            until(lambda: ready(process, executors), lambda: (folder / "probe.log").read_text()[-4000:])
            pages = {
                "executors": page(executors),
                "driver": page(f"{driver}/metrics/prometheus/"),
                "master": page(f"{cluster.page}/metrics/master/prometheus/"),
                "applications": page(f"{cluster.page}/metrics/applications/prometheus/"),
                "worker": page(f"{cluster.workers[0]}/metrics/prometheus/"),
            }
            (folder / "go").touch()
            assert process.wait(120) == 0, (folder / "probe.log").read_text()[-4000:]
        finally:
            process.kill()
    return {**json.loads((folder / "told.json").read_text()), **pages}


def ready(process: subprocess.Popen[bytes], executors: str) -> bool:
    """Whether both executors have tasks and have told of their memory, which they do with a heartbeat."""
    assert process.poll() is None, "the probe ended"
    try:
        told = page(executors)
    except OSError:
        return False
    lines = r'^metrics_executor_{}\{{.*executor_id="[01]".*\}} [1-9]'
    return all(
        len(re.findall(lines.format(name), told, re.MULTILINE)) == 2
        for name in ("activeTasks", "ProcessTreePythonRSSMemory_bytes")
    )


def test_executors_import_the_shipped_package_and_have_no_other(
    probed: dict[str, Any], wheel: Path, folder: Path
) -> None:
    assert probed["imported"] == f"{wheel}/spark_jobs/__init__.py"
    assert len({told["folder"] for told in probed["tasks"]}) == 2, "an executor on each worker"
    for told in probed["tasks"]:
        assert told["file"] == f"{told['folder']}/reclora_spark.zip/spark_jobs/__init__.py"
        assert Path(told["folder"]).is_relative_to(folder / "cluster")
        assert str(ROOT) not in told["path"]


def test_spark_tells_prometheus_what_it_does_while_a_job_runs(probed: dict[str, Any]) -> None:
    assert 'metrics_master_aliveWorkers_Value{type="gauges"} 2' in probed["master"]
    assert re.search(r"^metrics_application_reclora_probe_\d+_cores_Value\S* 2$", probed["applications"], re.MULTILINE)
    assert 'metrics_worker_coresUsed_Value{type="gauges"} 1' in probed["worker"]
    assert 'metrics_reclora_driver_DAGScheduler_job_activeJobs_Value{type="gauges"} 1' in probed["driver"]
    assert probed["executors"].count("metrics_executor_ProcessTreePythonRSSMemory_bytes{") >= 2, "Python's memory"


def test_from_a_wheel_a_local_job_is_as_quiet(wheel: Path, python: str, folder: Path) -> None:
    command = [python, "-m", "spark_jobs.synthesise", *choose(*SYNTHESISE), "--master", "local[2]"]
    environment = outside(PYTHONPATH=str(wheel), PYSPARK_PYTHON=python)
    done = subprocess.run([*command, "--out", "quiet"], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "jdk.incubator.vector" not in line]
    assert all(line.startswith("synthesise: ") for line in said), said
