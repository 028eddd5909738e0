"""Everything that imports DeepSpeed: ZeRO stages 0 to 3 over a frozen base with trainable adapters."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, distributed, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.nn import functional as F

from reclora_dist.config.schema import EngineConfig, TrainConfig
from reclora_dist.train.context import Context
from reclora_dist.train.engine import (
    MOMENTS,
    Loss,
    LossSum,
    MicroBatch,
    State,
    StepResult,
    collect_state,
    restore_moments,
    set_learning_rates,
    trainable,
)
from reclora_dist.train.stopwatch import Stopwatch

# On CPU DeepSpeed would compile an all-reduce in shared memory, which takes a compiler and a minute; only its inference
# calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

SWAP_BUFFERS = 24
"""Parameters in memory at a time where they live on a disk, each in a buffer that holds the largest one's share. Gates
and the first layer's banks, whose inputs need no gradient, stay there from the backward pass to the end of the step."""


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
        dtype: str,
    ) -> None:
        backend = "nccl" if context.device.type == "cuda" else "gloo"
        if not distributed.is_initialized():  # one process, in the debugger
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        largest = max(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
        settings = deepspeed_config(engine, config, dtype, largest)
        buffers = _float_buffers(model)
        # torch's own AdamW is passed in: naming it in the config would compile a fused one first
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimiser, config=settings)
        for module, name, buffer in buffers:
            # in half precision DeepSpeed casts them as well, and rounded frequencies turn positions
            setattr(module, name, buffer.to(self._engine.device))
        self._loss, self._stage = loss, engine.zero_stage
        self._is_scaled = dtype == "float16"
        self._clip, self._norm = config.clip or float("inf"), torch.zeros(())
        if self._stage == 0:
            optimiser.register_step_pre_hook(self._clip_whole)

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

    def step(self, micro_batches: Sequence[MicroBatch], scale: float) -> StepResult:
        """See ``Engine.step``."""
        self._engine.train()
        set_learning_rates(self._optimiser, scale)
        sums, watch = LossSum(), Stopwatch(self._engine.device)
        for batch, share in micro_batches:
            with watch:
                loss = self._loss(self._engine(batch), batch)
            self._engine.backward(loss * share, scale_wrt_gas=False)
            sums.add(loss, share)
        before = self._engine.skipped_steps
        self._engine.step()
        norm = float(self._norm if self._stage == 0 else self._engine.get_global_grad_norm())
        overflowed = self._engine.skipped_steps > before  # a gradient that is no number, in any precision
        lowers = overflowed and self._is_scaled and self._engine.optimizer.loss_scale > 1
        return StepResult(sums.mean, norm, watch.seconds, skipped=lowers)

    def _clip_whole(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the averaged gradients and keep their norm, which DeepSpeed does not tell without partitions.

        Without gradients the optimiser moves nothing.
        """
        self._norm = nn.utils.clip_grad_norm_(trainable(self._engine.module).values(), self._clip)
        if not torch.isfinite(self._norm):
            optimiser.zero_grad(set_to_none=True)

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

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: MicroBatch) -> None:
        """See ``Engine.restore``."""
        if self._stage == 0:
            restore_moments(self._engine.module, self._optimiser, state, steps)
            return
        self._make_moments(batch)
        for name, parameter in trainable(self._engine.module).items():
            # a new engine makes its masters of a model that it has rounded to half precision
            _put(parameter, state[f"parameter/{name}"])
            for moment in MOMENTS:
                _put(parameter, state[f"{moment}/{name}"], moment)
        for entry in self._optimiser.state.values():
            if "step" in entry:
                entry["step"] = torch.full_like(torch.as_tensor(entry["step"]), float(steps))

    def _make_moments(self, batch: MicroBatch) -> None:
        """Take a step with gradients of zero at learning rate 0: nothing moves, and at no scale can it overflow."""
        hooks = [parameter.register_hook(torch.zeros_like) for parameter in trainable(self._engine.module).values()]
        self.step([batch], scale=0.0)
        for hook in hooks:
            hook.remove()
        self._link_moments()

    def _link_moments(self) -> None:
        """ZeRO-1 and -2 link parameters to moments after the first group's first step, when other groups have none."""
        outer = self._engine.optimizer
        if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
            outer._hp_optimizer_states_linked = False
            outer._lazy_init_hp_params_optimizer_state()


def deepspeed_config(engine: EngineConfig, config: TrainConfig, dtype: str, largest: int) -> dict[str, Any]:
    """DeepSpeed's own configuration.

    The caller sets the end of a step by calling ``step``, so a step may have any number of micro-batches of any size;
    the size that DeepSpeed asks for only enters what it prints.

    Args:
        largest: numbers in the model's largest parameter.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip if engine.zero_stage else 0.0,
        "zero_optimization": zero_config(engine, largest),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 10**9,
    }


def zero_config(engine: EngineConfig, largest: int) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that is about partitions and where they live.

    Raises:
        ValueError: something is to live on a disk, and this machine cannot compile what DeepSpeed does that with.
    """
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": False}
    places = {"offload_optimizer": engine.offload_optimizer, "offload_param": engine.offload_parameters}
    if "nvme" in places.values() and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "engine offloads to 'nvme', for which DeepSpeed compiles its asynchronous I/O; it needs libaio's headers "
            "and a C++ compiler on every worker (Debian, Ubuntu: apt install libaio-dev g++), or offload to 'cpu'"
        )
    for key, place in places.items():
        if place != "none":
            zero[key] = {"device": place} | ({"nvme_path": engine.nvme_path} if place == "nvme" else {})
    if engine.offload_parameters == "nvme":
        world = distributed.get_world_size() if distributed.is_initialized() else 1
        zero["offload_param"] |= {"buffer_count": SWAP_BUFFERS, "buffer_size": -(-largest // world)}
        # a gathered parameter keeps its buffer, so it goes when its layer is done, and none is gathered ahead
        zero |= {f"stage3_{name}": 0 for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")}
    return zero


def _float_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_floating_point()
    ]


def _put(parameter: nn.Parameter, value: Tensor, moment: str | None = None) -> None:
    """Set this rank's part of a parameter's float32 master, or of a moment of it, from the whole."""
    value, world = value.to(parameter.device), distributed.get_world_size()
    uneven = hasattr(parameter, "ds_tensor") and value.numel() % world > 0
    if uneven:  # the setters of whole tensors go beyond the end of one that the ranks share unevenly
        padded = F.pad(value.flatten(), (0, -value.numel() % world))
        value = padded.chunk(world)[distributed.get_rank()]
    if moment is None:
        (safe_set_local_fp32_param if uneven else safe_set_full_fp32_param)(parameter, value)
    else:
        (safe_set_local_optimizer_state if uneven else safe_set_full_optimizer_state)(parameter, value, moment)


def _whole(value: Tensor | None, name: str) -> Tensor:
    """A gathered tensor; an empty one would be a partition mistaken for a parameter."""
    if value is None or value.numel() == 0:
        raise RuntimeError(f"DeepSpeed returned no data for {name!r}; refusing to save an empty tensor")
    return value.detach().float().cpu().clone()
