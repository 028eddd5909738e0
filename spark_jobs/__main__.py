"""Several jobs in one Spark application: the JVM, the executors and the Python workers start once.

    echo '["build_events", "--raw", "logs", "--out", "events"]' | python -m spark_jobs

Reads one command per line from standard input, a JSON list of a job's name and its arguments, and after each prints
``ENDED`` and the job's exit code. Spark starts with the first command that has work to do, with that command's options,
and ends with the input.
"""

import importlib
import json
import sys
from collections.abc import Iterable

JOBS = ("synthesise", "build_events", "retrieve_history", "write_shards", "report_quality")

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
            if name not in JOBS:
                print(f"spark_jobs: error: no job {name!r}; choose one of {', '.join(JOBS)}", file=sys.stderr)
                return 2
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
    if len(sys.argv) > 1:
        print(__doc__)
        sys.exit(0 if sys.argv[1] in ("-h", "--help") else 2)
    sys.exit(serve(sys.stdin))
