"""One Spark session for all in-process tests, and jobs run in it without their command line."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

sys.path.insert(0, str(Path(__file__).parents[2]))

from reclora_dist.config.load import build, override
from reclora_dist.contract.arrays import add_array
from reclora_dist.contract.manifest import Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.retrieval import on_grid
from spark_jobs import build_events, report_quality, retrieve_history, session, stage, synthesise, write_shards

JOBS = {job.JOB.name: job.JOB for job in (synthesise, build_events, retrieve_history, write_shards, report_quality)}

Runner = Callable[..., Manifest]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.spark)


@pytest.fixture(scope="session")
def spark(exhaustive: bool) -> Iterator[SparkSession]:
    """Plans of few rows run sooner than they are compiled; CI and the tests of commands have them compiled."""
    jit = {"spark.driver.defaultJavaOptions": "-XX:+UseSerialGC"}  # one long session: the best machine code pays
    if not exhaustive:
        jit |= {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}
    started = session.start("tests", "local[2]", "1g", 2, {"spark.ui.showConsoleProgress": "false", **jit})
    yield started
    started.stop()


@pytest.fixture(scope="session")
def run(spark: SparkSession) -> Runner:
    """``run(job, out, *settings, raw=..., events=..., ...)``: run a job and commit its result."""

    def runner(name: str, out: Path, *settings: str, **inputs: Path) -> Manifest:
        job = JOBS[name]
        config = build(job.config, override({}, settings))
        config, found = job.prepare(config, stage.open_inputs(job, {key: str(path) for key, path in inputs.items()}))
        folder = Folder(str(out))
        with stage.plainly():
            return stage.publish(job, config, found, folder, job.run(spark, config, found, folder))

    return runner


def rows(folder: Path, manifest: Manifest, prefix: str) -> list[dict[str, Any]]:
    """The rows of a table of a dataset."""
    found: list[dict[str, Any]] = read_parts(Folder(str(folder)), manifest.select(prefix)).to_pylist()
    return found


@pytest.fixture(scope="session", name="rows")
def rows_fixture() -> Callable[..., list[dict[str, Any]]]:
    return rows


def write_vectors(events: Path, out: Path, dimension: int = 8) -> None:
    """Random vectors on the grid for every item of an events dataset."""
    made = read_manifest(Folder(str(events)), EVENTS)
    table = np.random.default_rng(0).normal(size=(made.facts["items"] + 1, dimension)).astype(np.float32)
    table = on_grid(table)
    table[0] = 0
    entry = add_array(Folder(str(out)), "vectors", table)
    parents = {"events": made.content_digest}
    commit(Folder(str(out)), Manifest(VECTORS.name, VECTORS.version, "test", parents, (entry,)))


@pytest.fixture(scope="session", name="write_vectors")
def write_vectors_fixture() -> Callable[..., None]:
    return write_vectors


COLUMNS = ("source.format=csv", "source.events=events.csv", "source.items=", "rating_levels=[1,2,3,4,5]")
"""Settings for a log that ``write_log`` wrote."""


def write_log(folder: Path, events: Sequence[Sequence[Any]]) -> Path:
    """A CSV log of (user, item, rating, time in seconds)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(map(str, event)) for event in [("user_id", "item_id", "rating", "timestamp"), *events]]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    return folder


def tied_log(users: int = 30, items: int = 25, events: int = 24, seed: int = 0) -> list[tuple[str, str, int, int]]:
    """A log whose coarse clock makes many events fall on the same second, within and across users."""
    rng = np.random.default_rng(seed)
    log = {}
    for user in range(users):
        for item in rng.choice(items, events, replace=False):
            log[user, item] = (f"u{user}", f"i{item}", int(rng.integers(1, 6)), int(rng.integers(0, 60)))
    return list(log.values())


@dataclasses.dataclass(frozen=True)
class Csv:
    settings = COLUMNS
    write = staticmethod(write_log)
    tied = staticmethod(tied_log)


@pytest.fixture(scope="session")
def csv() -> Csv:
    return Csv()


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    split: str

    def manifest(self, name: str, expected: Any) -> Manifest:
        return read_manifest(Folder(str(self.folder / name)), expected)


def build_all(run: Runner, folder: Path, raw: Path, split: str, *more: str) -> None:
    """Events, vectors, histories and shards below ``folder``, of a log that ``write_log`` wrote."""
    events, vectors, histories = (folder / name for name in ("events", "vectors", "histories"))
    run("build_events", events, *COLUMNS, f"split={split}", "min_history=3", *more, raw=raw)
    write_vectors(events, vectors)
    run("retrieve_history", histories, "long=6", "short=3", events=events, vectors=vectors)
    settings = ("rows_per_file=150", "rows_per_group=40", "text_train=0.25", "text_validation=20", "text_test=1000")
    run("write_shards", folder / "shards", *settings, events=events, histories=histories)


@pytest.fixture(scope="session", name="build_all")
def build_all_fixture() -> Callable[..., None]:
    return build_all


@pytest.fixture(scope="session", params=["global_time", "per_user"])
def finished(request: pytest.FixtureRequest, run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run on a log full of ties, under either split."""
    folder = tmp_path_factory.mktemp(request.param)
    write_log(folder / "raw", tied_log())
    build_all(run, folder, folder / "raw", request.param)
    return Run(folder, request.param)
