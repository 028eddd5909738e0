"""Which files a raw log consists of. Plain Python: it is asked before Spark starts."""

from dataclasses import dataclass
from typing import Any

from reclora_dist.config.schema import SourceConfig
from reclora_dist.contract.manifest import MANIFEST, digest, read_manifest
from reclora_dist.contract.schema import RAW
from reclora_dist.contract.storage import Folder
from spark_jobs.days import days_between


@dataclass(frozen=True)
class Layout:
    """File names of a published data set."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


LAYOUTS = {
    "movielens_1m": Layout(("ratings.dat", "movies.dat", "users.dat")),
    "movielens_100k": Layout(("u.data", "u.item"), ("u.user",)),
    "movielens_25m": Layout(("ratings.csv", "movies.csv")),
}


def tables(source: SourceConfig, folder: Folder) -> list[str]:
    """Names, below ``folder``, of the files or folders that hold the log's tables.

    Raises:
        ValueError: one is not there; the text says what is.
    """
    if source.kind == "goodreads":
        names = [name for name in folder.files() if name.endswith(".csv")]
        _require(source, folder, names or ["*.csv"])
        return names
    if source.kind == "columns":
        names = [name for name in (*event_folders(source), source.items, source.users) if name]
        _require(source, folder, names)
        return names
    layout = LAYOUTS[source.kind]
    _require(source, folder, list(layout.required))
    return [*layout.required, *(name for name in layout.optional if folder.exists(name))]


def event_folders(source: SourceConfig) -> list[str]:
    """Where the events of a `columns` log lie: one place, or a folder for each day."""
    if not any(source.days):
        return [source.events]
    return [f"{source.events}/date={day}" for day in days_between(*source.days)]


def fingerprint(source: SourceConfig, folder: Folder) -> str:
    """Digest of the log: that of its manifest if it has one, else of its files' names, sizes and times of change.

    Raises:
        ValueError: a table is missing.
        ContractError: the manifest is of another version or damaged.
    """
    names = tables(source, folder)
    if folder.exists(MANIFEST):
        manifest = read_manifest(folder, RAW)
        parts = [entry for name in names for entry in manifest.select(f"{name}/")]
        return digest([[entry.path, entry.sha256] for entry in parts]) if any(source.days) else manifest.content_digest
    files = [file for name in names for file in folder.files(name)]
    return digest([[file, _version(folder.fs.info(folder.path(file)))] for file in files])


def _version(info: dict[str, Any]) -> list[str]:
    """What tells one version of a file from another on this file system."""
    return [str(info.get(key)) for key in ("size", "mtime", "ETag", "LastModified", "updated")]


def _require(source: SourceConfig, folder: Folder, names: list[str]) -> None:
    for name in names:
        if not folder.exists(name):
            there = sorted({file.split("/")[0] for file in folder.files()})
            raise ValueError(
                f"{folder.uri!r} has no {name!r}, which a {source.kind} log consists of; it holds: "
                f"{', '.join(there[:20]) or 'nothing'}. Point --raw (source.path) at the right folder."
            )
