"""Embedding and training on a real Ray cluster with two workers: results, metrics, and a worker that is killed."""

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from sample_data import small_config

from reclora_dist.config.schema import Config, EmbedConfig, PathsConfig, RayConfig
from reclora_dist.config.targets import adapter_target, crm_target
from reclora_dist.contract import schema
from reclora_dist.contract.arrays import read_array
from reclora_dist.contract.manifest import ContractError, Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.schema import ADAPTER, CRM, EVENTS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app.embed import embed_items
from reclora_dist.ray_app.scrape import scrape
from reclora_dist.ray_app.session import Cluster, connect
from reclora_dist.ray_app.trainer import train_stage
from reclora_dist.retrieval import check_grid
from reclora_dist.telemetry import names

pytestmark = pytest.mark.ray
RAY = RayConfig(workers=2, object_store_mib=100)
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect(RAY) as cluster:
        yield cluster


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def config(run: Path, **crm: int) -> Config:
    base = small_config(run, ray=RAY)
    return dataclasses.replace(base, crm_train=dataclasses.replace(base.crm_train, **crm))


def crm_digest(run: Path) -> str:
    return read_manifest(Folder(str(run / "crm")), CRM).content_digest


def test_a_crm_and_an_adapter_train_on_two_workers_and_are_seen_in_the_metrics(cluster: Cluster, run: Path) -> None:
    settings = config(run)
    assert not crm_target(settings).is_current, "the prepared one was trained without workers"
    train_stage(settings, "crm")
    assert crm_target(settings).is_current
    train_stage(settings, "adapter", "reclora")
    assert adapter_target(settings, "reclora").is_current
    facts = read_manifest(Folder(str(run / "adapters" / "reclora")), ADAPTER).facts
    assert facts["steps"] == facts["best_step"] > 5
    assert 0 < facts["validation_auc"] < 1
    assert not list((run / "checkpoints").rglob("*.json")), "the stages are complete"
    expected = {name for metric in TRAINING for name in names.series(metric)}
    assert expected <= seen(cluster, expected)


TRAINING = [metric for metric in names.ALL if metric.name.startswith("reclora_train")]


def seen(cluster: Cluster, expected: set[str]) -> set[str]:
    """Series at the metrics endpoints, as soon as all expected ones were there."""
    found, end = scrape(cluster), time.monotonic() + 20
    while not expected <= found and time.monotonic() < end:
        time.sleep(1)
        found |= scrape(cluster)
    return found


def test_a_worker_that_is_killed_is_replaced_and_nothing_changes(
    cluster: Cluster, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = config(run, epochs=12, checkpoint_every=7)
    train_stage(settings, "crm")
    undisturbed = crm_digest(run)
    shutil.rmtree(run / "crm")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(run / "checkpoints", killed), daemon=True)
    killer.start()
    train_stage(settings, "crm")
    killer.join(timeout=5)
    assert killed, "no worker was killed: the run was over before its first checkpoint was seen"
    assert crm_digest(run) == undisturbed


def kill_a_worker(checkpoints: Path, killed: list[int]) -> None:
    """SIGKILL one training worker of this process's cluster once a checkpoint is complete."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        workers = [p for p in psutil.Process().children(recursive=True) if is_worker(p)]
        if workers and next(checkpoints.rglob("manifest.json"), None):
            os.kill(workers[-1].pid, signal.SIGKILL)
            killed.append(workers[-1].pid)
            return
        time.sleep(0.05)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in "".join(process.cmdline())
    except psutil.Error:
        return False


def test_sizes_that_do_not_divide_start_no_worker(run: Path) -> None:
    with pytest.raises(ValueError, match=r"crm_train\.batch_size 7 is not a multiple of 2"):
        train_stage(config(run, batch_size=7), "crm")


def test_without_workers_it_runs_in_this_process(run: Path) -> None:
    settings = dataclasses.replace(config(run), ray=RayConfig(workers=0))
    before = crm_digest(run)
    shutil.rmtree(run / "crm")
    train_stage(settings, "crm")
    assert crm_digest(run) == before, "the same as a direct call"


def with_items(run: Path, texts: dict[int, str], trained: set[int], ancestors: list[str]) -> Manifest:
    """Give the run's events these item texts; only ``trained`` items occur in training."""
    folder = Folder(str(run / "events"))
    made = read_manifest(folder, EVENTS)
    old = read_parts(folder, made.select("items/")).to_pylist()
    rows = [{**old[(n - 1) % len(old)], "item": n, "item_id": f"i{n}", "text": text} for n, text in texts.items()]
    rows = [{**row, "train_events": int(row["item"] in trained)} for row in rows]
    entry = write_part(folder, "items/", 0, pa.Table.from_pylist(rows, schema.items(1)), 500)
    files = (entry, *(e for e in made.files if not e.path.startswith("items/")))
    facts = {**made.facts, "items": len(rows), "ancestors": ancestors}
    return commit(folder, dataclasses.replace(made, files=files, facts=facts))


def vectors_of(run: Path) -> np.ndarray:
    folder = Folder(str(run / "vectors"))
    return read_array(folder, read_manifest(folder, VECTORS), "vectors")


def test_items_of_a_later_day_are_projected_as_those_before(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    texts = {n: f"A record, number {n * n}, of {['jazz', 'rock', 'folk'][n % 3]}." for n in range(1, 46)}
    first = {n: texts[n] for n in range(1, 41)}
    base = dataclasses.replace(config(run), embed=EmbedConfig(path=str(run / "backbone"), dimension=6))
    earlier = with_items(run, first, set(range(1, 31)), [])
    embed_items(base)
    before = vectors_of(run)
    assert before.shape == (41, 6)

    later = Path(shutil.copytree(run, tmp_path / "later"))
    shutil.rmtree(later / "vectors")
    with_items(later, texts, set(range(1, 46)), [earlier.content_digest])
    previous = dataclasses.replace(base.embed, previous=str(run / "vectors"))
    embed_items(dataclasses.replace(base, paths=PathsConfig(str(later)), embed=previous))
    np.testing.assert_array_equal(vectors_of(later)[:41], before)
    check_grid(vectors_of(later))

    with_items(run, {**first, 40: "Quite another text."}, set(range(1, 31)), [])
    embed_items(base)
    untouched = np.abs(vectors_of(run)[1:40] - before[1:40]).max()
    assert untouched < 1e-3, "no training event, no say in the projection"
    assert np.abs(vectors_of(run)[40] - before[40]).max() > 1e-2

    with pytest.raises(ContractError, match="do not go on from"):
        embed_items(dataclasses.replace(base, paths=PathsConfig(str(later)), embed=previous))
    with_items(later, texts, set(range(1, 46)), [read_manifest(Folder(str(run / "events")), EVENTS).content_digest])
    with pytest.raises(ContractError, match="another encoder, or with another dimension"):
        other = dataclasses.replace(previous, dimension=5)
        embed_items(dataclasses.replace(base, paths=PathsConfig(str(later)), embed=other))
