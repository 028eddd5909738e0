"""The evaluation's control: an adapter with other samples' mixtures is a model of its own, however many score it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_data import small_config

from reclora_dist.config.schema import EngineConfig, EvaluateConfig, LoraConfig, RayConfig
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.scorer import Scorer, shuffled
from reclora_dist.ray_app.evaluate import evaluate_run, results, split_rows
from reclora_dist.ray_app.session import connect
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.train import stages
from reclora_dist.train.context import Context

pytestmark = pytest.mark.ray


def test_a_shuffled_control_is_scored_over_the_whole_split(prepared: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    config = small_config(
        run,
        engine=EngineConfig(kind="torch"),
        adapters={"id": LoraConfig(experts=3, rank=4, gate="id"), "lora": LoraConfig(experts=1, rank=4, gate="none")},
        evaluate=EvaluateConfig(bootstrap=10, shuffled=True, seed=5),
        compare=(("id", "id (shuffled)"),),
    )
    for name in config.adapters:
        stages.train_adapter(config, name, Context())
    config = dataclasses.replace(config, ray=RayConfig(workers=2))
    with connect(config.ray):
        rates = evaluate_run(config, NullMeters())
    models, differences = results(config, "test", rates)
    assert [model.name for model in models] == ["running_averages", "crm", "id", "lora", "id (shuffled)"]
    assert {(d.better, d.than) for d in differences} == {("id", "id (shuffled)")}
    assert [model.name for model in models if model.mixtures is not None] == ["id"]
    rows, scorer = split_rows(config, "test"), Scorer.load(Folder(str(run / "adapters" / "id")))
    found = {model.name: model.scores for model in models}
    np.testing.assert_allclose(found["id (shuffled)"], scorer.score(rows, shuffled(rows, 5)), atol=1e-6)
    np.testing.assert_allclose(found["id"], scorer.score(rows), atol=1e-6)
    assert np.abs(found["id"] - found["id (shuffled)"]).max() > 1e-5
