"""On an accelerator: every engine trains the small run's adapter, in half precision too, as plain torch does on it;
Ray Train gives a worker the accelerator; both processors give a sample the same score, and a text the same vector."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sample_data import small_config

from reclora_dist.backbone.embed import TextEncoder
from reclora_dist.config.schema import Config, EngineConfig, EvaluateConfig, RayConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import ADAPTER, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.evaluate.scorer import Scorer
from reclora_dist.ray_app.evaluate import evaluate_run, results
from reclora_dist.ray_app.session import connect
from reclora_dist.ray_app.trainer import train_all
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.train import stages
from reclora_dist.train.context import Context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device: the test needs one"),
]
ENGINES = {f"zero{stage}": EngineConfig(zero_stage=stage) for stage in (0, 1, 2, 3)} | {
    "zero3 offloaded": EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
}


def config(run: Path, engine: EngineConfig, dtype: str = "float32") -> Config:
    base = small_config(run, engine=engine)
    return dataclasses.replace(base, backbone=dataclasses.replace(base.backbone, dtype=dtype))  # type: ignore[arg-type]


def trained(
    prepared: Path, run: Path, engine: EngineConfig, dtype: str = "float32"
) -> tuple[dict[str, torch.Tensor], float]:
    shutil.copytree(prepared, run)
    stages.train_adapter(config(run, engine, dtype), "reclora", Context(device=torch.device("cuda")))
    folder = run / "adapters" / "reclora"
    auc = read_manifest(Folder(str(folder)), ADAPTER).facts["validation_auc"]
    return load_file(*folder.glob("adapter_model-*.safetensors")), float(auc)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_trains_what_plain_torch_trains(prepared: Path, tmp_path: Path, name: str) -> None:
    expected, auc = trained(prepared, tmp_path / "torch", EngineConfig(kind="torch"))
    found, other = trained(prepared, tmp_path / "run", ENGINES[name])
    assert other == pytest.approx(auc, abs=5e-3)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-3, msg=key)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(prepared: Path, tmp_path: Path, dtype: str) -> None:
    _, auc = trained(prepared, tmp_path / "torch", EngineConfig(kind="torch"))
    _, other = trained(prepared, tmp_path / "run", EngineConfig(zero_stage=2), dtype)
    assert other == pytest.approx(auc, abs=3e-2)


def test_vectors_are_those_of_the_cpu(prepared: Path) -> None:
    texts = ["jazz record 1", "a much longer text about a soul record, number 7"]
    found = TextEncoder(str(prepared / "backbone"), 32, "cuda")
    assert found.model.device.type == "cuda"
    np.testing.assert_allclose(found(texts), TextEncoder(str(prepared / "backbone"), 32)(texts), rtol=1e-3, atol=1e-3)


def test_ray_trains_and_evaluates_there_and_scores_are_those_of_the_cpu(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    ray = RayConfig(workers=1, gpus_per_worker=0.5, object_store_mib=100)
    small = dataclasses.replace(
        config(run, EngineConfig(zero_stage=2)), ray=ray, evaluate=EvaluateConfig(bootstrap=20, history_bands=(4,))
    )
    with connect(ray):
        train_all(small, tuple(small.adapters))
        evaluate_run(small, NullMeters())
    (found,) = [model for model in results(small, "test", {})[0] if model.name == "reclora"]
    shards = Folder(str(run / "shards"))
    rows = read_parts(shards, read_manifest(shards, SHARDS).select("text/split=test/"))
    scores = Scorer.from_pretrained(str(run / "adapters" / "reclora"), device="cpu").score(rows)
    np.testing.assert_allclose(found.scores, scores, atol=2e-3)
