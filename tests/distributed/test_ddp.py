"""Two real gloo processes: DDP for the CRM; ZeRO 0 to 3 and plain torch train the same RecLoRA, and resume."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddp_workers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException

from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import ADAPTER
from reclora_dist.contract.storage import Folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ENGINES = ["torch", "zero0", "zero1", "zero2", "zero3"]


def spawn(work: Callable[..., None], *arguments: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, (port, *arguments), nprocs=ddp_workers.WORLD)


@pytest.fixture(scope="module")
def results(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote, engine after engine, in one process group."""
    home = tmp_path_factory.mktemp("ddp")
    runs = {name: Path(shutil.copytree(prepared, home / f"run-{name}")) for name in ["crm", *ENGINES]}
    shutil.rmtree(runs["crm"] / "crm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(home / "compiled"))
        spawn(ddp_workers.every_engine, runs, home)
    return home


def state(results: Path, name: str, rank: int = 0) -> dict[str, Tensor]:
    return load_file(results / f"{name}-{rank}.safetensors")


def notes(results: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}-{rank}.json").read_text())
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ["crm", *ENGINES])
def test_both_ranks_end_with_the_same_state_and_the_same_validation_auc(results: Path, name: str) -> None:
    assert_close(state(results, name, 0), state(results, name, 1))
    reports = [notes(results, name, rank)["reports"] for rank in (0, 1)]
    assert reports[0] == reports[1]
    assert reports[0]


def test_deepspeed_compiles_nothing(results: Path) -> None:
    assert not (results / "compiled").exists()


def test_ddp_averages_the_gradients_of_both_ranks(results: Path) -> None:
    """A rank alone on its share ends elsewhere."""
    assert all(value.isfinite().all() for value in state(results, "crm").values())
    assert notes(results, "crm", 0)["losses"] != notes(results, "crm", 1)["losses"], "each has its own samples"


@pytest.mark.parametrize("name", ENGINES[1:])
def test_every_zero_stage_trains_what_plain_torch_trains(results: Path, name: str) -> None:
    """Losses of every step, and the weights at the end."""
    expected = notes(results, "torch")
    assert notes(results, name)["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert notes(results, name)["reports"][-1]["validation_auc"] == pytest.approx(
        expected["reports"][-1]["validation_auc"], abs=1e-3
    )
    ours, theirs = (
        {key: value for key, value in state(results, run).items() if key.startswith("parameter/")}
        for run in (name, "torch")
    )
    assert_close(ours, theirs, 1e-4)
    assert max(float(value.abs().max()) for key, value in theirs.items() if key.endswith("bank.B")) > 1e-3


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_was_stopped_ends_like_the_undisturbed_one(results: Path, name: str) -> None:
    tolerance = 1e-6 if name == "zero3" else 0.0
    folders = results / f"{name}-adapter", results / f"run-{name}" / "adapters" / "reclora"
    undisturbed, resumed = (load_file(*folder.glob("adapter_model-*.safetensors")) for folder in folders)
    assert_close(resumed, undisturbed, tolerance)
    assert_close(state(results, f"{name}-resumed"), state(results, name), tolerance)
    done = len(notes(results, f"{name}-resumed")["losses"])
    assert done == len(notes(results, name)["losses"]) - ddp_workers.KILL_AT, "it went on, it did not start anew"


def test_killed_processes_are_followed_by_new_ones(results: Path, prepared: Path, tmp_path: Path) -> None:
    """SIGKILL instead of an exception, ZeRO-2: the adapter's digest is that of the undisturbed run."""
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        spawn(ddp_workers.killed, run, tmp_path / "killed")
    assert list((run / "checkpoints").rglob("manifest.json"))
    spawn(ddp_workers.resumed, run, tmp_path / "resumed")
    digests = {
        read_manifest(Folder(str(folder)), ADAPTER).content_digest
        for folder in (run / "adapters" / "reclora", results / "zero2-adapter")
    }
    assert len(digests) == 1
