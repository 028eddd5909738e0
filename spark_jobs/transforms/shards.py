"""Samples to shards: who goes into which file, and a file put together from its histories and its samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from reclora_dist.config.schema import ShardsConfig
from reclora_dist.contract import schema
from reclora_dist.contract.manifest import ContractError, FileEntry
from reclora_dist.contract.parts import open_part, write_part
from reclora_dist.contract.storage import Folder
from spark_jobs.parts import entry_batch
from spark_jobs.transforms.packed import pack, unpack
from spark_jobs.transforms.ranks import rows_at

KEY = ("kind", "split", "file")
"""Columns that name a file: crm or text, the split, and its number."""


PACKED = "sample_id bigint, split string, past binary"
"""Spark schema of packed histories."""


@dataclass(frozen=True)
class Layout:
    """Where samples go. ``text`` is, per split, how many the language model gets; ``limits`` the largest text key
    among those; ``rows`` all samples of the split.
    """

    config: ShardsConfig
    rows: Mapping[str, int]
    text: Mapping[str, int]
    limits: Mapping[str, int]


@dataclass(frozen=True)
class Shape:
    """Lengths of a row's lists."""

    user_fields: int
    long: int
    short: int

    @property
    def past(self) -> list[pa.Field]:
        """The columns of a history, as they are packed."""
        whole = schema.histories(self.long, self.short)
        return [field for field in whole if field.name.startswith(("long_", "short_"))]

    def schema(self, kind: str) -> pa.Schema:
        """Arrow schema of the shards of a kind."""
        if kind == "crm":
            return schema.crm_shard(self.user_fields, self.long)
        return schema.text_shard(self.user_fields, self.long, self.short)


def packed_part(folder: Folder, entries: Sequence[FileEntry], shape: Shape, index: int) -> Iterator[pa.RecordBatch]:
    """Part ``index`` of the histories in batches of the schema PACKED."""
    for batch in open_part(folder, entries[index]).iter_batches():
        table = pa.Table.from_batches([batch])
        columns = [batch.column("sample_id"), batch.column("split"), pack(table, shape.past)]
        yield pa.RecordBatch.from_arrays(columns, names=["sample_id", "split", "past"])


def plan(samples: DataFrame, config: ShardsConfig, rows: Mapping[str, int]) -> Layout:
    """Decide how many and which samples the language model gets.

    Args:
        samples: with sample_id and split.
        config: the sizes asked for.
        rows: samples per split.
    """
    asked = dict(zip(schema.SPLITS, (config.text_train, config.text_validation, config.text_test), strict=True))
    text = {split: text_rows(asked[split], rows[split]) for split in schema.SPLITS}
    chosen = sorted(split for split in schema.SPLITS if text[split])
    before = {split: sum(rows[other] for other in schema.SPLITS if other < split) for split in chosen}
    keyed = samples.select("split", _text_key(config.seed).alias("key"))
    last = rows_at(keyed, ["split", "key"], lambda _: [before[split] + text[split] - 1 for split in chosen])
    return Layout(config, rows, text, {split: row["key"] for split, row in zip(chosen, last, strict=True)})


def text_rows(asked: float, rows: int) -> int:
    """How many of ``rows`` samples a setting asks for: a share up to 1, or a number above 1."""
    return min(rows, round(asked * rows if asked <= 1 else asked))


def placed(samples: DataFrame, layout: Layout) -> DataFrame:
    """One row per file that a sample goes to, with the columns KEY and ``place``, which orders the rows of a file.

    All of it follows from sample_id, split and the layout, so two frames of the same samples are placed alike.
    """
    place = F.xxhash64("sample_id", F.lit(layout.config.seed))
    share = (F.col("place").cast("double") + 2.0**63) / 2.0**64
    choices = [F.struct(F.lit("crm").alias("kind"), _file(share, layout, layout.rows).alias("file"))]
    key = _text_key(layout.config.seed)
    for split, limit in layout.limits.items():
        chosen = (F.col("split") == split) & (key <= limit)
        text = F.struct(F.lit("text").alias("kind"), _file(share, layout, layout.text).alias("file"))
        choices.append(F.when(chosen, text))
    spread = samples.withColumn("place", place).withColumn("_target", F.explode(F.array_compact(F.array(*choices))))
    return spread.withColumns({"kind": F.col("_target.kind"), "file": F.col("_target.file")}).drop("_target")


def assemble(
    folder: Folder,
    shape: Shape,
    rows_per_group: int,
    key: tuple[pa.Scalar, ...],
    histories: pa.Table,
    samples: pa.Table,
) -> pa.Table:
    """Write the file ``key``: its samples joined with their histories, in order of ``place``.

    Returns:
        One row of the schema ``parts.ENTRY``.

    Raises:
        ContractError: histories and events do not hold the same samples.
    """
    kind, split, file = (scalar.as_py() for scalar in key)
    ids = histories["sample_id"].to_numpy()
    order = np.lexsort((ids, histories["place"].to_numpy()))
    match = _match(ids[order], samples["sample_id"].to_numpy())
    target = shape.schema(kind)
    held = unpack(histories["past"].take(pa.array(order)).combine_chunks(), shape.past)
    matched = samples.take(pa.array(match))
    columns = [
        held[field.name] if field.name in held else matched[field.name].combine_chunks().cast(field.type)
        for field in target
    ]
    table = pa.Table.from_arrays(columns, schema=target)
    entry = write_part(folder, f"{kind}/split={split}/", file, table, rows_per_group)
    return pa.Table.from_batches([entry_batch([entry])])


def _match(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each wanted id lies among ``ids``."""
    sorter = np.argsort(ids)
    if not np.array_equal(ids[sorter], np.sort(wanted)):
        raise ContractError(
            f"the histories of a file hold {len(wanted)} samples, the events {len(ids)}, and they are not the same: "
            "the datasets do not belong together. Run retrieve_history on these events."
        )
    found: np.ndarray = sorter[np.searchsorted(ids, wanted, sorter=sorter)]
    return found


def _text_key(seed: int) -> Column:
    return F.xxhash64("sample_id", F.lit(seed), F.lit("text"))


def _file(share: Column, layout: Layout, rows: Mapping[str, int]) -> Column:
    """The file of a row: files cut the order of ``place`` into equal stretches."""
    column = F.lit(0)
    for split in schema.SPLITS:
        files = max(1, -(-rows[split] // layout.config.rows_per_file))
        number = F.least(F.floor(share * files), F.lit(files - 1)).cast("int")
        column = F.when(F.col("split") == split, number).otherwise(column)
    return column
