"""Ray Train around a training stage: workers, process group, metrics, restarts."""

import logging
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from reclora_dist.config.check import check_sizes
from reclora_dist.config.schema import Config
from reclora_dist.ray_app.meters import RayMeters
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.train import stages
from reclora_dist.train.context import Context

MAX_FAILURES = 3


def train_stage(config: Config, stage: str, adapter: str = "") -> None:
    """Run a training stage (``crm`` or ``adapter``) on ``config.ray.workers`` workers of the connected cluster.

    A worker that dies is replaced, and the run goes on from its newest checkpoint.

    Raises:
        ValueError: batch sizes do not divide; nothing was started.
        RuntimeError: the workers failed more often than allowed.
    """
    section, sizes = ("crm_train", config.crm_train) if stage == "crm" else ("lora_train", config.lora_train)
    check_sizes(sizes, config.ray.workers, section)
    if config.ray.workers == 0:
        torch.set_num_threads(config.ray.threads)
        _run(config, stage, adapter, Context())
        return
    with tempfile.TemporaryDirectory(prefix="reclora-train-") as scratch:
        _trainer(config, stage, adapter, scratch).fit()


def _trainer(config: Config, stage: str, adapter: str, scratch: str) -> TorchTrainer:
    """The trainer; our checkpoints lie in the run folder, so Ray's storage holds only its own notes."""
    gpus = config.ray.gpus_per_worker
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config, "stage": stage, "adapter": adapter},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=config.ray.workers, use_gpu=bool(gpus), resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name=f"{stage}-{adapter}".rstrip("-"),
            storage_path=scratch,
            failure_config=train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )


def _worker(job: Mapping[str, Any]) -> None:
    config: Config = job["config"]
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_report)
    torch.set_num_threads(config.ray.threads)
    # DeepSpeed calls torch.distributed by names that torch has since replaced: once per rank and step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    rank = train.get_context().get_world_rank()
    context = Context(
        rank=rank,
        world=train.get_context().get_world_size(),
        device=get_device() if config.ray.gpus_per_worker else torch.device("cpu"),
        meters=RayMeters() if rank == 0 else NullMeters(),
        report=lambda metrics: train.report(dict(metrics)),
    )
    _run(config, job["stage"], job["adapter"], context)


def _is_no_report(record: logging.LogRecord) -> bool:
    """Ray Train tells of every report; so do we, in fewer words."""
    return not record.getMessage().startswith("Reporting training result")


def _run(config: Config, stage: str, adapter: str, context: Context) -> None:
    if stage == "crm":
        stages.train_crm(config, context)
    else:
        stages.train_adapter(config, adapter, context)
