"""Same input, same output, byte for byte: whatever the partitions, the cores, the order of the rows, or what failed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import EVENTS, HISTORIES, SHARDS
from reclora_dist.contract.storage import Folder
from spark_jobs.__main__ import ENDED

ROOT = Path(__file__).parents[2]
DATASETS = {"events": EVENTS, "histories": HISTORIES, "shards": SHARDS}
pytestmark = pytest.mark.parametrize("finished", ["global_time"], indirect=True)

FAILING = """
import builtins, errno, os, pathlib

true_open = open

def failing(file, mode="r", *more, **named):
    if str(file).endswith(".partial"):
        from pyspark import TaskContext
        if TaskContext.get().attemptNumber() == 0:
            (pathlib.Path(os.environ["MARKERS"]) / os.path.basename(str(file)).rsplit(".", 2)[0]).touch()
            raise OSError(errno.EIO, "failed once, as a test asked for", str(file))
    return true_open(file, mode, *more, **named)

builtins.open = failing
"""
"""A sitecustomize.py for executors: a task's first attempt fails when it writes its first file."""


def digests(folder: Path) -> dict[str, str]:
    return {name: read_manifest(Folder(str(folder / name)), form).content_digest for name, form in DATASETS.items()}


@pytest.mark.parametrize("partitions", [7, 64])
def test_whatever_the_partitions(spark, run, build_all, finished, tmp_path: Path, partitions: int, exhaustive) -> None:
    if partitions > 7 and not exhaustive:
        pytest.skip("half a minute for the same code again: with --exhaustive only")
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", partitions)
    try:
        build_all(run, tmp_path, finished.folder / "raw", finished.split)
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)
    assert digests(tmp_path) == digests(finished.folder)


def test_whatever_the_order_of_the_rows(run, build_all, finished, tmp_path: Path) -> None:
    head, *rows = (finished.folder / "raw" / "events.csv").read_text().splitlines()
    random.Random(0).shuffle(rows)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "events.csv").write_text("\n".join([head, *rows]) + "\n")
    build_all(run, tmp_path, tmp_path / "raw", finished.split)
    assert digests(tmp_path) == digests(finished.folder)


def test_on_one_core_where_the_first_attempt_of_every_task_that_writes_fails(finished, csv, tmp_path: Path) -> None:
    site, markers = tmp_path / "site", tmp_path / "markers"
    site.mkdir()
    markers.mkdir()
    (site / "sitecustomize.py").write_text(FAILING)
    events, histories, shards = (tmp_path / name for name in DATASETS)
    raw, vectors = (finished.folder / name for name in ("raw", "vectors"))
    sizes = ("rows_per_file=150", "rows_per_group=40", "text_train=0.25", "text_validation=20", "text_test=1000")
    jobs = [
        ["build_events", *options(site, events, (*csv.settings, "min_history=3"), raw=raw)],
        ["retrieve_history", *options(site, histories, ("long=6", "short=3"), events=events, vectors=vectors)],
        ["write_shards", *options(site, shards, sizes, events=events, histories=histories)],
    ]
    left_out = ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "PYSPARK_PYTHON")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    done = subprocess.run(
        [sys.executable, "-m", "spark_jobs"], input="".join(json.dumps(job) + "\n" for job in jobs),
        cwd=ROOT, env={**environment, "MARKERS": str(markers)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" after ") == 1 and done.stdout.count(", still running") == 2, "one application"
    assert done.stdout.count(f"{ENDED}0\n") == 3
    assert digests(tmp_path) == digests(finished.folder)
    failed = {marker.name for marker in markers.iterdir()}
    for name, form in DATASETS.items():
        written = read_manifest(Folder(str(tmp_path / name)), form).files
        assert failed & {Path(entry.path).name for entry in written}, name


def options(site: Path, out: Path, settings: tuple[str, ...], **inputs: Path) -> list[str]:
    """Arguments of a job on one core whose tasks are tried again."""
    arguments = ["--master", "local[1,2]", "--shuffle-partitions", "2", "--out", str(out)]
    arguments += ["--conf", f"spark.executorEnv.PYTHONPATH={site}{os.pathsep}{ROOT}"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    return arguments + [part for name, path in inputs.items() for part in (f"--{name}", str(path))]
