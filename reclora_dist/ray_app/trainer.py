"""Ray Train around the training stages: workers, process group, metrics, restarts."""

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ray import train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from reclora_dist.config.check import check_training
from reclora_dist.config.run import RunFailed
from reclora_dist.config.schema import Config
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.telemetry import names as metric_names
from reclora_dist.train import stages
from reclora_dist.train.context import Context

# A detached actor of Ray Train asks every second whether the training's controller is alive, and else frees the
# workers' resources. Without an address it asks the newest cluster of the machine, which need not be this one.
ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def train_all(config: Config, names: Sequence[str]) -> None:
    """Train those of ``names`` (``crm``, or an adapter's) that are not up to date, one after the other.

    ``config.ray.workers`` workers of the cluster are started once for all of them. Workers that are lost are started
    again, and the run goes on from its newest checkpoint: as often as it takes, if each time there is a new one. With
    ``ray.min_workers`` it goes on with fewer, if the cluster has no more.

    Raises:
        ValueError: the settings do not fit together and nothing was started; or trying again would not help.
        RunFailed: the workers failed ``ray.max_failures`` times in a row without a new checkpoint.
    """
    check_training(config)
    if config.ray.workers == 0:
        torch.set_num_threads(config.ray.threads)
        stages.train_all(config, names, Context())
        return
    meters, lost = RayMeters(), dict.fromkeys(names, 0)
    failures, reached = 0, (0, -1)
    while True:
        for name, times in lost.items():
            meters.set(metric_names.TRAIN_FAILURES, times, stage=name)
        try:
            _fit(config, {"names": names})
            return
        except TrainingFailedError as error:
            _raise_refusal(error)
            finished, step = now = _reached(config, names)
            name = names[min(finished, len(names) - 1)]
            failures, reached, lost[name] = 1 if now > reached else failures + 1, now, lost[name] + 1
            if failures > config.ray.max_failures:
                raise RunFailed(
                    f"{name}: the workers failed {failures} times in a row without a new checkpoint. Lower "
                    f"checkpoint_every of its section, or look at the last failure: {_cause(error)}"
                ) from error
            print(f"{name}: {_cause(error)}; starting again from step {step}", flush=True)


def find_learning_rate(config: Config) -> None:
    """Run the range test of ``config.finder`` on ``config.ray.workers`` workers of the cluster.

    Raises:
        ValueError: the settings do not fit together, or a worker says that they do not.
        RunFailed: the workers failed.
    """
    name = config.finder.stage
    check_training(config)
    if config.ray.workers == 0:
        torch.set_num_threads(config.ray.threads)
        stages.find_learning_rate(config, name, Context())
        return
    try:
        _fit(config, {"finds": name})
    except TrainingFailedError as error:
        _raise_refusal(error)
        raise RunFailed(f"{name}: {_cause(error)}") from error


def _reached(config: Config, names: Sequence[str]) -> tuple[int, int]:
    """How many of ``names`` are trained, and the newest checkpoint's step of the next."""
    for finished, name in enumerate(names):
        if not stages.target_of(config, name).is_current:
            return finished, max(stages.checkpoints(config, name).steps(), default=0)
    return len(names), 0


def _raise_refusal(error: TrainingFailedError) -> None:
    """Raise what a worker refused: settings, data, divergence or memory; the next try would end the same way."""
    for cause in _causes(error).values():
        if isinstance(cause, ValueError):
            raise cause from None


def _causes(error: TrainingFailedError) -> dict[int, BaseException]:
    """What each worker ended with, by rank."""
    if not isinstance(error, WorkerGroupError):
        return {}
    return {rank: getattr(cause, "_base_exc", cause) for rank, cause in error.worker_failures.items()}


def _cause(error: TrainingFailedError) -> str:
    """The first failure in a few words; a worker that died comes before those that missed it."""
    causes = _causes(error)
    if not causes:
        return _line(error)
    rank = min(causes, key=lambda rank: (not isinstance(causes[rank], RayError), rank))
    return f"worker {rank} failed: {_line(causes[rank])}"


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _fit(config: Config, job: Mapping[str, Any]) -> None:
    """Start workers for a job; our checkpoints lie in the run folder, so Ray's storage holds only its own notes."""
    gpus, workers, least = config.ray.gpus_per_worker, config.ray.workers, config.ray.min_workers
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    with tempfile.TemporaryDirectory(prefix="reclora-train-") as scratch:
        TorchTrainer(
            _worker,
            train_loop_config={"config": config, **job},
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            scaling_config=train.ScalingConfig(
                num_workers=(least, workers) if 0 < least < workers else workers,  # type: ignore[arg-type]
                use_gpu=bool(gpus),
                resources_per_worker=resources,
            ),
            run_config=train.RunConfig(name="training", storage_path=scratch),
        ).fit()


def _worker(job: Mapping[str, Any]) -> None:
    config: Config = job["config"]
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_report)
    torch.set_num_threads(config.ray.threads)
    # DeepSpeed calls torch.distributed by names that torch has since replaced: once per rank and step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    context = Context(
        rank=train.get_context().get_world_rank(),
        world=train.get_context().get_world_size(),
        device=get_device() if config.ray.gpus_per_worker else torch.device("cpu"),
        report=lambda metrics: train.report(dict(metrics)),
    )
    if "finds" in job:
        stages.find_learning_rate(config, job["finds"], context)
    else:
        stages.train_all(config, job["names"], context, RayMeters)


def _is_no_report(record: logging.LogRecord) -> bool:
    """Ray Train tells of every report; so do we, in fewer words."""
    return not record.getMessage().startswith("Reporting training result")
