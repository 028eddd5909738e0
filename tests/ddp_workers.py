"""What the two processes of tests/distributed do; a module of its own, because spawned processes import it by name."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from sample_data import small_config

from reclora_dist.config.schema import Config, EngineConfig, RayConfig
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.telemetry.names import Metric
from reclora_dist.train import loop, stages
from reclora_dist.train.context import Context

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


def config(run: Path, engine: EngineConfig) -> Config:
    base = small_config(run, ray=RayConfig(workers=WORLD), engine=engine)
    train = dataclasses.replace(base.lora_train, micro_batch=16, log_every=1)
    # the fusion head is a third parameter group, the balance loss a second way into the gates
    lora = dataclasses.replace(base.adapters["reclora"], balance=0.1, head="fusion")
    return dataclasses.replace(base, lora_train=train, adapters={"reclora": lora})


def join(rank: int, port: int) -> None:
    """Make this process rank ``rank`` of a gloo process group."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
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
    context = Context(rank, WORLD, meters=losses, report=reports.append)
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
    save = loop._save

    def stopping(task, context, store, done, *more):  # type: ignore[no-untyped-def]
        save(task, context, store, done, *more)
        if done == step:
            torch.distributed.barrier()
            loop._save = save
            if die:
                os.kill(os.getpid(), 9)
            raise Stopped

    loop._save = stopping


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


def killed(rank: int, port: int, run: Path, out: Path) -> None:
    """RecLoRA with ZeRO-2 until SIGKILL."""
    join(rank, port)
    stop_after(KILL_AT, die=True)
    train("reclora", config(run, EngineConfig()), rank, out)


def resumed(rank: int, port: int, run: Path, out: Path) -> None:
    """RecLoRA with ZeRO-2 to the end."""
    join(rank, port)
    train("reclora", config(run, EngineConfig()), rank, out)
