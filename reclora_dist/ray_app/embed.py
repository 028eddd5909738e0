"""Item texts to vectors on Ray: a pool of encoders streams the item table, the driver fits the PCA."""

import io

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import torch
from ray.util import ActorPool

from reclora_dist.backbone.embed import TextEncoder, reduce
from reclora_dist.config.run import backbone_path, folder, manifest
from reclora_dist.config.schema import Config
from reclora_dist.config.targets import vectors_target
from reclora_dist.contract.manifest import add_file, file_entry
from reclora_dist.contract.parts import read_parts
from reclora_dist.contract.schema import EVENTS


class _Encoder:
    """One encoder of the pool."""

    def __init__(self, path: str, max_tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encode = TextEncoder(path, max_tokens)

    def encode(self, texts: list[str]) -> npt.NDArray[np.float32]:
        """Vectors of a batch of texts."""
        return self._encode(texts)


def embed_items(config: Config) -> None:
    """Write ``vectors/``: float32 [items + 1, dimension], unit rows, row 0 zero; PCA fitted on training items only."""
    events, source = manifest(config, "events", EVENTS), folder(config, "events")
    table = read_parts(source, events.select("items/"), ["item", "text", "train_events"])
    raw = _encode(config, table.select(["item", "text"]), events.facts["items"])
    fit = np.zeros(len(raw), bool)
    fit[table["item"].to_numpy()] = table["train_events"].to_numpy() > 0
    unit = reduce(raw[1:], fit[1:], config.embed.dimension)
    vectors = np.concatenate([np.zeros_like(unit[:1]), unit])
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    target = vectors_target(config)
    name = f"vectors-{file_entry('', buffer.getvalue()).sha256[:12]}.npy"
    files = [add_file(target.folder, name, buffer.getvalue())]
    facts = {"items": len(unit), "dimension": unit.shape[1]}
    target.commit(files, facts)


def _encode(config: Config, table: pa.Table, items: int) -> npt.NDArray[np.float32]:
    """Raw vectors by item position, float32 [items + 1, width]."""
    options = {"num_cpus": config.ray.cpus_per_worker, "num_gpus": config.ray.gpus_per_worker}
    path = config.embed.path or backbone_path(config)
    actor = ray.remote(_Encoder).options(**options)
    pool = ActorPool(
        [actor.remote(path, config.embed.max_tokens, config.ray.threads) for _ in range(max(1, config.ray.workers))]
    )
    texts, size = table["text"].to_pylist(), config.embed.batch_size
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    parts, every = [], max(1, len(batches) // 5)
    for part in pool.map(lambda encoder, batch: encoder.encode.remote(batch), batches):
        parts.append(part)
        if len(parts) % every == 0:
            print(f"vectors: {min(len(parts) * size, len(texts)):,} of {len(texts):,} items", flush=True)
    rows = np.concatenate(parts)
    vectors = np.zeros((items + 1, rows.shape[1]), np.float32)
    vectors[table["item"].to_numpy()] = rows
    return vectors
