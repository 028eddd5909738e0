"""The log cut into tasks of about equal cost, whoever its events belong to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reclora_dist.contract.manifest import FileEntry
from reclora_dist.contract.parts import Rows
from reclora_dist.contract.storage import Folder

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COST_PER_TASK = 300_000_000
"""Events compared in a task, about; a few seconds."""

COST_PER_SAMPLE = 300
"""What a sample costs besides, in events compared: its row is put together and written."""

PLANNED = "start bigint, stop bigint, cost bigint"


@dataclass(frozen=True)
class Task:
    """Rows ``start`` to ``stop`` of the log."""

    start: int
    stop: int
    cost: int


def plan(spark: "SparkSession", folder: Folder, entries: Sequence[FileEntry], candidates: int) -> list[Task]:
    """Tasks in order of their rows; they follow from the log and ``candidates`` alone.

    A sample costs a comparison per event it may see, which its place in its user's log tells.
    """
    from spark_jobs.parts import each_part

    log = Rows(folder, entries)

    def cuts(part: int) -> Iterator[pa.RecordBatch]:
        rows = log.range_of(part)
        places = log.read(rows.start, rows.stop, ["sample_id"])["sample_id"].to_numpy() & 0xFFFFFFFF
        cost = np.cumsum(np.minimum(places, candidates) + COST_PER_SAMPLE)
        first = np.flatnonzero(np.diff(cost // COST_PER_TASK, prepend=-1))
        last = np.append(first[1:], len(cost))
        whole = np.diff(cost[last - 1], prepend=0)
        columns = [pa.array(values, pa.int64()) for values in (rows.start + first, rows.start + last, whole)]
        yield pa.RecordBatch.from_arrays(columns, names=["start", "stop", "cost"])

    found = each_part(spark, len(entries), cuts, PLANNED).collect()
    return sorted((Task(*row) for row in found), key=lambda task: task.start)


def read_with_past(
    log: Rows, task: Task, candidates: int, columns: Sequence[str]
) -> tuple[pa.Table, NDArray[np.bool_]]:
    """The rows of a task after those of the same user that its first samples may see.

    Returns:
        The rows, and whether each is the task's own.
    """
    wanted = candidates
    while True:
        start = max(task.start - wanted, 0)
        table = log.read(start, task.stop, columns)
        own = task.start - start
        user = table["user"].to_numpy()[: own + 1]
        time = table["time"].to_numpy()[: own + 1]
        tied = int(np.count_nonzero((user == user[own]) & (time == time[own]))) - 1
        if start == 0 or user[0] != user[own] or own - tied >= candidates:
            first = int(np.argmax(user == user[own]))
            return table.slice(first), np.arange(first, table.num_rows) >= own
        wanted = candidates + 2 * tied
