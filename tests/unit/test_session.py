"""Choices made before a cluster starts, or without one; the clusters themselves are started in tests/ray_local."""

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sample_data import small_config

from reclora_dist.config.schema import LoraConfig, RayConfig
from reclora_dist.ray_app import pipeline, session, trainer
from reclora_dist.ray_app.scrape import series_of


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)


def test_a_random_token_is_put_into_the_environment_only() -> None:
    session._choose_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert "RAY_AUTH_MODE" not in os.environ, "Ray has read it already; it turns token mode on by itself"


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "mine"), ("RAY_AUTH_TOKEN_PATH", "/secret")]
)
def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    session._choose_token()
    assert os.environ[name] == value
    assert os.environ.get("RAY_AUTH_TOKEN") == ("mine" if name == "RAY_AUTH_TOKEN" else None)


def test_token_mode_without_a_token_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    session._choose_token()
    assert os.environ["RAY_AUTH_TOKEN"]


def test_an_address_without_a_cluster_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(session.ray, "init", nobody)
    for address, variable in (("auto", ""), ("", "head:6379")):
        monkeypatch.setenv("RAY_ADDRESS", variable)
        with (
            pytest.raises(ValueError, match=f"no Ray cluster at '{address or variable}': .*ray.address"),
            session.connect(RayConfig(address=address)),
        ):
            pass


def test_the_temp_folder_goes_unless_the_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LONGEST_ROOT", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with session._temp_dir():
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), session._temp_dir():
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="oops") as failure, session._temp_dir():
        raise ValueError("oops")
    (kept,) = tmp_path.iterdir()
    assert failure.value.__notes__ == [f"Ray's logs of this run are in {kept}"]


def test_a_long_temp_folder_is_not_used_because_socket_paths_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with session._temp_dir() as folder:
        assert folder.parent == Path("/tmp")


@pytest.mark.parametrize(
    ("lora", "all_series"),
    [
        (LoraConfig(experts=4), True),
        (LoraConfig(experts=4, gate="id"), True),
        (LoraConfig(experts=1, mode="matrix"), False),
        (LoraConfig(experts=1), False),
        (LoraConfig(experts=1, gate="none"), False),
    ],
)
def test_the_series_of_the_gates_are_expected_only_where_a_training_says_how_experts_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraConfig, all_series: bool
) -> None:
    config = small_config(tmp_path, adapters={"it": lora}, ray=RayConfig(workers=1))
    costs = iter([{}, {"stage_seconds": 1.0}])
    monkeypatch.setattr(pipeline, "_costs", lambda *_: next(costs))
    there: Any = object()
    run = pipeline.Session(config, ExitStack(), there, scraper=there)
    pipeline._train([pipeline.Stage("adapter it", trains="it")], run, {})
    assert run.emitted == (series_of("train") if all_series else set())


def test_a_training_refuses_its_settings_by_their_place(tmp_path: Path) -> None:
    config = small_config(tmp_path, ray=RayConfig(workers=3))
    lora = dataclasses.replace(config.adapters["lora"], train={"batch_size": 2})
    config = dataclasses.replace(config, adapters={"lora": lora})
    with pytest.raises(ValueError, match=r"^adapters\.lora\.train\.batch_size 2 leaves some of 3 workers"):
        trainer.train_all(config, ("lora",))


def test_workers_that_would_wait_for_gpus_forever_are_refused() -> None:
    session.check_gpus(RayConfig(workers=2, gpus_per_worker=0.5), 1.0)
    session.check_gpus(RayConfig(workers=2), 0.0)
    with pytest.raises(ValueError, match=r"ray\.workers 2 x ray\.gpus_per_worker 1 asks for 2 GPUs, and Ray finds 1"):
        session.check_gpus(RayConfig(workers=2, gpus_per_worker=1), 1.0)
