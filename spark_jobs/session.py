"""The Spark session of a job: quiet and on the loopback for a local master, spark-submit's own elsewhere."""

import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

OURS = {"spark.sql.session.timeZone": "UTC", "spark.sql.legacy.parquet.nanosAsLong": "true"}
"""What no site may have otherwise: how times without a zone are read, and nanoseconds, for which Spark has no type."""

_ROOT = Path(__file__).resolve().parents[1]
"""Where this process has the package from: a checkout, a folder of installed packages, or a wheel."""


def start(job: str, master: str, driver_memory: str, shuffle_partitions: int, conf: Mapping[str, str]) -> SparkSession:
    """Start (or, under spark-submit, join) Spark.

    ``OURS`` come first, then the properties that spark-submit was given, then ``conf``, then the other arguments.

    Raises:
        ValueError: a local master could not write its scratch files.
    """
    given = _submitted()
    local = _is_local(given.get("spark.master", master))
    wanted = {
        "spark.master": master,
        "spark.driver.memory": driver_memory,
        "spark.sql.shuffle.partitions": str(shuffle_partitions),
        "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
        **(_local() if local else {}),
        **conf,
    }
    if local:
        _check_scratch(given.get("spark.local.dir", conf.get("spark.local.dir", tempfile.gettempdir())))
    settings = SparkConf(loadDefaults=False)
    for key, value in wanted.items():
        if key not in given:
            settings.set(key, value)
    spark = SparkSession.builder.appName(f"reclora {job}").config(conf=settings).getOrCreate()
    for key, value in OURS.items():
        spark.conf.set(key, value)
    if not is_local(spark):
        _ship(spark.sparkContext)
    return spark


def running() -> SparkSession | None:
    """The session that is running in this process, if there is one."""
    return SparkSession.getActiveSession()


def forget(spark: SparkSession) -> None:
    """Let go of the rows that a job kept, so that the next one has the memory."""
    kept = spark.sparkContext._jsc.getPersistentRDDs()
    for rdd in list(kept.values()):
        rdd.unpersist(False)


def cause(error: Exception) -> str:
    """What our own code said on an executor, or Spark about a full disk or a file; empty if it was something else."""
    text = str(error)
    ours = re.findall(r"^(?:reclora_dist\.[\w.]*Error|ValueError): (.*)$", text, re.MULTILINE)
    if ours:
        return str(ours[-1])
    if "No space left on device" in text:
        return (
            "no space left on device for Spark's scratch files: free space where spark.local.dir lies (/tmp unless "
            "set), or name another folder with --conf spark.local.dir=…"
        )
    return _unreadable(text)


def _unreadable(text: str) -> str:
    """The file that Spark could not read, and the innermost reason."""
    found = re.search(r"Encountered error while reading file (.+?)\.\s(.*)", text)
    if not found:
        return ""
    reasons = re.findall(
        r"^Caused by: [\w.$]+: ((?:.*\n)(?:(?!\s+at |Caused by: |CSV file: ).*\n)*)", text + "\n", re.MULTILINE
    )
    reason = " ".join((reasons[-1] if reasons else found[2]).split())
    return (
        f"{unquote(found[1])!r} cannot be read ({reason}): it is damaged, cut short, or unlike the other files. "
        "Replace it, or take it out of the folder."
    )


def is_local(spark: SparkSession) -> bool:
    """Whether all of Spark is this process's own."""
    return _is_local(str(spark.sparkContext.master))


def _is_local(master: str) -> bool:
    return re.fullmatch(r"local(\[.*\])?", master) is not None


def _local() -> dict[str, str]:
    """What a master in this process wants besides: nobody else's network, no web page, no chatter, and a quick start.

    A local job is short: better machine code (tier 4 of the JIT) and better plans (adaptive execution) come too late
    to pay for themselves; without them a job on two cores takes a third of the processor time.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    return {
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executorEnv.PYTHONPATH": str(_ROOT),
        "spark.python.daemon.module": "spark_jobs.daemon",
        "spark.python.unix.domain.socket.enabled": "true",  # by TCP every task of a Python worker begins 40 ms later
        "spark.ui.enabled": "false",
        "spark.sql.adaptive.enabled": "false",
        "spark.driver.defaultJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={_logging()}",
    }


def _check_scratch(configured: str) -> None:
    """Spark ends the whole process without a word if it can make no folder for its scratch files."""
    for folder in os.environ.get("SPARK_LOCAL_DIRS", configured).split(","):
        try:
            os.makedirs(folder, exist_ok=True)
            os.rmdir(tempfile.mkdtemp(dir=folder))
        except OSError as error:
            raise ValueError(
                f"Spark cannot write its scratch files to {folder!r} ({error.strerror}): free space there, or name "
                "another folder with --conf spark.local.dir=…"
            ) from error


def _submitted() -> dict[str, str]:
    """The properties that spark-submit has set already; none when this process starts Spark itself."""
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        return {}
    SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())


def _logging() -> str:
    """URL of the configuration of a local job's log, which may lie in a wheel."""
    root = f"jar:{_ROOT.as_uri()}!" if _ROOT.is_file() else _ROOT.as_uri()
    return f"{root}/spark_jobs/log4j2.properties"


def _ship(context: SparkContext) -> None:
    """Give the executors the code that this process runs; they have no checkout, and no older wheel may come first.

    Also a wheel of ``--py-files`` is sent again, as a zip: Spark imports from .zip, .egg and .jar, never from .whl.
    """
    target = Path(str(context._temp_dir)) / "reclora_spark.zip"
    if _ROOT.is_file():
        shutil.copyfile(_ROOT, target)
    else:
        _archive(target)
    context.addPyFile(str(target))


def _archive(target: Path) -> None:
    """Write this package and ``reclora_dist`` as a zip."""
    with zipfile.ZipFile(target, "w") as archive:
        for package in ("reclora_dist", "spark_jobs"):
            for file in sorted((_ROOT / package).rglob("*.py")):
                archive.write(file, file.relative_to(_ROOT).as_posix())
