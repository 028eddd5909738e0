"""What a kill costs: losses after it, steps done twice, seconds lost; and the goodput with a kill every minute.

    make bench NAME=resume            one JSON object last

A small log of the demo's kind is prepared and its CRM trained. Then RecLoRA is trained with each ZeRO stage by two
processes under torchrun, once undisturbed and once killed (SIGKILL to all of them) at random steps and started again
each time; every step's loss is compared with the undisturbed one's. Last, the same under Ray Train, where one worker is
killed every minute.

`max_loss_difference`: goal 0.0. `goodput`: seconds of the undisturbed run over those of the run killed every minute.
"""

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
KILLS = (3, 3, 2, 2)
"""How often the run with ZeRO 0, 1, 2 and 3 is killed."""


def main() -> None:
    """Measure and print, or be one of torchrun's processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/resume", help="folder of the run")
    parser.add_argument("--epochs", type=int, default=2, help="of the undisturbed and the killed runs")
    parser.add_argument("--long", type=int, default=12, help="epochs of the run that is killed every minute")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between its kills")
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which it is killed")
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    home, draw = arguments.run.resolve(), random.Random(arguments.seed)
    common = [f"paths.run={home}", "synthesise.users=600", "shards.text_train=2000"]
    for command in ("prepare", "train"):
        program = [sys.executable, "-m", f"reclora_dist.cli.{command}", *common, "~adapters"]
        subprocess.run(program, check=True, cwd=ROOT)
    common += ["adapters=reclora", "lora_train.checkpoint_every=5", "lora_train.log_every=1"]
    stages = []
    for stage, kills in enumerate(KILLS):
        settings = [*common, f"engine=zero{stage}", f"lora_train.epochs={arguments.epochs}"]
        stages.append({"zero": stage, **compared(settings, home, kills, draw)})
        print(json.dumps(stages[-1]), flush=True)
    settings = [*common, "engine=zero2", f"lora_train.epochs={arguments.long}"]
    found = goodput(settings, home, arguments.every)
    print(json.dumps({"max_loss_difference": max(s["max_loss_difference"] for s in stages), **found, "stages": stages}))


def compared(settings: Sequence[str], home: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """One undisturbed run and one that is killed ``kills`` times."""
    expected, quiet = trained(settings, home, [])
    total = len(expected)
    places = sorted(draw.sample(range(2, total), kills))
    found, disturbed = trained(settings, home, places)
    steps = [step for step, _ in found]
    by_step = dict(expected)
    return {
        "max_loss_difference": max(abs(loss - by_step[step]) for step, loss in found),
        "steps": total,
        "kills_at": places,
        "repeated_steps": len(steps) - len(set(steps)),
        "seconds": round(quiet, 1),
        "seconds_lost_per_kill": round((disturbed - quiet) / kills, 1),
    }


def trained(settings: Sequence[str], home: Path, kills: Sequence[int]) -> tuple[list[tuple[int, float]], float]:
    """Steps and losses as they were taken, and the seconds from start to end."""
    for name in ("adapters", "checkpoints", "tensorboard"):
        shutil.rmtree(home / name, ignore_errors=True)
    log = home / "losses.jsonl"
    log.unlink(missing_ok=True)
    since = time.perf_counter()
    for kill in [*kills, None]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(Path(__file__).resolve()), "--worker", str(log), *settings]
        with (home / "worker.log").open("a") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        if kill is None:
            if process.wait():
                raise SystemExit(f"training failed: see {home / 'worker.log'}")
            break
        while process.poll() is None and not any(step >= kill for step, _ in read(log)):
            time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit(f"training ended before step {kill}: see {home / 'worker.log'}")
        every = psutil.Process(process.pid).children(recursive=True)  # torchrun's workers are in sessions of their own
        for one in [*every, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(every)
        process.wait()
    return read(log), time.perf_counter() - since


def read(log: Path) -> list[tuple[int, float]]:
    """Steps and losses of rank 0; a line that is being written does not count."""
    if not log.exists():
        return []
    lines = log.read_text().splitlines(keepends=True)
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


def work(arguments: Sequence[str]) -> None:
    """One of torchrun's processes: train, noting every step's loss."""
    from reclora_dist.cli.compose import load
    from reclora_dist.train import launch, stages

    @contextlib.contextmanager
    def noting(*_: Any) -> Iterator[Any]:
        def record(step: int, values: Mapping[str, float]) -> None:
            if "loss" in values:
                with Path(arguments[0]).open("a") as file:
                    file.write(json.dumps([step, values["loss"]]) + "\n")

        yield record

    stages.recording = noting  # type: ignore[assignment]
    launch.train_all(load(arguments[1:]))


def goodput(settings: Sequence[str], home: Path, every: float) -> dict[str, Any]:
    """Under Ray Train: once undisturbed, once with a worker killed every ``every`` seconds."""
    quiet, _ = under_ray(settings, home, 0.0)
    disturbed, kills = under_ray(settings, home, every)
    lost = (disturbed - quiet) / kills if kills else 0.0
    return {
        "goodput": round(quiet / disturbed, 3),
        "ray_seconds": round(quiet, 1),
        "ray_seconds_killed": round(disturbed, 1),
        "ray_kills": kills,
        "ray_seconds_lost_per_kill": round(lost, 1),
    }


def under_ray(settings: Sequence[str], home: Path, every: float) -> tuple[float, int]:
    """Seconds of a run, Ray's start included, and how often a worker was killed."""
    for name in ("adapters", "checkpoints", "tensorboard"):
        shutil.rmtree(home / name, ignore_errors=True)
    since, over, kills = time.perf_counter(), threading.Event(), list[int]()
    with (home / "ray.log").open("a") as output:
        command = [sys.executable, "-m", "reclora_dist.cli.train", *settings]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        if every:
            threading.Thread(target=killer, args=(process.pid, every, over, kills), daemon=True).start()
        code = process.wait()
    over.set()
    if code:
        raise SystemExit(f"training failed: see {home / 'ray.log'}")
    return time.perf_counter() - since, len(kills)


def killer(parent: int, every: float, over: threading.Event, kills: list[int]) -> None:
    """SIGKILL one training worker every so often, counted from the first one seen."""
    while not over.wait(every if kills or workers(parent) else 0.2):
        found = workers(parent)
        if found and (kills or not over.wait(every)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[-1].kill()
                kills.append(found[-1].pid)


def workers(parent: int) -> list[psutil.Process]:
    """Training workers below a process."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in "".join(process.cmdline()):
                    found.append(process)
    return found


if __name__ == "__main__":
    main()
