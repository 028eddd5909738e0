"""One small run of the whole pipeline; the tests look at it or copy it."""

import pytest
from small_run import Finished, finish


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish("pipeline", tmp_path_factory.mktemp("e2e") / "run")
