"""Spark jobs of ``spark_jobs`` for the pipeline."""

import ctypes
import dataclasses
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config
from spark_jobs.application import Application

_SET_PARENT_DEATH_SIGNAL = 1


class SparkJobs:
    """Jobs of ``spark_jobs``, one after the other in one Spark application, which starts with the first job."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._application: Application | None = None

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
        arguments = ["--config", json.dumps(dataclasses.asdict(section))]
        for name, uri in inputs.items():
            arguments += [f"--{name}", uri]
        arguments += ["--out", folder(self._config, output).uri, *_spark_options(self._config)]
        if "://" not in self._config.paths.run:
            arguments += ["--metrics-file", str(folder(self._config, "metrics").local() / f"{job}.prom")]
        self._application = self._application or Application(end_with_parent)
        current = False
        for line in self._application.run(job, arguments):
            current = current or "up to date" in line
            print(line, end="", flush=True)
        return not current

    def close(self) -> None:
        """End the application, if one is running."""
        if self._application:
            self._application.close()
            self._application = None


def _spark_options(config: Config) -> list[str]:
    spark = config.spark
    options = ["--master", spark.master, "--driver-memory", spark.driver_memory]
    options += ["--shuffle-partitions", str(spark.shuffle_partitions)]
    return options + [part for key, value in spark.conf.items() for part in ("--conf", f"{key}={value}")]


def end_with_parent() -> None:
    """A child must not go on writing after the process that started it was killed (Linux); for ``preexec_fn``."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
