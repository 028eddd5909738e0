"""Item texts to vectors on Ray: a pool of encoders streams the item table, the driver fits the PCA."""

import numpy as np
import ray
import torch
from ray.util import ActorPool

from reclora_dist.backbone.embed import Array, Projection, TextEncoder
from reclora_dist.config.run import backbone_path, folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.config.targets import vectors_target
from reclora_dist.contract.arrays import add_array, read_array
from reclora_dist.contract.manifest import ContractError, Manifest, digest, read_manifest
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import BACKBONE, EVENTS, VECTORS
from reclora_dist.contract.storage import Folder
from reclora_dist.ray_app.session import reserved_device


class _Encoder:
    """One encoder of the pool."""

    def __init__(self, path: str, max_tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encode = TextEncoder(path, max_tokens, reserved_device())

    def encode(self, texts: list[str]) -> Array:
        """Vectors of a batch of texts."""
        return self._encode(texts)


def embed_items(config: Config) -> None:
    """Write ``vectors/``: float32 [items + 1, dimension], unit rows, row 0 zero; PCA fitted on training items only.

    With ``embed.previous`` the vectors there stay, and items that came since are projected as those were.

    Raises:
        ContractError: the vectors of ``embed.previous`` are damaged, or of another log or encoder.
    """
    events, target = manifest(config, "events", EVENTS), vectors_target(config)
    columns = ["item", "text", "train_events"]
    items = read_parts(folder(config, "events"), events.select("items/"), columns).sort_by("item")
    old, projection = _previous(config, events) if config.embed.previous else (None, None)
    texts = items["text"].to_pylist()[0 if old is None else len(old) - 1 :]
    raw = _encode(config, texts) if texts or projection is None else np.zeros((0, len(projection.mean)), np.float32)
    if projection is None:
        projection = Projection.fit(raw[items["train_events"].to_numpy() > 0], config.embed.dimension)
    new = projection(raw)
    vectors = np.concatenate([np.zeros((1, new.shape[1]), np.float32) if old is None else old, new])
    files = [
        add_array(target.folder, "vectors", vectors),
        add_array(target.folder, "projection", projection.to_array()),
    ]
    facts = {"items": len(vectors) - 1, "dimension": vectors.shape[1], "encoder": _encoder(config)}
    target.commit(files, facts)


def _encoder(config: Config) -> str:
    """Digest of what turns a text into a vector, but for the projection."""
    tiny = not config.embed.path and config.backbone.kind == "tiny"
    model = manifest(config, "backbone", BACKBONE).content_digest if tiny else config.embed.path or config.backbone.path
    return digest([model, config.embed.max_tokens, config.embed.dimension])


def _previous(config: Config, events: Manifest) -> tuple[Array, Projection]:
    """The vectors of ``embed.previous``, and how they were projected."""
    place = Folder(config.embed.previous)
    found = read_manifest(place, VECTORS)
    if found.parents["events"] not in (events.content_digest, *events.facts.get("ancestors", ())):
        raise ContractError(
            f"embed.previous = {place.uri!r} has vectors of events {found.parents['events'][:12]}…, which these events "
            "do not go on from (build_events --previous). Name vectors of an earlier day, or leave it empty."
        )
    if found.facts.get("encoder") != _encoder(config):
        raise ContractError(
            f"embed.previous = {place.uri!r} was made by another encoder, or with another dimension or max_tokens. Use "
            "those settings, or leave embed.previous empty and embed all items again."
        )
    projection = Projection.from_array(read_array(place, found, "projection"))
    return read_array(place, found, "vectors"), projection


def _encode(config: Config, texts: list[str]) -> Array:
    """Raw vectors of texts, float32 [texts, width]."""
    options = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": config.ray.gpus_per_worker}
    path = config.embed.path or backbone_path(config)
    actor = ray.remote(_Encoder).options(**options)
    pool = ActorPool(
        [actor.remote(path, config.embed.max_tokens, config.ray.threads) for _ in range(max(1, config.ray.workers))]
    )
    size = config.embed.batch_size
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    parts, every = [], max(1, len(batches) // 5)
    for part in pool.map(lambda encoder, batch: encoder.encode.remote(batch), batches):
        parts.append(part)
        if len(parts) % every == 0:
            print(f"vectors: {min(len(parts) * size, len(texts)):,} of {len(texts):,} items", flush=True)
    return np.concatenate(parts)
