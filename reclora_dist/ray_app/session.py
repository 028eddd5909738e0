"""Joining a Ray cluster, or starting one that lives as long as this process needs it."""

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from reclora_dist.config.schema import RayConfig

MIB = 1 << 20
# Unix socket paths end at 107 bytes; our folder's name, Ray's session and its socket names take up to 90 of them.
_LONGEST_ROOT = 15


@dataclass(frozen=True)
class Cluster:
    """The cluster this process is connected to.

    Attributes:
        address: host:port of its control store.
        dashboard: host:port of its dashboard, empty where there is none.
        metrics: host:port of every node's Prometheus endpoint.
        started: whether this process started it (and will end it).
    """

    address: str
    dashboard: str
    metrics: tuple[str, ...]
    started: bool


@contextmanager
def connect(config: RayConfig) -> Iterator[Cluster]:
    """Be connected to a cluster: the one already joined, ``config.address``, ``RAY_ADDRESS``, or a fresh one.

    A cluster that was started here ends with the block; a joined one goes on. A fresh cluster keeps its files in a
    folder of its own, which stays behind only if the block fails, because Ray's logs are in it. ``RAY_ADDRESS`` names
    the cluster inside the block.

    Raises:
        ValueError: there is no cluster at the address; or the workers ask for more GPUs than a fresh cluster has, which
            would wait for them forever.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    if ray.is_initialized():
        yield _joined(ray.init(ignore_reinit_error=True, logging_level=logging.WARNING))
    elif config.address or os.environ.get("RAY_ADDRESS"):
        context = _join(config.address)
        with _connected(context):
            yield _joined(context)
    else:
        with _temp_dir() as folder:
            context = _start(config, folder)
            with _connected(context) as address:
                check_gpus(config, ray.cluster_resources().get("GPU", 0))
                port = context.address_info["metrics_export_port"]
                yield Cluster(address, context.dashboard_url, (f"127.0.0.1:{port}",), started=True)


@contextmanager
def _connected(context: Any) -> Iterator[str]:
    """The cluster's address, which is RAY_ADDRESS in the block; disconnect afterwards."""
    address, before = str(context.address_info["gcs_address"]), os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = address
    try:
        yield address
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
        ray.shutdown(wait_for_processes=True)


def check_gpus(config: RayConfig, found: float) -> None:
    """Refuse workers that ask for more GPUs than this machine has.

    Raises:
        ValueError: names the settings and the remedy.
    """
    wanted = config.workers * config.gpus_per_worker
    if wanted > found:
        raise ValueError(
            f"ray.workers {config.workers} x ray.gpus_per_worker {config.gpus_per_worker:g} asks for {wanted:g} GPUs, "
            f"and Ray finds {found:g} on this machine: lower one of them, or name a cluster in ray.address"
        )


def reserved_device() -> str:
    """Where this task or actor computes: ``cuda`` if Ray reserved a GPU for it, else ``cpu``.

    Whether torch finds a GPU says nothing: Ray shows those of the node to processes that reserved none, too.
    """
    return "cuda" if ray.get_gpu_ids() else "cpu"


def _join(address: str) -> Any:
    try:
        return ray.init(address=address or None, logging_level=logging.WARNING)
    except ConnectionError as error:
        place = address or os.environ["RAY_ADDRESS"]
        raise ValueError(
            f"no Ray cluster at {place!r}: start it (cluster/ray/head.sh), or correct ray.address or RAY_ADDRESS; "
            "with both empty the command starts a cluster of its own"
        ) from error


def _start(config: RayConfig, folder: Path) -> Any:
    _choose_token()
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine's node away
    context = ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, math.ceil(config.workers * config.cpus_per_worker), 2),
        object_store_memory=config.object_store_mib * MIB,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
        _metrics_export_port=config.metrics_port or None,
    )
    logging.getLogger("ray").setLevel(logging.WARNING)
    return context


def _choose_token() -> None:
    """Give a cluster that starts here a token known to this process and its children only.

    Ray turns token mode on for such a cluster unless RAY_AUTH_MODE says otherwise, and would write a token of its own
    to the home folder, readable by everyone. RAY_AUTH_MODE itself must not be set here: Ray reads it at import, and a
    later value would reach the cluster's processes but not this one.
    """
    chosen = os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
    known = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not chosen and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _temp_dir() -> Iterator[Path]:
    root = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="reclora-ray-", dir=root if len(root) <= _LONGEST_ROOT else "/tmp"))
    failed = False
    try:
        yield folder
    except Exception as error:  # not Ctrl-C or SIGTERM: then nothing went wrong
        failed = True
        error.add_note(f"Ray's logs of this run are in {folder}")
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


def _joined(context: Any) -> Cluster:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    metrics = tuple(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes)
    return Cluster(context.address_info["gcs_address"], context.dashboard_url or "", metrics, started=False)
