"""What all jobs share: arguments to configuration, the check whether anything is to do, Spark, the commit, metrics.

Nothing here imports pyspark before it is known that there is work.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from reclora_dist.config.load import build
from reclora_dist.contract.manifest import (
    ContractError,
    FileEntry,
    Format,
    Manifest,
    check_output,
    commit,
    digest,
    is_current,
    read_manifest,
)
from reclora_dist.contract.storage import Folder
from spark_jobs import arguments
from spark_jobs.metrics import JobMetrics
from spark_jobs.privacy import Privacy

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class Output:
    """What a job has written: its files, and the facts for the manifest."""

    files: Sequence[FileEntry]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """What a job reads: folders by name, the manifests of those that have one, and whom to keep the data from.

    ``tables`` are what is read of the folder ``raw``, if it is not all of it.
    """

    folders: Mapping[str, Folder]
    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)
    privacy: Privacy = field(default_factory=Privacy)
    tables: Mapping[str, Folder] = field(default_factory=dict)

    @property
    def read(self) -> dict[str, Folder]:
        """The places that are read, by name."""
        return {**{name: at for name, at in self.folders.items() if name != "raw" or not self.tables}, **self.tables}


@dataclass(frozen=True)
class Job:
    """One Spark job.

    ``run(spark, config, inputs, out)`` writes files; ``inputs`` maps an option to its help, those in ``optional`` may
    be left out; ``formats`` names the dataset format of each input that has a manifest; ``prepare`` looks at
    configuration and inputs before Spark starts and may replace both; ``fixed`` are files that it writes under names
    without a digest.
    """

    name: str
    summary: str
    config: type
    output: Format
    run: Callable[["SparkSession", Any, Inputs, Folder], Output]
    inputs: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    formats: Mapping[str, Format] = field(default_factory=dict)
    prepare: Callable[[Any, Inputs], tuple[Any, Inputs]] = lambda config, inputs: (config, inputs)
    fixed: frozenset[str] = frozenset()


def say(job: str, text: str) -> None:
    """Print a line of progress."""
    print(f"{job}: {text}", flush=True)


def main(job: Job, argv: Sequence[str] | None = None, keep: bool = False) -> int:
    """Run a job from the command line; 0 if its result is there, 2 if its input cannot be used.

    Args:
        keep: leave Spark running, and work in what an earlier job left running.
    """
    given = arguments.parser(job.name, job.summary, job.config, job.inputs, job.optional).parse_args(argv)
    try:
        _run(job, given, keep)
    except ValueError as error:
        print(f"{job.name}: error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _run(job: Job, given: Any, keep: bool) -> None:
    began = time.monotonic()
    config: Any = build(job.config, arguments.settings(given.config, given.settings))
    config, inputs = job.prepare(config, open_inputs(job, {name: getattr(given, name) for name in job.inputs}))
    out = Folder(given.out).absolute()
    metrics = JobMetrics(job.name, given.metrics_port)
    if is_current(out, job.output, digest(config), inputs.parents):
        say(job.output.name.rpartition(".")[2], "up to date")
        manifest = read_manifest(out, job.output)
    else:
        check_output(out, job.output, inputs.read, job.fixed)
        manifest = execute(job, config, inputs, out, given, keep)
    metrics.record(manifest, time.monotonic() - began)
    if given.metrics_file:
        metrics.write(given.metrics_file)


def open_inputs(job: Job, uris: Mapping[str, str]) -> Inputs:
    """Read the manifests of the inputs that must have one.

    Raises:
        ContractError: one is missing, of another version, or damaged.
    """
    folders = {name: Folder(uri).absolute() for name, uri in uris.items() if uri}
    manifests = {name: read_manifest(folders[name], job.formats[name]) for name in folders if name in job.formats}
    return Inputs(folders, manifests, {name: manifest.content_digest for name, manifest in manifests.items()})


def execute(job: Job, config: Any, inputs: Inputs, out: Folder, given: Any, keep: bool) -> Manifest:
    """Start Spark (or find it running, if it is to be kept), run the job and commit its result."""
    from spark_jobs import progress, session

    began = time.monotonic()
    spark = session.running() if keep else None
    if spark is None:
        name = "pipeline" if keep else job.name
        properties = arguments.properties(given.conf)
        spark = session.start(name, given.master, given.driver_memory, given.shuffle_partitions, properties)
        waited = f" after {time.monotonic() - began:.1f} s"
    else:
        waited = ", still running"
    say(job.name, f"Spark {spark.version} on {spark.sparkContext.master}{waited}")
    try:
        with plainly():
            with progress.shown(spark, partial(say, job.name)):
                output = job.run(spark, config, inputs, out)
            manifest = publish(job, config, inputs, out, output)
    finally:
        if keep:
            session.forget(spark)
        else:
            spark.stop()
    seconds = time.monotonic() - began
    say(job.name, f"{manifest.rows():,} rows in {len(manifest.files)} files, {seconds:.1f} s -> {out.uri}")
    return manifest


@contextmanager
def plainly() -> Iterator[None]:
    """Say in one line what Spark reports of bad input or a full disk; anything else passes as it is.

    Raises:
        ContractError: as said.
    """
    from py4j.protocol import Py4JJavaError
    from pyspark.errors import PySparkException

    from spark_jobs import session

    try:
        yield
    except (PySparkException, Py4JJavaError) as error:
        told = session.cause(error)
        if told:
            raise ContractError(told) from error
        raise


def publish(job: Job, config: Any, inputs: Inputs, out: Folder, output: Output) -> Manifest:
    """Commit what a job wrote."""
    files = tuple(sorted(output.files, key=lambda entry: entry.path))
    facts = dict(output.facts)
    made = Manifest(job.output.name, job.output.version, digest(config), inputs.parents, files, facts)
    return commit(out, made, job.fixed)
