"""The builder that a Serve config file names (``serve deploy``, KubeRay's RayService)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import serve

from reclora_dist.config.check import check_serve
from reclora_dist.config.load import ConfigError, build
from reclora_dist.config.schema import EvaluateConfig, Section, ServeConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import ADAPTER
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app.service import application


@dataclass(frozen=True)
class Arguments(Section):
    """The ``args`` of the application in a Serve config; host and port are set by its ``http_options``."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def build_application(args: Mapping[str, Any]) -> serve.Application:
    """The Serve application that ``args`` describe.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or no adapter.
        ContractError: there is no adapter at the path.
        ValueError: a setting of ``serve`` cannot work.
    """
    arguments = build(Arguments, args)
    adapter = arguments.serve.adapter
    if not adapter:
        raise ConfigError("config serve.adapter = '': name the adapter folder to serve")
    check_serve(arguments.serve)
    read_manifest(Folder(adapter), ADAPTER)
    return application(adapter, arguments.serve, arguments.evaluate)
