"""Spark jobs of ``spark_jobs`` for the pipeline."""

import ctypes
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config
from spark_jobs.__main__ import ENDED

_SET_PARENT_DEATH_SIGNAL = 1


class JobFailed(ValueError):
    """A Spark job ended with an error, which it has printed."""


class SparkJobs:
    """Jobs of ``spark_jobs``, one after the other in one Spark application: a process of its own, whose JVM and memory
    go when it is closed. It starts with the first job.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: subprocess.Popen[str] | None = None

    def run(self, job: str, section: Any, inputs: Mapping[str, str], output: str) -> bool:
        """Run ``spark_jobs.<job>`` with a config section; print what it prints.

        Args:
            inputs: input option to URI.
            output: sub-folder of the run.

        Returns:
            Whether there was work to do.

        Raises:
            JobFailed: the job ended with an error.
        """
        command = [job, "--config", json.dumps(dataclasses.asdict(section))]
        for name, uri in inputs.items():
            command += [f"--{name}", uri]
        command += ["--out", folder(self._config, output).uri, *_spark_options(self._config)]
        if "://" not in self._config.paths.run:
            command += ["--metrics-file", str(folder(self._config, "metrics").local() / f"{job}.prom")]
        return not self._ask(job, command)

    def close(self) -> None:
        """End the application, if one is running."""
        if self._process:
            with self._process as process:
                assert process.stdin is not None
                process.stdin.close()
            self._process = None

    def _ask(self, job: str, command: Sequence[str]) -> bool:
        """Whether the job found its result up to date."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "spark_jobs"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_end_with_parent,
            )  # fmt: skip
        process, current, code = self._process, False, ""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith(ENDED):
                code = line.removeprefix(ENDED).strip()
                break
            current = current or "up to date" in line
            print(line, end="", flush=True)
        if code != "0":
            code = code or str(process.wait())
            raise JobFailed(f"Spark job {job} ended with exit code {code}; its message stands above")
        return current


def _spark_options(config: Config) -> list[str]:
    spark = config.spark
    options = ["--master", spark.master, "--driver-memory", spark.driver_memory]
    options += ["--shuffle-partitions", str(spark.shuffle_partitions)]
    return options + [part for key, value in spark.conf.items() for part in ("--conf", f"{key}={value}")]


def _end_with_parent() -> None:
    """A job must not go on writing after the pipeline that started it was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
