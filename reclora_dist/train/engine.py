"""One optimiser step, whoever takes it: plain torch here, DeepSpeed in its own module."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reclora_dist.config.schema import TrainConfig
from reclora_dist.train.context import Context
from reclora_dist.train.stopwatch import Stopwatch

Loss = Callable[[Any, Any], Tensor]
"""(model output, batch) -> scalar mean loss."""

State = dict[str, Tensor]
"""``parameter/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` of every trainable parameter, whole and in float32."""

MOMENTS = ("exp_avg", "exp_avg_sq")


class MicroBatch(NamedTuple):
    """The input of one forward pass.

    ``share`` is what the mean loss of its rows counts in this worker's loss: rows over rows of a worker's mean step, so
    that the mean of the workers' gradients is the gradient of the mean over all rows, however they are divided.
    """

    batch: Any
    share: float


@dataclass(frozen=True)
class StepResult:
    """Mean loss of this worker's samples, norm of the gradient before clipping, seconds of the forward passes.

    ``skipped``: no parameter moved, because float16 overflowed; the scale of the loss was lowered, and is above 1.
    """

    loss: float
    gradient_norm: float
    forward_seconds: float = 0.0
    skipped: bool = False


class Engine(Protocol):
    """Owns the model's optimiser; the training loop knows nothing else of it."""

    @property
    def model(self) -> nn.Module:
        """What to call for a forward pass."""

    def step(self, micro_batches: Sequence[MicroBatch], scale: float) -> StepResult:
        """Accumulate the gradients of the micro-batches and update; learning rates are ``scale`` times their peaks."""

    def state(self) -> State:
        """Parameters and moments; every rank calls it and gets the same."""

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: MicroBatch) -> None:
        """Take up a saved state after ``steps`` updates; the parameters were loaded before the engine was built.

        Args:
            batch: any micro-batch; DeepSpeed makes its moments in a first step, taken here at learning rate 0.
        """


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``parameter/NAME`` entries into the model.

    Raises:
        ValueError: names or shapes differ; the state is of another model.
    """
    parameters = trainable(model)
    found = {name.partition("/")[2]: value for name, value in state.items() if name.startswith("parameter/")}
    for name in sorted(parameters.keys() | found.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else None for side in (parameters, found))
        if ours != theirs:
            raise ValueError(
                f"checkpoint of another model: {name!r} has shape {theirs} there and {ours} here; "
                "use the config it was trained with, or another run folder"
            )
        parameters[name].data.copy_(found[name])


def build_optimiser(
    model: nn.Module, config: TrainConfig, role: Callable[[str], str] = lambda name: "other", fused: bool = False
) -> torch.optim.AdamW:
    """AdamW with a learning rate of its own for the banks and the gates (each group keeps its peak as ``peak``).

    Args:
        fused: one pass over each parameter; for an optimiser that no engine takes apart. With a million rows of
            embeddings it is 15 times as fast (docs/results).
    """
    peaks = {"bank": config.bank_lr or config.lr, "gate": config.gate_lr or config.lr, "other": config.lr}
    groups = []
    for kind, peak in peaks.items():
        parameters = [p for name, p in trainable(model).items() if role(name) == kind]
        if parameters:
            groups.append({"params": parameters, "lr": peak, "peak": peak})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)


def schedule(step: int, total: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then linear decay to ``final_lr``."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    return config.final_lr + (1 - config.final_lr) * (total - step) / max(1, total - warmup)


def _shared(model: nn.Module) -> DistributedDataParallel:
    """The model, its gradients averaged over the workers. All build the same buffers, and no training changes one."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 has a new name, 2.9 has not
        return DistributedDataParallel(model, broadcast_buffers=False)


class TorchEngine:
    """Plain torch: AdamW, and DistributedDataParallel where there are several workers."""

    def __init__(
        self, model: nn.Module, optimiser: torch.optim.AdamW, loss: Loss, config: TrainConfig, context: Context
    ) -> None:
        self._bare = model.to(context.device)
        self._model = self._bare if context.world == 1 else _shared(self._bare)
        self._optimiser = optimiser
        self._loss = loss
        self._clip = config.clip or float("inf")

    @property
    def model(self) -> nn.Module:
        """The bare model: evaluation passes need no gradient synchronisation."""
        return self._bare

    def step(self, micro_batches: Sequence[MicroBatch], scale: float) -> StepResult:
        """See ``Engine.step``."""
        self._bare.train()
        sums, watch = LossSum(), Stopwatch(next(self._bare.parameters()).device)
        for number, (batch, share) in enumerate(micro_batches, 1):
            with nullcontext() if number == len(micro_batches) else self._alone():
                with watch:
                    loss = self._loss(self._model(batch), batch)
                (loss * share).backward()
            sums.add(loss, share)
        norm = nn.utils.clip_grad_norm_(trainable(self._bare).values(), self._clip)
        if torch.isfinite(norm):
            set_learning_rates(self._optimiser, scale)
            self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return StepResult(sums.mean, float(norm), watch.seconds)

    def _alone(self) -> AbstractContextManager[None]:
        """Gradients stay with this worker: they are averaged with those of the step's last micro-batch."""
        model = self._model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def state(self) -> State:
        """See ``Engine.state``."""
        return collect_state(self._bare, self._optimiser)

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: MicroBatch) -> None:
        """See ``Engine.restore``."""
        restore_moments(self._bare, self._optimiser, state, steps)


class LossSum:
    """Mean loss of a step's micro-batches."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, float]] = []

    def add(self, loss: Tensor, share: float) -> None:
        """Take the mean loss of a micro-batch."""
        self._parts.append((loss.detach(), share))

    @property
    def mean(self) -> float:
        """Weighted by the micro-batches' shares; waits for the device, once."""
        return sum(loss.item() * share for loss, share in self._parts) / sum(share for _, share in self._parts)


def set_learning_rates(optimiser: torch.optim.Optimizer, scale: float) -> None:
    """Set every group's learning rate to ``scale`` times its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * scale


def collect_state(model: nn.Module, optimiser: torch.optim.Optimizer) -> State:
    """State of a model whose optimiser is indexed by its own parameters (no partitions)."""
    state = {}
    for name, parameter in trainable(model).items():
        state[f"parameter/{name}"] = parameter.detach().float().cpu().clone()
        for moment in MOMENTS:
            value = optimiser.state[parameter].get(moment, torch.zeros_like(parameter))
            state[f"{moment}/{name}"] = value.detach().float().cpu().clone()
    return state


def restore_moments(
    model: nn.Module, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor], steps: int
) -> None:
    """Fill the moments of an optimiser that is indexed by the model's own parameters."""
    fused = optimiser.defaults.get("fused")
    for name, parameter in trainable(model).items():
        entry = {"step": torch.tensor(float(steps), device=parameter.device if fused else "cpu")}
        for moment in MOMENTS:
            entry[moment] = state[f"{moment}/{name}"].to(parameter)
        optimiser.state[parameter] = entry
