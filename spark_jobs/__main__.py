"""Several jobs in one Spark application: the JVM, the executors and the Python workers start once.

    printf '%s\n' '["build_events", "--raw", "logs", "--out", "events"]' | python -m spark_jobs

Reads one command per line from standard input, a JSON list of a job's name and its arguments, and after each prints
``ENDED`` and the job's exit code. Spark starts with the first command that has work to do, with that command's options,
and ends with the input.
"""

import importlib
import json
import sys
from collections.abc import Iterable

ENDED = "spark_jobs: ended with "
"""What the line after a command begins with."""


def serve(commands: Iterable[str]) -> int:
    """Run commands until one fails.

    Returns:
        Exit code of the last one.
    """
    code = 0
    try:
        for command in commands:
            name, *arguments = json.loads(command)
            code = importlib.import_module(f"spark_jobs.{name}").cli(arguments, keep=True)
            print(f"{ENDED}{code}", flush=True)
            if code:
                break
    finally:
        _stop()
    return code


def _stop() -> None:
    """End Spark, if a job started it."""
    if "pyspark" in sys.modules:
        from spark_jobs.session import running

        spark = running()
        if spark is not None:
            spark.stop()


if __name__ == "__main__":
    sys.exit(serve(sys.stdin))
