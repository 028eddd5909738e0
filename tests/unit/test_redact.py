"""Secrets stay out of what a run leaves behind: its record, MLflow's parameters, a study's logs."""

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reclora_dist.cli.compose import load
from reclora_dist.config.redact import redacted, redacted_text
from reclora_dist.ray_app import study
from reclora_dist.ray_app.record import write_record
from reclora_dist.studies.grid import Point, Run
from reclora_dist.telemetry import tracking

CONF = "{spark.authenticate.secret: hush, spark.hadoop.fs.s3a.secret.key: 'hush, hush', spark.executor.cores: '2'}"
SETTINGS = (f"spark.conf={CONF}", "tracking.mlflow=http://me:hush@mlflow:5000/x")


def test_keys_that_spark_masks_are_masked_and_other_settings_are_not() -> None:
    properties = {"spark.ssl.keyPassword": "hush", "spark.hadoop.fs.s3a.access.key": "hush", "spark.app.name": "a"}
    settings = {"spark": {"conf": properties}, "train": {"micro_tokens": 900}, "points": {"a": ["seed=1"]}}
    found: Any = redacted(settings)
    assert found["spark"]["conf"].pop("spark.app.name") == "a"
    assert set(found["spark"]["conf"].values()) == {"*********(redacted)"}
    assert found["train"] == settings["train"] and found["points"] == settings["points"]
    assert properties["spark.ssl.keyPassword"] == "hush", "the settings themselves stay"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:hush@host:5000/x", "http://host:5000/x"),
        ("https://hush@host", "https://host"),
        ("postgresql+psycopg://me:hu@sh@host/db", "postgresql+psycopg://host/db"),
        ("abfss://container@account.dfs.core.windows.net/runs", "abfss://container@account.dfs.core.windows.net/runs"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
    ],
)
def test_uris_lose_their_userinfo(uri: str, shown: str) -> None:
    assert redacted_text(uri) == shown


@pytest.mark.parametrize(
    "argument",
    [
        "spark.conf={spark.authenticate.secret:hush,spark.cores:1}",
        "++spark.conf={spark.authenticate.secret: 'hush, hush', spark.cores: 1}",
        """spark={conf: {"spark.authenticate.secret": "hu\\"hush", spark.cores: 1}}""",
        "study.points={a: ['spark.conf={spark.authenticate.secret: hush}']}",
    ],
)
def test_an_argument_is_shown_without_its_secrets(argument: str) -> None:
    shown = redacted_text(argument)
    assert "hush" not in shown and "spark.authenticate.secret" in shown
    assert ("spark.cores" in shown) == ("spark.cores" in argument)
    assert redacted_text("lora_train.micro_tokens=900") == "lora_train.micro_tokens=900"


def test_the_record_of_a_run_has_no_secrets(tmp_path: Path) -> None:
    write_record(load([*SETTINGS, f"paths.run={tmp_path}"]), "now")
    text = (tmp_path / "run.json").read_text()
    assert "hush" not in text
    assert '"mlflow": "http://mlflow:5000/x"' in text and '"spark.executor.cores": "2"' in text


def test_mlflows_parameters_have_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: dict[str, str] = {}
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: "1",
        create_run=lambda *_, **__: SimpleNamespace(info=SimpleNamespace(run_id="r")),
        log_param=lambda run, key, value: told.update({key: value}),
        set_terminated=lambda run, status: None,
    )
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda uri: client))
    config = load([*SETTINGS, f"paths.run={tmp_path}"])
    with tracking.recording(config, "crm", dataclasses.asdict(config)):
        pass
    assert told["spark.conf.spark.executor.cores"] == "2"
    assert "hush" not in str(told)


def test_a_studys_log_shows_its_commands_without_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = (*SETTINGS, f"paths.run={tmp_path}")
    run = Run(Point("all", (), {}), 0, arguments, load(arguments))
    given: list[str] = []
    monkeypatch.setattr(study, "_call", lambda command, *_: given.extend(command) or 0)
    outcome = study._run_point._function(run, [], os.getcwd(), {})
    assert not outcome.error and SETTINGS[0] in given, "the command itself has them"
    log = (tmp_path / study.LOG).read_text()
    assert "reclora_dist.cli." in log and "hush" not in log
