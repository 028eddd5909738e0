"""Columns, Arrow schemas and versions of every dataset that passes between stages (see docs/data-contract.md).

Positions (``user``, ``item``) are dense, start at 1 and follow the first appearance in the log; 0 is padding.
``sample_id`` is ``user << 32 | order`` with ``order`` the event's place in its user's log, so it is unique by
construction. ``time`` is in milliseconds since the epoch, or an order number where a log has no clock.
``level`` is the place of a rating among the log's rating levels, from 1; 0 is padding.
"""

import pyarrow as pa

from reclora_dist.contract.manifest import Format

RAW = Format("reclora.raw", 1)
EVENTS = Format("reclora.events", 3)
BACKBONE = Format("reclora.backbone", 1)
VECTORS = Format("reclora.vectors", 2)
HISTORIES = Format("reclora.histories", 3)
SHARDS = Format("reclora.shards", 1)
QUALITY = Format("reclora.quality", 2)
CRM = Format("reclora.crm", 3)
ADAPTER = Format("reclora.adapter", 3)
CHECKPOINT = Format("reclora.checkpoint", 1)
EVALUATION = Format("reclora.evaluation", 3)
SERVICE = Format("reclora.service", 1)
STUDY_RUN = Format("reclora.study_run", 1)

SPLITS = ("train", "validation", "test")

STATISTICS = ("item_events", "item_likes", "user_events", "user_likes")
"""Counts over events strictly before an event's time: columns of the events, and the order of ``statistics``."""

events = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("time", pa.int64(), nullable=False),
        pa.field("rating", pa.float32(), nullable=False),
        pa.field("level", pa.int8(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in STATISTICS),
    ]
)

quarantine = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
    ]
)

predictions = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
    ]
)

candidates = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("time", pa.int64(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
    ]
)
"""Lists to rank, the rows of a list one after the other; ``label`` is 1 for the item of the sample itself."""


def _positions(fields: int) -> pa.DataType:
    """Lists of ``fields`` positions; without fields plain lists: Parquet does not return a fixed size of 0."""
    return pa.list_(pa.int32(), fields) if fields else pa.list_(pa.int32())


def items(fields: int) -> pa.Schema:
    """Schema of the item table with ``fields`` categorical fields (values are positions in the manifest's facts)."""
    return pa.schema(
        [
            pa.field("item", pa.int32(), nullable=False),
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("title", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("fields", _positions(fields), nullable=False),
            pa.field("train_events", pa.int64(), nullable=False),
            pa.field("events", pa.int64(), nullable=False),
            pa.field("likes", pa.int64(), nullable=False),
        ]
    )


def users(fields: int) -> pa.Schema:
    """Schema of the user table with ``fields`` categorical fields."""
    return pa.schema(
        [
            pa.field("user", pa.int32(), nullable=False),
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("fields", _positions(fields), nullable=False),
        ]
    )


vocabulary = pa.schema([("key", pa.int64()), ("user_id", pa.string()), ("user", pa.int64())])
"""Who has which position, in order of ``key``, Spark's xxhash64 of the id."""

state = pa.schema(
    [
        ("user", pa.int64()),
        ("events", pa.int64()),
        ("likes", pa.int64()),
        ("fields", pa.list_(pa.int32())),
        ("items", pa.list_(pa.int32())),
        ("times", pa.list_(pa.int64())),
        ("levels", pa.list_(pa.int8())),
    ]
)
"""What is known of a user at the end of a day: all events and likes counted, and the newest events, oldest first."""

_statistics = pa.field("statistics", pa.list_(pa.float32(), len(STATISTICS)), nullable=False)


def _sample() -> list[pa.Field]:
    return [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("user", pa.int32(), nullable=False),
        pa.field("item", pa.int32(), nullable=False),
        pa.field("time", pa.int64(), nullable=False),
        pa.field("label", pa.int8(), nullable=False),
    ]


def _history(name: str, length: int) -> list[pa.Field]:
    """A retrieved history: items and levels padded with 0 to ``length``, oldest first, and how many are real."""
    return [
        pa.field(f"{name}_items", pa.list_(pa.int32(), length), nullable=False),
        pa.field(f"{name}_levels", pa.list_(pa.int8(), length), nullable=False),
        pa.field(f"{name}_length", pa.int32(), nullable=False),
    ]


def histories(long: int, short: int) -> pa.Schema:
    """Schema of the retrieved histories of every sample, and its running statistics."""
    split = pa.field("split", pa.string(), nullable=False)
    return pa.schema([*_sample(), split, _statistics, *_history("long", long), *_history("short", short)])


def crm_shard(user_fields: int, long: int) -> pa.Schema:
    """Schema of a CRM shard: the sample, its user's fields, the running statistics and the long history."""
    return pa.schema(
        [
            *_sample(),
            pa.field("user_fields", _positions(user_fields), nullable=False),
            _statistics,
            *_history("long", long),
        ]
    )


def text_shard(user_fields: int, long: int, short: int) -> pa.Schema:
    """Schema of a text shard: the CRM row of the same ``sample_id`` and the short history; text stays in ``items``."""
    return pa.schema([*crm_shard(user_fields, long), *_history("short", short)])
