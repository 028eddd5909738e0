"""The training loop: an interrupted run ends as an undisturbed one, validation chooses, the learning rate's course."""

import copy
import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from sample_data import small_config, write_run
from torch import Tensor, nn

from reclora_dist.config.check import check_engine, check_sizes
from reclora_dist.config.schema import Config, EngineConfig, LoraConfig, TrainConfig
from reclora_dist.contract.manifest import read_manifest
from reclora_dist.contract.schema import ADAPTER, CRM
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.build import load_crm
from reclora_dist.data.collate import crm_batch
from reclora_dist.data.plan import Stretch
from reclora_dist.lora.gate import GateUse
from reclora_dist.lora.model import parameter_role
from reclora_dist.telemetry import names
from reclora_dist.telemetry.meters import NullMeters
from reclora_dist.telemetry.names import Metric
from reclora_dist.train import stages
from reclora_dist.train.checkpoint import Checkpoint, CheckpointStore
from reclora_dist.train.context import Context
from reclora_dist.train.engine import MicroBatch, StepResult, TorchEngine, build_optimiser, schedule
from reclora_dist.train.errors import Diverged, OutOfMemory
from reclora_dist.train.loop import FitResult, Progress, Task, fit
from reclora_dist.train.pace import Pace, Report, forward_flops, slowest


class Killed(BaseException):
    """The process ends here."""


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the run as soon as the checkpoint of ``step`` is complete."""
    whole = CheckpointStore.save

    def save(store: CheckpointStore, checkpoint: Checkpoint) -> None:
        whole(store, checkpoint)
        if checkpoint.step == step:
            raise Killed

    monkeypatch.setattr(CheckpointStore, "save", save)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    write_run(run)
    return run


def crm_config(run: Path, **changes: Any) -> Config:
    base = small_config(run)
    return dataclasses.replace(base, crm_train=dataclasses.replace(base.crm_train, **changes))


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> str:
    """Content digest of the CRM that an uninterrupted run saves: weights, choice of checkpoint and history."""
    stages.train_crm(crm_config(data), Context())
    return read_manifest(Folder(str(data / "crm")), CRM).content_digest


@pytest.mark.parametrize("step", [3, 6, 9, 10, 18, 20])
def test_a_crm_run_that_was_killed_ends_like_the_undisturbed_one(
    data: Path, undisturbed: str, step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = crm_config(data)
    kill_after(step, monkeypatch)
    with pytest.raises(Killed):
        stages.train_crm(config, Context())
    monkeypatch.undo()
    stages.train_crm(config, Context())
    assert f"crm: resuming after step {step}" in capsys.readouterr().out
    assert read_manifest(Folder(str(data / "crm")), CRM).content_digest == undisturbed
    assert not (data / "checkpoints" / "crm").exists() or not list((data / "checkpoints" / "crm").iterdir())


def test_a_micro_batched_adapter_run_that_was_killed_ends_like_the_undisturbed_one(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared, run)
    base = small_config(run, engine=EngineConfig(kind="torch"))
    train = dataclasses.replace(base.lora_train, micro_batch=16, validate_every=4)
    config = dataclasses.replace(
        base, lora_train=train, adapters={"reclora": LoraConfig(experts=3, rank=2, dropout=0.1)}
    )
    folder = Folder(str(run / "adapters" / "reclora"))
    stages.train_adapter(config, "reclora", Context())
    expected = read_manifest(folder, ADAPTER).content_digest
    kill_after(6, monkeypatch)
    with pytest.raises(Killed):
        stages.train_adapter(config, "reclora", Context())
    monkeypatch.undo()
    stages.train_adapter(config, "reclora", Context())
    assert read_manifest(folder, ADAPTER).content_digest == expected


def test_a_checkpoint_of_another_config_is_not_taken_up(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_after(3, monkeypatch)
    with pytest.raises(Killed):
        stages.train_crm(crm_config(data, lr=1e-3), Context())
    monkeypatch.undo()
    capsys.readouterr()
    stages.train_crm(crm_config(data, lr=5e-4, epochs=1), Context())
    assert "resuming" not in capsys.readouterr().out


def test_micro_batches_give_the_whole_batchs_step(data: Path) -> None:
    def step(sizes: list[int]) -> tuple[StepResult, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        train = TrainConfig(lr=0.1, clip=0.5)
        engine = TorchEngine(model, build_optimiser(model, train, fused=True), mean_square, train, Context())
        x = torch.arange(24.0).view(6, 4)
        micro_batches = [MicroBatch(rows, len(rows) / 6) for rows in x.split(sizes)]
        return engine.step(micro_batches, 1.0), model.weight.detach()

    whole, weight = step([6])
    for sizes in ([2, 2, 2], [3, 2, 1]):
        parts, other = step(sizes)
        assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
        assert whole.gradient_norm == pytest.approx(parts.gradient_norm, rel=1e-5)
        torch.testing.assert_close(weight, other)


def mean_square(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


@dataclass(frozen=True)
class Nothing:
    """A batch of one row without content."""

    size = tokens = 1

    def __len__(self) -> int:
        return 1


class Counted:
    """An engine whose only parameter is the number of its steps; notes what it was told."""

    def __init__(self, results: Mapping[int, StepResult] | None = None) -> None:
        self.model = nn.Identity()
        self.value = 0.0
        self.results = results or {}
        self.scales: list[float] = []
        self.draws: list[float] = []

    def step(self, micro_batches: Any, scale: float) -> StepResult:
        self.value += 1
        self.scales.append(scale)
        self.draws.append(float(torch.rand(())))
        return self.results.get(int(self.value), StepResult(1.0, 1.0))

    def state(self) -> dict[str, Tensor]:
        return {"parameter/w": torch.tensor(self.value), "exp_avg/w": torch.zeros(()), "exp_avg_sq/w": torch.zeros(())}

    def restore(self, state: Mapping[str, Tensor], steps: int, batch: Any) -> None:
        self.value = float(state["parameter/w"])


def counted(
    folder: Path,
    aucs: Iterable[float],
    train: TrainConfig,
    context: Context | None = None,
    resume: bool = False,
    gate_use: Callable[[], GateUse] | None = None,
    results: Mapping[int, StepResult] | None = None,
) -> tuple[Counted, FitResult]:
    """Fit a ``Counted`` engine for epochs of 5 steps; validation gives ``aucs`` one after the other."""
    engine, validations = Counted(results), iter(aucs)
    store = CheckpointStore(Folder(str(folder)), "d")

    def batches(epoch: int, start: int, earlier: Sequence[Stretch]) -> Generator[list[MicroBatch], None, None]:
        yield from ([MicroBatch(Nothing(), 1.0)] for _ in range(start, 5))

    task = Task("counted", engine, 5, batches, lambda: next(validations), gate_use=gate_use)
    return engine, fit(task, train, context or Context(), store, store.latest() if resume else None)


def test_validation_chooses_the_parameters(tmp_path: Path) -> None:
    _, result = counted(tmp_path, [0.6, 0.8, 0.7, 0.8], TrainConfig(epochs=4))
    assert result.parameters == {"parameter/w": torch.tensor(10.0)}, "the second of four; a tie changes nothing"
    assert result.progress.best_step == 10
    assert [entry["validation_auc"] for entry in result.progress.history] == [0.6, 0.8, 0.7, 0.8]
    assert [entry["step"] for entry in result.progress.history] == [5, 10, 15, 20]
    assert result.steps == 20


def test_the_choice_survives_a_restart(tmp_path: Path) -> None:
    with pytest.raises(StopIteration):
        counted(tmp_path, [0.8, 0.7], TrainConfig(epochs=4, checkpoint_every=3))
    engine, result = counted(tmp_path, [0.6, 0.7], TrainConfig(epochs=4, checkpoint_every=3), resume=True)
    assert result.parameters == {"parameter/w": torch.tensor(5.0)}
    assert len(engine.scales) == 8, "it went on after the checkpoint of step 12"


def test_random_draws_depend_on_seed_step_and_rank_alone(tmp_path: Path) -> None:
    train = TrainConfig(epochs=2, checkpoint_every=3)
    whole, _ = counted(tmp_path / "a", [0.5, 0.6], train)
    with pytest.raises(StopIteration):
        counted(tmp_path / "b", [0.5], train)
    rest, _ = counted(tmp_path / "b", [0.6], train, resume=True)
    assert rest.draws == whole.draws[9:]
    assert len(set(whole.draws)) == 10
    other, _ = counted(tmp_path / "c", [0.5, 0.6], dataclasses.replace(train, seed=1))
    second, _ = counted(tmp_path / "d", [0.5, 0.6], train, Context(rank=1))
    assert not set(whole.draws) & set(other.draws) | set(whole.draws) & set(second.draws)


def test_only_the_leading_worker_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted(tmp_path, [0.5], TrainConfig(), Context(rank=1))
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_training_ends_when_validation_has_lost_its_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = TrainConfig(epochs=9, patience=2)
    engine, result = counted(tmp_path, [0.6, 0.8, 0.7, 0.75], train)
    assert (result.steps, result.progress.best_step, len(engine.scales)) == (20, 10, 20)
    assert "no better AUC in 2 validations, ending at step 20" in capsys.readouterr().out
    again, result = counted(tmp_path, [], train, resume=True)
    assert (result.steps, again.scales) == (20, []), "killed after its last checkpoint, it has nothing left to do"


@pytest.mark.parametrize(("loss", "norm"), [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (math.inf, 0.0)])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run_and_leaves_the_checkpoints(
    tmp_path: Path, loss: float, norm: float
) -> None:
    train = TrainConfig(epochs=2, checkpoint_every=3, lr=1e-2)
    with pytest.raises(
        Diverged, match=rf"counted: step 8 has loss {loss} and gradient norm {norm} .*Lower lr"
    ) as found:
        counted(tmp_path, [0.5, 0.6], train, results={8: StepResult(loss, norm)})
    assert isinstance(found.value, ValueError), "trying again would not help"
    assert str(copy.copy(found.value)) == str(found.value), "it is pickled on its way to the driver"
    assert CheckpointStore(Folder(str(tmp_path)), "d").steps() == [5, 6]


def test_a_step_that_lowers_the_scale_of_the_loss_is_no_divergence(tmp_path: Path) -> None:
    _, result = counted(tmp_path, [0.5], TrainConfig(), results={3: StepResult(1.0, math.inf, skipped=True)})
    assert result.steps == 5


def test_a_skipped_step_leaves_the_last_loss_and_gradient_norm(tmp_path: Path) -> None:
    meters, records = Heard(), list[Mapping[str, float]]()
    results = {4: StepResult(math.nan, math.inf, skipped=True)}
    context = Context(meters=meters, record=lambda _, values: records.append(values))
    counted(tmp_path, [0.5], TrainConfig(log_every=2), context, results=results)
    for name in ("loss", "gradient_norm"):
        assert len(meters.heard[names.TRAINING[name].name]) == 2, "steps 2 and 5"
        assert sum(name in values for values in records) == 2
    shown = [*meters.heard.values(), *(values.values() for values in records)]
    assert all(math.isfinite(value) for values in shown for value in values)
    assert len(meters.heard[names.TRAIN_LEARNING_RATE.name]) == 3


def test_out_of_memory_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(engine: Counted, micro_batches: Any, scale: float) -> StepResult:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Counted, "step", full)
    with pytest.raises(OutOfMemory, match=r"counted: out of memory in step 1, with up to 1 samples .* micro_batch"):
        counted(tmp_path, [0.5], TrainConfig())


def test_memory_may_run_out_in_the_validation_and_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def validated() -> Generator[float, None, None]:
        full()
        yield 0.5

    with pytest.raises(
        OutOfMemory, match="counted: out of memory in the validation after step 5, with up to 1 samples"
    ):
        counted(tmp_path, validated(), TrainConfig())
    monkeypatch.setattr(Pace, "measure", full)
    with pytest.raises(OutOfMemory, match="counted: out of memory in step 1, with up to 1 samples"):
        counted(tmp_path, [0.5], TrainConfig())


def test_other_numbers_of_workers_in_an_epoch_are_remembered() -> None:
    progress = Progress(world=2, earlier=[(4, 3)])
    assert progress.stretches(2, 5) == [Stretch(4, 3)], "the same two go on"
    assert progress.stretches(3, 5) == [Stretch(4, 3), Stretch(2, 2)]
    assert progress.stretches(3, 3) == [Stretch(4, 3)], "two had not begun"
    assert progress.stretches(3, 0) == [], "an epoch has just ended"


class Heard(NullMeters):
    def __init__(self) -> None:
        self.heard: dict[str, list[float]] = {}

    def _hear(self, metric: Metric, value: float = 1.0, /, **labels: str) -> None:
        assert labels.pop("stage") == "counted"
        self.heard.setdefault(" ".join([metric.name, *labels.values()]), []).append(value)

    add = set = observe = _hear


def test_metrics_and_reports(tmp_path: Path) -> None:
    meters, reports = Heard(), list[Mapping[str, float]]()
    train = TrainConfig(epochs=2, batch_size=8, log_every=4, lr=1e-2)
    counted(tmp_path, [0.5, 0.6], train, Context(meters=meters, report=reports.append))
    assert meters.heard[names.TRAIN_STEPS.name] == [1.0] * 10
    assert sum(meters.heard[names.TRAIN_SAMPLES.name]) == 80
    assert meters.heard[names.TRAIN_VALIDATION_AUC.name] == [0.5, 0.6]
    assert len(meters.heard[names.TRAIN_LOSS.name]) == 3, "steps 4, 8 and the last"
    assert [report["step"] for report in reports] == [5, 10]
    for key, metric in names.TRAINING.items():
        assert len(meters.heard[metric.name]) == 3, key
    assert meters.heard[names.TRAIN_SLOWEST_WORKER.name] == [1.0] * 3, "there is but one"


def test_the_costs_of_a_run_are_means_over_its_time(tmp_path: Path) -> None:
    records: list[tuple[int, Mapping[str, float]]] = []
    train = TrainConfig(epochs=2, batch_size=8, log_every=4)
    _, result = counted(tmp_path, [0.5, 0.6], train, Context(record=lambda *entry: records.append(entry)))
    assert result.costs["steps"] == 10
    assert result.costs["samples_per_second"] == pytest.approx(80 / result.costs["seconds"])
    assert result.costs["tokens_per_second"] == pytest.approx(10 / result.costs["seconds"])
    assert 0 <= result.costs["data_wait_share"] <= 1
    assert result.costs["communication_share"] == 0
    assert result.costs["peak_memory_bytes"] > 1e6
    assert [step for step, _ in records] == [4, 5, 8, 10, 10]


def test_the_slowest_worker_is_named() -> None:
    reports = [Report("a", 0.1, 0.9, 0, 0, 0), Report("b", 2.0, 1.0, 0, 0, 0), Report("c", 0.0, 1.0, 0, 0, 0)]
    assert slowest(reports) == (1, pytest.approx(3.0))
    assert slowest(reports[:1]) == (0, 1.0)


def test_flops_are_those_of_the_matrix_products() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert forward_flops(model, torch.ones(3, 4)) == 3 * 2 * (4 * 8 + 8 * 2)


def test_the_use_of_every_expert_is_a_metric(tmp_path: Path) -> None:
    meters, use = Heard(), GateUse(0.5, [0.7, 0.3], [0.9, 0.1])
    train = TrainConfig(epochs=1, log_every=4)
    counted(tmp_path, [0.5], train, Context(meters=meters), gate_use=lambda: use)
    found = {name: values for name, values in meters.heard.items() if "gate" in name}
    assert found == {
        "reclora_train_gate_entropy": [0.5] * 2,
        "reclora_train_gate_weight 0": [0.7] * 2,
        "reclora_train_gate_weight 1": [0.3] * 2,
        "reclora_train_gate_largest 0": [0.9] * 2,
        "reclora_train_gate_largest 1": [0.1] * 2,
    }


def test_learning_rate_rises_then_falls_in_a_line() -> None:
    train = TrainConfig(warmup=0.1, final_lr=0.2)
    course = [schedule(step, 100, train) for step in range(100)]
    assert course[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert course[10] == pytest.approx(1.0)
    falls = [a - b for a, b in itertools.pairwise(course[10:])]
    assert falls == pytest.approx([falls[0]] * 89)
    assert 0.2 < course[-1] < 0.22
    assert schedule(0, 1, train) == 1.0


def test_banks_and_gates_have_learning_rates_of_their_own(prepared: Path) -> None:
    base = small_config(prepared)
    train = dataclasses.replace(base.lora_train, lr=1e-3, bank_lr=2e-3, gate_lr=3e-3, weight_decay=0.1)
    crm = Folder(str(prepared / "crm"))
    model = stages.build_model(base, base.adapters["reclora"], load_crm(crm, read_manifest(crm, CRM)))
    optimiser = build_optimiser(model, train, parameter_role)
    by_id = {id(p): name for name, p in model.named_parameters()}
    found = {by_id[id(p)]: group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert {lr for name, lr in found.items() if ".bank." in name} == {2e-3}
    assert {lr for name, lr in found.items() if name.startswith("gates.")} == {3e-3}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {group["weight_decay"] for group in optimiser.param_groups} == {0.1}


@pytest.mark.parametrize(
    ("train", "workers", "words"),
    [
        (TrainConfig(batch_size=2), 3, "batch_size 2 leaves some of 3 workers without a sample; take at least 3"),
        (TrainConfig(epochs=0), 1, "epochs 0 must be at least 1"),
        (TrainConfig(micro_batch=-1), 1, "micro_batch -1 must be at least 0"),
        (TrainConfig(lr=0.0), 1, "lr 0.0 must be above 0"),
        (TrainConfig(keep=0), 1, "keep 0 must be at least 1"),
        (TrainConfig(micro_batch=4, micro_tokens=900), 1, "has both micro_batch and micro_tokens"),
    ],
)
def test_sizes_that_cannot_work_are_refused(train: TrainConfig, workers: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"lora_train.*{words}"):
        check_sizes(train, workers, "lora_train")
    check_sizes(TrainConfig(batch_size=64, micro_batch=24), 3, "lora_train")
    check_sizes(TrainConfig(batch_size=7), 0, "lora_train")


@pytest.mark.parametrize(
    ("engine", "dtype", "words"),
    [
        (EngineConfig(kind="torch", offload_optimizer="cpu"), "float32", "offload_optimizer 'cpu' needs DeepSpeed"),
        (EngineConfig(kind="torch"), "float16", "float16 needs a scaled loss"),
        (EngineConfig(zero_stage=0), "bfloat16", "dtype bfloat16 needs engine.zero_stage 1 or higher, not 0"),
        (EngineConfig(zero_stage=0), "float16", "dtype float16 needs engine.zero_stage 1 or higher, not 0"),
        (EngineConfig(zero_stage=0, offload_optimizer="cpu"), "float32", "'cpu' needs engine.zero_stage 1 or higher"),
        (EngineConfig(zero_stage=2, offload_parameters="cpu"), "float32", "needs engine.zero_stage 3 or higher, not 2"),
        (EngineConfig(zero_stage=2, offload_optimizer="nvme"), "float32", "needs engine.zero_stage 3 or higher, not 2"),
        (EngineConfig(zero_stage=3, offload_parameters="nvme"), "float32", "engine.nvme_path is empty"),
    ],
)
def test_engines_that_cannot_work_are_refused(engine: EngineConfig, dtype: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_engine(engine, dtype)
    check_engine(EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu"), "bfloat16")


def test_a_machine_that_cannot_offload_to_a_disk_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from reclora_dist.train import deepspeed_engine

    monkeypatch.setattr(deepspeed_engine.AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    on_disk = EngineConfig(zero_stage=3, offload_parameters="nvme", nvme_path="/scratch")
    with pytest.raises(ValueError, match=r"needs libaio's headers .* apt install libaio-dev g\+\+"):
        deepspeed_engine.zero_config(on_disk, 100)
    assert deepspeed_engine.zero_config(EngineConfig(zero_stage=2), 100) == {"stage": 2, "overlap_comm": False}


def test_one_label_in_validation_is_an_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_liked(table: pa.Table) -> CrmBatch:
        rows = crm_batch(table)
        return dataclasses.replace(rows, label=torch.ones_like(rows.label))

    monkeypatch.setattr(stages, "crm_batch", all_liked)
    with pytest.raises(ValueError, match=r"all \d+ validation labels are 1; AUC needs both, take more samples"):
        stages.train_crm(crm_config(data, seed=9, epochs=1), Context())
