"""Training under torchrun: the same stages as under Ray Train, for who has another scheduler."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from reclora_dist.config.check import check_config
from reclora_dist.config.schema import Config
from reclora_dist.train import stages
from reclora_dist.train.context import Context


def is_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def train_all(config: Config) -> None:
    """Train the CRM and the adapters that are not up to date, as one of torchrun's processes.

    ``ray.workers`` is not read: torchrun says how many there are. Metrics go to TensorBoard and the log only.

    Raises:
        ValueError: the settings do not fit together, or a stage refuses its input.
    """
    check_config(config)
    torch.set_num_threads(config.ray.threads)
    with _joined() as context:
        stages.train_all(config, ("crm", *config.adapters), context)


@contextmanager
def _joined() -> Iterator[Context]:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        yield Context(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
