"""A Spark master and two workers of one core on the loopback, as processes of their own that end with the test."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pyspark

HOME = Path(pyspark.__file__).parent
MEMORY = "1g"
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""For JVMs that live for seconds."""


@dataclass(frozen=True)
class Standalone:
    """A running cluster: its master URL, the web pages of the master and of each worker, what jobs inherit."""

    url: str
    page: str
    workers: tuple[str, ...]
    environment: Mapping[str, str]


def outside(**changes: str) -> dict[str, str]:
    """The environment of a process that has neither our checkout nor another Spark."""
    ours = ("PYSPARK", "SPARK", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return {**kept, "SPARK_HOME": str(HOME), "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_PUBLIC_DNS": "127.0.0.1", **changes}


def until(found: Callable[[], object], what: Callable[[], str], seconds: float = 120) -> None:
    """Wait until ``found()`` is true; after ``seconds`` fail with ``what()``."""
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def page(address: str) -> str:
    """The body that a web address answers with."""
    with urlopen(address, timeout=20) as answer:
        text: str = answer.read().decode()
    return text


@contextmanager
def standalone(folder: Path, conf: Path) -> Iterator[Standalone]:
    """Start the cluster with its files in ``folder`` and the settings of the folder ``conf``; end it in any case."""
    options = {"SPARK_CONF_DIR": str(conf), "SPARK_DAEMON_MEMORY": "256m", "SPARK_DAEMON_JAVA_OPTS": QUICK}
    ports = ("--port", "0", "--webui-port", "0")
    with ExitStack() as stack:
        master = stack.enter_context(
            _daemon(folder / "master", "master.Master", "--host", "127.0.0.1", *ports, **options)
        )
        url = _told(master, r"Starting Spark master at (spark://\S+)")
        size = ("--cores", "1", "--memory", MEMORY)
        logs = [  # of two hosts: Spark never runs a task twice at a time on one
            stack.enter_context(
                _daemon(folder / f"worker{n}", "worker.Worker", "--host", f"127.0.0.{n}", *ports, *size, url, **options)
            )
            for n in (1, 2)
        ]
        pages = [_told(log, r"WebUI.* (http://127\.0\.0\.1:\d+)") for log in (master, *logs)]
        until(lambda: json.loads(page(f"{pages[0]}/json/"))["aliveworkers"] == 2, logs[1].read_text)
        yield Standalone(url, pages[0], tuple(pages[1:]), outside())


@contextmanager
def _daemon(folder: Path, name: str, *arguments: str, **changes: str) -> Iterator[Path]:
    """A process of the cluster, its working folder and its log."""
    folder.mkdir(parents=True)
    log = folder / "log"
    command = [str(HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{name}", *arguments]
    environment = outside(SPARK_WORKER_DIR=str(folder), **changes)
    with (
        log.open("wb") as file,
        subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment) as process,
    ):
        try:
            yield log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _told(log: Path, pattern: str) -> str:
    """The first match of ``pattern`` in a log."""
    until(lambda: re.search(pattern, log.read_text()), log.read_text)
    match = re.search(pattern, log.read_text())
    assert match
    return match[1]
