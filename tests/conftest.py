"""What all tests share: ``sample_data`` is importable, real models are found or skipped, one prepared run."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would wait for each other
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # spark-submit
sys.path.insert(0, str(Path(__file__).parent))

SPARK = "tests/spark/"
"""Beginning of the ids of all tests of Spark jobs."""

MODELS = Path(__file__).parents[2] / "shared" / "models"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="also every repetition of slow tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spark first, then the files with long tests, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: (not item.nodeid.startswith(SPARK), item.get_closest_marker("slow") is None))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadFileScheduling":
    """The tests of a file stay in one process, and so do those of Spark: they share a session and what it compiled."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return SPARK if nodeid.startswith(SPARK) else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether slow tests are to go through all their cases, or through one of each kind."""
    return bool(request.config.getoption("--exhaustive"))


@pytest.fixture(scope="session")
def real_model() -> "type[RealModels]":
    """``real_model.path(name)``: folder of a pretrained model; skips where there is none."""
    return RealModels


class RealModels:
    @staticmethod
    def path(name: str) -> str:
        if not (MODELS / name / "config.json").exists():
            pytest.skip(f"{MODELS / name} is absent: the test needs that pretrained model")
        return str(MODELS / name)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with events, vectors, shards, a tiny backbone and a CRM; read it, or copy it before you write."""
    from sample_data import small_config, write_run

    from reclora_dist.train import stages
    from reclora_dist.train.context import Context

    run = tmp_path_factory.mktemp("prepared")
    write_run(run)
    config = small_config(run)
    stages.train_backbone(config)
    stages.train_crm(config, Context())
    return run
