"""What the two processes of tests/distributed do; a module of its own, because spawned processes import it by name."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from sample_data import small_config
from torch import Tensor, nn

from reclora_dist.config.schema import BackboneConfig, Config, EngineConfig, RayConfig, TrainConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.telemetry.names import Metric
from reclora_dist.train import loop, stages
from reclora_dist.train.checkpoint import CheckpointStore
from reclora_dist.train.context import Context
from reclora_dist.train.engine import Engine, MicroBatch, State, TorchEngine, build_optimiser, load_parameters
from reclora_dist.train.errors import Diverged
from reclora_dist.train.states import ask_teacher

WORLD = 2
KILL_AT = 6


class Stopped(BaseException):
    """Both ranks stop here, right after a checkpoint."""


class Losses(NullMeters):
    """Keeps the training losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        if metric is names.TRAIN_LOSS:
            self.values.append(value)


def config(run: Path, engine: EngineConfig, **changes: Any) -> Config:
    base = small_config(run, ray=RayConfig(workers=WORLD), engine=engine)
    train = dataclasses.replace(base.lora_train, **{"micro_batch": 16, "log_every": 1, **changes})
    # the fusion head is a third parameter group, the balance loss a second way into the gates
    lora = dataclasses.replace(base.adapters["reclora"], balance=0.1, head="fusion")
    return dataclasses.replace(base, lora_train=train, adapters={"reclora": lora})


def join(rank: int, port: int, world: int = WORLD) -> None:
    """Make this process rank ``rank`` of a gloo process group."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")


def train(name: str, settings: Config, rank: int, out: Path) -> None:
    """Train ``crm`` or an adapter; write this rank's state at the end, validation AUCs and losses."""
    reports: list[Mapping[str, float]] = []
    losses, ends = Losses(), []
    whole = loop.fit

    def fit(task, *arguments):  # type: ignore[no-untyped-def]
        result = whole(task, *arguments)
        ends.append(task.engine.state())
        return result

    stages.fit = fit  # type: ignore[assignment]
    context = Context(rank, torch.distributed.get_world_size(), meters=losses, report=reports.append)
    try:
        if name == "crm":
            stages.train_crm(settings, context)
        else:
            stages.train_adapter(settings, name, context)
    finally:
        stages.fit = whole
    torch.distributed.barrier()
    save_file(ends[0], out.with_name(f"{out.name}-{rank}.safetensors"))
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps({"reports": reports, "losses": losses.values}))


def stop_after(step: int, die: bool = False) -> None:
    """From now on, training ends right after the checkpoint of ``step``: the processes die, or the run is given up."""
    save = loop.save_checkpoint

    def stopping(run, writer):  # type: ignore[no-untyped-def]
        save(run, writer)
        if run.done == step:
            writer.wait()
            torch.distributed.barrier()
            loop.save_checkpoint = save
            if die:
                os.kill(os.getpid(), 9)
            raise Stopped

    loop.save_checkpoint = stopping


@dataclass
class Rows:
    """A batch of the small model."""

    x: Tensor
    size = tokens = 1

    def __len__(self) -> int:
        return len(self.x)


class TwoLayers(nn.Module):
    """A frozen layer under a trained one. One parameter has an odd number of numbers: two workers share it unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.top = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 3)

    def forward(self, batch: Rows) -> Tensor:
        logits: Tensor = self.top(self.base(batch.x.to(self.base.weight.dtype)).relu())
        return logits


PRECISIONS = {f"zero{stage} {dtype}": (stage, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")}
PRECISIONS |= {"zero0 float32": (0, "float32"), "zero2 float16": (2, "float16"), "zero3 float16": (3, "float16")}


def small_loss(output: Tensor, batch: Rows) -> Tensor:
    return nn.functional.cross_entropy(output.float(), torch.tensor([0, 1, 2, 1]))


def small_engine(name: str, rank: int, state: State | None = None) -> Engine:
    """DeepSpeed at the stage and in the precision of ``PRECISIONS``, over ``TwoLayers``."""
    from deepspeed.accelerator import get_accelerator

    from reclora_dist.train.deepspeed_engine import DeepSpeedEngine

    get_accelerator().is_fp16_supported = lambda: True  # few processors are fast at it, all can do it
    model, train, (stage, dtype) = TwoLayers(), TrainConfig(lr=1e-2, batch_size=8), PRECISIONS[name]
    if state is not None:
        load_parameters(model, state)

    context = Context(rank, torch.distributed.get_world_size())
    return DeepSpeedEngine(
        model, build_optimiser(model, train), small_loss, train, EngineConfig(zero_stage=stage), context, dtype
    )


def rows(rank: int, step: int, bad: bool = False) -> list[MicroBatch]:
    """This rank's batch of a step; a bad one is no number on rank 1."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))
    return [MicroBatch(Rows(x * float("nan") if bad and rank == 1 else x), 1.0)]


def end(name: str, engine: Engine, rank: int, out: Path) -> dict[str, Any]:
    """How a training ends whose batches are bad from the second step on: steps that were begun, and the message."""
    begun, message, steps = list[int](), "", 24

    def batches(epoch: int, start: int, earlier: Any) -> Generator[list[MicroBatch], None, None]:
        for step in range(steps):
            begun.append(step)
            yield rows(rank, step, bad=step > 0)

    task = loop.Task(name, engine, steps, batches, lambda: 0.5)
    context = Context(rank, torch.distributed.get_world_size())
    try:
        loop.fit(task, TrainConfig(batch_size=8), context, CheckpointStore(Folder(str(out)), ""), None)
    except Diverged as error:
        message = str(error)
    return {"begun": len(begun), "message": message}


def differing(ours: State, theirs: State) -> list[str]:
    """Names of the tensors that are not equal."""
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def buffers(rank: int, out: Path) -> None:
    """What plain torch leaves of a buffer that differs between ranks."""
    model, train = TwoLayers(), TrainConfig(batch_size=8)
    model.register_buffer("constant", torch.tensor(float(rank)))
    engine = TorchEngine(model, build_optimiser(model, train), small_loss, train, Context(rank, WORLD))
    for step in range(2):
        engine.step(rows(rank, step), 1.0)
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps(model.get_buffer("constant").item()))


def every_precision(rank: int, out: Path) -> None:
    """A small model in every stage and precision: taken up again by a new engine, then with batches that are bad."""
    found: dict[str, Any] = {}
    for name in PRECISIONS:
        engine = small_engine(name, rank)
        norms = [engine.step(rows(rank, step), 1.0).gradient_norm for step in range(3)]
        state = engine.state()
        engine.step(rows(rank, 3), 1.0)
        after = engine.state()
        notes = {"norm": norms[0], "moved": differing(after, state)}
        again = small_engine(name, rank, state)
        again.restore(state, 3, rows(rank, 0, bad=True)[0])
        notes["restored"] = differing(again.state(), state)
        again.step(rows(rank, 3), 1.0)
        notes["next"] = differing(again.state(), after)
        found[name] = notes | end(name, again, rank, out / name)
    out.with_name(f"{out.name}-{rank}.json").write_text(json.dumps(found))


def every_engine(rank: int, port: int, runs: Mapping[str, Path], out: Path) -> None:
    """The CRM with DDP, then RecLoRA with each engine: undisturbed, and stopped and taken up again."""
    join(rank, port)
    train("crm", config(runs["crm"], EngineConfig()), rank, out / "crm")
    for name, run in runs.items():
        if name == "crm":
            continue
        kind = EngineConfig(kind="torch") if name == "torch" else EngineConfig(zero_stage=int(name[-1]))  # type: ignore[arg-type]
        train("reclora", config(run, kind), rank, out / name)
        if rank == 0:
            (run / "adapters" / "reclora").rename(out / f"{name}-adapter")
        torch.distributed.barrier()
        stop_after(KILL_AT)
        try:
            train("reclora", config(run, kind), rank, out / f"{name}-stopped")
        except Stopped:
            train("reclora", config(run, kind), rank, out / f"{name}-resumed")
    buffers(rank, out / "buffers")
    every_precision(rank, out / "precision")


VARIANTS = {
    "zero2 offloaded": EngineConfig(offload_optimizer="cpu"),
    "zero3 offloaded": EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
    "zero2 by tokens": EngineConfig(),
    "zero3 by tokens": EngineConfig(zero_stage=3),
    "torch by tokens": EngineConfig(kind="torch"),
}


def on_disk(rank: int, port: int, run: Path, out: Path, disk: Path) -> None:
    """RecLoRA with ZeRO-3, parameters and optimiser on the folder ``disk``."""
    join(rank, port)
    kind = EngineConfig(zero_stage=3, offload_optimizer="nvme", offload_parameters="nvme", nvme_path=str(disk))
    train("reclora", config(run, kind), rank, out)


def every_variant(rank: int, port: int, runs: Mapping[str, Path], out: Path) -> None:
    """RecLoRA with offload, and with micro-batches by tokens, whose number differs between ranks."""
    join(rank, port)
    for name, engine in VARIANTS.items():
        changes = {"micro_batch": 0, "micro_tokens": 300} if name.endswith("tokens") else {}
        train("reclora", config(runs[name], engine, **changes), rank, out / name)


def uneven(rank: int, port: int, run: Path, out: Path, world: int) -> None:
    """The CRM, then RecLoRA with ZeRO-2 until a checkpoint inside the epoch, on ``world`` workers."""
    join(rank, port, world)
    train("crm", config(run, EngineConfig()), rank, out / f"crm-{world}")
    stop_after(3)
    with contextlib.suppress(Stopped):
        train("reclora", config(run, EngineConfig()), rank, out / f"reclora-{world}")


def other_world(rank: int, port: int, run: Path, out: Path, world: int) -> None:
    """RecLoRA with ZeRO-3 to the end."""
    join(rank, port, world)
    train("reclora", config(run, EngineConfig(zero_stage=3)), rank, out / f"reclora-{world}")


def partitioned(rank: int, port: int, path: str, out: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """Logits of a backbone that was partitioned while it was read, and what this rank holds of it."""
    join(rank, port)
    from reclora_dist.train.partitioned import load_partitioned

    settings = BackboneConfig(kind="causal", dtype=dtype)
    backbone = load_partitioned(settings, path, EngineConfig(zero_stage=3), TrainConfig())
    parameters = list(backbone.model.parameters())
    assert all(parameter.numel() == 0 for parameter in parameters), "no whole parameter is left"
    mine = sum(parameter.ds_tensor.numel() for parameter in parameters)
    import deepspeed

    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters):
        ids = torch.tensor([[3, 5, 8, 13], [4, 6, 9, 9]])
        logits = backbone(ids, torch.ones_like(ids), torch.tensor([3, 2]))
    save_file({"logits": logits, "mine": torch.tensor(mine)}, out.with_name(f"{out.name}-{rank}.safetensors"))


def taught(rank: int, port: int, run: Path, out: Path) -> None:
    """LoRA, what it says of the samples, and RecLoRA that starts from it and learns that, with ZeRO-3."""
    join(rank, port)
    base = config(run, EngineConfig(zero_stage=3))
    adapters = small_config(run).adapters
    pupil = dataclasses.replace(adapters["reclora"], start="lora", teacher="lora")
    settings = dataclasses.replace(base, adapters={"lora": adapters["lora"], "reclora": pupil})
    train("lora", settings, rank, out / "lora")
    shards = Folder(str(run / "shards"))
    entries = read_manifest(shards, SHARDS).select("text/split=train/")
    context = Context(rank, torch.distributed.get_world_size())
    said = ask_teacher(Folder(str(run / "adapters/lora")), shards, entries, context)
    save_file({"ids": torch.tensor(said.ids), "said": said.values[0]}, out / f"said-{rank}.safetensors")
    train("reclora", settings, rank, out / "reclora")


def alone(rank: int, port: int, run: Path, out: Path) -> None:
    """RecLoRA with DeepSpeed in bfloat16 in one process that joined no group, as in a debugger."""
    torch.set_num_threads(1)
    base = config(run, EngineConfig())
    settings = dataclasses.replace(base, backbone=dataclasses.replace(base.backbone, dtype="bfloat16"))
    prepared = stages.prepare_adapter(settings, "reclora", Context())
    model = prepared.task.engine.model
    kinds = {name: str(buffer.dtype) for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    frozen = {str(p.dtype) for p in model.parameters() if not p.requires_grad}
    out.write_text(json.dumps({"buffers": kinds, "frozen": sorted(frozen)}))
    stages._train(settings, lambda _: prepared, Context())


def beside_a_gpu(rank: int, port: int, run: Path, out: Path) -> None:
    """A context on the CPU, although torch finds a GPU."""
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: True
    prepared = stages.prepare_adapter(config(run, EngineConfig()), "reclora", Context())
    with contextlib.closing(prepared.task.batches(0, 0, ())) as steps:
        loss = prepared.task.engine.step(next(steps), 1.0).loss
    out.write_text(json.dumps({"device": str(prepared.task.engine.model.device), "loss": loss}))


def killed(rank: int, port: int, run: Path, out: Path) -> None:
    """RecLoRA with ZeRO-2 until SIGKILL."""
    join(rank, port)
    stop_after(KILL_AT, die=True)
    train("reclora", config(run, EngineConfig()), rank, out)


def resumed(rank: int, port: int, run: Path, out: Path) -> None:
    """RecLoRA with ZeRO-2 to the end."""
    join(rank, port)
    train("reclora", config(run, EngineConfig()), rank, out)
