"""A study from the command line on a real Ray cluster: shared stages, a run that fails, and going on afterwards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_run import REPOSITORY, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
SETTINGS = (
    "ray.workers=0", "engine=torch", "ray.object_store_mib=100", "retrieval.long=8", "retrieval.short=4",
    "backbone.tiny.hidden=32", "backbone.tiny.layers=2", "backbone.tiny.heads=2", "backbone.tiny.vocabulary=400",
    "crm.embedding=8", "crm.dnn=[32,32]", "crm.attention=[16]", "crm_train.batch_size=64", "crm_train.epochs=2",
    "lora_train.batch_size=64", "lora_train.epochs=1", "evaluate.bootstrap=50", "prompt.profile=", "~adapters.uniform",
    "study.commands=[train,evaluate]", "study.seeds=[0]", "study.compare=[[one,lora]]",
    "study.points={first: [], second: ['adapters.one.rank=4'], broken: []}",
)  # fmt: skip


def run(home: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "reclora_dist.cli.study", "study=identity", *SETTINGS, f"paths.run={home}"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=1400)


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    """A study's folder in which Spark has been: the first two runs have shards and a backbone, the third nothing."""
    for point in ("first", "second"):
        copy_without_crm(prepared, tmp_path / point / "seed-0")
    return tmp_path


def copy_without_crm(prepared: Path, place: Path) -> None:
    shutil.copytree(prepared, place, dirs_exist_ok=True)
    shutil.rmtree(place / "crm")


def test_a_study_shares_stages_survives_a_failing_run_and_goes_on_later(home: Path, prepared: Path) -> None:
    done = run(home)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "study: 3 runs, 0 of them finished before" in done.stdout
    assert "] first seed 0: done in" in done.stdout
    (second,) = [line for line in done.stdout.splitlines() if "second seed 0" in line]
    assert "reused crm, adapter lora;" in second
    assert "1 of 3 runs failed" in done.stderr
    assert f"broken seed 0: error: '{home}/broken/seed-0/shards' has no manifest.json" in done.stderr
    logs = {point: (home / point / "seed-0/log.txt").read_text() for point in ("first", "second", "broken")}
    assert "crm: done in" in logs["first"] and "crm: up to date" in logs["second"]
    assert "adapter lora: up to date" in logs["second"] and "adapter one: done in" in logs["second"]
    crm = [home / point / "seed-0/crm/manifest.json" for point in ("first", "second")]
    assert crm[0].read_bytes() == crm[1].read_bytes()

    rows = pq.read_table(home / "results.parquet").to_pylist()
    found = {(r["point"], r["model"]): r["value"] for r in rows if (r["split"], r["metric"]) == ("test", "auc")}
    models = ("running_averages", "crm", "lora", "one")
    assert set(found) >= {(point, model) for point in ("first", "second") for model in models}
    assert found["first", "lora"] == found["second", "lora"]
    (metrics,) = (home / "first/seed-0/evaluation").glob("metrics-*.json")
    evaluated = json.loads(metrics.read_text())
    assert found["first", "one"] == evaluated["splits"]["test"]["one"]["auc"]["mean"]
    page = (home / "results.md").read_text()
    assert "* broken seed 0: error: " in page
    assert "| one − lora | second | auc |" in page

    copy_without_crm(prepared, home / "broken/seed-0")
    again = run(home)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "study: 3 runs, 2 of them finished before" in again.stdout
    assert "reused crm, adapter lora, adapter one, evaluation;" in again.stdout
    assert "Failed" not in (home / "results.md").read_text()
