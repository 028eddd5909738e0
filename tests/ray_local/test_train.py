"""Embedding and training on a real Ray cluster with two workers, and serving what they trained, while a real Prometheus
looks on: results, metrics, and a worker that is killed.

One file, for all of it looks at one training, and the tests of a file stay in one process.
"""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import requests
import yaml
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from sample_data import small_config

from reclora_dist.config.schema import (
    Config,
    EmbedConfig,
    EvaluateConfig,
    PathsConfig,
    RayConfig,
    ServeConfig,
    TrackingConfig,
)
from reclora_dist.config.targets import adapter_target, crm_target
from reclora_dist.contract import schema
from reclora_dist.contract.arrays import read_array
from reclora_dist.contract.manifest import ContractError, Manifest, commit, read_manifest
from reclora_dist.contract.parts import read_parts, write_part
from reclora_dist.contract.schema import ADAPTER, CRM, EVALUATION, EVENTS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app import service
from reclora_dist.ray_app.embed import embed_items
from reclora_dist.ray_app.evaluate import evaluate_run, ranking_result, results, slice_results
from reclora_dist.ray_app.session import Cluster, connect
from reclora_dist.ray_app.summary import write_summary
from reclora_dist.ray_app.trainer import train_all
from reclora_dist.retrieval import check_grid
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.train.errors import Diverged

pytestmark = pytest.mark.ray
RAY = RayConfig(workers=2, object_store_mib=100)
ALONE = dataclasses.replace(RAY, workers=1)
"""Where the number of workers changes nothing: each takes ten seconds to start."""

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring" / "prometheus"
PATIENCE_S = 120.0
LONG = {"epochs": 12, "checkpoint_every": 7}
"""A training of the CRM that lasts long enough to be disturbed."""


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian, Ubuntu: apt install prometheus)")
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port = free_port()
    with connect(dataclasses.replace(RAY, metrics_port=port)) as cluster:
        assert cluster.started
        assert [target.rpartition(":")[2] for target in cluster.metrics] == [str(port)]
        yield cluster


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a Prometheus that scrapes the cluster every second; the shipped configuration, other targets.

    Empty where it is not installed: training needs none.
    """
    program = shutil.which("prometheus")
    if program is None:
        yield ""
        return
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yaml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = list(cluster.metrics)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    arguments = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        address = f"127.0.0.1:{port}"
        process = subprocess.Popen([program, *arguments, f"--web.listen-address={address}"], stderr=log)
        yield f"http://{address}"
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def trained(cluster: Cluster, prometheus: str, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a CRM and an adapter of two workers, watched from the first step on."""
    run = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("trained") / "run"))
    settings = config(run, **LONG)
    assert not crm_target(settings).is_current, "the prepared one was trained for fewer epochs"
    train_all(settings, ("crm", "reclora"))
    return run


@pytest.fixture
def served(cluster: Cluster, trained: Path) -> Iterator[None]:
    """Serve the adapter, score once and evaluate."""
    adapter = str(trained / "adapters" / "reclora")
    with service.running(adapter, ServeConfig(port=0), EvaluateConfig(bootstrap=5), cluster) as url:
        requests.post(f"{url}/v1/score", json={"user": "u1", "candidates": ["i1", "i2"]}, timeout=60).raise_for_status()
        requests.post(f"{url}/v1/evaluations", json={"split": "validation"}, timeout=60).raise_for_status()
        yield


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def config(run: Path, **crm: Any) -> Config:
    base = small_config(run, ray=RAY)
    return dataclasses.replace(base, crm_train=dataclasses.replace(base.crm_train, **crm))


def crm_digest(run: Path) -> str:
    return read_manifest(Folder(str(run / "crm")), CRM).content_digest


def test_ray_train_is_told_which_cluster_it_is_in(cluster: Cluster) -> None:
    """Else it asks the machine's newest one whether the training goes on, and frees its resources if not."""
    assert get_env_vars_to_propagate()["RAY_ADDRESS"] == cluster.address


def test_a_crm_and_an_adapter_train_on_two_workers(trained: Path) -> None:
    settings = config(trained, **LONG)
    assert crm_target(settings).is_current
    assert adapter_target(settings, "reclora").is_current
    facts = read_manifest(Folder(str(trained / "adapters" / "reclora")), ADAPTER).facts
    assert facts["steps"] == facts["best_step"] > 5
    assert 0 < facts["validation_auc"] < 1
    assert not list((trained / "checkpoints").rglob("*.json")), "the stages are complete"


def samples(prometheus: str, query: str) -> list[dict[str, Any]]:
    """The result of an instant query, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_S
    result: list[dict[str, Any]] = []
    while not result and time.monotonic() < deadline:
        try:
            answer = requests.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=10).json()
        except requests.ConnectionError:  # it is still starting
            answer = {"data": {"result": []}}
        result = answer["data"]["result"]
        time.sleep(0.0 if result else 0.5)
    assert result, f"Prometheus has nothing for {query}"
    return result


def test_prometheus_finds_every_series_with_its_labels_and_the_values_of_the_run(
    prometheus: str, trained: Path, served: None
) -> None:
    tool("prometheus")
    watched = [metric for metric in names.ALL if not metric.name.startswith("reclora_spark_")]
    assert len(watched) > 10
    for metric in watched:
        for name in names.series(metric):
            labels = samples(prometheus, f"last_over_time({name}[5m])")[0]["metric"]
            assert set(metric.labels) <= set(labels), name
    steps = samples(prometheus, 'last_over_time(ray_reclora_train_steps_total{stage="crm"}[5m])')
    assert float(steps[0]["value"][1]) == read_manifest(Folder(str(trained / "crm")), CRM).facts["steps"]
    candidates = samples(prometheus, "ray_reclora_serve_candidates_total")
    assert float(candidates[0]["value"][1]) == 2
    auc = samples(prometheus, 'ray_reclora_evaluation_metric{metric="auc",split="validation",model="reclora"}')
    assert 0 <= float(auc[0]["value"][1]) <= 1


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yaml"), ("check", "rules", "alerts.yaml"), ("test", "rules", "alerts_test.yaml")],
)
def test_promtool_accepts_what_we_ship(command: tuple[str, str, str]) -> None:
    done = subprocess.run([tool("promtool"), *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_worker_that_is_killed_is_replaced_and_nothing_changes(
    cluster: Cluster, trained: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(run / "checkpoints", killed), daemon=True)
    killer.start()
    train_all(config(run, **LONG), ("crm",))
    killer.join(timeout=5)
    assert killed, "no worker was killed: the run was over before its first checkpoint was seen"
    assert crm_digest(run) == crm_digest(trained)
    assert re.search(r"crm: worker \d failed: .+; starting again from step \d+", capsys.readouterr().out)


def test_what_would_fail_again_is_not_tried_again(
    cluster: Cluster, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that diverges: one message, no restart, and the checkpoints before it stay."""
    settings = config(run, **{**LONG, "checkpoint_every": 1}, lr=1e30, clip=0.0)
    with pytest.raises(Diverged, match=r"crm: step \d+ has loss .* Lower lr or clip"):
        train_all(settings, ("crm",))
    assert "starting again" not in capsys.readouterr().out


def test_workers_that_never_get_to_a_checkpoint_are_given_up(cluster: Cluster, run: Path) -> None:
    """What each try does is no error of ours: the run folder cannot be written to."""
    settings = dataclasses.replace(config(run, **LONG), ray=dataclasses.replace(ALONE, max_failures=1))
    settings = dataclasses.replace(settings, tracking=TrackingConfig(tensorboard=False))
    settings = dataclasses.replace(settings, crm_train=dataclasses.replace(settings.crm_train, storage_patience=0.0))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "crm").write_text("a file where a folder should be")
    with pytest.raises(RuntimeError, match=r"crm: the workers failed 2 times in a row without a new checkpoint"):
        train_all(settings, ("crm",))


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


def test_sizes_that_cannot_work_start_no_worker(run: Path) -> None:
    with pytest.raises(ValueError, match=r"crm_train\.batch_size 1 leaves some of 2 workers without a sample"):
        train_all(config(run, batch_size=1), ("crm",))


def test_without_workers_it_runs_in_this_process(run: Path) -> None:
    settings = dataclasses.replace(config(run), ray=RayConfig(workers=0))
    before = crm_digest(run)
    shutil.rmtree(run / "crm")
    train_all(settings, ("crm",))
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


def test_an_evaluation_has_slices_and_the_ranking_whatever_the_workers(cluster: Cluster, trained: Path) -> None:
    found = []
    for workers in (2, 1):
        settings = dataclasses.replace(
            config(trained, **LONG),
            adapters={"reclora": small_config(trained).adapters["reclora"]},
            ray=dataclasses.replace(RAY, workers=workers),
            evaluate=EvaluateConfig(bootstrap=20, ranking_users=10),
            compare=(("reclora", "crm"),),
        )
        evaluate_run(settings, NullMeters())
        found.append(read_manifest(Folder(str(trained / "evaluation")), EVALUATION))
    drawn = [entry.sha256 for record in found for entry in record.select("candidates/")]
    assert drawn[0] == drawn[1]

    slices, all_rows = slice_results(settings, "test")
    assert [s.name for s in slices] == [s.name for s in all_rows]
    by_name = {s.name: s for s in slices}
    whole = by_name["rare_items"]
    assert by_name["known_users"].rows == whole.rows > 100, "all items have one training event, all users samples"
    assert set(whole.models) == {"running_averages", "crm", "reclora"}
    assert set(whole.models["reclora"]) == {"auc", "gauc", "logloss", "acc", "ece"}
    models, differences = results(settings, "test", {})
    assert models[2].metrics == whole.models["reclora"]
    assert whole.differences == differences
    assert (by_name["new_users"].rows, by_name["new_users"].models["crm"]) == (0, {})

    ranking = ranking_result(settings)
    assert ranking is not None
    assert (ranking.users, ranking.candidates) == (10, 20)
    assert set(ranking.models) == {"running_averages", "crm", "reclora"}
    rank = ranking.models["crm"]
    assert 0 <= rank["hit_ratio_at_1"].mean <= rank["ndcg_at_5"].mean <= 1
    assert [d.metric for d in ranking.differences] == ["hit_ratio_at_1", "ndcg_at_5", "mrr"]
    folder = Folder(str(trained / "evaluation"))
    write_summary(settings, {})
    report = (trained / "report" / "report.md").read_text()
    assert "## Slices of all rows" in report
    assert "## Next liked item among 20 (10 users)" in report
    lists = read_parts(folder, found[-1].select("candidates/"))
    scores = read_parts(folder, found[-1].select("predictions/ranking/crm/"))
    assert lists.select(["sample_id", "user", "label"]).equals(scores.select(["sample_id", "user", "label"]))


def vectors_of(run: Path) -> np.ndarray:
    folder = Folder(str(run / "vectors"))
    return read_array(folder, read_manifest(folder, VECTORS), "vectors")


def test_items_of_a_later_day_are_projected_as_those_before(cluster: Cluster, run: Path, tmp_path: Path) -> None:
    texts = {n: f"A record, number {n * n}, of {['jazz', 'rock', 'folk'][n % 3]}." for n in range(1, 46)}
    first = {n: texts[n] for n in range(1, 41)}
    base = dataclasses.replace(config(run), ray=ALONE, embed=EmbedConfig(path=str(run / "backbone"), dimension=6))
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
