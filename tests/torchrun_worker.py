"""What torchrun starts in tests/distributed: training of a small run; its folder is the argument."""

import dataclasses
import sys
from pathlib import Path

from sample_data import small_config

from reclora_dist.config.schema import EngineConfig
from reclora_dist.train import launch

if __name__ == "__main__":
    settings = small_config(Path(sys.argv[1]), engine=EngineConfig())
    adapters = {"reclora": settings.adapters["reclora"]}
    launch.train_all(dataclasses.replace(settings, adapters=adapters))
