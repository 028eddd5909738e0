"""Which rows of which row groups a rank reads, in which order: pure arithmetic on the manifest's row counts."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reclora_dist.contract.manifest import FileEntry

Span: TypeAlias = tuple[int, int]
"""Rows ``start`` to ``stop`` (exclusive) of a virtual sequence of rows."""


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
        """Rows of this rank per step."""
        ...

    @property
    def steps(self) -> int:
        """Steps of the whole pass."""
        ...

    def rows_from(self, start_step: int) -> int:
        """Rows of this rank from step ``start_step`` to the end."""
        ...

    def slices(self, start_step: int = 0) -> Iterator[Slice]:
        """Slices whose concatenation, cut every ``batch`` rows, gives the steps from ``start_step`` on."""
        ...


def row_groups(entries: Sequence[FileEntry]) -> tuple[RowGroup, ...]:
    """All row groups of the files, in file order."""
    return tuple(RowGroup(f, g, rows) for f, entry in enumerate(entries) for g, rows in enumerate(entry.row_groups))


@dataclass(frozen=True)
class Stretch:
    """A part of an epoch: ``steps`` steps that ``world`` workers took."""

    world: int
    steps: int


@dataclass(frozen=True)
class EpochPlan:
    """One training epoch of one rank.

    A seeded permutation of the row groups, each shuffled inside, makes one virtual sequence of all rows. Its first
    ``steps * batch_size`` rows are used; every rank takes a contiguous share of it, in equal parts but for one row per
    step. A cut may fall inside a row group: the shuffle of a row group is the same on all ranks, so shares stay
    disjoint. The fewer than ``batch_size`` rows that are left out differ from epoch to epoch.

    The number of workers may change inside the epoch: what ``earlier`` ones have left is shared among those of now, so
    that no row is seen twice. Neither the number of steps nor ``batch_size``, the rows of a step over all ranks,
    depends on the workers.
    """

    groups: tuple[RowGroup, ...]
    seed: int
    epoch: int
    rank: int
    world: int
    batch_size: int
    earlier: tuple[Stretch, ...] = ()

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.world, self.batch_size // max(1, self.world))
        if self.seed < 0 or self.epoch < 0:
            raise ValueError(f"seed {self.seed} and epoch {self.epoch} must not be negative")
        if self._total < self.batch_size:
            raise ValueError(
                f"the split has {self._total} rows, but one step takes batch_size = {self.batch_size}: use a smaller "
                "batch size, or more data"
            )

    @property
    def steps(self) -> int:
        """Full steps of the epoch; equal on all ranks, at least 1."""
        return self._total // self.batch_size

    @property
    def batch(self) -> int:
        """Rows of this rank per step."""
        return part(self.batch_size, self.world, self.rank)[1]

    @property
    def first(self) -> int:
        """The first step of this number of workers."""
        return sum(stretch.steps for stretch in self.earlier)

    def rows_from(self, start_step: int) -> int:
        """Rows of this rank from step ``start_step`` to the end."""
        return max(0, self.steps - start_step) * self.batch

    def slices(self, start_step: int = 0) -> Iterator[Slice]:
        """The rank's slices from step ``start_step`` on.

        Raises:
            ValueError: ``start_step`` lies outside the epoch, or before the last change of workers.
        """
        _check_step(start_step, self.steps, self.first)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.groups))
        groups = (self.groups[i] for i in order)
        mine = _unread(
            self._left(), self.batch_size, self.world, self.rank, self.steps - self.first, start_step - self.first
        )
        return _cut(groups, mine, self._shuffle_seed)

    @property
    def _total(self) -> int:
        return sum(group.rows for group in self.groups)

    def _left(self) -> list[Span]:
        """What the earlier stretches have left of the virtual sequence."""
        left, steps = [(0, self._total)], self.steps
        for stretch in self.earlier:
            tail = _within(left, steps * self.batch_size, self._total)
            ranks = range(stretch.world)
            unread = [_unread(left, self.batch_size, stretch.world, r, steps, stretch.steps) for r in ranks]
            left, steps = [*chain.from_iterable(unread), *tail], steps - stretch.steps
        return left

    def _shuffle_seed(self, group: RowGroup) -> int:
        entropy = np.random.SeedSequence([self.seed, self.epoch, group.file, group.group])
        return int(entropy.generate_state(1, np.uint64)[0])


def part(whole: int, parts: int, index: int) -> tuple[int, int]:
    """Where part ``index`` of ``whole`` things in ``parts`` nearly equal parts begins, and how many it has."""
    size, more = divmod(whole, parts)
    return index * size + min(index, more), size + (index < more)


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
        start, rows = part(total, self.world, self.rank)
        return start, start + rows

    @property
    def steps(self) -> int:
        """Steps of this rank; the last may have fewer than ``batch`` rows."""
        return -(-self.rows_from(0) // self.batch)

    def rows_from(self, start_step: int) -> int:
        """Rows of this rank from step ``start_step`` to the end."""
        start, stop = self._share
        return max(0, stop - start - start_step * self.batch)

    def slices(self, start_step: int = 0) -> Iterator[Slice]:
        """The rank's slices from step ``start_step`` on, in stored order.

        Raises:
            ValueError: ``start_step`` lies outside the pass.
        """
        _check_step(start_step, self.steps)
        start, stop = self._share
        return _cut(self.groups, [(start + start_step * self.batch, stop)], lambda _: None)


def _check_rank(rank: int, world: int, batch: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in 0..{world - 1}: ranks are counted from 0 to world - 1")
    if batch < 1:
        raise ValueError(f"batch {batch} is not positive: a step needs at least one row per worker")


def _check_step(start_step: int, steps: int, first: int = 0) -> None:
    if not first <= start_step <= steps:
        raise ValueError(
            f"start step {start_step} is not in {first}..{steps}: the position belongs to another epoch, data set or "
            "number of workers"
        )


def _unread(spans: Sequence[Span], batch_size: int, world: int, rank: int, steps: int, done: int) -> list[Span]:
    """What a rank has yet to read after ``done`` of ``steps`` steps in which ``world`` ranks go through the spans."""
    before, batch = part(batch_size, world, rank)
    return _within(spans, steps * before + done * batch, steps * (before + batch))


def _within(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """Places ``start`` to ``stop`` of the concatenated spans, as spans."""
    found, begin = [], 0
    for low, high in spans:
        first, last = max(start - begin, 0), min(stop - begin, high - low)
        if first < last:
            found.append((low + first, low + last))
        begin += high - low
    return found


def _cut(
    groups: Iterable[RowGroup], spans: Iterable[Span], shuffle_seed: Callable[[RowGroup], int | None]
) -> Iterator[Slice]:
    """Slices of the spans, which ascend, of the concatenated groups."""
    left, begin = deque(spans), 0
    for group in groups:
        end = begin + group.rows
        while left and left[0][0] < end:
            low, high = left.popleft()
            yield Slice(group.file, group.group, low - begin, min(high, end) - begin, shuffle_seed(group))
            if high > end:
                left.appendleft((end, high))
        if not left:
            return
        begin = end
