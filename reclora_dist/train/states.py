"""The CRM's answers for all text samples, in one batched pass before the first step (``reader.crm_states=stored``)."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.storage import Folder
from reclora_dist.data.collate import CRM_COLUMNS, crm_batch
from reclora_dist.data.plan import SequentialPlan, row_groups
from reclora_dist.data.readers import read_batches
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.model import RecLora
from reclora_dist.train.context import Context

BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Answers:
    """State [n, ...], logit [n] and user state [n, ...] of the samples ``ids``, int64 [n] ascending; float32."""

    ids: NDArray[np.int64]
    values: tuple[Tensor, ...]

    def of(self, sample_id: Tensor) -> tuple[Tensor, ...]:
        """The answers for some samples, [B, ...] each.

        Raises:
            KeyError: the CRM was not asked about one of them.
        """
        wanted = sample_id.numpy()
        places = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        if not (self.ids[places] == wanted).all():
            raise KeyError(f"the CRM was not asked about sample {wanted[self.ids[places] != wanted][0]}")
        rows = torch.from_numpy(places)
        return tuple(value[rows] for value in self.values)


@torch.no_grad()
def ask_crm(model: RecLora, folder: Folder, entries: Sequence[FileEntry], context: Context) -> Answers:
    """Ask the CRM about every row of ``entries``; each worker asks about its share, and all get all answers.

    The user's state is kept only where the gate reads it. Memory: 4 bytes times the widths of what is kept, a sample.
    """
    for_user = model.config.gate == "user"
    plan = SequentialPlan(row_groups(entries), BATCH, context.rank, context.world)
    ids, found = [np.zeros(0, np.int64)], list[tuple[Tensor, ...]]()
    with closing(read_batches(folder, entries, plan, CRM_COLUMNS)) as tables:
        for table in tables:
            batch = crm_batch(table)
            output = model.crm(batch.to(context.device))
            user_state = output.user_state if for_user else output.state[:, :0]
            ids.append(batch.sample_id.numpy())
            found.append(tuple(value.float().cpu() for value in (output.state, output.logit, user_state)))
    mine = tuple(torch.cat(parts) for parts in zip(*found, strict=True)) if found else ()
    gathered = [part for part in context.gather((np.concatenate(ids), mine)) if part[1]]
    every = np.concatenate([part[0] for part in gathered])
    order = np.argsort(every, kind="stable")
    rows = torch.from_numpy(order)
    values = tuple(torch.cat(parts)[rows] for parts in zip(*(part[1] for part in gathered), strict=True))
    return Answers(every[order], values)


def with_answers(collate: Callable[[pa.Table], TextBatch], answers: Answers) -> Callable[[pa.Table], TextBatch]:
    """A collator whose batches carry the CRM's answers."""

    def collated(table: pa.Table) -> TextBatch:
        batch = collate(table)
        return dataclasses.replace(batch, answers=answers.of(batch.crm.sample_id))

    return collated
