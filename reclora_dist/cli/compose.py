"""From the command line to a ``Config``: Hydra composes, the dataclasses check, and Hydra ends here."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from reclora_dist.config.load import build
from reclora_dist.config.run import RunFailed
from reclora_dist.config.schema import Config

# What no file of configs/ sets is the dataclasses' default; the shipped files show only what they change.
ConfigStore.instance().store("defaults", dataclasses.asdict(Config()))

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def command(run: Callable[[Config], None]) -> Callable[[], None]:
    """Make a command line program of ``run``: overrides as arguments, one clear line for what the user can mend."""

    def entry(composed: DictConfig) -> None:
        try:
            run(to_config(composed))
        except (ValueError, FileNotFoundError, RunFailed) as error:
            print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
            sys.exit(2)

    wrapped: Callable[[], None] = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(entry)

    def main() -> None:
        sys.argv[1:] = [lenient(argument) for argument in sys.argv[1:]]
        wrapped()

    main.__doc__ = run.__doc__
    return main


def lenient(argument: str) -> str:
    """Let an override pass Hydra even if its key is unknown: ``build`` says what was meant, Hydra would not."""
    key, sign, _ = argument.partition("=")
    is_setting = sign and key[:1] not in "+~-" and not key.startswith("hydra") and not (CONFIGS / key).is_dir()
    return f"++{argument}" if is_setting else argument


def to_config(composed: DictConfig) -> Config:
    """Resolve a composed configuration into dataclasses; local paths become absolute, as workers have other folders.

    Raises:
        ConfigError: an unknown key or a value of the wrong type.
    """
    values: Any = OmegaConf.to_container(composed, resolve=True)
    match values:
        case {"spark": {"conf": dict(conf)}}:  # Spark's properties are texts; YAML reads true as no text
            conf.update({key: str(value).lower() for key, value in conf.items() if isinstance(value, bool)})
    config = build(Config, values)
    source = dataclasses.replace(config.events.source, path=_absolute(config.events.source.path))
    return dataclasses.replace(
        config,
        paths=dataclasses.replace(config.paths, run=_absolute(config.paths.run), shards=_absolute(config.paths.shards)),
        events=dataclasses.replace(config.events, source=source),
        backbone=dataclasses.replace(config.backbone, path=_model(config.backbone.path)),
        embed=dataclasses.replace(
            config.embed, path=_model(config.embed.path), previous=_absolute(config.embed.previous)
        ),
        serve=dataclasses.replace(config.serve, adapter=_absolute(config.serve.adapter)),
        export=dataclasses.replace(
            config.export, adapter=_absolute(config.export.adapter), out=_absolute(config.export.out)
        ),
    )


def _absolute(uri: str) -> str:
    return str(Path(uri).expanduser().resolve()) if uri and "://" not in uri else uri


def _model(path: str) -> str:
    """A model's local folder as an absolute path; what is no folder here is a hub id."""
    return _absolute(path) if path.startswith((".", "~", "/")) or Path(path).is_dir() else path


def load(overrides: Sequence[str] = ()) -> Config:
    """The configuration that these command line arguments give; for tests and notebooks."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return to_config(compose("config", [lenient(argument) for argument in overrides]))
