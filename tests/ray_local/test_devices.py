"""What computes on a GPU has reserved one, and gives it back."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from sample_data import small_config

from reclora_dist.config.schema import EvaluateConfig, RayConfig, ServeConfig
from reclora_dist.evaluate.scorer import Scorer
from reclora_dist.ray_app import embed, evaluate, service
from reclora_dist.ray_app.messages import EvaluationRequest
from reclora_dist.ray_app.session import connect, reserved_device

pytestmark = pytest.mark.ray
RESERVED = pytest.mark.parametrize(("reserved", "device"), [([], "cpu"), ([0], "cuda")])


@RESERVED
def test_items_are_embedded_on_the_gpu_that_was_reserved(
    monkeypatch: pytest.MonkeyPatch, reserved: list[int], device: str
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: reserved)
    monkeypatch.setattr(embed, "TextEncoder", lambda *args: asked.append(args))
    embed._Encoder("model", 64, 1)
    assert asked == [("model", 64, device)]


class Loaded(Exception):
    """The scorer was asked for."""


STARTS: dict[str, Callable[[], Any]] = {
    "task of the evaluation": lambda: evaluate._score_adapter("adapter", pa.table({}), 1, 8),
    "replica of the service": lambda: service.Model("adapter", ServeConfig()),
    "evaluation by the service": lambda: service._EvaluationRun().evaluate(
        "adapter", EvaluationRequest(split="test"), EvaluateConfig()
    ),
}


@RESERVED
@pytest.mark.parametrize("start", STARTS)
def test_scores_are_computed_on_the_gpu_that_was_reserved_and_on_no_other(
    monkeypatch: pytest.MonkeyPatch, start: str, reserved: list[int], device: str
) -> None:
    def load(path: str, device: str | None = None, **_: Any) -> None:
        raise Loaded(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: reserved)
    monkeypatch.setattr(Scorer, "from_pretrained", load)
    with pytest.raises(Loaded, match=f"^{device}$"):
        STARTS[start]()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that takes this machine to have a GPU."""
    with patch.object(ray, "init", partial(ray.init, num_gpus=1)), connect(RayConfig(workers=1)):
        yield


@pytest.mark.parametrize(("gpus", "processes", "device"), [(0, 1, "cpu"), (1, 2, "cuda")])
def test_a_task_that_reserved_a_gpu_leaves_no_process_on_it(
    monkeypatch: pytest.MonkeyPatch, cluster: None, prepared: Path, gpus: int, processes: int, device: str
) -> None:
    """Two adapters one after the other: in one process without a GPU, whose start takes seconds."""

    def score(adapter: str, rows: pa.Table, *_: Any) -> evaluate.Scored:
        return evaluate.Scored(np.full(rows.num_rows, os.getpid() + (reserved_device() == "cuda") / 2), 1.0)

    monkeypatch.setattr(evaluate, "_score_adapter", score)
    config = dataclasses.replace(
        small_config(prepared), ray=RayConfig(workers=1, cpus_per_worker=2, gpus_per_worker=gpus)
    )
    scored = evaluate._score(config, evaluate.split_rows(config, "test"), "test", 0.5)
    found = np.concatenate([scored[name].scores for name in config.adapters])
    assert set(found % 1) == {0.0 if device == "cpu" else 0.5}
    assert len(set(found)) == processes


def test_rows_are_stored_a_second_time_only_for_shuffled_controls(
    monkeypatch: pytest.MonkeyPatch, cluster: None, prepared: Path
) -> None:
    monkeypatch.setattr(evaluate, "_score_adapter", lambda _, rows, *rest: evaluate.Scored(np.zeros(len(rows)), 1.0))
    put, stored = ray.put, list[pa.Table]()
    monkeypatch.setattr(ray, "put", lambda table: [stored.append(table), put(table)][1])
    config = dataclasses.replace(small_config(prepared), ray=RayConfig(workers=1))
    for settings, tables in ((EvaluateConfig(), 1), (EvaluateConfig(shuffled=True), 2)):
        stored.clear()
        rows = evaluate.split_rows(config, "test")
        evaluate._score(dataclasses.replace(config, evaluate=settings), rows, "test", 0.5)
        assert len(stored) == tables
