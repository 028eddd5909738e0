"""Start and end of the service, and its evaluations, with stand-ins for Ray; tests/ray_local has the real ones."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.schema import ApplicationStatus

from reclora_dist.config.schema import Config, EvaluateConfig, ServeConfig
from reclora_dist.contract.manifest import ContractError
from reclora_dist.ray_app import check, service
from reclora_dist.ray_app.messages import Evaluation, EvaluationRequest, Interval, Rejected
from reclora_dist.ray_app.session import Cluster
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.telemetry.names import EVALUATION_METRIC, Metric

OURS = Cluster("127.0.0.1:1", "", (), started=True)
JOINED = Cluster("127.0.0.1:1", "", (), started=False)
EVALUATE = EvaluateConfig()


class FakeServe:
    """Ray Serve that listens already: remembers its applications and what it was asked to do."""

    def __init__(self) -> None:
        self.applications: dict[str, Any] = {}
        self.deleted: list[str] = []
        self.on_run: Callable[[], None] = lambda: None

    def status(self) -> Any:
        return SimpleNamespace(applications=self.applications)

    def run(self, _: Any, name: str, **__: Any) -> None:
        self.applications[name] = SimpleNamespace(status=ApplicationStatus.DEPLOYING)
        self.on_run()

    def delete(self, name: str) -> None:
        self.deleted.append(name)
        del self.applications[name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    fake = FakeServe()
    client = SimpleNamespace(http_config=SimpleNamespace(host="127.0.0.1", port=8000))
    monkeypatch.setattr(service, "serve", fake)
    monkeypatch.setattr(service, "_client", lambda: client)
    monkeypatch.setattr(service, "_disconnect", lambda: None)
    monkeypatch.setattr(service, "read_manifest", lambda *_: None)
    monkeypatch.setattr(service, "application", lambda *_: None)
    monkeypatch.setattr(service.ray, "cluster_resources", lambda: {"CPU": 2.0})
    return fake


def serve(config: ServeConfig, cluster: Cluster = OURS) -> str:
    with service.running("/adapter", config, EVALUATE, cluster) as url:
        return url


def test_a_service_of_another_process_is_refused_and_stays(fake: FakeServe) -> None:
    other = fake.applications["reclora"] = SimpleNamespace(status=ApplicationStatus.RUNNING)
    with pytest.raises(ValueError, match=r"'reclora' is on this cluster already \(RUNNING\).*serve\.check=false"):
        serve(ServeConfig())
    assert fake.applications == {"reclora": other}


def test_a_start_that_is_interrupted_leaves_no_application(fake: FakeServe) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fake.on_run = interrupt
    with pytest.raises(KeyboardInterrupt):
        serve(ServeConfig())
    assert fake.deleted == ["reclora"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_ends_the_service(fake: FakeServe, number: int) -> None:
    def killed() -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)
        raise AssertionError("the start went on")

    fake.on_run = killed
    before = signal.getsignal(number)
    service.serve_until_stopped("/adapter", ServeConfig(), EVALUATE, OURS)
    assert fake.deleted == ["reclora"]
    assert signal.getsignal(number) == before


def test_a_check_that_fails_leaves_no_application(fake: FakeServe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("HTTP 500")

    monkeypatch.setattr(check, "_call", refuse)
    scraper: Any = SimpleNamespace(cluster=OURS)
    config = Config(serve=ServeConfig(adapter="/adapter"))
    with pytest.raises(RuntimeError, match="HTTP 500"):
        check.check_service(config, scraper, set())
    assert fake.deleted == ["reclora"]


def test_another_address_than_the_one_that_ray_serve_has_is_refused(fake: FakeServe) -> None:
    assert serve(ServeConfig(port=0)) == serve(ServeConfig(port=8000)) == "http://127.0.0.1:8000"
    for asked in (ServeConfig(port=8001), ServeConfig(host="10.0.0.1")):
        words = rf"listens on 127\.0\.0\.1:8000 already, serve\.host and serve\.port ask for {asked.host}:{asked.port}:"
        with pytest.raises(ValueError, match=words):
            serve(asked)


def test_replicas_that_would_wait_forever_are_refused(fake: FakeServe) -> None:
    serve(ServeConfig(replicas=1, threads=1))
    with pytest.raises(ValueError, match=r"serve\.replicas 2 x serve\.threads 1 and 1 .* ask for 3 CPUs, .* finds 2"):
        serve(ServeConfig(replicas=2))
    with pytest.raises(ValueError, match=r"serve\.replicas 1 x serve\.gpus 1 and 1 .* ask for 2 GPUs, .* finds 0"):
        serve(ServeConfig(gpus=1))
    serve(ServeConfig(replicas=2, gpus=1), JOINED)  # its autoscaler may bring them


def test_a_check_does_not_wait_forever_for_a_free_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_call", lambda *_: {"id": "e1", "status": "pending"})
    monkeypatch.setattr(check, "START_PATIENCE_S", 0.0)
    with pytest.raises(RuntimeError, match=r"evaluation has waited 0 s for a free CPU .*serve\.gpus.*"):
        check._evaluate("http://service")


class Gauges(NullMeters):
    def __init__(self) -> None:
        self.gauges: set[str] = set()

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        super().set(metric, value, **labels)
        self.gauges.add(metric.name)


def evaluated(monkeypatch: pytest.MonkeyPatch, answer: Any, **request: Any) -> tuple[Evaluation, set[str]]:
    """How an evaluation ends whose process answers, or raises, ``answer``; and the gauges that it sets."""

    async def ready() -> None:
        return None

    async def evaluate(*_: Any) -> Any:
        if isinstance(answer, RayError):
            raise answer
        return answer

    run = SimpleNamespace(ready=SimpleNamespace(remote=ready), evaluate=SimpleNamespace(remote=evaluate))
    monkeypatch.setattr(service.ray, "remote", lambda **_: lambda _: SimpleNamespace(remote=lambda: run))
    meters = Gauges()
    monkeypatch.setattr(service, "RayMeters", lambda: meters)

    async def follow() -> Evaluation:
        evaluator = service.Evaluator("/adapter", EVALUATE, 0)
        started = await evaluator.start(EvaluationRequest(split="test", **request))
        assert isinstance(started, Evaluation)
        await asyncio.gather(*evaluator.tasks)
        found = await evaluator.find(started.id)
        assert found is not None
        return found

    return asyncio.run(follow()), meters.gauges


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RayTaskError("evaluate", "in s3://bucket/run", ContractError("s3://bucket/run has no manifest.json")),
            "the evaluation failed: the service's log says why",
        ),
        (
            RayActorError(None, "actor 4f2a on node 10.0.0.7 died"),
            "the evaluation's process was lost: the service's log says why",
        ),
    ],
)
def test_a_client_is_told_no_internals_of_a_failure_and_the_log_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: RayError, words: str
) -> None:
    with caplog.at_level(logging.ERROR):
        failed, _ = evaluated(monkeypatch, error)
    assert (failed.status, failed.error) == ("failed", words)
    assert "s3://bucket" in caplog.text or "10.0.0.7" in caplog.text


def test_metrics_that_the_samples_do_not_allow_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, _ = evaluated(monkeypatch, Rejected("all 1 labels are 1: AUC is undefined"))
    assert (failed.status, failed.error) == ("failed", "all 1 labels are 1: AUC is undefined")


def test_an_evaluation_of_some_samples_is_not_published_as_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    result = service._Result("reclora", 7, {"auc": Interval(mean=0.4, low=0.3, high=0.5)})
    whole, gauges = evaluated(monkeypatch, result)
    assert (whole.status, gauges) == ("done", {EVALUATION_METRIC.name})
    part, gauges = evaluated(monkeypatch, result, limit=7)
    assert (part.status, gauges) == ("done", set())
