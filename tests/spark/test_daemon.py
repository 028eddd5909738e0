"""The daemon of Spark's Python workers, spoken to as Spark does."""

import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from standalone_cluster import until


@pytest.mark.parametrize("module", ["pyspark.daemon", "spark_jobs.daemon"])
def test_only_ours_is_silent_about_a_worker_whose_session_stops(module: str, request: pytest.FixtureRequest) -> None:
    folder = tempfile.TemporaryDirectory()  # the path of a socket has at most 107 bytes
    request.addfinalizer(folder.cleanup)
    environment = os.environ | {
        "PYTHON_UNIX_DOMAIN_ENABLED": "true",
        "PYTHON_WORKER_FACTORY_SOCK_DIR": folder.name,
        "PYTHON_DAEMON_KILL_WORKER_ON_FLUSH_FAILURE": "1",
        "SPARK_REUSE_WORKER": "1",
    }
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-m", module, "pyspark.worker"]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], env=environment, **pipes) as started:
        assert started.stdin and started.stdout and started.stderr
        (length,) = struct.unpack("!i", started.stdout.read(4))
        with socket.socket(socket.AF_UNIX) as spark:
            spark.connect(started.stdout.read(length).decode())
            (worker,) = struct.unpack("!i", spark.recv(4))
        until(lambda: not Path(f"/proc/{worker}").exists(), lambda: "the worker did not notice that Spark hung up")
        started.stdin.close()
        said = started.stderr.read().decode()
    assert ("BrokenPipeError" in said) is (module == "pyspark.daemon"), said
