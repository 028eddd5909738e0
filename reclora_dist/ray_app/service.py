"""The scoring service on Ray Serve: an HTTP ingress, model replicas that score requests together, and evaluations.

Three deployments, so that each grows alone: ``Ingress`` speaks HTTP, ``Model`` replicas hold the adapter and the log,
``Evaluator`` keeps the state of evaluations, each of which runs in an actor of its own and never delays a score.
"""

import asyncio
import dataclasses
import logging
import math
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import HTTPOptions
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from reclora_dist.config.schema import EvaluateConfig, ServeConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import ADAPTER, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.data.features import HistoryEvent, RequestError
from reclora_dist.ray_app.api import build_api
from reclora_dist.ray_app.messages import (
    Evaluation,
    EvaluationRequest,
    Health,
    Interval,
    ItemScore,
    Rejected,
    ScoreRequest,
    ScoreResponse,
)
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.ray_app.session import Cluster, reserved_device
from reclora_dist.telemetry import names

APPLICATION = "reclora"
MAX_UNFINISHED = 8
"""Evaluations that may wait or run at the same time."""

MAX_KEPT = 1000
"""Evaluations whose result is remembered."""

_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_REQUEST_TIMEOUT_S = 120.0
_FAILED = "the evaluation failed: the service's log says why"
_LOST = "the evaluation's process was lost: the service's log says why"

log = logging.getLogger(__name__)


class Model:
    """One replica: the adapter, the log's features, and a queue that gathers requests into batches."""

    def __init__(self, adapter: str, config: ServeConfig) -> None:
        from reclora_dist.evaluate.scorer import Scorer, feature_store

        self.scorer = Scorer.load(Folder(adapter), config.threads, device=reserved_device())
        self.store = feature_store(adapter, self.scorer.config)
        self.meters = RayMeters()
        self.thread = ThreadPoolExecutor(1)  # always the same one: torch keeps a pool of its own per calling thread
        queue: Any = self.score
        queue.set_max_batch_size(config.max_batch)
        queue.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)

    def health(self) -> Health:
        """What this replica serves."""
        return Health(model=self.scorer.name, users=len(self.store.users), items=len(self.store.items))

    @serve.batch
    async def score(self, requests: list[ScoreRequest]) -> list[ScoreResponse | Rejected]:
        """Answer the requests of one batch; a bad one is refused without harm to the others."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._answers, requests)

    def _answers(self, requests: Sequence[ScoreRequest]) -> list[ScoreResponse | Rejected]:
        parts = [self._rows(request) for request in requests]
        tables = [part for part in parts if isinstance(part, pa.Table)]
        scores = iter(self._scores(tables))
        return [
            part if isinstance(part, Rejected) else self._response(request, part, next(scores))
            for request, part in zip(requests, parts, strict=True)
        ]

    def _rows(self, request: ScoreRequest) -> pa.Table | Rejected:
        history = request.history
        events = None if history is None else [HistoryEvent(e.item, e.rating, e.time) for e in history]
        try:
            return self.store.rows(
                request.candidates,
                self.scorer.config.retrieval,
                user=request.user,
                history=events,
                time=request.time,
                profile=request.profile,
            )
        except RequestError as error:
            return Rejected(str(error))

    def _scores(self, tables: list[pa.Table]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """The scores of each table, computed together."""
        if not tables:
            return []
        rows = pa.concat_tables(tables)
        self.meters.observe(names.SERVE_BATCH_ROWS, rows.num_rows)
        self.meters.add(names.SERVE_CANDIDATES, rows.num_rows)
        return np.split(self.scorer.score(rows), np.cumsum([table.num_rows for table in tables])[:-1])

    def _response(self, request: ScoreRequest, rows: pa.Table, scores: Any) -> ScoreResponse:
        answers = [
            ItemScore(item=item, title=self.store.titles[self.store.items[item]], score=score)
            for item, score in zip(request.candidates, scores.tolist(), strict=True)
        ]
        return ScoreResponse(model=self.scorer.name, time=rows["time"][0].as_py(), scores=answers)


class _EvaluationRun:
    """One evaluation in a process of its own."""

    def ready(self) -> None:
        """Return as soon as the process runs."""

    def evaluate(self, adapter: str, request: EvaluationRequest, config: EvaluateConfig) -> "_Result | Rejected":
        """Score the samples of a split; refused where their metrics are undefined."""
        from reclora_dist.evaluate.metrics import binary_metrics
        from reclora_dist.evaluate.scorer import Scorer, check_reference, referenced

        folder = Folder(adapter)
        scorer = Scorer.load(folder, 1, config.batch_size, reserved_device())
        shards = referenced(folder, scorer.config, "shards")
        manifest = read_manifest(shards, SHARDS)
        check_reference(scorer.config, "shards", manifest)
        rows = read_parts(shards, manifest.select(f"text/split={request.split}/")).slice(0, request.limit)
        labels, users, scores = rows["label"].to_numpy(), rows["user"].to_numpy(), scorer.score(rows)
        try:
            metrics = binary_metrics(labels, scores, users, config)
        except ValueError as error:  # it speaks of labels and scores, and of no path
            return Rejected(str(error))
        return _Result(scorer.name, rows.num_rows, {name: _finite(interval) for name, interval in metrics.items()})


@dataclasses.dataclass(frozen=True)
class _Result:
    """Outcome of an evaluation."""

    model: str
    samples: int
    metrics: Mapping[str, Interval]


def _finite(interval: Any) -> Interval:
    """An interval as JSON has it: null for a number that is undefined."""
    values = dataclasses.asdict(interval)
    return Interval(**{name: value if math.isfinite(value) else None for name, value in values.items()})


class Evaluator:
    """Starts evaluations and knows how they stand."""

    def __init__(self, adapter: str, config: EvaluateConfig, gpus: float) -> None:
        self.adapter = adapter
        self.config = config
        self.gpus = gpus
        self.meters = RayMeters()
        self.found: dict[str, Evaluation] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    async def start(self, request: EvaluationRequest) -> Evaluation | Rejected:
        """Accept an evaluation, unless too many are unfinished."""
        if len(self.tasks) >= MAX_UNFINISHED:
            return Rejected(f"{len(self.tasks)} evaluations are unfinished, the most allowed: wait for one to end")
        evaluation = Evaluation(id=uuid.uuid4().hex, split=request.split, limit=request.limit, status="pending")
        while len(self.found) >= MAX_KEPT:
            del self.found[next(iter(self.found))]
        self.found[evaluation.id] = evaluation
        task = asyncio.create_task(self._follow(evaluation.id, request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return evaluation

    async def find(self, identifier: str) -> Evaluation | None:
        """Where an evaluation stands."""
        return self.found.get(identifier)

    async def _follow(self, identifier: str, request: EvaluationRequest) -> None:
        run: Any = ray.remote(num_cpus=1, num_gpus=self.gpus)(_EvaluationRun).remote()
        start = time.perf_counter()
        try:
            await run.ready.remote()
            self._update(identifier, status="running")
            result: _Result | Rejected = await run.evaluate.remote(self.adapter, request, self.config)
        except RayError as error:  # its text has paths, addresses and ids: it is for the log, not for a client
            log.exception("evaluation %s failed", identifier)
            failure = _FAILED if isinstance(error, RayTaskError) else _LOST
            self._update(identifier, status="failed", error=failure)
            return
        if isinstance(result, Rejected):
            self._update(identifier, status="failed", error=result.detail)
            return
        seconds = round(time.perf_counter() - start, 3)
        done = {"samples": result.samples, "seconds": seconds, "metrics": dict(result.metrics)}
        self._update(identifier, status="done", **done)
        self._publish(request, result)

    def _update(self, identifier: str, **changes: Any) -> None:
        self.found[identifier] = self.found[identifier].model_copy(update=changes)

    def _publish(self, request: EvaluationRequest, result: _Result) -> None:
        """Set the gauges here and not in the evaluation's own process, which ends before they are scraped."""
        split = request.split
        self.meters.add(names.EVALUATION_SAMPLES, result.samples, model=result.model, split=split)
        if request.limit is not None:
            return  # the gauges, and the alerts on them, are the whole split's
        for name, interval in result.metrics.items():
            if interval.mean is not None:
                self.meters.set(names.EVALUATION_METRIC, interval.mean, model=result.model, split=split, metric=name)


@dataclasses.dataclass(frozen=True)
class _RemoteModel:
    """The model replicas as the HTTP face sees them."""

    handle: DeploymentHandle[Any]

    async def score(self, request: ScoreRequest) -> ScoreResponse | Rejected:
        answer: ScoreResponse | Rejected = await self.handle.score.remote(request)
        return answer

    async def health(self) -> Health:
        health: Health = await self.handle.health.remote()
        return health


@dataclasses.dataclass(frozen=True)
class _RemoteEvaluator:
    """The evaluator as the HTTP face sees it."""

    handle: DeploymentHandle[Any]

    async def start(self, request: EvaluationRequest) -> Evaluation | Rejected:
        answer: Evaluation | Rejected = await self.handle.start.remote(request)
        return answer

    async def find(self, identifier: str) -> Evaluation | None:
        found: Evaluation | None = await self.handle.find.remote(identifier)
        return found


def application(adapter: str, config: ServeConfig, evaluate: EvaluateConfig) -> serve.Application:
    """The Serve application of one adapter.

    Args:
        adapter: absolute path or URI of the adapter folder, readable from every node.
    """

    def build() -> FastAPI:
        model = serve.get_deployment_handle("Model", app_name=APPLICATION)
        evaluator = serve.get_deployment_handle("Evaluator", app_name=APPLICATION)
        return build_api(_RemoteModel(model), _RemoteEvaluator(evaluator), config, RayMeters())

    waiting = 4 * config.max_batch * config.replicas
    model = _deployment(
        Model,
        num_replicas=config.replicas,
        max_ongoing_requests=2 * config.max_batch,
        ray_actor_options={"num_cpus": config.threads, "num_gpus": config.gpus},
    )
    evaluator = _deployment(Evaluator, ray_actor_options={"num_cpus": 0})
    ingress = _deployment(
        serve.ingress(build)(),
        name="Ingress",
        max_ongoing_requests=waiting,
        max_queued_requests=waiting,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(model.bind(adapter, config), evaluator.bind(adapter, evaluate, config.gpus))


def _deployment(kind: type, **options: Any) -> serve.Deployment:
    name = options.pop("name", kind.__name__)
    return serve.deployment(name=name, logging_config=_QUIET, graceful_shutdown_wait_loop_s=0.5, **options)(kind)


@contextmanager
def running(adapter: str, config: ServeConfig, evaluate: EvaluateConfig, cluster: Cluster) -> Iterator[str]:
    """Serve an adapter on the connected cluster while the block runs; enter it when the service is ready to score.

    A block that fails, and a start that fails or is interrupted, leave no application behind. Ray Serve itself stays
    for other applications and ends with the cluster.

    Args:
        adapter: path or URI of the adapter folder.
        config: with port 0 a free port is taken, or the one that Ray Serve has, where it runs already.
        cluster: the connected one. If it was started here, it has to have room for the replicas and an evaluation.

    Yields:
        The service's base URL.

    Raises:
        ContractError: there is no adapter at the path.
        ValueError: the port is in use, Ray Serve listens elsewhere already, the cluster has such a service already, or
            it is too small.
    """
    folder = Folder(adapter).absolute()
    read_manifest(folder, ADAPTER)
    if cluster.started:  # a joined one may grow
        check_room(config, ray.cluster_resources())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _disconnect()  # Ray Serve remembers a controller by job id, which is the same in every cluster's first driver
    if _client() is None:
        _start_serve(config.host, config.port or _free_port(config.host))
    _require_address(config)
    _require_absent()
    try:
        serve.run(application(folder.uri, config, evaluate), name=APPLICATION, route_prefix="/")
        yield _address()
    finally:
        serve.delete(APPLICATION)


def serve_until_stopped(adapter: str, config: ServeConfig, evaluate: EvaluateConfig, cluster: Cluster) -> None:
    """Serve an adapter on the connected cluster until Ctrl-C or SIGTERM; call it from the main thread.

    Raises:
        ContractError: there is no adapter at the path.
        ValueError: the port is in use, Ray Serve listens elsewhere already, the cluster has such a service already, or
            it is too small.
    """
    with _signals_interrupt(), suppress(KeyboardInterrupt), running(adapter, config, evaluate, cluster) as url:
        print(f"serving {adapter} at {url} (API: {url}/docs); Ctrl-C stops it", flush=True)
        try:
            threading.Event().wait()
        finally:
            print("stopping", flush=True)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """In the block the first Ctrl-C or SIGTERM raises KeyboardInterrupt; later ones must not disturb the end."""
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise KeyboardInterrupt

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def check_room(config: ServeConfig, found: Mapping[str, float]) -> None:
    """Refuse a service that would wait forever for CPUs or GPUs: its replicas hold some, an evaluation needs more.

    Args:
        found: the cluster's resources by Ray's names.

    Raises:
        ValueError: names the settings and the remedy.
    """
    needs = (("CPU", "threads", config.threads, 1.0), ("GPU", "gpus", config.gpus, config.gpus))
    for kind, name, each, evaluation in needs:
        wanted, there = config.replicas * each + evaluation, found.get(kind, 0)
        if wanted > there:
            raise ValueError(
                f"serve.replicas {config.replicas} x serve.{name} {each:g} and {evaluation:g} for an evaluation ask "
                f"for {wanted:g} {kind}s, and Ray finds {there:g} on this machine: lower one of them, or name a "
                "cluster in ray.address"
            )


def _require_address(config: ServeConfig) -> None:
    """Refuse another address than the one that Ray Serve listens on: it can have been started with another one only."""
    options = _client().http_config
    if options.host != config.host or config.port not in (0, options.port):
        raise ValueError(
            f"Ray Serve listens on {options.host}:{options.port} already, serve.host and serve.port ask for "
            f"{config.host}:{config.port}: set them to that address (port 0 takes any), take another cluster, or end "
            "Ray Serve there (serve shutdown)"
        )


def _require_absent() -> None:
    """Refuse to replace a service of another process, which would then end with this one."""
    found = serve.status().applications.get(APPLICATION)
    if found is not None:
        raise ValueError(
            f"application {APPLICATION!r} is on this cluster already ({found.status.value}): stop that service, take "
            "another cluster, or let the pipeline check none (serve.check=false); if its process is gone, "
            f"serve.delete({APPLICATION!r}) of Ray Serve ends it"
        )


def _start_serve(host: str, port: int) -> None:
    _require_free(host, port)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=host, port=port, request_timeout_s=_REQUEST_TIMEOUT_S),
        logging_config=_QUIET,
    )


def _address() -> str:
    options = _client().http_config
    return f"http://{options.host}:{options.port}"


def _client() -> Any:
    """The running Serve's client, None where there is none; no public call tells its address."""
    return _get_global_client(raise_if_no_controller_running=False)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _require_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ValueError(
            f"port {port} of {host} cannot be taken ({error.strerror}): set serve.port to another, 0 takes any free one"
        ) from error
