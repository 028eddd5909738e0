"""From nothing to a checked service in one command; again; with SIGKILL inside a stage, which a Ray job then finishes.

One file, for all of it starts from one finished run, and the tests of a file stay in one process.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import REPOSITORY, SETTINGS, Finished, command, digests, environment, finish

pytestmark = [pytest.mark.spark, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
STAGES = [
    "synthesise", "events", "backbone", "vectors", "histories", "shards", "quality", "crm",
    "adapter lora", "adapter uniform", "adapter reclora", "evaluation", "service",
]  # fmt: skip
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
MODELS = ["running_averages", "crm", "lora", "uniform", "reclora"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One small run of the whole pipeline; the tests look at it or copy it."""
    return finish("pipeline", tmp_path_factory.mktemp("e2e") / "run")


@pytest.fixture(scope="module")
def summary(finished: Finished) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished.run / "summary.json").read_text())
    return found


def test_every_stage_does_its_work_in_order(finished: Finished) -> None:
    first, end = STAGES.index("crm"), STAGES.index("evaluation")
    headlines = [*STAGES[:first], ", ".join(STAGES[first:end]), *STAGES[end:]]
    assert re.findall(r"^=== (.*)$", finished.output, re.MULTILINE) == headlines
    done = [*STAGES[:end], "workers", *STAGES[end:]]
    assert re.findall(r"^(.*): done in [\d.]+ s$", finished.output, re.MULTILINE) == done
    assert set(digests(finished.run)) == {
        "raw", "events", "backbone", "vectors", "histories", "shards", "quality", "crm",
        "adapters/lora", "adapters/uniform", "adapters/reclora", "evaluation", "service",
    }  # fmt: skip


def test_the_summary_has_what_is_promised(summary: dict[str, Any]) -> None:
    kept = {"training", "seconds", "peak_memory_mib"}
    assert set(summary) == {*MODELS, "reclora_minus_lora", "reclora_minus_uniform"} | kept
    for model in MODELS:
        assert set(summary[model]) == {"auc", "logloss", "acc", "samples_per_s"}
        assert 0 < summary[model]["auc"] < 1
        assert 0 <= summary[model]["acc"] <= 1
        assert summary[model]["logloss"] > 0
        assert summary[model]["samples_per_s"] > 0
    for other in ("lora", "uniform"):
        difference = summary[f"reclora_minus_{other}"]
        assert difference["low"] <= difference["mean"] <= difference["high"]
        between = summary["reclora"]["auc"] - summary[other]["auc"]
        assert difference["mean"] == pytest.approx(between, abs=0.02)
    assert set(summary["seconds"]) == {*STAGES, "workers"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())
    assert 500 < summary["peak_memory_mib"] < 8192
    assert set(summary["training"]) == {"crm", "lora", "uniform", "reclora"}
    for stage, costs in summary["training"].items():
        assert costs["samples_per_second"] > 0
        assert 0 <= costs["data_wait_share"] < 1
        assert 0 < costs["communication_share"] <= 1
        assert 0 < costs["mfu"] < 1
        assert (costs["tokens_per_second"] > 0) == (stage != "crm")


def test_a_run_says_what_it_was_made_with(finished: Finished) -> None:
    record = json.loads((finished.run / "run.json").read_text())
    assert record["config"]["paths"]["run"] == str(finished.run)
    assert record["config"]["lora_train"]["batch_size"] > 0
    assert all(record["versions"].values())
    assert set(record["commit"]) <= {"id", "changed"}
    for stage in ("crm", "lora", "uniform", "reclora"):
        assert list((finished.run / "tensorboard" / stage).glob("events.out.tfevents.*"))


def test_ray_train_repeats_no_report_of_ours(finished: Finished) -> None:
    assert "crm: step 44 validation AUC" in finished.output
    assert "Reporting training result" not in finished.output


def test_it_ends_with_the_table_and_where_to_look(finished: Finished, summary: dict[str, Any]) -> None:
    end = finished.output[finished.output.index("\nmodel ") :]
    for model in MODELS:
        assert re.search(rf"^{model} +{summary[model]['auc']:.4f} ", end, re.MULTILINE)
    assert "AUC reclora − lora: " in end
    assert f"report: {finished.run / 'report' / 'report.html'}" in end
    assert (finished.run / "report" / "report.html").stat().st_size > 10_000
    assert f"summary: {finished.run / 'summary.json'}" in end
    assert re.search(r"^metrics: (\d+) of \1 series found", finished.output, re.MULTILINE)


def test_the_service_answers_what_the_evaluation_scored(finished: Finished) -> None:
    answers = json.loads((finished.run / "service" / "answers.json").read_text())
    asked = answers["score"]["request"]["candidates"]
    assert [score["item"] for score in answers["score"]["response"]["scores"]] == asked
    assert answers["evaluation"]["status"] == "done"


def test_nothing_unsafe_is_written(finished: Finished) -> None:
    files = (path for path in finished.run.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    kinds = {path.suffix for path in files}
    assert kinds <= {
        ".json",
        ".parquet",
        ".arrow",
        ".safetensors",
        ".npy",
        ".md",
        ".html",
        ".svg",
        ".png",
        ".prom",
        ".txt",
    }, kinds


def test_a_second_run_skips_what_is_up_to_date(finished: Finished, tmp_path: Path) -> None:
    """In a folder that was moved, too: nothing in a run depends on where it lies."""
    run = Path(shutil.copytree(finished.run, tmp_path / "moved"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    again = finish("pipeline", run)
    assert re.findall(r"^(.*): up to date$", again.output, re.MULTILINE)
    for stage in STAGES:
        assert f"{stage}: up to date\n" in again.output
    assert "ray: connecting" not in again.output
    assert "Spark" not in again.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")} == before
    assert "\nmodel " in again.output


def test_a_run_that_was_killed_again_and_again_ends_like_the_undisturbed_one(
    finished: Finished, tmp_path: Path, exhaustive: bool
) -> None:
    """SIGKILL inside the stages in turn; each next run goes on from there.

    The run lacks what these stages make; the others are up to date, if what is made again is what it was.
    """
    if not exhaustive:
        pytest.skip("minutes; one stage is killed below, a Spark job in tests/spark: with --exhaustive only")
    run, stages = tmp_path / "run", list(KILLED)
    shutil.copytree(finished.run, run)
    for stage in stages:
        shutil.rmtree(run / KILLED[stage][0])
    for stage in stages:
        kill_inside(run, stage, KILLED[stage][1])
    end = finish("pipeline", run).output
    for stage in STAGES[: STAGES.index(stages[-1])]:
        assert f"{stage}: up to date\n" in end
    found, expected = digests(run), digests(finished.run)
    assert found.pop("service") and expected.pop("service")
    assert found == expected
    assert answers(run) == answers(finished.run)
    assert not list(run.rglob("*.partial"))


def answers(run: Path) -> list[Any]:
    """What the service answered, without its times."""
    told = json.loads((run / "service" / "answers.json").read_text())
    scores: list[Any] = told["score"]["response"]["scores"]
    return scores


KILLED = {
    "events": ("events", "events/**/*"),
    "backbone": ("backbone", "=== backbone"),
    "vectors": ("vectors", "ray: connecting"),
    "crm": ("crm", "checkpoints/crm/**/manifest.json"),
    "adapter reclora": ("adapters/reclora", "checkpoints/reclora/**/manifest.json"),
    "evaluation": ("evaluation", "evaluation: lora scored"),
    "service": ("service", "ray: connecting"),
}
"""What a stage makes; and by what one sees that it is at work: files that it has left (a glob), or what it says. The
other Spark jobs and adapters run the same code."""


def kill_inside(run: Path, stage: str, sign: str) -> None:
    """Start the pipeline and SIGKILL it when ``stage`` is at work; all of it ends."""
    log = run.with_suffix(".txt")
    with (
        log.open("w") as output,
        subprocess.Popen(
            command("pipeline", run), cwd=REPOSITORY, env=environment(), stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        wait_for(process, log, lambda: bool(re.search(rf"^=== (.+, )?{stage}\b", log.read_text(), re.MULTILINE)))
        wait_for(process, log, lambda: sign in log.read_text() or any(path.is_file() for path in run.glob(sign)))
        working = [p for p in psutil.Process(process.pid).children(recursive=True) if not ends_later(p)]
        os.kill(process.pid, signal.SIGKILL)
    assert f"{stage}: done" not in log.read_text()
    _, alive = psutil.wait_procs(working, timeout=60)
    assert not alive, f"{stage} was killed, and these went on: {alive}"


def wait_for(process: subprocess.Popen[bytes], log: Path, happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 900
    while not happened():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.02)


def ends_later(process: psutil.Process) -> bool:
    """Ray's agents look for their node once a minute only; they touch nothing of a run."""
    try:
        return "".join(process.cmdline()).strip() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    except psutil.Error:
        return False


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a head node's dashboard."""
    head, dashboard, agent, metrics, client = free_ports(5)
    folder = Path(tempfile.mkdtemp(prefix="reclora-job-", dir="/tmp"))  # its sockets' paths must be short
    options = {
        "--port": head, "--dashboard-port": dashboard, "--dashboard-agent-listen-port": agent,
        "--metrics-export-port": metrics, "--ray-client-server-port": client, "--temp-dir": folder, "--num-cpus": 2,
        "--object-store-memory": 100 << 20, "--dashboard-host": "127.0.0.1",
    }  # fmt: skip
    arguments = [f"{name}={value}" for name, value in options.items()]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (folder / "head.log").open("w") as log:
        node = subprocess.Popen(
            [*RAY, "start", "--head", "--block", "--disable-usage-stats", *arguments],
            env=environment(**TOKEN, PATH=path), stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for_port(dashboard, node, folder / "head.log")
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        stop(psutil.Process(node.pid))
        shutil.rmtree(folder, ignore_errors=True)


def stop(node: psutil.Process) -> None:
    """End a node's processes; its own orderly way takes half a minute."""
    processes = [node, *node.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def wait_for_port(port: int, node: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert node.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


def submit(cluster: str, *entrypoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for its end; a head node takes jobs some time after its dashboard answers."""
    end = time.monotonic() + 120
    while True:
        done = subprocess.run(
            [*RAY, "job", "submit", "--address", cluster, "--working-dir", ".", "--", *entrypoint],
            cwd=REPOSITORY, env=environment(**more), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        if "No available agent to submit job" not in done.stderr or time.monotonic() > end:
            return done


def test_a_job_goes_on_with_a_training_that_was_killed_and_gives_the_adapter_of_the_undisturbed_run(
    finished: Finished, cluster: str, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    made, sign = KILLED["adapter reclora"]
    shutil.rmtree(run / made)
    kill_inside(run, "adapter reclora", sign)
    done = submit(cluster, "python", "-m", "reclora_dist.cli.train", *SETTINGS, f"paths.run={run}", **TOKEN)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert "succeeded" in done.stdout
    assert "crm: up to date" in done.stdout
    assert "reclora: resuming after step" in done.stdout
    assert "adapter reclora: done in" in done.stdout
    assert digests(run) == digests(finished.run)
    assert not list(run.rglob("*.partial"))


def test_bad_input_fails_the_job_with_its_message(cluster: str, tmp_path: Path) -> None:
    done = submit(cluster, "python", "-m", "reclora_dist.cli.train", "crm.embeding=8", f"paths.run={tmp_path}", **TOKEN)
    assert done.returncode != 0
    assert "error: config crm.embeding = 8: no such key; did you mean 'crm.embedding'?" in done.stdout + done.stderr


def test_without_the_token_nothing_is_run(cluster: str) -> None:
    done = submit(cluster, "python", "-c", "print('I ran')", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "I ran" not in done.stdout
