"""Ray Train around a training stage: workers, process group, metrics, restarts."""

import logging
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from ray import train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from reclora_dist.config.check import check_ray, check_sizes
from reclora_dist.config.schema import Config
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import Meters, NullMeters
from reclora_dist.train import stages
from reclora_dist.train.context import Context

# A detached actor of Ray Train asks every second whether the training's controller is alive, and else frees the
# workers' resources. Without an address it asks the newest cluster of the machine, which need not be this one.
ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def train_stage(config: Config, stage: str, adapter: str = "") -> None:
    """Run a stage (``crm``, ``adapter`` or ``learning_rate``) on ``config.ray.workers`` workers of the cluster.

    Workers that are lost are started again, and the run goes on from its newest checkpoint: as often as it takes, if
    each time there is a new one. With ``ray.min_workers`` it goes on with fewer, if the cluster has no more.

    Raises:
        ValueError: the settings do not fit together and nothing was started; or trying again would not help.
        RuntimeError: the workers failed ``ray.max_failures`` times in a row without a new checkpoint.
    """
    section, sizes = ("lora_train", config.lora_train) if adapter else ("crm_train", config.crm_train)
    check_sizes(sizes, config.ray.workers, section)
    check_ray(config.ray)
    if config.ray.workers == 0:
        torch.set_num_threads(config.ray.threads)
        stages.run_stage(config, stage, adapter, Context())
        return
    meters, name = RayMeters(), adapter or "crm"
    store = stages.checkpoints(config, name)
    failures, lost, reached = 0, 0, -1
    while True:
        meters.set(names.TRAIN_FAILURES, lost, stage=name)
        try:
            with tempfile.TemporaryDirectory(prefix="reclora-train-") as scratch:
                _trainer(config, stage, adapter, scratch).fit()
            return
        except TrainingFailedError as error:
            step = max(store.steps(), default=0)
            failures, lost, reached = 1 if step > reached else failures + 1, lost + 1, step
            _give_up(name, error, failures, config.ray.max_failures)
            print(f"{name}: {_cause(error)}; starting again from step {step}", flush=True)


def _give_up(name: str, error: TrainingFailedError, failures: int, allowed: int) -> None:
    """Raise what ended the training, if trying again is no use."""
    for cause in _causes(error).values():
        if isinstance(cause, ValueError):  # settings, data, divergence or memory: the next try would end the same way
            raise cause from None
    if failures > allowed:
        raise RuntimeError(
            f"{name}: the workers failed {failures} times in a row without a new checkpoint. Lower checkpoint_every of "
            f"its section, or look at the last failure: {_cause(error)}"
        ) from error


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


def _trainer(config: Config, stage: str, adapter: str, scratch: str) -> TorchTrainer:
    """The trainer; our checkpoints lie in the run folder, so Ray's storage holds only its own notes."""
    gpus, workers, least = config.ray.gpus_per_worker, config.ray.workers, config.ray.min_workers
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config, "stage": stage, "adapter": adapter},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=(least, workers) if 0 < least < workers else workers,  # type: ignore[arg-type]
            use_gpu=bool(gpus),
            resources_per_worker=resources,
        ),
        run_config=train.RunConfig(name=f"{stage}-{adapter}".rstrip("-"), storage_path=scratch),
    )


def _worker(job: Mapping[str, Any]) -> None:
    config: Config = job["config"]
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_report)
    torch.set_num_threads(config.ray.threads)
    # DeepSpeed calls torch.distributed by names that torch has since replaced: once per rank and step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank = train.get_context().get_world_rank()
    meters: Meters = RayMeters() if rank == 0 else NullMeters()
    context = Context(
        rank=rank,
        world=train.get_context().get_world_size(),
        device=get_device() if config.ray.gpus_per_worker else torch.device("cpu"),
        meters=meters,
        report=lambda metrics: train.report(dict(metrics)),
    )
    stages.run_stage(config, job["stage"], job["adapter"], context)


def _is_no_report(record: logging.LogRecord) -> bool:
    """Ray Train tells of every report; so do we, in fewer words."""
    return not record.getMessage().startswith("Reporting training result")
