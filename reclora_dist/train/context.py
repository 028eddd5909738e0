"""Who a worker is among the workers of a run, and whom it tells."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import distributed

from reclora_dist.telemetry.meters import Meters, NullMeters

T = TypeVar("T")


def _ignore(metrics: Mapping[str, float]) -> None:
    """Nobody listens."""


def _forget(step: int, values: Mapping[str, float]) -> None:
    """Nobody keeps a record."""


@dataclass(frozen=True)
class Context:
    """Rank, world and device of this worker.

    ``report`` takes validation metrics and is called by all ranks; ``record`` takes the figures of a step.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    meters: Meters = field(default_factory=NullMeters)
    report: Callable[[Mapping[str, float]], None] = _ignore
    record: Callable[[int, Mapping[str, float]], None] = _forget

    @property
    def leads(self) -> bool:
        """Whether this worker writes files and log lines."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        distributed.all_gather_object(values, value)
        return [v for v in values if v is not None]

    def say(self, line: str) -> None:
        """Print a progress line, once per run."""
        if self.leads:
            sys.stdout.write(line + "\n")  # Ray Train replaces print() by one that writes twice
            sys.stdout.flush()
