"""One optimiser step, whoever takes it: plain torch here, DeepSpeed in its own module."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reclora_dist.config.schema import TrainConfig
from reclora_dist.train.context import Context

Loss = Callable[[Any, Any], Tensor]
"""(model output, batch) -> scalar mean loss."""

State = dict[str, Tensor]
"""``parameter/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` of every trainable parameter, whole and in float32."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """Mean loss of this worker's samples and the norm of the gradient before clipping."""

    loss: float
    gradient_norm: float


class Engine(Protocol):
    """Owns the model's optimiser; the training loop knows nothing else of it."""

    @property
    def model(self) -> nn.Module:
        """What to call for a forward pass."""

    def step(self, micro_batches: Sequence[Any], scale: float) -> StepResult:
        """Accumulate the gradients of the micro-batches and update; learning rates are ``scale`` times their peaks."""

    def state(self) -> State:
        """Parameters and moments; every rank calls it and gets the same."""

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: Any) -> None:
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
    model: nn.Module, config: TrainConfig, role: Callable[[str], str] = lambda name: "other"
) -> torch.optim.AdamW:
    """AdamW with a learning rate of its own for the banks and the gates (each group keeps its peak as ``peak``)."""
    peaks = {"bank": config.bank_lr or config.lr, "gate": config.gate_lr or config.lr, "other": config.lr}
    groups = []
    for kind, peak in peaks.items():
        parameters = [p for name, p in trainable(model).items() if role(name) == kind]
        if parameters:
            groups.append({"params": parameters, "lr": peak, "peak": peak})
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def schedule(step: int, total: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then linear decay to ``final_lr``."""
    warmup = max(1, round(config.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    return config.final_lr + (1 - config.final_lr) * (total - step) / max(1, total - warmup)


class TorchEngine:
    """Plain torch: AdamW, and DistributedDataParallel where there are several workers."""

    def __init__(
        self, model: nn.Module, optimiser: torch.optim.AdamW, loss: Loss, config: TrainConfig, context: Context
    ) -> None:
        self._bare = model.to(context.device)
        self._model = DistributedDataParallel(self._bare) if context.world > 1 else self._bare
        self._optimiser = optimiser
        self._loss = loss
        self._clip = config.clip or float("inf")

    @property
    def model(self) -> nn.Module:
        """The bare model: evaluation passes need no gradient synchronisation."""
        return self._bare

    def step(self, micro_batches: Sequence[Any], scale: float) -> StepResult:
        """See ``Engine.step``."""
        self._bare.train()
        total = 0.0
        for batch in micro_batches:
            loss = self._loss(self._model(batch), batch) / len(micro_batches)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(trainable(self._bare).values(), self._clip)
        set_learning_rates(self._optimiser, scale)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return StepResult(total, float(norm))

    def state(self) -> State:
        """See ``Engine.state``."""
        return collect_state(self._bare, self._optimiser)

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: Any) -> None:
        """See ``Engine.restore``."""
        restore_moments(self._bare, self._optimiser, state, steps)


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
    for name, parameter in trainable(model).items():
        entry: dict[str, Tensor] = {"step": torch.tensor(float(steps))}
        for moment in MOMENTS:
            entry[moment] = state[f"{moment}/{name}"].to(parameter)
        optimiser.state[parameter] = entry
