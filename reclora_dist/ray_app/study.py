"""The runs of a study as Ray tasks: each is the pipeline in a process of its own, on one cluster for all of them."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import RayError

from reclora_dist.config.redact import redacted_text
from reclora_dist.config.schema import Config
from reclora_dist.ray_app.reuse import reuse_stages
from reclora_dist.ray_app.session import Cluster, connect
from reclora_dist.ray_app.spark import end_with_parent
from reclora_dist.studies.grid import Run

LOG = "log.txt"
_ERROR = re.compile(r"error:|[\w.]+(Error|Exception|Failed)\b")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: seconds it took, stages it took over from siblings, and its error line (empty: none)."""

    seconds: float
    reused: tuple[str, ...] = ()
    error: str = ""


def run_study(config: Config, runs: Sequence[Run]) -> dict[str, str]:
    """Run what is not finished; a run that fails does not stop the others.

    The first run goes alone, then the first of each seed: what they make, the others need not make at the same time.

    Returns:
        The error line of each run that failed, by its name.

    Raises:
        ValueError: the study's folder is on a remote file system.
    """
    waiting = [run for run in runs if not run.is_finished]
    print(f"study: {len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    if not waiting:
        return {}
    workers = max(run.config.ray.workers for run in waiting)
    with connect(dataclasses.replace(config.ray, workers=workers)) as cluster:
        return _run_all(config, waiting, [run.config.paths.run for run in runs], _environment(cluster))


def _environment(cluster: Cluster) -> dict[str, str]:
    """This command's environment, and how its children join the cluster."""
    more = {"RAY_ADDRESS": cluster.address, "HYDRA_FULL_ERROR": "1"}  # else Hydra hides what went wrong from the log
    if cluster.started:
        more["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE", "token")  # as Ray chose for the cluster it started
    return {**os.environ, **more}


def _run_all(
    config: Config, waiting: Sequence[Run], folders: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    began = time.monotonic()
    errors: dict[str, str] = {}
    pending = list(waiting)
    running: dict[ray.ObjectRef[Outcome], Run] = {}
    while pending or running:
        while len(running) < config.study.parallel and (run := startable(waiting, pending, list(running.values()))):
            pending.remove(run)
            siblings = [folder for folder in reversed(folders) if folder != run.config.paths.run]
            running[_run_point.remote(run, siblings, os.getcwd(), environment)] = run
        (reference,), _ = ray.wait(list(running))
        run = running.pop(reference)
        outcome = _outcome(reference)
        if outcome.error:
            errors[run.name] = outcome.error
        done = len(waiting) - len(pending) - len(running)
        _say(run, outcome, done, len(waiting), time.monotonic() - began)
    return errors


def startable(waiting: Sequence[Run], pending: Sequence[Run], running: Sequence[Run]) -> Run | None:
    """The next of the ``pending`` runs; None as long as those that make what it shares are at work.

    That is the first of all that were ``waiting``, then the first of its seed.
    """
    leads = list({run.seed: run for run in reversed(waiting)}.values())
    for run in sorted(pending, key=lambda run: run not in leads):
        if not any(other is waiting[0] or (other in leads and other.seed == run.seed) for other in running):
            return run
    return None


def _outcome(reference: "ray.ObjectRef[Outcome]") -> Outcome:
    try:
        return ray.get(reference)
    except RayError as error:  # the task failed, or its process or its node died
        return Outcome(0.0, error=str(error).strip().splitlines()[-1])


def _say(run: Run, outcome: Outcome, done: int, total: int, elapsed: float) -> None:
    what = f"failed: {outcome.error}" if outcome.error else f"done in {outcome.seconds:.0f} s"
    reused = f", reused {', '.join(outcome.reused)}" if outcome.reused else ""
    left = f"about {elapsed / done * (total - done):.0f} s left" if done < total else "nothing left"
    print(f"study: [{done}/{total}] {run.name}: {what}{reused}; {elapsed:.0f} s so far, {left}", flush=True)


@ray.remote(num_cpus=0, max_retries=0)
def _run_point(run: Run, siblings: Sequence[str], cwd: str, environment: Mapping[str, str]) -> Outcome:
    """One run; it reserves nothing, its training and scoring do."""
    began = time.monotonic()
    log = Path(run.config.paths.run, LOG)
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        reused = tuple(reuse_stages(run.config, siblings))
    except ValueError as error:
        return Outcome(time.monotonic() - began, error=str(error))
    with log.open("w") as output:
        for name in run.config.study.commands:
            command = [sys.executable, "-u", "-m", f"reclora_dist.cli.{name}", *run.arguments]
            print(shlex.join(map(redacted_text, command)), file=output, flush=True)
            code = _call(command, cwd, environment, output.fileno())
            if code:
                return Outcome(time.monotonic() - began, reused, f"{_error_line(log)} (exit code {code}, see {log})")
    seconds = time.monotonic() - began
    run.finish(seconds)
    return Outcome(seconds, reused)


def _call(command: Sequence[str], cwd: str, environment: Mapping[str, str], output: int) -> int:
    """Run a command to its end; it ends with this process, too."""
    done = subprocess.run(
        command, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        preexec_fn=end_with_parent,
    )  # fmt: skip
    return done.returncode


def _error_line(log: Path) -> str:
    """What a log says of a failure: the last line of an error or exception, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])
