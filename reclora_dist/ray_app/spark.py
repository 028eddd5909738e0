"""Run a Spark job of ``spark_jobs`` as a process of its own: its JVM and memory go when it ends."""

import ctypes
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config

_SET_PARENT_DEATH_SIGNAL = 1


class JobFailed(ValueError):
    """A Spark job ended with an error, which it has printed."""


def run_job(config: Config, job: str, section: Any, inputs: Mapping[str, str], output: str) -> bool:
    """Run ``spark_jobs.<job>`` with a config section; print what it prints.

    Args:
        inputs: input option to URI.
        output: sub-folder of the run.

    Returns:
        Whether there was work to do.

    Raises:
        JobFailed: the job ended with an error.
    """
    command = [sys.executable, "-m", f"spark_jobs.{job}", "--config", json.dumps(dataclasses.asdict(section))]
    for name, uri in inputs.items():
        command += [f"--{name}", uri]
    command += ["--out", folder(config, output).uri, *_spark_options(config)]
    if "://" not in config.paths.run:
        command += ["--metrics-file", str(folder(config, "metrics").local() / f"{job}.prom")]
    current = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_end_with_parent) as process:
        assert process.stdout is not None
        for line in process.stdout:
            current = current or "up to date" in line
            print(line, end="", flush=True)
    if process.returncode:
        raise JobFailed(f"Spark job {job} ended with exit code {process.returncode}; its message stands above")
    return not current


def _spark_options(config: Config) -> list[str]:
    spark = config.spark
    options = ["--master", spark.master, "--driver-memory", spark.driver_memory]
    options += ["--shuffle-partitions", str(spark.shuffle_partitions)]
    return options + [part for key, value in spark.conf.items() for part in ("--conf", f"{key}={value}")]


def _end_with_parent() -> None:
    """A job must not go on writing after the pipeline that started it was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
