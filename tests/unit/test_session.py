"""Choices made before a cluster starts; the clusters themselves are started in tests/ray_local."""

import os
from pathlib import Path

import pytest

from reclora_dist.ray_app import session


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
