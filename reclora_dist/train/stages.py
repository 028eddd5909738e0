"""What a training worker does for each stage: build, fit, save. Ray starts it; tests call it directly."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from reclora_dist.backbone.load import load_backbone
from reclora_dist.config.run import backbone_path, folder, manifest
from reclora_dist.config.schema import Config, LoraConfig, TrainConfig
from reclora_dist.config.targets import Target, adapter_target, backbone_target, crm_target
from reclora_dist.contract.manifest import FileEntry, Manifest, add_file
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import CRM, EVENTS, SHARDS, VECTORS
from reclora_dist.crm.batch import CrmBatch, CrmOutput
from reclora_dist.crm.build import Crm, add_crm, build_crm, load_crm, vocabulary_of
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch
from reclora_dist.data.plan import EpochPlan, SequentialPlan, row_groups
from reclora_dist.data.readers import read_batches
from reclora_dist.evaluate.auc import auc_by_group
from reclora_dist.evaluate.scorer import crm_probability, text_collator
from reclora_dist.lora.adapter import AdapterConfig, AdapterIdentity, Reference, save_adapter
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.gate import gate_use, imbalance
from reclora_dist.lora.model import RecLora, parameter_role
from reclora_dist.train.checkpoint import CheckpointStore
from reclora_dist.train.context import Context
from reclora_dist.train.engine import Engine, Loss, TorchEngine, build_optimiser, load_parameters
from reclora_dist.train.loop import FitResult, Task, fit


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


def train_crm(config: Config, context: Context) -> None:
    """Train the CRM on all samples and save it at ``crm/``; validation AUC chooses the checkpoint."""
    events, shards = manifest(config, "events", EVENTS), manifest(config, "shards", SHARDS)
    items = read_parts(folder(config, "events"), events.select("items/"), ["item", "fields"])
    torch.manual_seed(config.crm_train.seed)
    model = build_crm(config.crm, events.facts, items)
    target = crm_target(config)
    store = _store(config, "crm", target)
    resume = store.latest()
    if resume:
        load_parameters(model, resume.state)
    optimiser = build_optimiser(model, config.crm_train)
    engine = TorchEngine(model, optimiser, crm_loss, config.crm_train, context)
    data = _Data(config, shards, "crm", CRM_COLUMNS, crm_batch, config.crm_train, context)
    task = Task("crm", engine, data.steps_per_epoch, data.batches, lambda: data.auc(engine, _crm_scores))
    result = fit(task, config.crm_train, context, store, resume)
    if context.leads:
        load_parameters(model, result.parameters)
        target.commit(add_crm(target.folder, model, vocabulary_of(events.facts)), _facts(result))
        store.clear()


def train_adapter(config: Config, name: str, context: Context) -> None:
    """Fine-tune the adapter ``name`` on the text samples and save it at ``adapters/<name>/``."""
    lora = config.adapters[name]
    shards = manifest(config, "shards", SHARDS)
    crm_folder, crm_manifest = folder(config, "crm"), manifest(config, "crm", CRM)
    adapter = adapter_config(config, name)
    model = build_model(config, lora, load_crm(crm_folder, crm_manifest)).to(context.device)
    target = adapter_target(config, name)
    store = _store(config, name, target)
    resume = store.latest()
    if resume:
        load_parameters(model, resume.state)
    engine = _engine(config, model, context)
    collate = text_collator(adapter, folder(config, "events"), backbone_path(config))
    data = _Data(config, shards, "text", TEXT_COLUMNS, collate, config.lora_train, context)
    task = Task(
        name,
        engine,
        data.steps_per_epoch,
        data.batches,
        validate=lambda: data.auc(engine, _text_scores),
        gate_use=(lambda: gate_use(last_mixture(model))) if lora.weighs else None,
    )
    result = fit(task, config.lora_train, context, store, resume)
    if context.leads:
        origin = AdapterIdentity(target.config_digest, target.parents)
        weights = {key.partition("/")[2]: value for key, value in result.parameters.items()}
        save_adapter(target.folder, adapter, weights, (crm_folder, crm_manifest), origin, _facts(result))
        store.clear()


def build_model(config: Config, lora: LoraConfig, crm: Crm) -> RecLora:
    """An untrained RecLoRA; the same seed gives the same weights on every worker."""
    backbone = load_backbone(config.backbone, backbone_path(config))
    torch.manual_seed(config.lora_train.seed)
    return RecLora(backbone, crm, config.backbone, lora)


def adapter_config(config: Config, name: str) -> AdapterConfig:
    """The ``adapter_config.json`` of an adapter of this run; what lies in the run is named relative to the adapter."""
    formats = {"events": EVENTS, "vectors": VECTORS, "shards": SHARDS}
    references = {
        key: Reference(f"../../{key}", manifest(config, key, value).content_digest) for key, value in formats.items()
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
    """Cross entropy over the two answers."""
    return F.cross_entropy(logits, batch.label.long())


def adapter_loss(model: RecLora) -> Loss:
    """The answers' cross entropy plus ``balance`` times the imbalance of the experts' use in the forward before.

    The mixture is read from the model, not returned by it: it is in the same graph as the logits, so engines see one
    forward and one backward, and gradient checkpointing, which runs only the backbone's layers again, leaves it alone.
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


class _Data:
    """Training batches and the validation pass of one stage."""

    def __init__(
        self,
        config: Config,
        shards: Manifest,
        kind: str,
        columns: tuple[str, ...],
        collate: Callable[[pa.Table], Any],
        train: TrainConfig,
        context: Context,
    ) -> None:
        self.config, self.columns, self.collate, self.context = config, columns, collate, context
        self.train = train
        self.folder = folder(config, "shards")
        self.training = self._entries(shards, f"{kind}/split=train/")
        self.validation = self._entries(shards, f"{kind}/split=validation/")
        self.per_worker = train.batch_size // context.world
        self.micro = train.micro_batch or self.per_worker
        self.steps_per_epoch = self._plan(0).steps

    def batches(self, epoch: int, start: int) -> Iterator[list[Any]]:
        """Micro-batches of every step of an epoch from step ``start`` on."""
        tables = read_batches(
            self.folder, self.training, self._plan(epoch), self.columns, self.config.reader, start_step=start
        )
        for table in tables:
            parts = [table.slice(first, self.micro) for first in range(0, self.per_worker, self.micro)]
            yield [self.collate(part).to(self.context.device) for part in parts]

    def auc(self, engine: Engine, score: Callable[[torch.nn.Module, Any], Tensor]) -> float:
        """AUC on the validation split, the same number on every rank."""
        model = engine.model
        model.eval()  # returns nothing in DeepSpeed
        plans = [self._sequential(rank) for rank in range(self.context.world)]
        mine, most = plans[self.context.rank], max(plan.steps for plan in plans)
        labels, scores = [torch.zeros(0)], [torch.zeros(0)]
        batch = None
        with torch.no_grad():
            for table in read_batches(self.folder, self.validation, mine, self.columns, self.config.reader):
                batch = self.collate(table).to(self.context.device)
                scores.append(score(model, batch).float().cpu())
                labels.append(batch.label.cpu())
            for _ in range(most - mine.steps):  # ZeRO-3 gathers in every forward, so all ranks do equally many
                score(model, batch if batch is not None else next(self.batches(0, 0))[0])
        gathered = self.context.gather((torch.cat(scores), torch.cat(labels)))
        every, truth = (torch.cat([part[i] for part in gathered]).numpy() for i in (0, 1))
        (found,) = auc_by_group(truth, every, np.zeros(len(truth), np.int64), 1)
        if np.isnan(found):
            raise ValueError(
                f"all {len(truth)} validation labels are {truth[0]:.0f}; AUC needs both, take more samples"
            )
        return float(found)

    def _plan(self, epoch: int) -> EpochPlan:
        return EpochPlan(
            row_groups(self.training), self.train.seed, epoch, self.context.rank, self.context.world, self.per_worker
        )

    def _sequential(self, rank: int) -> SequentialPlan:
        size = min(4 * self.micro, 4096)
        return SequentialPlan(row_groups(self.validation), size, rank, self.context.world)

    def _entries(self, shards: Manifest, prefix: str) -> tuple[FileEntry, ...]:
        entries = shards.select(prefix)
        if not sum(entry.rows for entry in entries):
            raise ValueError(f"{self.folder.uri!r} has no rows in {prefix}; check events.fractions and shards.text_*")
        return entries


def _engine(config: Config, model: RecLora, context: Context) -> Engine:
    optimiser = build_optimiser(model, config.lora_train, parameter_role)
    if config.engine.kind == "torch":
        return TorchEngine(model, optimiser, adapter_loss(model), config.lora_train, context)
    from reclora_dist.train.deepspeed_engine import DeepSpeedEngine

    bfloat16 = config.backbone.dtype == "bfloat16"
    loss = adapter_loss(model)
    return DeepSpeedEngine(model, optimiser, loss, config.lora_train, config.engine, context, bfloat16)


def _store(config: Config, stage: str, target: Target) -> CheckpointStore:
    return CheckpointStore(folder(config, f"checkpoints/{stage}/{target.digest[:12]}"), target.digest)


def _facts(result: FitResult) -> dict[str, Any]:
    """Figures of a training run; no timings, so that equal runs have equal digests."""
    progress = result.progress
    return {
        "steps": result.steps,
        "best_step": progress.best_step,
        "validation_auc": round(progress.best_auc, 6),
        "history": progress.history,
    }
