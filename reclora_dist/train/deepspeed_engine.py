"""Everything that imports DeepSpeed: ZeRO stages 0 to 3 over a frozen base with trainable adapters."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu")

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor, nn

from reclora_dist.config.schema import EngineConfig, TrainConfig
from reclora_dist.train.context import Context
from reclora_dist.train.engine import (
    MOMENTS,
    Loss,
    State,
    StepResult,
    collect_state,
    restore_moments,
    set_learning_rates,
    trainable,
)

# On CPU DeepSpeed would compile an all-reduce in shared memory, which takes a compiler and a minute; only its inference
# calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class DeepSpeedEngine:
    """A DeepSpeed engine behind the ``Engine`` protocol.

    State is saved whole, per parameter and in float32, so it holds no pickle and fits any ZeRO stage and world size.
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.AdamW,
        loss: Loss,
        config: TrainConfig,
        engine: EngineConfig,
        context: Context,
        bfloat16: bool,
    ) -> None:
        per_worker = config.batch_size // context.world
        micro = config.micro_batch or per_worker
        deepspeed.init_distributed(dist_backend="nccl" if context.device.type == "cuda" else "gloo", verbose=False)
        settings = deepspeed_config(engine, micro, per_worker // micro, config.clip, bfloat16)
        # torch's own AdamW is passed in: naming it in the config would compile a fused one first
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=settings)
        self._loss = loss
        self._stage = engine.zero_stage

    @property
    def model(self) -> nn.Module:
        """The wrapped model; its forward gathers partitioned parameters."""
        wrapped: nn.Module = self._engine
        return wrapped

    @property
    def _optimiser(self) -> torch.optim.Optimizer:
        """The torch optimiser inside: ZeRO's wrapper keeps it as ``optimizer``."""
        outer = self._engine.optimizer
        inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return inner

    def step(self, micro_batches: Sequence[Any], scale: float) -> StepResult:
        """See ``Engine.step``."""
        self._engine.train()
        set_learning_rates(self._optimiser, scale)
        total = 0.0
        for batch in micro_batches:
            loss = self._loss(self._engine(batch), batch)
            self._engine.backward(loss)
            self._engine.step()
            total += loss.item() / len(micro_batches)
        return StepResult(total, float(self._engine.get_global_grad_norm() or 0.0))

    def state(self) -> State:
        """See ``Engine.state``."""
        if self._stage == 0:
            return collect_state(self._engine.module, self._optimiser)
        self._link_moments()
        state = {}
        for name, parameter in trainable(self._engine.module).items():
            state[f"parameter/{name}"] = _whole(safe_get_full_fp32_param(parameter), name)
            for moment in MOMENTS:
                state[f"{moment}/{name}"] = _whole(safe_get_full_optimizer_state(parameter, moment), name)
        return state

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: Any) -> None:
        """See ``Engine.restore``."""
        accumulation = self._engine.gradient_accumulation_steps()
        self.step([batch] * accumulation, scale=0.0)  # makes the moments; at learning rate 0 no parameter moves
        if self._stage == 0:
            restore_moments(self._engine.module, self._optimiser, state, steps)
            return
        self._link_moments()
        for name, parameter in trainable(self._engine.module).items():
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[f"{moment}/{name}"].to(parameter.device), moment)
        for entry in self._optimiser.state.values():
            if "step" in entry:
                entry["step"] = torch.full_like(torch.as_tensor(entry["step"]), float(steps))

    def _link_moments(self) -> None:
        """ZeRO-1 and -2 link parameters to moments after the first group's first step, when other groups have none."""
        outer = self._engine.optimizer
        if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
            outer._hp_optimizer_states_linked = False
            outer._lazy_init_hp_params_optimizer_state()


def deepspeed_config(
    engine: EngineConfig, micro_batch: int, accumulation: int, clip: float, bfloat16: bool
) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": engine.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bfloat16},
        "steps_per_print": 10**9,
    }


def _whole(value: Tensor | None, name: str) -> Tensor:
    """A gathered tensor; an empty one would be a partition mistaken for a parameter."""
    if value is None or value.numel() == 0:
        raise RuntimeError(f"DeepSpeed returned no data for {name!r}; refusing to save an empty tensor")
    return value.detach().float().cpu().clone()
