"""The range test: rates rise in equal ratios, the end comes with the loss, the suggestion is where it falls fastest."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from sample_data import small_config

from reclora_dist.config.check import check_finder
from reclora_dist.config.schema import EngineConfig, FinderConfig, TrainConfig
from reclora_dist.contract.storage import Folder
from reclora_dist.train import stages
from reclora_dist.train.context import Context
from reclora_dist.train.engine import StepResult
from reclora_dist.train.learning_rate import Point, range_test, steepest, write_range_test


def test_the_suggestion_is_where_the_loss_falls_fastest(tmp_path: Path) -> None:
    """A logistic fall in the logarithm of the rate, centred at 1e-3, then growth."""
    rates = [10 ** (-6 + 6 * n / 60) for n in range(61)]
    points = [Point(lr, 1 / (1 + math.exp(4 * (math.log10(lr) + 3))) + 50 * lr**2) for lr in rates]
    assert steepest(points) == pytest.approx(1e-3, rel=0.3)
    said: list[str] = []
    write_range_test(Folder(str(tmp_path)), "crm", points, said.append)
    found = json.loads((tmp_path / "crm.json").read_text())
    assert found["suggested"] == steepest(points)
    assert len(found["points"]) == 61
    assert (tmp_path / "crm.png").read_bytes().startswith(b"\x89PNG")
    assert "falls fastest at learning rate" in said[0]


def test_a_loss_that_never_falls_suggests_nothing(tmp_path: Path) -> None:
    points, said = [Point(10.0**n, float(n + 1)) for n in range(9)], list[str]()
    assert steepest(points) is None
    write_range_test(Folder(str(tmp_path)), "crm", points, said.append)
    assert json.loads((tmp_path / "crm.json").read_text())["suggested"] is None
    assert "the loss never fell: lower finder.low" in said[0]


@pytest.mark.parametrize("stage", ["crm", "reclora"])
def test_a_stage_is_tested_and_nothing_else_changes(
    prepared: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    finder = FinderConfig(stage, low=1e-5, high=10.0, steps=30)
    config = dataclasses.replace(small_config(run, engine=EngineConfig(kind="torch")), finder=finder)
    stages.find_learning_rate(config, stage, Context())
    found = json.loads((run / "learning_rate" / f"{stage}.json").read_text())
    rates = [lr for lr, _ in found["points"]]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[1] / rates[0] == pytest.approx(1e6 ** (1 / 29))
    assert found["suggested"] is None or 1e-5 <= found["suggested"] <= 10
    assert not (run / "adapters").exists()
    assert not list((run / "checkpoints").rglob("*.json"))
    assert f"{stage}: step 5/30 learning rate" in capsys.readouterr().out


def test_steps_in_which_float16_looks_for_its_scale_are_no_points_and_no_end() -> None:
    results = [StepResult(math.inf, math.inf, 0.0, skipped=True)] * 2 + [StepResult(1.0, 1.0, 0.0)] * 3
    task = Mock(engine=Mock(step=Mock(side_effect=results)), batches=Mock(return_value=iter([[]] * 5)))
    points = range_test(task, TrainConfig(), FinderConfig("crm", steps=5), Context())
    assert [point.loss for point in points] == pytest.approx([1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("finder", "words"),
    [
        (FinderConfig("lorra"), "finder.stage names 'lorra'; there are: crm, lora"),
        (FinderConfig(low=1.0, high=0.1), "finder goes from 1.0 to 0.1 in 100 steps"),
        (FinderConfig(steps=2), "at least 3"),
    ],
)
def test_a_test_that_cannot_work_is_refused(finder: FinderConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_finder(finder, ["lora"])
