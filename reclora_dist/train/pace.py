"""What a step costs and where its time goes: log lines, metrics, and the figures of the whole run."""

import math
import resource
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from reclora_dist.config.schema import TrainConfig
from reclora_dist.lora.gate import GateUse
from reclora_dist.telemetry import names
from reclora_dist.train.context import Context
from reclora_dist.train.engine import Engine, MicroBatch, StepResult, trainable

SLOW = 2.0
"""A worker is called slow when it takes so many times what the median of the others does."""


@dataclass
class Tally:
    """Sums over steps of this worker: seconds, real and padded tokens, samples, work in the units of ``batch.size``."""

    steps: int = 0
    waited: float = 0.0
    forward: float = 0.0
    tokens: int = 0
    size: int = 0

    def add(self, micro_batches: Sequence[MicroBatch], result: StepResult) -> None:
        """Count a step."""
        self.steps += 1
        self.forward += result.forward_seconds
        self.tokens += sum(batch.tokens for batch, share in micro_batches if share)
        self.size += sum(batch.size for batch, _ in micro_batches)


class Report(NamedTuple):
    """What a worker tells the first one of the steps since the last log line."""

    host: str
    waited: float
    forward: float
    tokens: int
    size: int
    memory: int


class Pace:
    """The clock of a run.

    Time of validation is not counted. FLOPs of a forward pass are counted by torch on the first micro-batch and grow
    with its size; a backward pass costs ``backward`` times as many. MFU is their rate over that of a large matrix
    product on the same device. The communication's share is that of an all-reduce of all trainable parameters, timed
    by itself before the first step: what it would take if nothing hid it.
    """

    def __init__(
        self, stage: str, config: TrainConfig, context: Context, done: int, total: int, backward: float
    ) -> None:
        self.stage, self.config, self.context, self.total = stage, config, context, total
        self._backward = backward
        self._first = self._last = done
        self._since = time.perf_counter()
        self._excluded = self._excluded_since = 0.0
        self._now, self._whole = Tally(), list[Mapping[str, float]]()
        self._flops_per_size = self._matmul_rate = self._reduce_seconds = 0.0

    def waits(self, steps: Iterable[Sequence[MicroBatch]]) -> Iterator[Sequence[MicroBatch]]:
        """The same steps; the time until each is there is counted as waiting for data."""
        source = iter(steps)
        while True:
            since = time.perf_counter()
            found = next(source, None)
            if found is None:
                return
            self._now.waited += time.perf_counter() - since
            yield found

    def measure(self, engine: Engine, micro_batches: Sequence[MicroBatch]) -> None:
        """Before the first step: what a forward pass, this device and the network can do. Collective."""
        if self._matmul_rate:
            return
        since, batch = time.perf_counter(), micro_batches[0].batch
        self._flops_per_size = forward_flops(engine.model, batch) / max(1, batch.size)
        self._matmul_rate = matmul_rate(self.context.device)
        if self.context.world > 1:
            count = sum(parameter.numel() for parameter in trainable(engine.model).values())
            self._reduce_seconds = reduce_seconds(count, self.context.device)
        self.exclude(time.perf_counter() - since)

    def exclude(self, seconds: float) -> None:
        """Time that is no training, as that of a validation."""
        self._excluded += seconds

    def is_due(self, done: int) -> bool:
        """Whether a log line follows step ``done``."""
        return not done % self.config.log_every or done == self.total

    def tick(
        self,
        done: int,
        micro_batches: Sequence[MicroBatch],
        result: StepResult,
        scale: float,
        use: GateUse | None,
    ) -> None:
        """Count a step; every ``log_every`` steps gather what the workers took, print a line and set the gauges."""
        meters = self.context.meters
        meters.add(names.TRAIN_STEPS, stage=self.stage)
        meters.add(names.TRAIN_SAMPLES, self.config.batch_size, stage=self.stage)
        self._now.add(micro_batches, result)
        if not self.is_due(done):
            return
        now, mine = time.perf_counter(), self._now
        report = Report(socket.gethostname(), mine.waited, mine.forward, mine.tokens, mine.size, self._memory())
        reports = self.context.gather(report)
        seconds = max(1e-9, now - self._since - (self._excluded - self._excluded_since))
        costs = self._costs(reports, mine.steps, seconds)
        self._whole.append({"seconds": seconds, **costs})
        if self.context.leads:
            self._show(done, result, scale, costs, seconds / mine.steps)
            if use is not None:
                self._show_use(use)
            self._warn(reports, seconds)
        self._since, self._last, self._now, self._excluded_since = now, done, Tally(), self._excluded

    def summary(self) -> dict[str, float]:
        """Means over the run, weighted by time; the peak of memory; the seconds that were training."""
        total = sum(interval["seconds"] for interval in self._whole)
        if not total:
            return {}
        keys = self._whole[0].keys() - {"seconds", "peak_memory_bytes"}
        means = {key: sum(part["seconds"] * part[key] for part in self._whole) / total for key in sorted(keys)}
        peak = max(part["peak_memory_bytes"] for part in self._whole)
        return {"seconds": total, "steps": self._last - self._first, **means, "peak_memory_bytes": peak}

    def _costs(self, reports: Sequence[Report], steps: int, seconds: float) -> dict[str, float]:
        flops = (1 + self._backward) * self._flops_per_size * sum(report.size for report in reports) / seconds
        return {
            "samples_per_second": steps * self.config.batch_size / seconds,
            "tokens_per_second": sum(report.tokens for report in reports) / seconds,
            "data_wait_share": max(report.waited for report in reports) / seconds,
            "communication_share": min(1.0, steps * self._reduce_seconds / seconds),
            "flops_per_second": flops,
            "mfu": flops / (self.context.world * self._matmul_rate) if self._matmul_rate else 0.0,
            "peak_memory_bytes": float(max(report.memory for report in reports)),
            "slowest_worker": slowest(reports)[1],
        }

    def _show(self, done: int, result: StepResult, scale: float, costs: Mapping[str, float], seconds: float) -> None:
        meters, stage = self.context.meters, self.stage
        meters.observe(names.TRAIN_STEP_SECONDS, seconds, stage=stage)
        course = {"loss": result.loss, "gradient_norm": result.gradient_norm, "learning_rate": scale * self.config.lr}
        figures = {key: value for key, value in {**course, **costs}.items() if math.isfinite(value)}  # a skipped step's
        for key, value in figures.items():
            meters.set(names.TRAINING[key], value, stage=stage)
        self.context.record(done, figures)
        left = seconds * (self.total - done)
        tokens = f", {costs['tokens_per_second']:,.0f} tokens/s" if costs["tokens_per_second"] else ""
        self.context.say(
            f"{stage}: step {done}/{self.total} loss {result.loss:.4f} {costs['samples_per_second']:,.0f} samples/s"
            f"{tokens}, {left:.0f} s left"
        )

    def _show_use(self, use: GateUse) -> None:
        meters, stage = self.context.meters, self.stage
        meters.set(names.TRAIN_GATE_ENTROPY, use.entropy, stage=stage)
        for metric, values in ((names.TRAIN_GATE_WEIGHT, use.weight), (names.TRAIN_GATE_LARGEST, use.largest)):
            for expert, value in enumerate(values):
                meters.set(metric, value, stage=stage, expert=str(expert))

    def _warn(self, reports: Sequence[Report], seconds: float) -> None:
        rank, ratio = slowest(reports)
        slow = reports[rank]
        if ratio > SLOW and slow.waited + slow.forward > seconds / 4:
            self.context.say(
                f"{self.stage}: worker {rank} on {slow.host} takes {ratio:.1f} times as long as the others (waits "
                f"{slow.waited:.1f} s for data and computes {slow.forward:.1f} s of the last {seconds:.1f} s): all "
                "wait for it"
            )

    def _memory(self) -> int:
        if self.context.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.context.device))
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def slowest(reports: Sequence[Report]) -> tuple[int, float]:
    """The worker that takes longest to have its data and go forward, and how many times the others' median."""
    busy = [report.waited + report.forward for report in reports]
    rank = max(range(len(busy)), key=busy.__getitem__)
    others = busy[:rank] + busy[rank + 1 :]
    return rank, busy[rank] / max(1e-9, statistics.median(others)) if others else 1.0


@torch.no_grad()
def forward_flops(model: nn.Module, batch: object) -> float:
    """FLOPs of a forward pass, a multiplication and an addition each counting one."""
    model.eval()  # returns nothing in DeepSpeed
    with FlopCounterMode(display=False) as counter:
        model(batch)
    return float(counter.get_total_flops())


def matmul_rate(device: torch.device, tries: int = 3) -> float:
    """FLOPs per second of a large matrix product in float32, or on a GPU in bfloat16."""
    on_gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
    a = torch.rand(n, n, device=device, dtype=dtype)  # a GPU is faster with equal numbers, which draw less power
    best = float("inf")
    for _ in range(tries):
        since = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - since)
    return 2 * n**3 / best


def reduce_seconds(count: int, device: torch.device, tries: int = 3) -> float:
    """Seconds of an all-reduce of ``count`` float32 numbers: the best of some tries, on the slowest worker."""
    numbers = torch.zeros(count, device=device)
    best = float("inf")
    for _ in range(tries):
        distributed.barrier()
        since = time.perf_counter()
        distributed.all_reduce(numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - since)
    return best
