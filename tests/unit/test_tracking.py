"""TensorBoard has what was recorded, and so has MLflow where it is installed."""

import dataclasses
import sys
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from reclora_dist.config.schema import Config, PathsConfig, TrackingConfig
from reclora_dist.telemetry.tracking import recording


def config(run: Path | str, **tracking: object) -> Config:
    return dataclasses.replace(Config(), paths=PathsConfig(str(run)), tracking=TrackingConfig(**tracking))  # type: ignore[arg-type]


def scalars(file: Path) -> list[tuple[int, str, float]]:
    """Steps, names and values of an event file: records of length, checksum, bytes, checksum."""
    content, found = file.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        body = content[12 : 12 + size]
        assert int.from_bytes(content[12 + size : 16 + size], "little") == masked_crc32c(body)
        event = event_pb2.Event.FromString(body)
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        content = content[16 + size :]
    return found


def test_tensorboard_has_every_figure_at_its_step(tmp_path: Path) -> None:
    with recording(config(tmp_path), "crm", {}) as record:
        record(5, {"loss": 0.5, "mfu": 0.25})
        record(10, {"loss": 0.25})
    (file,) = (tmp_path / "tensorboard" / "crm").iterdir()
    assert scalars(file) == [(5, "loss", 0.5), (5, "mfu", 0.25), (10, "loss", 0.25)]


def test_nothing_is_written_where_nobody_wants_it(tmp_path: Path) -> None:
    with recording(config(tmp_path, tensorboard=False), "crm", {}) as record:
        record(5, {"loss": 0.5})
    with recording(config("memory://run"), "crm", {}) as record:
        record(5, {"loss": 0.5})
    assert not list(tmp_path.iterdir())


def test_mlflow_without_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with (
        pytest.raises(ValueError, match="MLflow is not installed: pip install"),
        recording(config(tmp_path, mlflow="sqlite:///x"), "crm", {}),
    ):
        pass


def test_mlflow_gets_parameters_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed: the test needs it")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server's database needs more than the client
    uri = (tmp_path / "mlruns").as_uri()
    resolved = {"crm": {"kind": "sim"}, "seed": 3}
    with recording(config(tmp_path / "demo", mlflow=uri), "crm", resolved) as record:
        record(5, {"loss": 0.5})
    with pytest.raises(RuntimeError), recording(config(tmp_path / "demo", mlflow=uri), "crm", {}):
        raise RuntimeError
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("reclora")
    runs = {run.info.status: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"FINISHED", "FAILED"}
    done = runs["FINISHED"]
    assert done.info.run_name == "demo/crm"
    assert done.data.params == {"crm.kind": "sim", "seed": "3"}
    assert done.data.metrics == {"loss": 0.5}
