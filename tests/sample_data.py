"""A small run folder written without Spark: events, item vectors and shards in the contract's formats."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow as pa

from reclora_dist.config.schema import Config, RetrievalConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import FileEntry, Manifest, add_file, commit
from reclora_dist.contract.parts import write_part
from reclora_dist.contract.storage import Folder

TOPICS = ["jazz", "rock", "folk", "soul"]
LEVELS = [1.0, 2.0, 3.0, 4.0, 5.0]


def _fixed(rows: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), kind), rows.shape[1])


def write_run(
    run: Path, users: int = 60, items: int = 40, events: int = 20, long: int = 8, short: int = 4, seed: int = 0
) -> None:
    """Write ``events/``, ``vectors/`` and ``shards/`` below ``run``: likes follow tastes of four topics."""
    rng = np.random.default_rng(seed)
    item_topic, taste = rng.integers(0, 4, items), rng.normal(size=(users, 4))
    table = _events(rng, users, items, events, item_topic, taste)
    manifest = _write_events(Folder(str(run / "events")), table, users, items, item_topic)
    vectors = np.zeros((items + 1, 4), np.float32)
    vectors[1:] = np.eye(4)[item_topic]
    _write_vectors(Folder(str(run / "vectors")), vectors, manifest)
    _write_shards(Folder(str(run / "shards")), table, manifest, long, short)


def _events(rng, users, items, events, item_topic, taste) -> pa.Table:  # type: ignore[no-untyped-def]
    rows = []
    for user in range(1, users + 1):
        chosen = rng.choice(items, events, replace=False)
        times = np.sort(rng.choice(10_000, events, replace=False)) * 1000
        for order, (item, time) in enumerate(zip(chosen, times, strict=True)):
            like = int(taste[user - 1, item_topic[item]] + 0.3 * rng.normal() > 0)
            level = int(rng.integers(4, 6) if like else rng.integers(1, 4))
            split = "train" if time < 7_000_000 else "validation" if time < 8_500_000 else "test"
            row = (user << 32 | order, user, int(item) + 1, int(time), float(level), level, like, split)
            rows.append((*row, 0, 0, 0, 0))
    columns = list(zip(*rows, strict=True))
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema.events, strict=True)], schema=schema.events)


def _write_events(folder: Folder, table: pa.Table, users: int, items: int, topics: np.ndarray) -> Manifest:
    user_fields = np.arange(1, users + 1)[:, None] % 2 + 1
    item_table = pa.table(
        [
            pa.array(range(1, items + 1), pa.int32()),
            pa.array([f"i{n}" for n in range(1, items + 1)]),
            pa.array([f"{TOPICS[t]} record {n}" for n, t in enumerate(topics, 1)]),
            pa.array([f"A {TOPICS[t]} record, number {n}." for n, t in enumerate(topics, 1)]),
            _fixed(topics[:, None] + 1, pa.int32()),
            *[pa.array([1] * items, pa.int64())] * 3,
        ],
        schema=schema.items(1),
    )
    user_table = pa.table(
        [
            pa.array(range(1, users + 1), pa.int32()),
            pa.array([f"u{n}" for n in range(1, users + 1)]),
            _fixed(user_fields, pa.int32()),
        ],
        schema=schema.users(1),
    )
    files = [
        write_part(folder, "events/", 0, table, 500),
        write_part(folder, "items/", 0, item_table, 500),
        write_part(folder, "users/", 0, user_table, 500),
    ]
    facts = {
        "rating_levels": LEVELS,
        "level_likes": [0, 0, 0, 1, 1],
        "user_fields": {"group": ["a", "b"]},
        "item_fields": {"topic": TOPICS},
        "counts": dict.fromkeys(("read", "clean", "events"), table.num_rows),
        "quarantine": {},
        "split_times": [7_000_000, 8_500_000],
        "min_history": 3,
        "split": "global_time",
        "users": users,
        "items": items,
        "first_users": [1],
    }
    return _commit(folder, schema.EVENTS, files, facts, {})


def _write_vectors(folder: Folder, vectors: np.ndarray, parent: Manifest) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    files = [add_file(folder, "vectors-000000000000.npy", buffer.getvalue())]
    _commit(folder, schema.VECTORS, files, {"dimension": vectors.shape[1]}, {"events": parent.content_digest})


def _write_shards(folder: Folder, table: pa.Table, parent: Manifest, long: int, short: int) -> None:
    """Most recent history; the statistics are left at zero."""
    columns = {name: table[name].to_numpy() for name in ("sample_id", "user", "item", "time", "level", "label")}
    splits = np.array(table["split"].to_pylist())
    order = columns["sample_id"] & 0xFFFFFFFF
    files: list[FileEntry] = []
    for split in schema.SPLITS:
        rows = np.flatnonzero((splits == split) & (order >= 3))
        arrays = _sample_columns(columns, order, rows, long, short)
        crm, text = schema.crm_shard(1, long), schema.text_shard(1, long, short)
        for kind, spec in (("crm", crm), ("text", text)):
            part = pa.table([arrays[field.name] for field in spec], schema=spec)
            files.append(write_part(folder, f"{kind}/split={split}/", 0, part, 64))
    facts = {"long": long, "short": short, **{k: parent.facts[k] for k in ("rating_levels", "level_likes")}}
    _commit(folder, schema.SHARDS, files, facts, {"events": parent.content_digest})


def _sample_columns(columns, order, rows, long, short) -> dict[str, pa.Array]:  # type: ignore[no-untyped-def]
    kinds = {"sample_id": pa.int64(), "user": pa.int32(), "item": pa.int32(), "time": pa.int64(), "label": pa.int8()}
    arrays = {name: pa.array(columns[name][rows], kind) for name, kind in kinds.items()}
    arrays["user_fields"] = _fixed(columns["user"][rows][:, None] % 2 + 1, pa.int32())
    arrays["statistics"] = _fixed(np.zeros((len(rows), 4), np.float32), pa.float32())
    for name, width in (("long", long), ("short", short)):
        length = np.minimum(order[rows], width)
        places = np.arange(width)[None, :]
        index = np.where(places < length[:, None], rows[:, None] - length[:, None] + places, -1)
        for column, kind in (("item", pa.int32()), ("level", pa.int8())):
            values = np.where(index < 0, 0, columns[column][index])
            arrays[f"{name}_{column}s"] = _fixed(values, kind)
        arrays[f"{name}_length"] = pa.array(length, pa.int32())
    return arrays


def _commit(folder: Folder, fmt, files, facts, parents) -> Manifest:  # type: ignore[no-untyped-def]
    return commit(folder, Manifest(fmt.name, fmt.version, "sample", parents, tuple(files), facts))


def small_config(run: Path, **changes: object) -> Config:
    """A config for ``write_run``'s data that trains in seconds."""
    from reclora_dist.config.schema import (
        BackboneConfig,
        CrmConfig,
        LoraConfig,
        PathsConfig,
        RayConfig,
        TinyConfig,
        TrainConfig,
    )

    base = Config(
        paths=PathsConfig(str(run)),
        retrieval=RetrievalConfig(long=8, short=4),
        backbone=BackboneConfig(tiny=TinyConfig(hidden=32, layers=2, heads=2, vocabulary=400, steps=4, batch_size=4)),
        crm=CrmConfig(embedding=8, dnn=(32, 32), attention=(16,)),
        crm_train=TrainConfig(batch_size=64, epochs=2, checkpoint_every=3, log_every=5),
        adapters={
            "lora": LoraConfig(experts=1, rank=4, gate="none"),
            "reclora": LoraConfig(experts=4, rank=4, temperature=1.0),
        },
        lora_train=TrainConfig(batch_size=64, epochs=1, checkpoint_every=3, log_every=5),
        ray=RayConfig(workers=0),
    )
    return dataclasses.replace(base, **changes)
