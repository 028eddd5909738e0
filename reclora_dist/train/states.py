"""What frozen models say of the text samples, in one batched pass before the first step.

The CRM, with ``reader.crm_states=stored``; and the teacher of an adapter that has one.
"""

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
from reclora_dist.data.collate import CRM_COLUMNS, TEXT_COLUMNS, crm_batch
from reclora_dist.data.plan import SequentialPlan, row_groups
from reclora_dist.data.readers import read_batches
from reclora_dist.evaluate.scorer import Scorer
from reclora_dist.lora.batch import TextBatch
from reclora_dist.lora.model import RecLora
from reclora_dist.train.context import Context

BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a model said of the samples ``ids``, int64 [n] ascending: one or more float32 tensors, [n, ...]."""

    ids: NDArray[np.int64]
    values: tuple[Tensor, ...]

    def of(self, sample_id: Tensor) -> tuple[Tensor, ...]:
        """The answers for some samples, [B, ...] each.

        Raises:
            KeyError: the model was not asked about one of them.
        """
        wanted = sample_id.numpy()
        places = np.minimum(np.searchsorted(self.ids, wanted), len(self.ids) - 1)
        if not (self.ids[places] == wanted).all():
            raise KeyError(f"the model was not asked about sample {wanted[self.ids[places] != wanted][0]}")
        rows = torch.from_numpy(places)
        return tuple(value[rows] for value in self.values)


@torch.no_grad()
def ask_crm(model: RecLora, folder: Folder, entries: Sequence[FileEntry], context: Context) -> Answers:
    """State, logit and user state that the CRM has of every row of ``entries``.

    The user's state is kept only where the gate reads it. Memory: 4 bytes times the widths of what is kept, a sample.
    """
    for_user = model.config.gate == "user"

    def answer(table: pa.Table) -> tuple[Tensor, ...]:
        output = model.crm(crm_batch(table).to(context.device))
        user_state = output.user_state if for_user else output.state[:, :0]
        return output.state, output.logit, user_state

    return _asked(answer, folder, entries, CRM_COLUMNS, context)


def ask_teacher(teacher: Folder, folder: Folder, entries: Sequence[FileEntry], context: Context) -> Answers:
    """The probability of a like that the adapter ``teacher`` gives every row of ``entries``.

    Every worker holds the whole teacher with its backbone as long as this takes.

    Raises:
        ContractError: the teacher, or what it was trained with, is missing, damaged or changed.
    """
    scorer = Scorer.from_pretrained(teacher.uri, context.device)
    return _asked(lambda table: (torch.from_numpy(scorer.score(table)),), folder, entries, TEXT_COLUMNS, context)


def _asked(
    answer: Callable[[pa.Table], tuple[Tensor, ...]],
    folder: Folder,
    entries: Sequence[FileEntry],
    columns: tuple[str, ...],
    context: Context,
) -> Answers:
    """Each worker asks about its share of the rows, and all get all answers."""
    plan = SequentialPlan(row_groups(entries), BATCH, context.rank, context.world)
    ids, found = [np.zeros(0, np.int64)], list[tuple[Tensor, ...]]()
    with closing(read_batches(folder, entries, plan, columns)) as tables:
        for table in tables:
            ids.append(table["sample_id"].to_numpy())
            found.append(tuple(value.float().cpu() for value in answer(table)))
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


def taught(batch: TextBatch, scores: Answers) -> TextBatch:
    """The batch with a teacher's probabilities, to be learned in place of the labels."""
    (probability,) = scores.of(batch.crm.sample_id)
    return dataclasses.replace(batch, taught=probability)
