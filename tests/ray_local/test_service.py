"""A real adapter behind a real Ray Serve, asked over HTTP."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import requests
from sample_data import small_config, write_run

from reclora_dist.config.schema import EngineConfig, EvaluateConfig, RayConfig, ServeConfig
from reclora_dist.contract.manifest import ContractError, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.data.features import FeatureStore
from reclora_dist.evaluate.metrics import binary_metrics
from reclora_dist.evaluate.scorer import Scorer
from reclora_dist.ray_app import service
from reclora_dist.ray_app.session import Cluster, connect
from reclora_dist.train import stages
from reclora_dist.train.context import Context

pytestmark = pytest.mark.ray
EVALUATE = EvaluateConfig(bootstrap=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    config = small_config(folder, engine=EngineConfig(kind="torch"))
    stages.train_backbone(config)
    stages.train_crm(config, Context())
    stages.train_adapter(config, "reclora", Context())
    return folder


@pytest.fixture(scope="module")
def adapter(run: Path) -> Folder:
    return Folder(str(run / "adapters" / "reclora"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect(RayConfig()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def url(adapter: Folder, cluster: Cluster) -> Iterator[str]:
    config = ServeConfig(port=0, max_batch=8, batch_wait_ms=20, max_candidates=50)
    with service.running(adapter.uri, config, EVALUATE, cluster) as url:
        yield url


@pytest.fixture(scope="module")
def store(run: Path) -> FeatureStore:
    return FeatureStore.load(Folder(str(run / "events")), Folder(str(run / "vectors")))


@pytest.fixture(scope="module")
def scorer(adapter: Folder) -> Scorer:
    return Scorer.load(adapter)


def score(url: str, **request: Any) -> requests.Response:
    return requests.post(f"{url}/v1/score", json=request, timeout=60)


def found(response: requests.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return [entry["score"] for entry in response.json()["scores"]]


def test_a_taken_port_and_a_path_without_adapter_are_refused(cluster: Cluster, adapter: Folder, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        start(
            cluster,
            adapter.uri,
            ServeConfig(port=port),
            f"port {port} of 127.0.0.1 cannot be taken .*: set serve.port to another",
        )
    start(cluster, str(tmp_path), ServeConfig(port=0), r"has no manifest\.json", ContractError)


def start(cluster: Cluster, adapter: str, config: ServeConfig, words: str, kind: type[Exception] = ValueError) -> None:
    """Start a service that is refused with ``words``."""
    with pytest.raises(kind, match=words), service.running(adapter, config, EVALUATE, cluster):
        pass


def test_a_second_service_is_refused_and_the_first_goes_on(url: str, cluster: Cluster, adapter: Folder) -> None:
    start(cluster, adapter.uri, ServeConfig(host="0.0.0.0", port=0), r"Ray Serve listens on 127\.0\.0\.1:\d+ already")
    start(cluster, adapter.uri, ServeConfig(port=0), r"application 'reclora' is on this cluster already \(RUNNING\)")
    assert requests.get(f"{url}/healthz", timeout=60).status_code == 200


def test_scores_are_the_librarys_in_the_order_asked(url: str, store: FeatureStore, scorer: Scorer) -> None:
    candidates = ["i7", "i3", "i31", "i3"]
    response = score(url, user="u5", candidates=candidates)
    rows = store.rows(candidates, scorer.config.retrieval, user="u5")
    assert found(response) == pytest.approx(scorer.score(rows).tolist(), abs=1e-6)
    answer = response.json()
    assert answer["model"] == "reclora"
    assert [entry["item"] for entry in answer["scores"]] == candidates
    assert answer["scores"][0]["title"] == store.titles[7]
    assert answer["time"] == rows["time"][0].as_py()


def test_an_earlier_time_and_an_explicit_history_are_scored(url: str, store: FeatureStore, scorer: Scorer) -> None:
    early = store.rows(["i1"], scorer.config.retrieval, user="u5", time=5_000_000)
    assert found(score(url, user="u5", candidates=["i1"], time=5_000_000)) == pytest.approx(
        scorer.score(early), abs=1e-6
    )
    history = [{"item": "i2", "rating": 5}, {"item": "i9", "rating": 1.0}]
    liked = found(score(url, history=history, candidates=["i1", "i2"], profile={"group": "a"}))
    swapped = [{"item": "i2", "rating": 1}, {"item": "i9", "rating": 5.0}]
    assert liked != pytest.approx(found(score(url, history=swapped, candidates=["i1", "i2"])), abs=1e-9)


REFUSED = {
    "unknown user": (
        {"user": "nobody", "candidates": ["i1"]},
        "user 'nobody' is not in the log: send the user's history",
    ),
    "unknown item": ({"user": "u1", "candidates": ["i1", "i999"]}, "candidates holds item 'i999', not in the log"),
    "empty history": ({"history": [], "candidates": ["i1"]}, "history is empty: send at least one event"),
    "no candidates": ({"user": "u1", "candidates": []}, "candidates is empty: name at least one item to score"),
    "rating": (
        {"history": [{"item": "i1", "rating": 9}], "candidates": ["i1"]},
        "rating 9.0 of item 'i1' is not on the",
    ),
    "too many": ({"user": "u1", "candidates": ["i1"] * 51}, "51 candidates, this service takes at most 50"),
    "no time before": ({"user": "u1", "candidates": ["i1"], "time": -1}, "user 'u1' has no event before time -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_4xx_and_the_librarys_words(url: str, case: str) -> None:
    request, words = REFUSED[case]
    response = score(url, **request)
    assert response.status_code == 422
    assert response.json()["detail"].startswith(words)


def test_nan_rating_is_refused_by_value(url: str) -> None:
    body = '{"history": [{"item": "i1", "rating": NaN}], "candidates": ["i1"]}'
    response = requests.post(f"{url}/v1/score", data=body, headers={"content-type": "application/json"}, timeout=60)
    assert response.status_code == 422
    assert response.json()["detail"].startswith("rating nan of item 'i1' is not on the scale: use one of 1, 2, 3")


def test_requests_at_the_same_time_are_scored_together_and_not_mixed_up(url: str) -> None:
    users = [f"u{n}" for n in range(1, 25)]
    alone = [found(score(url, user=user, candidates=["i4", "i5"])) for user in users]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda user: score(url, user=user, candidates=["i4", "i5"]), [*users, "nobody"]))
    assert answers.pop().status_code == 422
    for one, together in zip(alone, answers, strict=True):
        assert found(together) == pytest.approx(one, abs=1e-6)


def test_evaluation_runs_in_the_background_and_gives_the_librarys_metrics(url: str, run: Path, scorer: Scorer) -> None:
    started = requests.post(f"{url}/v1/evaluations", json={"split": "validation", "limit": 100}, timeout=60)
    assert started.status_code == 202
    assert started.json()["status"] in ("pending", "running")
    found(score(url, user="u1", candidates=["i1"]))
    done = _finished(url, started.json()["id"])
    assert done["status"] == "done", done["error"]
    shards = Folder(str(run / "shards"))
    entries = read_manifest(shards, SHARDS).select("text/split=validation/")
    rows = read_parts(shards, entries).slice(0, 100)
    expected = binary_metrics(rows["label"].to_numpy(), scorer.score(rows), rows["user"].to_numpy(), EVALUATE)
    assert done["samples"] == rows.num_rows == 100
    for name, interval in expected.items():
        assert done["metrics"][name]["mean"] == pytest.approx(interval.mean, abs=1e-6)
        assert done["metrics"][name]["low"] <= done["metrics"][name]["high"]


def test_an_evaluation_that_cannot_be_done_says_why(url: str) -> None:
    started = requests.post(f"{url}/v1/evaluations", json={"split": "test", "limit": 1}, timeout=60).json()
    failed = _finished(url, started["id"])
    assert failed["status"] == "failed"
    assert "AUC is undefined" in failed["error"]
    unknown = requests.get(f"{url}/v1/evaluations/none", timeout=60)
    assert (unknown.status_code, unknown.json()["detail"][:29]) == (404, "evaluation 'none' is unknown:")


def _finished(url: str, identifier: str) -> dict[str, Any]:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        state = requests.get(f"{url}/v1/evaluations/{identifier}", timeout=60).json()
        if state["status"] in ("done", "failed"):
            return dict(state)
        time.sleep(0.2)
    raise TimeoutError(f"evaluation {identifier} is still {state['status']}")


def test_health_and_openapi_page(url: str) -> None:
    health = requests.get(f"{url}/healthz", timeout=60)
    assert health.json() == {"status": "ok", "model": "reclora", "users": 60, "items": 40}
    assert "/v1/score" in requests.get(f"{url}/openapi.json", timeout=60).json()["paths"]
    assert requests.get(f"{url}/docs", timeout=60).status_code == 200


def test_the_cluster_asks_for_a_token_that_no_file_holds(cluster: Cluster) -> None:
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) >= 32
    with connect(RayConfig()) as joined:
        assert not joined.started
        assert requests.get(f"http://{joined.dashboard}/api/version", timeout=60).status_code == 401
        token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
        assert requests.get(f"http://{joined.dashboard}/api/version", headers=token, timeout=60).status_code == 200
        assert joined.dashboard.startswith("127.0.0.1:")
    assert ray.is_initialized(), "leaving a joined cluster does not end it"


def test_a_process_that_joins_by_address_leaves_the_cluster_running(cluster: Cluster) -> None:
    code = (
        "from reclora_dist.config.schema import RayConfig\n"
        "from reclora_dist.ray_app.session import connect\n"
        "with connect(RayConfig()) as cluster: print(cluster.started, len(cluster.metrics))"
    )
    address = ray.get_runtime_context().gcs_address
    joined = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=True,
    )
    assert joined.stdout.strip() == "False 1"
    assert ray.nodes()[0]["Alive"]
