"""Two real gloo processes: DDP for the CRM; ZeRO 0 to 3 and plain torch train the same RecLoRA, and resume."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ddp_workers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException
from transformers import LlamaConfig, LlamaForCausalLM

from reclora_dist.backbone.load import load_backbone
from reclora_dist.backbone.tiny import train_tokenizer
from reclora_dist.config.schema import BackboneConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import ADAPTER, SHARDS
from reclora_dist.contract.storage import Folder
from reclora_dist.lora.adapter import read_weights
from reclora_dist.train.context import Context
from reclora_dist.train.states import ask_teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ENGINES = ["torch", "zero0", "zero1", "zero2", "zero3"]


def spawn(work: Callable[..., None], *arguments: Any, world: int = ddp_workers.WORLD) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, (port, *arguments), nprocs=world)


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


def test_ddp_sends_no_buffers(results: Path) -> None:
    """The largest is constant: the fields of all items."""
    assert [json.loads((results / f"buffers-{rank}.json").read_text()) for rank in range(2)] == [0.0, 1.0]


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
    folders = results / f"{name}-adapter", results / f"run-{name}" / "adapters" / "reclora"
    undisturbed, resumed = (load_file(*folder.glob("adapter_model-*.safetensors")) for folder in folders)
    assert_close(resumed, undisturbed)
    assert_close(state(results, f"{name}-resumed"), state(results, name))
    done = len(notes(results, f"{name}-resumed")["losses"])
    assert done == len(notes(results, name)["losses"]) - ddp_workers.KILL_AT, "it went on, it did not start anew"


@pytest.mark.parametrize("rank", range(ddp_workers.WORLD))
@pytest.mark.parametrize("name", ddp_workers.PRECISIONS)
def test_a_batch_that_is_no_number_ends_the_training(results: Path, name: str, rank: int) -> None:
    """In float16 it may be an overflow: the scale of the loss is lowered first, 2^16 times at most."""
    found = notes(results, "precision", rank)[name]
    assert 0.1 < found["norm"] < 10
    lowered = 16 if name.endswith(" float16") else 0
    assert found["begun"] == 2 + lowered
    assert re.search(
        rf"{name}: step {2 + lowered} has loss .* gradient norm (inf|nan) at learning rate", found["message"]
    )


@pytest.mark.parametrize("name", ddp_workers.PRECISIONS)
def test_a_new_engine_goes_on_where_another_was_bit_for_bit(results: Path, name: str) -> None:
    """Half precision keeps float32 masters; the micro-batch that the new engine is given may overflow."""
    for rank in range(ddp_workers.WORLD):
        found = notes(results, "precision", rank)[name]
        assert len(found["moved"]) == 6, "two parameters with their moments"
        assert not found["restored"]
        assert not found["next"]


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


@pytest.fixture(scope="module")
def variants(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("variants")
    runs = {name: Path(shutil.copytree(prepared, home / f"run-{name}")) for name in ddp_workers.VARIANTS}
    spawn(ddp_workers.every_variant, runs, home)
    return home


@pytest.mark.parametrize("name", ddp_workers.VARIANTS)
def test_offload_and_token_budgets_train_what_plain_torch_trains(results: Path, variants: Path, name: str) -> None:
    """By tokens the dropout falls elsewhere, so plain torch is compared with by tokens, too."""
    expected = state(variants, "torch by tokens") if name.endswith("tokens") else state(results, "torch")
    ours, theirs = (
        {key: value for key, value in found.items() if key.startswith("parameter/")}
        for found in (state(variants, name), expected)
    )
    assert_close(ours, theirs, 1e-4)


def test_two_processes_ask_a_teacher_like_one(prepared: Path, tmp_path: Path) -> None:
    """Each asks about its share of the samples, and both know all; the pupil that starts from it is whole."""
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    spawn(ddp_workers.taught, run, tmp_path)
    shards, teacher = Folder(str(run / "shards")), Folder(str(run / "adapters/lora"))
    alone = ask_teacher(teacher, shards, read_manifest(shards, SHARDS).select("text/split=train/"), Context())
    for rank in range(ddp_workers.WORLD):
        said = load_file(tmp_path / f"said-{rank}.safetensors")
        assert said["ids"].tolist() == alone.ids.tolist()
        torch.testing.assert_close(said["said"], alone.values[0], atol=1e-6, rtol=0)
    (begun, learned) = (read_weights(Folder(str(run / "adapters" / name))) for name in ("lora", "reclora"))
    names = {name for name in learned if name.endswith("bank.A")}
    assert names == {name for name in begun if name.endswith("bank.A")}
    for name in names:
        assert learned[name].shape == (4, *begun[name].shape[1:])
        assert (
            torch.nn.functional.cosine_similarity(learned[name].mean(0).flatten(), begun[name].flatten(), dim=0) > 0.9
        )


@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="libaio is absent (Debian: libaio-dev)")
@pytest.mark.timeout(1500)
def test_parameters_and_optimiser_on_a_disk_train_what_plain_torch_trains(
    results: Path, prepared: Path, tmp_path: Path, exhaustive: bool
) -> None:
    """DeepSpeed compiles its asynchronous I/O first. Tensors of this size it keeps in memory all the same;
    of larger ones see docs/training.md."""
    if not exhaustive:
        pytest.skip("minutes to compile: with --exhaustive only")
    run, disk = Path(shutil.copytree(prepared, tmp_path / "run")), tmp_path / "disk"
    disk.mkdir()
    spawn(ddp_workers.on_disk, run, tmp_path / "disk-run", disk)
    assert {place.name for place in (disk / "zero_stage_3").iterdir()} == {"optimizer", "float32params"}
    ours, theirs = (
        {key: value for key, value in found.items() if key.startswith("parameter/")}
        for found in (state(tmp_path, "disk-run"), state(results, "torch"))
    )
    assert_close(ours, theirs, 1e-4)


def test_another_number_of_workers_goes_on_inside_the_epoch(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three workers (64 rows are no multiple of three) stop after a checkpoint; one goes on, with another stage."""
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    shutil.rmtree(run / "crm")
    spawn(ddp_workers.uneven, run, tmp_path, 3, world=3)
    for rank in (1, 2):
        assert_close(state(tmp_path, "crm-3", 0), state(tmp_path, "crm-3", rank))
    capfd.readouterr()
    spawn(ddp_workers.other_world, run, tmp_path, 1, world=1)
    assert "reclora: resuming after step 3, with 1 workers in place of 3" in capfd.readouterr().out
    facts = read_manifest(Folder(str(run / "adapters" / "reclora")), ADAPTER).facts
    assert len(notes(tmp_path, "reclora-1")["losses"]) == facts["steps"] - 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_backbone_is_partitioned_while_it_is_read(tmp_path: Path, dtype: Literal["float32", "bfloat16"]) -> None:
    """From several safetensors files; each rank holds half, and the scores are those of the whole model."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    whole = LlamaForCausalLM(settings)
    whole.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    train_tokenizer(["No Yes some words of a model"] * 9, 300).save_pretrained(tmp_path / "model")
    spawn(ddp_workers.partitioned, str(tmp_path / "model"), tmp_path / "part", dtype)
    backbone = load_backbone(BackboneConfig(kind="causal", dtype=dtype), str(tmp_path / "model"))
    ids = torch.tensor([[3, 5, 8, 13], [4, 6, 9, 9]])
    with torch.no_grad():
        expected = backbone(ids, torch.ones_like(ids), torch.tensor([3, 2]))
    parts = [load_file(tmp_path / f"part-{rank}.safetensors") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part["logits"], expected, rtol=1e-5, atol=1e-6 if dtype == "float32" else 2e-3)
    total = sum(parameter.numel() for parameter in backbone.model.parameters())
    assert total <= sum(int(part["mine"]) for part in parts) <= total + 64, "each has its half, rounded up"


def test_torchrun_trains_without_ray(prepared: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(ddp_workers.__file__).with_name("torchrun_worker.py")), str(run)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "crm: up to date" in done.stdout
    assert (run / "adapters" / "reclora" / "manifest.json").exists()
    assert (run / "tensorboard" / "reclora").is_dir()


def test_deepspeed_stays_on_the_cpu_where_the_context_does(prepared: Path, tmp_path: Path) -> None:
    spawn(ddp_workers.beside_a_gpu, Path(shutil.copytree(prepared, tmp_path / "run")), tmp_path / "found", world=1)
    found = json.loads((tmp_path / "found").read_text())
    assert found["device"].startswith("cpu")
    assert 0 < found["loss"] < 10


def test_one_process_trains_with_deepspeed_in_half_precision(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(prepared, tmp_path / "run"))
    spawn(ddp_workers.alone, run, tmp_path / "kinds.json", world=1)
    emulated = not any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    assert ("several times slower than float32" in capfd.readouterr().out) == emulated
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    assert kinds["frozen"] == ["torch.bfloat16"]
    rotary = {name: kind for name, kind in kinds["buffers"].items() if "inv_freq" in name}
    assert rotary
    assert set(rotary.values()) == {"torch.float32"}, "rounded frequencies would turn positions"
    assert 0 < read_manifest(Folder(str(run / "adapters" / "reclora")), ADAPTER).facts["validation_auc"] < 1
