"""The training loop. It knows neither Ray nor DeepSpeed, and it is the same for the CRM and for RecLoRA."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reclora_dist.config.schema import TrainConfig
from reclora_dist.lora.gate import GateUse
from reclora_dist.telemetry import names
from reclora_dist.train.checkpoint import Checkpoint, CheckpointStore
from reclora_dist.train.context import Context
from reclora_dist.train.engine import Engine, StepResult, schedule

MicroBatches = Sequence[Any]


@dataclass(frozen=True)
class Task:
    """What is trained: the loop's only view of a model and its data."""

    name: str
    engine: Engine
    steps_per_epoch: int
    batches: Callable[[int, int], Iterator[MicroBatches]]
    """(epoch, first step) -> the micro-batches of every step from there on."""
    validate: Callable[[], float]
    """Validation AUC; every rank calls it and gets the same number."""
    gate_use: Callable[[], GateUse] | None = None
    """How the gates used the experts in the last micro-batch; None where there is no choice."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    best_auc: float = -math.inf
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """A finished run: the parameters with the best validation AUC, and how it went."""

    parameters: Mapping[str, Tensor]
    progress: Progress
    steps: int
    samples_per_second: float


def fit(
    task: Task, config: TrainConfig, context: Context, store: CheckpointStore, resume: Checkpoint | None
) -> FitResult:
    """Train ``task`` to the end from ``resume`` on; validation chooses the parameters that are returned.

    Every random draw of a step follows from (seed, step, rank), so an interrupted run continues as if it had not been.
    """
    total = config.epochs * task.steps_per_epoch
    progress, best = _take_up(task, context, resume)
    start = resume.step if resume else 0
    clock = _Clock(task, config, context, total, start)
    for step, micro_batches in _steps(task, config, start):
        torch.manual_seed(hash((config.seed, step, context.rank)))
        result = task.engine.step(micro_batches, schedule(step, total, config))
        done = step + 1
        clock.tick(done, result, schedule(step, total, config))
        validated = done == total or done % (config.validate_every or task.steps_per_epoch) == 0
        if validated:
            best = _validate(task, context, progress, done, best)
        if validated or done % config.checkpoint_every == 0:
            _save(task, context, store, done, progress, best)
    return FitResult(best, progress, total, clock.samples_per_second)


def _take_up(task: Task, context: Context, resume: Checkpoint | None) -> tuple[Progress, Mapping[str, Tensor]]:
    if resume is None:
        return Progress(), {}
    context.say(f"{task.name}: resuming after step {resume.step}")
    first = next(task.batches(0, 0))[0]
    task.engine.restore(resume.state, resume.step, first)
    return Progress(**dict(resume.progress)), resume.best


def _steps(task: Task, config: TrainConfig, start: int) -> Iterator[tuple[int, MicroBatches]]:
    for epoch in range(start // task.steps_per_epoch, config.epochs):
        first = max(0, start - epoch * task.steps_per_epoch)
        for offset, micro_batches in enumerate(task.batches(epoch, first), first):
            yield epoch * task.steps_per_epoch + offset, micro_batches


def _validate(
    task: Task, context: Context, progress: Progress, step: int, best: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Score the validation split; return the best parameters so far."""
    auc = task.validate()
    progress.history.append({"step": step, "validation_auc": auc})
    context.meters.set(names.TRAIN_VALIDATION_AUC, auc, stage=task.name)
    context.report({"step": step, "validation_auc": auc})
    context.say(f"{task.name}: step {step} validation AUC {auc:.4f} (best {max(auc, progress.best_auc):.4f})")
    if auc <= progress.best_auc:
        return best
    progress.best_auc, progress.best_step = auc, step
    state = task.engine.state()
    return {name: value for name, value in state.items() if name.startswith("parameter/")}


def _save(
    task: Task,
    context: Context,
    store: CheckpointStore,
    step: int,
    progress: Progress,
    best: Mapping[str, Tensor],
) -> None:
    state = task.engine.state()  # collective: every rank takes part, rank 0 writes
    if context.leads:
        store.save(Checkpoint(step, state, best, vars(progress)))


class _Clock:
    """Log lines and metrics of the steps."""

    def __init__(self, task: Task, config: TrainConfig, context: Context, total: int, start: int) -> None:
        self.task, self.config, self.context, self.total = task, config, context, total
        self.first = self.last = start
        self.begun = self.since = time.perf_counter()

    @property
    def samples_per_second(self) -> float:
        """Training samples per second over all workers, validation and checkpoints included."""
        steps = self.last - self.first
        return steps * self.config.batch_size / max(1e-9, time.perf_counter() - self.begun)

    def tick(self, done: int, result: StepResult, scale: float) -> None:
        """Count a step; every ``log_every`` steps print a line and set the gauges."""
        meters, stage = self.context.meters, self.task.name
        meters.add(names.TRAIN_STEPS, stage=stage)
        meters.add(names.TRAIN_SAMPLES, self.config.batch_size, stage=stage)
        if done % self.config.log_every and done != self.total:
            return
        now = time.perf_counter()
        seconds = (now - self.since) / max(1, done - self.last)
        rate = self.config.batch_size / seconds
        meters.observe(names.TRAIN_STEP_SECONDS, seconds, stage=stage)
        meters.set(names.TRAIN_LOSS, result.loss, stage=stage)
        meters.set(names.TRAIN_SAMPLES_PER_SECOND, rate, stage=stage)
        meters.set(names.TRAIN_LEARNING_RATE, scale * self.config.lr, stage=stage)
        meters.set(names.TRAIN_GRADIENT_NORM, result.gradient_norm, stage=stage)
        if self.task.gate_use is not None:
            self._show(self.task.gate_use())
        left = seconds * (self.total - done)
        self.context.say(
            f"{stage}: step {done}/{self.total} loss {result.loss:.4f} {rate:,.0f} samples/s, {left:.0f} s left"
        )
        self.since, self.last = now, done

    def _show(self, use: GateUse) -> None:
        meters, stage = self.context.meters, self.task.name
        meters.set(names.TRAIN_GATE_ENTROPY, use.entropy, stage=stage)
        for metric, values in ((names.TRAIN_GATE_WEIGHT, use.weight), (names.TRAIN_GATE_LARGEST, use.largest)):
            for expert, value in enumerate(values):
                meters.set(metric, value, stage=stage, expert=str(expert))
