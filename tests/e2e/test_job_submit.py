"""A stage as a Ray job: ``ray job submit --working-dir .`` to a cluster of its own, which asks for a token."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_run import REPOSITORY, SETTINGS, Finished, digests, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


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
        wait_for(dashboard, node, folder / "head.log")
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


def wait_for(port: int, node: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert node.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


def submit(cluster: str, *entrypoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RAY, "job", "submit", "--address", cluster, "--working-dir", ".", "--", *entrypoint],
        cwd=REPOSITORY, env=environment(**more), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_training_as_a_job_gives_the_adapter_of_the_pipeline(finished: Finished, cluster: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.run, tmp_path / "run"))
    shutil.rmtree(run / "adapters" / "reclora")
    done = submit(cluster, "python", "-m", "reclora_dist.cli.train", *SETTINGS, f"paths.run={run}", **TOKEN)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    assert "succeeded" in done.stdout
    assert "crm: up to date" in done.stdout
    assert "adapter reclora: done in" in done.stdout
    assert digests(run) == digests(finished.run)


def test_bad_input_fails_the_job_with_its_message(cluster: str, tmp_path: Path) -> None:
    done = submit(cluster, "python", "-m", "reclora_dist.cli.train", "crm.embeding=8", f"paths.run={tmp_path}", **TOKEN)
    assert done.returncode != 0
    assert "error: config crm.embeding = 8: no such key; did you mean 'crm.embedding'?" in done.stdout + done.stderr


def test_without_the_token_nothing_is_run(cluster: str) -> None:
    done = submit(cluster, "python", "-c", "print('I ran')", RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "I ran" not in done.stdout
