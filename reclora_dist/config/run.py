"""Where the datasets of a run lie, and how a run fails."""

from reclora_dist.config.schema import Config
from reclora_dist.contract.manifest import Format, Manifest, read_manifest
from reclora_dist.contract.storage import Folder


class RunFailed(RuntimeError):
    """A run cannot go on, for a reason that lies outside its settings and data; the text names it."""


def folder(config: Config, name: str) -> Folder:
    """The sub-folder ``name`` of the run; its shards may lie elsewhere."""
    if name == "shards" and config.paths.shards:
        return Folder(config.paths.shards)
    return Folder(config.paths.run).child(name)


def manifest(config: Config, name: str, expected: Format) -> Manifest:
    """The manifest of the run's sub-folder ``name``.

    Raises:
        ContractError: the stage that writes it has not completed.
    """
    return read_manifest(folder(config, name), expected)


def backbone_path(config: Config) -> str:
    """Folder or hub id of the backbone; the tiny one lies in the run."""
    if config.backbone.kind == "tiny":
        return str(folder(config, "backbone").local())
    if not config.backbone.path:
        raise ValueError(f"backbone.path is empty; kind {config.backbone.kind!r} needs a model folder or hub id")
    return config.backbone.path
