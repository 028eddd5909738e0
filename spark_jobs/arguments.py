"""Arguments of a Spark job: the same under ``python -m spark_jobs.<job>`` and ``spark-submit spark_jobs/<job>.py``."""

import argparse
import dataclasses
import json
import typing
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reclora_dist.config.load import ConfigError, override
from reclora_dist.config.schema import SparkConfig


def parser(
    job: str, summary: str, config: type, inputs: Mapping[str, str], optional: Container[str] = ()
) -> argparse.ArgumentParser:
    """The parser of a job; its help lists every setting of the ``config`` dataclass.

    Args:
        job: name of the job's module.
        summary: what the job does.
        config: dataclass of its settings.
        inputs: option name to help text, for every dataset that the job reads.
        optional: those of them that may be left out.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m spark_jobs.{job}",
        description=summary,
        epilog=f"settings (--set KEY=VALUE, or --config):\n{_settings(config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("--config", default="{}", metavar="JSON", help="settings: a JSON object, or a file of one")
    result.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="one setting, e.g. k_core=10"
    )
    for name, text in inputs.items():
        result.add_argument(f"--{name}", required=name not in optional, default="", metavar="URI", help=text)
    result.add_argument("--out", required=True, metavar="URI", help="folder of the result")
    _add_spark(result)
    return result


def _add_spark(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("Spark", "properties that spark-submit was given come first")
    defaults = SparkConfig()
    group.add_argument("--master", default=defaults.master, help="master URL (default: %(default)s)")
    group.add_argument(
        "--shuffle-partitions", type=int, default=defaults.shuffle_partitions, metavar="N",
        help="partitions of a shuffle; the result does not depend on it (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--driver-memory", default=defaults.driver_memory, help="heap of the driver (default: %(default)s)"
    )
    group.add_argument("--conf", action="append", default=[], metavar="K=V", help="any further Spark property")
    group = result.add_argument_group("metrics")
    group.add_argument("--metrics-file", default="", metavar="PATH", help="write the metrics there (Prometheus text)")
    group.add_argument("--metrics-port", type=int, default=0, metavar="PORT", help="serve them on 127.0.0.1 meanwhile")


def settings(text: str, assignments: Sequence[str]) -> dict[str, Any]:
    """The settings given by ``--config`` (JSON or a file of it) and ``--set``.

    Raises:
        ConfigError: the text is neither a JSON object nor a readable file of one, or an assignment has no ``=``.
    """
    source = "--config"
    if not text.lstrip().startswith("{"):
        source = f"--config file {text!r}"
        try:
            text = Path(text).read_text()
        except OSError as error:
            raise ConfigError(f"{source} cannot be read ({error.strerror}); give a JSON object or a file") from error
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds a {type(values).__name__}, not a JSON object of settings")
    return override(values, assignments)


def properties(assignments: Sequence[str]) -> dict[str, str]:
    """The Spark properties given by ``--conf``.

    Raises:
        ConfigError: one has no ``=``.
    """
    for assignment in assignments:
        if "=" not in assignment:
            raise ConfigError(f"--conf {assignment!r}: write it as property=value")
    return dict(assignment.split("=", 1) for assignment in assignments)


def _settings(config: type) -> str:
    rows = list(_walk(config))
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"  {left:<{width}}  {text}" for left, text in rows)


def _walk(config: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _walk(typing.cast(type, kind), f"{prefix}{field.name}.")
            continue
        default = field.default if field.default is not dataclasses.MISSING else None
        shown = json.dumps(default)
        words = " | ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else ""
        yield f"{prefix}{field.name}={shown}", field.metadata["help"] + (f" ({words})" if words else "")
