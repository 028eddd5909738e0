"""What a training worker does for each stage: build, fit, save. Ray starts it; tests call it directly."""

import dataclasses
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from reclora_dist.backbone.load import load_backbone
from reclora_dist.config.run import backbone_path, folder, manifest
from reclora_dist.config.schema import Config, LoraConfig, TrainConfig
from reclora_dist.config.targets import Target, adapter_target, backbone_target, crm_target
from reclora_dist.contract.manifest import Manifest, add_file
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import CRM, EVENTS, SHARDS, VECTORS
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.build import Crm, add_crm, build_crm, load_crm, vocabulary_of
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch
from reclora_dist.evaluate.scorer import crm_probability, text_collator
from reclora_dist.lora.adapter import (
    AdapterConfig,
    AdapterIdentity,
    Reference,
    read_weights,
    save_adapter,
    start_from,
)
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.gate import gate_use, imbalance
from reclora_dist.lora.model import RecLora, parameter_role
from reclora_dist.telemetry.meters import Meters, NullMeters
from reclora_dist.telemetry.tracking import recording
from reclora_dist.train.checkpoint import Checkpoint, CheckpointStore
from reclora_dist.train.context import Context
from reclora_dist.train.data import Data
from reclora_dist.train.engine import Engine, Loss, TorchEngine, build_optimiser, load_parameters
from reclora_dist.train.learning_rate import range_test, write_range_test
from reclora_dist.train.loop import FitResult, Task, fit
from reclora_dist.train.states import ask_crm, ask_teacher, taught, with_answers


def train_backbone(config: Config, say: Callable[[str], None] = print) -> None:
    """Train the tiny backbone on the run's item texts and training histories and save it at ``backbone/``."""
    from reclora_dist.backbone.tiny import pretrain  # no worker needs what these import
    from reclora_dist.data.corpus import corpus

    events, target, tiny = manifest(config, "events", EVENTS), backbone_target(config), config.backbone.tiny
    prompts = tiny.steps * tiny.batch_size
    tokenizer, texts = corpus(
        folder(config, "events"), events, config.backbone, config.prompt, config.retrieval.short, prompts
    )
    every = max(1, tiny.steps // 10)

    def progress(step: int, loss: float) -> None:
        if step % every == 0:
            say(f"backbone: step {step}/{tiny.steps} loss {loss:.3f}")

    with tempfile.TemporaryDirectory(prefix="reclora-backbone-") as scratch:
        loss = pretrain(config.backbone, tokenizer, texts, Path(scratch), progress)
        names = sorted(path.name for path in Path(scratch).iterdir())
        files = [add_file(target.folder, name, (Path(scratch) / name).read_bytes()) for name in names]
    facts = {"texts": len(texts), "loss": round(loss, 4), "vocabulary": len(tokenizer)}
    target.commit(files, facts)


def train_all(
    config: Config, names: Sequence[str], context: Context, meters: Callable[[], Meters] = NullMeters
) -> None:
    """Train those of ``names`` (``crm``, or an adapter's) that are not up to date, in this order, as this worker.

    Args:
        meters: makes those of a stage; they end with it, so that no gauge shows a training that is over.

    Raises:
        ValueError: a stage refuses its input.
    """
    for name in names:
        if context.gather(target_of(config, name).is_current)[0]:
            context.say(f"{name}: up to date")
            continue
        own = dataclasses.replace(context, meters=meters() if context.leads else NullMeters())
        with _recorded(config, name, own) as recorded:
            train_crm(config, recorded) if name == "crm" else train_adapter(config, name, recorded)
        _release_memory(context)
        context.gather(None)  # the next stage reads what rank 0 has written


def target_of(config: Config, name: str) -> Target:
    """What the training of ``name``, ``crm`` or an adapter's, is to make."""
    return crm_target(config) if name == "crm" else adapter_target(config, name)


def _release_memory(context: Context) -> None:
    """Give back what a stage held: model and engine refer to each other, so they go only when Python looks for them."""
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)


@contextmanager
def _recorded(config: Config, name: str, context: Context) -> Iterator[Context]:
    """The context with a record of the stage's course, which rank 0 keeps."""
    if not context.leads:
        yield context
        return
    with recording(config, name, dataclasses.asdict(config)) as record:
        yield dataclasses.replace(context, record=record)


@dataclass(frozen=True)
class Prepared:
    """A stage ready to be trained."""

    task: Task
    train: TrainConfig
    store: CheckpointStore
    resume: Checkpoint | None
    save: Callable[[FitResult], None]
    """Publish what was trained."""


def train_crm(config: Config, context: Context) -> None:
    """Train the CRM on all samples and save it at ``crm/``; validation AUC chooses the checkpoint."""
    _train(config, partial(prepare_crm, config), context)


def train_adapter(config: Config, name: str, context: Context) -> None:
    """Fine-tune the adapter ``name`` on the text samples and save it at ``adapters/<name>/``."""
    _train(config, partial(prepare_adapter, config, name), context)


def _train(config: Config, prepare: Callable[[Context], Prepared], context: Context) -> None:
    since = time.perf_counter()
    stage = prepare(context)
    result = fit(stage.task, stage.train, context, stage.store, stage.resume)
    if context.leads:
        costs = {**result.costs, "stage_seconds": time.perf_counter() - since}
        rounded = {key: round(value, 6) for key, value in costs.items()}
        folder(config, "training").write(f"{stage.task.name}.json", json.dumps(rounded, indent=1).encode())
        stage.save(result)
        stage.store.clear()


def find_learning_rate(config: Config, name: str, context: Context) -> None:
    """Write a range test of the learning rate of ``name``, ``crm`` or an adapter's, to ``learning_rate/``."""
    prepare = prepare_crm if name == "crm" else partial(prepare_adapter, name=name)
    with _recorded(config, name, context) as recorded:
        stage = prepare(config, context=recorded, fresh=True)
        points = range_test(stage.task, stage.train, config.finder, recorded)
    if context.leads:
        write_range_test(folder(config, "learning_rate"), name, points, context.say)


def prepare_crm(config: Config, context: Context, fresh: bool = False) -> Prepared:
    """The CRM with its data; ``fresh`` takes up no checkpoint."""
    events, shards = manifest(config, "events", EVENTS), manifest(config, "shards", SHARDS)
    items = read_parts(folder(config, "events"), events.select("items/"), ["item", "fields"])
    torch.manual_seed(config.crm_train.seed)
    model = build_crm(config.crm, events.facts, items)
    target, store = crm_target(config), checkpoints(config, "crm")
    resume = _taken_up(model, store, context, fresh)
    optimiser = build_optimiser(model, config.crm_train, fused=True)
    engine = TorchEngine(model, optimiser, crm_loss, config.crm_train, context)
    data = Data(config, shards, "crm", CRM_COLUMNS, crm_batch, config.crm_train, context)
    task = Task("crm", engine, data.steps_per_epoch, data.batches, lambda: data.auc(engine, _crm_scores))

    def save(result: FitResult) -> None:
        load_parameters(model, result.parameters)
        target.commit(add_crm(target.folder, model, vocabulary_of(events.facts, config.crm.ignore)), _facts(result))

    return Prepared(task, config.crm_train, store, resume, save)


def prepare_adapter(config: Config, name: str, context: Context, fresh: bool = False) -> Prepared:
    """The adapter ``name`` on its backbone with its data; ``fresh`` takes up no checkpoint."""
    lora, train = config.adapters[name], config.training(name)
    shards = manifest(config, "shards", SHARDS)
    crm_folder, crm_manifest = folder(config, "crm"), manifest(config, "crm", CRM)
    teach = _teacher(config, lora, shards, context)  # before our own model is there: two do not fit where one does
    adapter = adapter_config(config, name)
    os.environ["DS_ACCELERATOR"] = context.device.type  # read when DeepSpeed is imported; else it takes what it finds
    if context.device.type == "cpu" and _is_emulated(config.backbone.dtype):
        context.say(
            f"{name}: backbone.dtype {config.backbone.dtype}, for which this processor has no instructions: several "
            "times slower than float32"
        )
    model = build_model(config, lora, load_crm(crm_folder, crm_manifest))
    if lora.start:
        start_from(model, read_weights(folder(config, f"adapters/{lora.start}")), train.seed)
    model = model.to(context.device)
    target, store = adapter_target(config, name), checkpoints(config, name)
    resume = _taken_up(model, store, context, fresh)
    engine = _engine(config, model, train, context)
    collate: Callable[[pa.Table], TextBatch] = text_collator(adapter, folder(config, "events"), backbone_path(config))
    if config.reader.crm_states == "stored" and model.reads_crm:
        collate = with_answers(collate, ask_crm(model, folder(config, "shards"), shards.select("text/"), context))
    data = Data(config, shards, "text", TEXT_COLUMNS, collate, train, context, teach)
    task = Task(
        name,
        engine,
        data.steps_per_epoch,
        data.batches,
        validate=lambda: data.auc(engine, _text_scores),
        backward=1.0,
        gate_use=(lambda: gate_use(last_mixture(model))) if lora.weighs else None,
    )

    def save(result: FitResult) -> None:
        origin = AdapterIdentity(target.config_digest, target.parents)
        weights = {key.partition("/")[2]: value for key, value in result.parameters.items()}
        save_adapter(target.folder, adapter, weights, (crm_folder, crm_manifest), origin, _facts(result))

    return Prepared(task, train, store, resume, save)


def _teacher(
    config: Config, lora: LoraConfig, shards: Manifest, context: Context
) -> Callable[[TextBatch], TextBatch] | None:
    """What gives the training batches the scores of the adapter's teacher; None without a teacher."""
    if not lora.teacher:
        return None
    entries = shards.select("text/split=train/")
    context.say(f"{lora.teacher} scores {sum(entry.rows for entry in entries):,} training samples as the teacher")
    scores = ask_teacher(folder(config, f"adapters/{lora.teacher}"), folder(config, "shards"), entries, context)
    _release_memory(context)
    return partial(taught, scores=scores)


def _is_emulated(dtype: str) -> bool:
    has = torch.cpu.get_capabilities()
    return dtype != "float32" and not any(value for name, value in has.items() if name.endswith("bf16"))


def _taken_up(model: torch.nn.Module, store: CheckpointStore, context: Context, fresh: bool) -> Checkpoint | None:
    """The newest checkpoint, its parameters loaded."""
    resume = None if fresh else store.latest(context.say)
    if resume:
        load_parameters(model, resume.state)
    return resume


def build_model(config: Config, lora: LoraConfig, crm: Crm) -> RecLora:
    """An untrained RecLoRA; the same seed gives the same weights on every worker.

    With ZeRO-3 the backbone is partitioned while it is read, so this is a collective operation.
    """
    path, train = backbone_path(config), lora.training(config.lora_train)
    if config.engine.kind == "deepspeed" and config.engine.zero_stage == 3 and distributed.is_initialized():
        from reclora_dist.train.partitioned import load_partitioned

        backbone = load_partitioned(config.backbone, path, config.engine, train)
    else:
        backbone = load_backbone(config.backbone, path)
    torch.manual_seed(train.seed)
    return RecLora(backbone, crm, config.backbone, lora)


def adapter_config(config: Config, name: str) -> AdapterConfig:
    """The ``adapter_config.json`` of an adapter of this run; what it refers to is named relative to the adapter."""
    formats, home = {"events": EVENTS, "vectors": VECTORS, "shards": SHARDS}, folder(config, f"adapters/{name}")
    references = {
        key: Reference(home.relative(folder(config, key)), manifest(config, key, value).content_digest)
        for key, value in formats.items()
    }
    return AdapterConfig(
        name,
        config.backbone,
        "../../backbone" if config.backbone.kind == "tiny" else backbone_path(config),
        config.prompt,
        config.adapters[name],
        config.retrieval,
        references,
    )


def crm_loss(output: CrmOutput, batch: CrmBatch) -> Tensor:
    """Binary cross entropy of the CRM."""
    return F.binary_cross_entropy_with_logits(output.logit, batch.label)


def text_loss(logits: Tensor, batch: TextBatch) -> Tensor:
    """Cross entropy over the two answers, with the labels or with what a teacher says in their place."""
    if batch.taught is None:
        return F.cross_entropy(logits, batch.label.long())
    return F.cross_entropy(logits, torch.stack([1 - batch.taught, batch.taught], dim=1).to(logits.dtype))


def adapter_loss(model: RecLora) -> Loss:
    """The answers' cross entropy plus ``balance`` times the imbalance of the experts' use in the forward before.

    The mixture is read from the model, not returned by it: it is in the same graph as the logits, so engines see one
    forward and one backward, and gradient checkpointing, which runs only the backbone's layers again, leaves it alone.
    The imbalance of a step is not the mean of its passes', so their sizes are part of what is trained.
    """
    balance = model.config.balance
    if not balance:
        return text_loss
    return lambda logits, batch: text_loss(logits, batch) + balance * imbalance(last_mixture(model))


def last_mixture(model: RecLora) -> Tensor:
    """Mixtures of the last forward, [matrices, batch, experts]; of a model that has some."""
    mixture = model.conditioning.mixture
    assert mixture is not None
    return mixture


def _crm_scores(model: torch.nn.Module, batch: CrmBatch) -> Tensor:
    return crm_probability(model, batch)  # type: ignore[arg-type]


def _text_scores(model: torch.nn.Module, batch: TextBatch) -> Tensor:
    logits: Tensor = model(batch)
    return torch.softmax(logits.double(), dim=-1)[:, 1]


def _engine(config: Config, model: RecLora, train: TrainConfig, context: Context) -> Engine:
    plain = config.engine.kind == "torch"
    optimiser = build_optimiser(model, train, parameter_role, fused=plain)
    if plain:
        return TorchEngine(model, optimiser, adapter_loss(model), train, context)
    from reclora_dist.train.deepspeed_engine import DeepSpeedEngine

    loss = adapter_loss(model)
    return DeepSpeedEngine(model, optimiser, loss, train, config.engine, context, config.backbone.dtype)


def checkpoints(config: Config, stage: str) -> CheckpointStore:
    """The checkpoints of a stage: ``crm``, or the name of an adapter."""
    target, keep = target_of(config, stage), config.training(stage).keep
    return CheckpointStore(folder(config, f"checkpoints/{stage}/{target.digest[:12]}"), target.digest, keep)


def _facts(result: FitResult) -> dict[str, Any]:
    """Figures of a training run; no timings, so that equal runs have equal digests."""
    progress = result.progress
    return {
        "steps": result.steps,
        "best_step": progress.best_step,
        "validation_auc": round(progress.best_auc, 6),
        "history": progress.history,
    }
