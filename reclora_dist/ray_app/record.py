"""What a run was made with: ``run.json``, written before the first stage."""

import dataclasses
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from reclora_dist.config.redact import redacted
from reclora_dist.config.schema import Config
from reclora_dist.contract.storage import Folder

PACKAGES = (
    "reclora-dist", "torch", "deepspeed", "ray", "transformers", "pyspark", "pyarrow", "petastorm", "hydra-core",
)  # fmt: skip
NAME = "run.json"


def write_record(config: Config, started: str) -> None:
    """Write the resolved configuration without secrets, versions, commit; the outputs' manifests have inputs' digests.

    Args:
        started: time of the start, ISO 8601.
    """
    record = {
        "started": started,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "config": redacted(dataclasses.asdict(config)),
    }
    Folder(config.paths.run).write(NAME, json.dumps(record, indent=1).encode())


def commit() -> dict[str, Any]:
    """Commit of the checkout that this package lies in, and whether files differ from it; empty without one."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return {}
    try:
        found = [_git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain", "--untracked-files=no")]
    except (OSError, subprocess.CalledProcessError):  # no git, or not ours to read
        return {}
    return {"id": found[0], "changed": bool(found[1])}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
