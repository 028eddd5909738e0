"""Which rows of which row groups a rank reads, in which order: pure arithmetic on the manifest's row counts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from reclora_dist.contract.manifest import FileEntry


@dataclass(frozen=True)
class RowGroup:
    """One row group: index of its file among the entries, its index in the file, its rows."""

    file: int
    group: int
    rows: int


@dataclass(frozen=True)
class Slice:
    """Rows ``start`` to ``stop`` (exclusive) of a row group, counted in its shuffled order (None: stored order)."""

    file: int
    group: int
    start: int
    stop: int
    shuffle_seed: int | None

    @property
    def rows(self) -> int:
        """Rows in the slice."""
        return self.stop - self.start

    def indices(self, rows: int) -> NDArray[np.int64]:
        """Places of the slice's rows in its row group of ``rows`` rows; int64 [stop - start]."""
        if self.shuffle_seed is None:
            return np.arange(self.start, self.stop, dtype=np.int64)
        order = np.random.default_rng(self.shuffle_seed).permutation(rows)
        return order[self.start : self.stop].astype(np.int64, copy=False)


class Plan(Protocol):
    """What a reader needs to know: the batch size, the number of steps, and the slices from a step on."""

    @property
    def groups(self) -> tuple[RowGroup, ...]:
        """All row groups of the files that the plan is made for."""
        ...

    @property
    def batch(self) -> int:
        """Rows of a rank per step."""
        ...

    @property
    def rows(self) -> int:
        """Rows of this rank in the whole pass."""
        ...

    @property
    def steps(self) -> int:
        """Steps of the whole pass."""
        ...

    def slices(self, start_step: int = 0) -> Iterator[Slice]:
        """Slices whose concatenation, cut every ``batch`` rows, gives the steps from ``start_step`` on."""
        ...


def row_groups(entries: Sequence[FileEntry]) -> tuple[RowGroup, ...]:
    """All row groups of the files, in file order."""
    return tuple(RowGroup(f, g, rows) for f, entry in enumerate(entries) for g, rows in enumerate(entry.row_groups))


@dataclass(frozen=True)
class EpochPlan:
    """One training epoch of one rank.

    A seeded permutation of the row groups, each shuffled inside, makes one virtual sequence of all rows. Its first
    ``steps * world * batch`` rows are used; rank ``r`` takes the ``r``-th of ``world`` equal contiguous shares. A cut
    may fall inside a row group: the shuffle of a row group is the same on all ranks, so shares stay disjoint. The
    fewer than ``world * batch`` rows that are left out differ from epoch to epoch.
    """

    groups: tuple[RowGroup, ...]
    seed: int
    epoch: int
    rank: int
    world: int
    batch: int

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.batch)
        if self.seed < 0 or self.epoch < 0:
            raise ValueError(f"seed {self.seed} and epoch {self.epoch} must not be negative")
        total = sum(group.rows for group in self.groups)
        if total < self.world * self.batch:
            raise ValueError(
                f"the split has {total} rows, but one step of {self.world} workers takes {self.world} x {self.batch} = "
                f"{self.world * self.batch}: use a smaller batch size, fewer workers, or more data"
            )

    @property
    def steps(self) -> int:
        """Full steps of the epoch; equal on all ranks, at least 1."""
        return sum(group.rows for group in self.groups) // (self.world * self.batch)

    @property
    def rows(self) -> int:
        """Rows of this rank in the epoch: ``steps * batch``."""
        return self.steps * self.batch

    def slices(self, start_step: int = 0) -> Iterator[Slice]:
        """The rank's slices from step ``start_step`` on.

        Raises:
            ValueError: ``start_step`` lies outside the epoch.
        """
        _check_step(start_step, self.steps)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.groups))
        start = self.rank * self.rows
        groups = (self.groups[i] for i in order)
        return _cut(groups, start + start_step * self.batch, start + self.rows, self._shuffle_seed)

    def _shuffle_seed(self, group: RowGroup) -> int:
        entropy = np.random.SeedSequence([self.seed, self.epoch, group.file, group.group])
        return int(entropy.generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class SequentialPlan:
    """One pass in stored order for evaluation: every row once, ranks take contiguous shares that differ by one row."""

    groups: tuple[RowGroup, ...]
    batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.batch)

    @property
    def _share(self) -> tuple[int, int]:
        total = sum(group.rows for group in self.groups)
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    @property
    def rows(self) -> int:
        """Rows of this rank."""
        start, stop = self._share
        return stop - start

    @property
    def steps(self) -> int:
        """Steps of this rank; the last may have fewer than ``batch`` rows."""
        return -(-self.rows // self.batch)

    def slices(self, start_step: int = 0) -> Iterator[Slice]:
        """The rank's slices from step ``start_step`` on, in stored order.

        Raises:
            ValueError: ``start_step`` lies outside the pass.
        """
        _check_step(start_step, self.steps)
        start, stop = self._share
        return _cut(self.groups, start + start_step * self.batch, stop, lambda _: None)


def _check_rank(rank: int, world: int, batch: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in 0..{world - 1}: ranks are counted from 0 to world - 1")
    if batch < 1:
        raise ValueError(f"batch {batch} is not positive: a step needs at least one row per worker")


def _check_step(start_step: int, steps: int) -> None:
    if not 0 <= start_step <= steps:
        raise ValueError(
            f"start step {start_step} is not in 0..{steps}: the position belongs to another epoch, data set or "
            "number of workers"
        )


def _cut(
    groups: Sequence[RowGroup] | Iterator[RowGroup],
    start: int,
    stop: int,
    shuffle_seed: Callable[[RowGroup], int | None],
) -> Iterator[Slice]:
    """Slices of the virtual rows ``start`` to ``stop`` of the concatenated groups."""
    begin = 0
    for group in groups:
        if begin >= stop:
            return
        low, high = max(start - begin, 0), min(stop - begin, group.rows)
        if low < high:
            yield Slice(group.file, group.group, low, high, shuffle_seed(group))
        begin += group.rows
