"""Score rows of text shards with one adapter: the same code validates in training, evaluates and serves."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from reclora_dist.backbone.load import load_tokenizer
from reclora_dist.contract.manifest import ContractError, Manifest, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.crm.batch import CrmBatch
from reclora_dist.crm.build import Crm
from reclora_dist.data.collate import TextCollator, crm_batch
from reclora_dist.data.features import FeatureStore
from reclora_dist.data.micro import by_tokens
from reclora_dist.data.prompts import PromptBuilder
from reclora_dist.lora.adapter import AdapterConfig, load_adapter, resolved_backbone
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.model import RecLora

Scores = npt.NDArray[np.float64]

CPU_TOKENS, DEVICE_TOKENS = 2048, 32_768
"""Tokens, padding included, of a forward pass, unless one prompt is longer: on a CPU as many as leave their activations
in its caches, on a GPU (or another device) as many as keep it busy and leave most of its memory to the weights."""


def text_collator(config: AdapterConfig, events: Folder, backbone: str) -> TextCollator:
    """The collator that words samples as ``config`` says, with the titles of an events dataset.

    Args:
        backbone: folder or hub id of the tokenizer.
    """
    manifest = read_manifest(events, EVENTS)
    items = read_parts(events, manifest.select("items/"), ["item", "title"])
    titles = [""] * (manifest.facts["items"] + 1)
    for item, title in zip(items["item"].to_pylist(), items["title"].to_pylist(), strict=True):
        titles[item] = title
    prompts = PromptBuilder(
        config.prompt,
        load_tokenizer(backbone),
        titles,
        manifest.facts["rating_levels"],
        manifest.facts["user_fields"],
        causal=config.backbone.kind != "encoder",
    )
    return TextCollator(prompts)


def crm_probability(model: Crm, batch: CrmBatch) -> torch.Tensor:
    """The CRM's own probability of a like, [batch]."""
    return torch.sigmoid(model(batch).logit.double())


class Scorer:
    """An adapter ready to score; use one per process and not from several threads at once."""

    def __init__(self, model: RecLora, config: AdapterConfig, collate: TextCollator, batch_size: int = 256) -> None:
        self.model = model.eval()
        self.config = config
        self.collate = collate
        self.batch_size = batch_size
        self.device = next(model.parameters()).device

    @classmethod
    def load(
        cls, adapter: Folder, threads: int = 1, batch_size: int = 256, device: torch.device | str | None = None
    ) -> "Scorer":
        """``from_pretrained`` for a process that does nothing else: torch takes ``threads`` threads from now on."""
        torch.set_num_threads(threads)
        return cls.from_pretrained(adapter.uri, device, batch_size=batch_size)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        base: str | None = None,
        batch_size: int = 256,
    ) -> "Scorer":
        """Load an adapter folder and the datasets that it refers to; the model is in eval mode.

        Args:
            path: path or URI of the adapter folder.
            device: None takes the GPU where there is one.
            dtype: type of the backbone, float32 or bfloat16; None takes that of the adapter's config.
            base: folder or hub id of the backbone, for an adapter whose own path to it does not lead there.
            batch_size: samples per forward pass.

        Raises:
            ContractError: the adapter, its backbone or its events are missing, damaged, or not those of its training.
            ValueError: the backbone is no model folder, or the dtype is another one.
        """
        adapter = Folder(path).absolute()
        model, config = load_adapter(adapter, dtype, base)
        events = referenced(adapter, config, "events")
        check_reference(config, "events", read_manifest(events, EVENTS))
        collate = text_collator(config, events, resolved_backbone(adapter, config))
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(chosen), config, collate, batch_size)

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.config.name

    @torch.inference_mode()
    def score(self, rows: pa.Table, donors: pa.Table | None = None) -> Scores:
        """Probability of a like for rows in the text shard schema, float64 [rows], in their order.

        Args:
            donors: for each row one whose mixture takes the place of the row's own (see ``shuffled``); all else stays.
        """
        scores = np.empty(rows.num_rows)
        for places, table in self._batches(rows):
            whole = self.collate(table)
            for part in self._passes(whole):
                batch = whole.take(torch.from_numpy(part)).to(self.device)
                foreign = None
                if donors is not None:
                    crm = crm_batch(donors.take(pa.array(places[part]))).to(self.device)
                    foreign = self.model.mixture(crm)
                logits = self.model(batch, foreign)
                scores[places[part]] = torch.softmax(logits.double(), dim=-1)[:, 1].cpu().numpy()
        return scores

    @torch.inference_mode()
    def mixtures(self, rows: pa.Table) -> npt.NDArray[np.float32]:
        """Gate weights, float32 [rows, matrices, experts]; one expert of weight 1 where there is no gate.

        In mode ``matrix`` they are matrices, [rows, matrices, r · r].
        """
        parts = np.ones((rows.num_rows, len(self.model.banks), self.config.lora.mixture_width), np.float32)
        for places, table in self._batches(rows):
            mixture = self.model.mixture(crm_batch(table).to(self.device))
            if mixture is not None:
                parts[places] = mixture.transpose(0, 1).float().cpu().numpy()
        return parts

    def _passes(self, batch: TextBatch) -> list[npt.NDArray[np.int64]]:
        """The rows of each forward pass."""
        lengths = batch.last.numpy() + 1
        most = CPU_TOKENS if self.device.type == "cpu" else DEVICE_TOKENS
        return by_tokens(lengths, max(most, int(lengths.max())))

    def _batches(self, rows: pa.Table) -> list[tuple[npt.NDArray[np.int64], pa.Table]]:
        """Batches of rows with histories of like length, so that little is padded, and their places in ``rows``."""
        order = np.argsort(rows["short_length"].to_numpy(), kind="stable")
        places = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return [(part, rows.take(pa.array(part))) for part in places]


def shuffled(rows: pa.Table, seed: int) -> pa.Table:
    """The rows in a random order that leaves none (of two or more) at its place: donors of ``Scorer.score``."""
    order = np.random.default_rng(seed).permutation(rows.num_rows)
    donors = np.empty_like(order)
    donors[order] = np.roll(order, 1)
    return rows.take(pa.array(donors))


def feature_store(path: str, config: AdapterConfig) -> FeatureStore:
    """The log and the item vectors that the adapter at ``path`` refers to: they give the rows of a user.

    Raises:
        ContractError: they are missing, damaged, or not those that the adapter was trained with.
    """
    events, vectors = (referenced(Folder(path), config, name) for name in ("events", "vectors"))
    check_reference(config, "events", read_manifest(events, EVENTS))
    check_reference(config, "vectors", read_manifest(vectors, VECTORS))
    return FeatureStore.load(events, vectors)


def referenced(adapter: Folder, config: AdapterConfig, name: str) -> Folder:
    """The folder of a dataset that an adapter refers to."""
    return adapter.resolve(config.references[name].uri)


def check_reference(config: AdapterConfig, name: str, manifest: Manifest) -> None:
    """Refuse a dataset that changed since the adapter was trained.

    Raises:
        ContractError: its content digest is another one.
    """
    reference = config.references[name]
    if manifest.content_digest != reference.content_digest:
        raise ContractError(
            f"adapter {config.name!r} was trained with {name} {reference.content_digest[:12]}…, but {reference.uri!r} "
            f"now holds {manifest.content_digest[:12]}…; train the adapter again or restore the dataset"
        )
