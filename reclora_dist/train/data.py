"""Training batches and the validation pass of one stage."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from reclora_dist.config.run import folder
from reclora_dist.config.schema import Config, TrainConfig
from reclora_dist.contract.manifest import FileEntry, Manifest
from reclora_dist.data.ahead import ahead
from reclora_dist.data.micro import Rows, by_rows, by_sum, by_tokens, spread
from reclora_dist.data.plan import EpochPlan, SequentialPlan, Stretch, row_groups
from reclora_dist.data.readers import read_batches
from reclora_dist.evaluate.auc import auc_by_group
from reclora_dist.lora.batch import TextBatch
from reclora_dist.train.context import Context
from reclora_dist.train.engine import Engine, MicroBatch


class Data:
    """The shards of one stage as this worker sees them."""

    def __init__(
        self,
        config: Config,
        shards: Manifest,
        kind: str,
        columns: tuple[str, ...],
        collate: Callable[[pa.Table], Any],
        train: TrainConfig,
        context: Context,
        teach: Callable[[Any], Any] | None = None,
    ) -> None:
        """Args: kind: ``crm`` or ``text``; teach: what is done to the batches of the training, not of the validation.

        Raises:
            ValueError: a split is empty, or smaller than one step.
        """
        self.config, self.columns, self.collate, self.context = config, columns, collate, context
        self.train, self.teach = train, teach
        self.folder = folder(config, "shards")
        self.training = self._entries(shards, f"{kind}/split=train/")
        self.validation = self._entries(shards, f"{kind}/split=validation/")
        self.steps_per_epoch = self._plan(0, ()).steps

    def batches(
        self, epoch: int, start: int, earlier: Sequence[Stretch] = ()
    ) -> Generator[list[MicroBatch], None, None]:
        """Micro-batches of every step of an epoch from step ``start`` on; as many on every rank.

        Args:
            earlier: what other numbers of workers have done of the epoch.
        """
        with closing(ahead(self._made(epoch, start, earlier), self.config.reader.prefetch)) as steps:
            for batch, passes in steps:
                yield [self._micro(batch, rows) for rows in spread(passes, self._most(len(passes)))]

    def first(self) -> Any:
        """A batch for one pass, for who needs any; other than ``batches`` it asks no other worker."""
        with closing(self._made(0, 0, ())) as steps:
            batch, passes = next(steps)
            return batch.take(torch.from_numpy(passes[0]))

    def auc(self, engine: Engine, score: Callable[[nn.Module, Any], Tensor]) -> float:
        """AUC on the validation split, the same number on every rank.

        Raises:
            ValueError: all labels are equal.
        """
        model = engine.model
        model.eval()  # returns nothing in DeepSpeed
        plans = [self._sequential(rank) for rank in range(self.context.world)]
        mine, most = plans[self.context.rank], max(plan.steps for plan in plans)
        labels, scores = [torch.zeros(0)], [torch.zeros(0)]
        with torch.no_grad(), closing(ahead(self._validated(mine, most), self.config.reader.prefetch)) as steps:
            for batch, passes in steps:
                for rows in spread(passes, self._most(len(passes))):
                    part = _taken(batch, rows)
                    scores.append(score(model, part.to(self.context.device)).float().cpu()[: len(rows)])
                    labels.append(part.label[: len(rows)])
        gathered = self.context.gather((torch.cat(scores), torch.cat(labels)))
        every, truth = (torch.cat([part[i] for part in gathered]).numpy() for i in (0, 1))
        (found,) = auc_by_group(truth, every, np.zeros(len(truth), np.int64), 1)
        if np.isnan(found):
            raise ValueError(
                f"all {len(truth)} validation labels are {truth[0]:.0f}; AUC needs both, take more samples"
            )
        return float(found)

    def _made(
        self, epoch: int, start: int, earlier: Sequence[Stretch]
    ) -> Generator[tuple[Any, list[Rows]], None, None]:
        """The rows of every step and how this rank alone would divide them; runs ahead of the training, in a thread."""
        plan = self._plan(epoch, earlier)
        with closing(read_batches(self.folder, self.training, plan, self.columns, self.config.reader, start)) as tables:
            for table in tables:
                batch = self.collate(table)
                batch = self.teach(batch) if self.teach else batch
                yield batch, self._passes(batch)

    def _passes(self, batch: Any) -> list[Rows]:
        if self.train.micro_tokens and isinstance(batch, TextBatch):
            divide = by_sum if self.train.packing else by_tokens
            return divide(batch.last.numpy() + 1, self.train.micro_tokens)
        most = -(-self.train.batch_size // self.context.world)
        return by_rows(len(batch), -(-most // (self.train.micro_batch or most)))

    def _most(self, passes: int) -> int:
        """Passes of the rank that has the most: every forward may be a collective operation."""
        return max(self.context.gather(passes)) if self.train.micro_tokens else passes

    def _micro(self, batch: Any, rows: Rows) -> MicroBatch:
        share = len(rows) * self.context.world / self.train.batch_size
        batch = _taken(batch, rows)
        if self.train.packing and isinstance(batch, TextBatch):
            batch = batch.packed()
        return MicroBatch(batch.to(self.context.device), share)

    def _validated(self, plan: SequentialPlan, most: int) -> Generator[tuple[Any, list[Rows]], None, None]:
        """Validation batches and their rows in each pass; ``most`` batches, as many on every rank as on any other."""
        batch = None
        with closing(read_batches(self.folder, self.validation, plan, self.columns, self.config.reader)) as tables:
            for table in tables:
                batch = self.collate(table)
                yield batch, self._judged(batch)
        for _ in range(most - plan.steps):  # ZeRO-3 gathers in every forward, so all ranks do equally many
            yield batch if batch is not None else self.first(), by_rows(0, 1)

    def _judged(self, batch: Any) -> list[Rows]:
        """The rows of each pass of a validation batch; nothing is packed there."""
        if self.train.micro_tokens and isinstance(batch, TextBatch):
            return by_tokens(batch.last.numpy() + 1, self.train.micro_tokens)
        return by_rows(len(batch), 1)

    def _plan(self, epoch: int, earlier: Sequence[Stretch]) -> EpochPlan:
        groups, context = row_groups(self.training), self.context
        size = self.train.batch_size
        return EpochPlan(groups, self.train.seed, epoch, context.rank, context.world, size, tuple(earlier))

    def _sequential(self, rank: int) -> SequentialPlan:
        world = self.context.world
        per_worker = -(-self.train.batch_size // world)
        size = min(4 * (self.train.micro_batch or per_worker), 4096)
        return SequentialPlan(row_groups(self.validation), size, rank, world)

    def _entries(self, shards: Manifest, prefix: str) -> tuple[FileEntry, ...]:
        entries = shards.select(prefix)
        if not sum(entry.rows for entry in entries):
            raise ValueError(f"{self.folder.uri!r} has no rows in {prefix}; check events.fractions and shards.text_*")
        return entries


def _taken(batch: Any, rows: Rows) -> Any:
    """The rows of one pass; a pass without rows takes any, which count nothing."""
    if len(rows) == len(batch):
        return batch
    return batch.take(torch.from_numpy(rows if len(rows) else np.zeros(1, np.int64)))
