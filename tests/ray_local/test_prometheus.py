"""A real Prometheus scrapes a Ray cluster on which a stage trains, an adapter serves and an evaluation runs."""

import dataclasses
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from sample_data import small_config, write_run

from reclora_dist.config.schema import EngineConfig, EvaluateConfig, RayConfig, ServeConfig
from reclora_dist.ray_app import service
from reclora_dist.ray_app.session import Cluster, connect
from reclora_dist.ray_app.trainer import train_stage
from reclora_dist.telemetry import names
from reclora_dist.telemetry.names import series
from reclora_dist.train import stages
from reclora_dist.train.context import Context

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring" / "prometheus"
PATIENCE_S = 60.0


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
    tool("prometheus")
    port = free_port()
    with connect(RayConfig(metrics_port=port)) as cluster:
        assert cluster.started
        assert [target.rpartition(":")[2] for target in cluster.metrics] == [str(port)]
        yield cluster


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a Prometheus that scrapes the cluster every second; the shipped configuration, other targets."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yaml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = list(cluster.metrics)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    arguments = [f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        address = f"127.0.0.1:{port}"
        process = subprocess.Popen([tool("prometheus"), *arguments, f"--web.listen-address={address}"], stderr=log)
        yield f"http://{address}"
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def demo(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Train on a Ray worker, then serve, score once and evaluate."""
    run = tmp_path_factory.mktemp("run")
    write_run(run)
    config = small_config(run, engine=EngineConfig(kind="torch"), ray=RayConfig(workers=1))
    stages.train_backbone(config)
    train_stage(config, "crm")
    stages.train_adapter(dataclasses.replace(config, ray=RayConfig(workers=0)), "reclora", Context())
    adapter = str(run / "adapters" / "reclora")
    url = service.run(adapter, ServeConfig(port=0), EvaluateConfig(bootstrap=5))
    requests.post(f"{url}/v1/score", json={"user": "u1", "candidates": ["i1", "i2"]}, timeout=60).raise_for_status()
    requests.post(f"{url}/v1/evaluations", json={"split": "validation", "limit": 50}, timeout=60).raise_for_status()
    yield
    service.shutdown()


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


TRAINING = (
    names.TRAIN_STEPS,
    names.TRAIN_SAMPLES,
    names.TRAIN_LOSS,
    names.TRAIN_SAMPLES_PER_SECOND,
    names.TRAIN_LEARNING_RATE,
    names.TRAIN_GRADIENT_NORM,
    names.TRAIN_STEP_SECONDS,
    names.TRAIN_VALIDATION_AUC,
)
SERVING = (names.SERVE_REQUESTS, names.SERVE_LATENCY_SECONDS, names.SERVE_BATCH_ROWS, names.SERVE_CANDIDATES)
EVALUATION = (names.EVALUATION_METRIC, names.EVALUATION_SAMPLES)


@pytest.mark.ray
@pytest.mark.parametrize("metrics", [TRAINING, SERVING, EVALUATION], ids=["training", "serving", "evaluation"])
def test_prometheus_finds_every_series_with_its_labels(
    prometheus: str, demo: None, metrics: Sequence[names.Metric]
) -> None:
    for metric in metrics:
        for name in series(metric):
            labels = samples(prometheus, f"last_over_time({name}[5m])")[0]["metric"]
            assert set(metric.labels) <= set(labels), name


@pytest.mark.ray
def test_the_values_are_those_of_the_run(prometheus: str, demo: None) -> None:
    steps = samples(prometheus, 'last_over_time(ray_reclora_train_steps_total{stage="crm"}[5m])')
    assert float(steps[0]["value"][1]) == 20
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
