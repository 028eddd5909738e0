"""Several jobs in one Spark application, asked for by another process: the client of ``python -m spark_jobs``."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from spark_jobs.__main__ import ENDED


class JobFailed(ValueError):
    """A Spark job ended with an error, which it has printed."""


class Application:
    """A process that runs jobs one after the other in one Spark application; its JVM and memory go when it is closed.

    Args:
        before_start: called in the new process before the program starts.
    """

    def __init__(self, before_start: Callable[[], None] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "spark_jobs"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=before_start,
        )  # fmt: skip

    def run(self, job: str, arguments: Sequence[str]) -> Iterator[str]:
        """Run a job; give the lines that it prints, as they come. The job runs while they are read.

        Raises:
            JobFailed: the job ended with an error.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([job, *arguments]) + "\n")
        self.process.stdin.flush()
        code = ""
        for line in self.process.stdout:
            if line.startswith(ENDED):
                code = line.removeprefix(ENDED).strip()
                break
            yield line
        if code != "0":
            code = code or str(self.process.wait())
            raise JobFailed(f"Spark job {job} ended with exit code {code}; its message stands above")

    def close(self) -> None:
        """End the application and wait for it."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
