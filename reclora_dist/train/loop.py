"""The training loop. It knows neither Ray nor DeepSpeed, and it is the same for the CRM and for RecLoRA."""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reclora_dist.config.schema import TrainConfig
from reclora_dist.data.plan import Stretch
from reclora_dist.lora.gate import GateUse
from reclora_dist.telemetry import names
from reclora_dist.train.checkpoint import Checkpoint, CheckpointStore, Writer
from reclora_dist.train.context import Context
from reclora_dist.train.engine import Engine, MicroBatch, State, schedule
from reclora_dist.train.errors import diverged, is_out_of_memory, out_of_memory
from reclora_dist.train.pace import Pace

MicroBatches = Sequence[MicroBatch]


@dataclass(frozen=True)
class Task:
    """What is trained: the loop's only view of a model and its data."""

    name: str
    engine: Engine
    steps_per_epoch: int
    batches: Callable[[int, int, Sequence[Stretch]], Generator[MicroBatches, None, None]]
    """(epoch, first step, what other numbers of workers did of it) -> the micro-batches of every step from there on."""
    validate: Callable[[], float]
    """Validation AUC; every rank calls it and gets the same number."""
    backward: float = 2.0
    """FLOPs of a backward pass, in forward passes: 2 where all is trained, 1 where nearly all is frozen."""
    gate_use: Callable[[], GateUse] | None = None
    """How the gates used the experts in the last micro-batch; None where there is no choice."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint.

    ``world`` workers were at it, after those of ``earlier`` (workers, steps) in the same epoch.
    """

    best_auc: float = -math.inf
    best_step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    world: int = 1
    earlier: list[tuple[int, int]] = field(default_factory=list)

    def stretches(self, world: int, offset: int) -> list[Stretch]:
        """What other numbers of workers did of an epoch that ``world`` workers go on with at step ``offset``."""
        found = [Stretch(*stretch) for stretch in self.earlier] if offset else []
        new = offset - sum(stretch.steps for stretch in found)
        return [*found, Stretch(self.world, new)] if new and world != self.world else found

    def is_over(self, patience: int) -> bool:
        """Whether the last ``patience`` validations brought nothing better."""
        later = [entry for entry in self.history if entry["step"] > self.best_step]
        return 0 < patience <= len(later)


@dataclass(frozen=True)
class FitResult:
    """A finished run: the parameters with the best validation AUC, and how it went."""

    parameters: Mapping[str, Tensor]
    progress: Progress
    steps: int
    costs: Mapping[str, float]
    """See ``Pace.summary``."""


def fit(
    task: Task, config: TrainConfig, context: Context, store: CheckpointStore, resume: Checkpoint | None
) -> FitResult:
    """Train ``task`` to the end from ``resume`` on; validation chooses the parameters that are returned.

    Every random draw of a step follows from (seed, step, rank), so an interrupted run continues as if it had not been.
    Checkpoints are written beside the training; all are there when this returns.

    Raises:
        Diverged: loss or gradient is no number any more.
        OutOfMemory: a forward or backward pass did not fit, in training or in validation.
    """
    run = _Run(task, config, context, resume)
    with store.writer(config.storage_patience, context.say) as writer:
        while not run.is_over():
            with closing(run.epoch()) as steps:
                for micro_batches in steps:
                    with run.in_memory(micro_batches):
                        run.step(micro_batches)
                        if run.validates:
                            run.validate()
                    if run.validates or run.done % config.checkpoint_every == 0:
                        save_checkpoint(run, writer)
                    if run.is_over():
                        break
    return FitResult(run.best, run.progress, run.done, run.pace.summary())


def save_checkpoint(run: "_Run", writer: Writer) -> None:
    """Hand the state to the writer: collective, every rank takes part and rank 0 writes."""
    state = run.state()
    if run.context.leads:
        progress = {**vars(run.progress), "history": list(run.progress.history)}
        writer.submit(Checkpoint(run.done, state, run.best, progress))


class _Run:
    """A run in its course: ``done`` of ``total`` steps."""

    def __init__(self, task: Task, config: TrainConfig, context: Context, resume: Checkpoint | None) -> None:
        self.task, self.config, self.context = task, config, context
        self.total = config.epochs * task.steps_per_epoch
        self.progress, self.best = Progress(), dict[str, Tensor]()
        self.done, self.earlier = 0, list[Stretch]()
        self._collected, self._state = -1, State()
        if resume:
            self._take_up(resume)
        self.progress.world = context.world
        self.pace = Pace(task.name, config, context, self.done, self.total, task.backward)

    def is_over(self) -> bool:
        """Whether all steps are done, or validation says that more are no use."""
        return self.done >= self.total or self.progress.is_over(self.config.patience)

    @property
    def validates(self) -> bool:
        """Whether a validation follows the last step."""
        return self.done == self.total or self.done % (self.config.validate_every or self.task.steps_per_epoch) == 0

    def epoch(self) -> Generator[MicroBatches, None, None]:
        """The rest of the epoch."""
        epoch, offset = divmod(self.done, self.task.steps_per_epoch)
        self.earlier = self.earlier if offset else []
        self.progress.earlier = [(stretch.world, stretch.steps) for stretch in self.earlier]
        steps = self.task.batches(epoch, offset, self.earlier)
        with closing(steps):
            yield from self.pace.waits(steps)

    @contextmanager
    def in_memory(self, micro_batches: MicroBatches) -> Iterator[None]:
        """Say what to do if memory runs out in the next step or the validation after it."""
        before = self.done
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            where = f"step {before + 1}" if self.done == before else f"the validation after step {self.done}"
            raise out_of_memory(self.task.name, where, micro_batches) from error

    def step(self, micro_batches: MicroBatches) -> None:
        """One update."""
        number, engine = self.done, self.task.engine
        self.pace.measure(engine, micro_batches)
        torch.manual_seed(hash((self.config.seed, number, self.context.rank)))
        scale = schedule(number, self.total, self.config)
        result = engine.step(micro_batches, scale)
        if not (result.skipped or (math.isfinite(result.gradient_norm) and math.isfinite(result.loss))):
            raise diverged(self.task.name, number + 1, result, scale * self.config.lr)
        self.done += 1
        use = self.task.gate_use if self.pace.is_due(self.done) else None
        self.pace.tick(self.done, micro_batches, result, scale, use() if use else None)

    def validate(self) -> None:
        """Score the validation split, and keep the parameters if they are the best so far."""
        since, progress, name = time.perf_counter(), self.progress, self.task.name
        auc = self.task.validate()
        progress.history.append({"step": self.done, "validation_auc": auc})
        self.context.meters.set(names.TRAIN_VALIDATION_AUC, auc, stage=name)
        self.context.record(self.done, {"validation_auc": auc})
        self.context.report({"step": self.done, "validation_auc": auc})
        best = max(auc, progress.best_auc)
        self.context.say(f"{name}: step {self.done} validation AUC {auc:.4f} (best {best:.4f})")
        if auc > progress.best_auc:
            progress.best_auc, progress.best_step = auc, self.done
            self.best = {key: value for key, value in self.state().items() if key.startswith("parameter/")}
        if progress.is_over(self.config.patience) and self.done < self.total:
            self.context.say(f"{name}: no better AUC in {self.config.patience} validations, ending at step {self.done}")
        self.pace.exclude(time.perf_counter() - since)

    def state(self) -> State:
        """The engine's state after the last step; collected once, for the best parameters and the checkpoint."""
        if self._collected != self.done:
            self._collected, self._state = self.done, self.task.engine.state()
        return self._state

    def _take_up(self, resume: Checkpoint) -> None:
        name, steps, context = self.task.name, self.task.steps_per_epoch, self.context
        self.progress, self.best = Progress(**dict(resume.progress)), dict(resume.best)
        self.done = resume.step
        offset = self.done % steps
        self.earlier = self.progress.stretches(context.world, offset)
        context.say(f"{name}: resuming after step {self.done}{self._other_world()}")
        with closing(self.task.batches(0, 0, ())) as first:
            self.task.engine.restore(resume.state, self.done, next(first)[0])

    def _other_world(self) -> str:
        before, now = self.progress.world, self.context.world
        return "" if before == now else f", with {now} workers in place of {before}"
