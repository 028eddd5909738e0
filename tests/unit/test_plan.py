"""EpochPlan and SequentialPlan: disjoint, complete up to the tail, deterministic, resumable."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reclora_dist.contract.manifest import FileEntry
from reclora_dist.data.plan import EpochPlan, Plan, RowGroup, SequentialPlan, Stretch, part, row_groups

Row = tuple[int, int, int]

layouts = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=4)


def groups_of(layout: list[list[int]]) -> tuple[RowGroup, ...]:
    return row_groups([FileEntry(f"part-{i}", tuple(rows), 0, "") for i, rows in enumerate(layout)])


def every_row(groups: tuple[RowGroup, ...]) -> set[Row]:
    return {(g.file, g.group, row) for g in groups for row in range(g.rows)}


def planned(plan: Plan, start_step: int = 0) -> list[Row]:
    sizes = {(g.file, g.group): g.rows for g in plan.groups}
    return [
        (part.file, part.group, int(row))
        for part in plan.slices(start_step)
        for row in part.indices(sizes[part.file, part.group])
    ]


@st.composite
def epochs(draw: st.DrawFn) -> list[EpochPlan]:
    """The plans of all ranks of one epoch."""
    groups = groups_of(draw(layouts))
    total = sum(g.rows for g in groups)
    batch_size = draw(st.integers(1, min(24, total)))
    world = draw(st.integers(1, min(4, batch_size)))
    seed, epoch = draw(st.integers(0, 2**40)), draw(st.integers(0, 100))
    return [EpochPlan(groups, seed, epoch, rank, world, batch_size) for rank in range(world)]


@given(epochs())
def test_ranks_share_all_rows_but_the_tail(plans: list[EpochPlan]) -> None:
    shares = [planned(plan) for plan in plans]
    rows = [row for share in shares for row in share]
    everything = every_row(plans[0].groups)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= everything
    assert len(everything) - len(rows) < plans[0].batch_size
    assert [len(share) for share in shares] == [plan.steps * plan.batch for plan in plans]
    assert [plan.rows_from(0) for plan in plans] == [len(share) for share in shares]
    assert sum(plan.batch for plan in plans) == plans[0].batch_size
    assert max(plan.batch for plan in plans) - min(plan.batch for plan in plans) <= 1


@given(epochs(), st.data())
def test_resume_gives_the_remaining_rows(plans: list[EpochPlan], data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(plans))
    step = data.draw(st.integers(0, plan.steps))
    assert planned(plan, step) == planned(plan)[step * plan.batch :]


@given(epochs(), st.data())
def test_when_the_number_of_workers_changes_no_row_is_seen_twice(plans: list[EpochPlan], data: st.DataObject) -> None:
    plan = plans[0]
    seen: list[Row] = []
    earlier: tuple[Stretch, ...] = ()
    while (first := sum(stretch.steps for stretch in earlier)) < plan.steps:
        world = data.draw(st.integers(1, min(4, plan.batch_size)))
        steps = data.draw(st.integers(1, plan.steps - first))
        for rank in range(world):
            now = EpochPlan(plan.groups, plan.seed, plan.epoch, rank, world, plan.batch_size, earlier)
            assert now.steps == plan.steps
            assert now.rows_from(first) == len(planned(now, first))
            seen += planned(now, first)[: steps * now.batch]
        earlier = (*earlier, Stretch(world, steps))
    assert len(seen) == plan.steps * plan.batch_size == len(set(seen))
    assert set(seen) <= every_row(plan.groups)


def test_a_position_before_the_last_change_of_workers_is_refused() -> None:
    plan = EpochPlan(groups_of([[50]]), 0, 0, 0, 1, 10, (Stretch(2, 3),))
    with pytest.raises(ValueError, match=r"start step 2 is not in 3\.\.5"):
        plan.slices(2)


@given(st.integers(0, 100), st.integers(1, 9))
def test_parts_are_nearly_equal_and_make_the_whole(whole: int, parts: int) -> None:
    found = [part(whole, parts, index) for index in range(parts)]
    assert [begin for begin, _ in found] == [sum(size for _, size in found[:i]) for i in range(parts)]
    assert sum(size for _, size in found) == whole
    assert max(size for _, size in found) - min(size for _, size in found) <= 1


@given(epochs())
def test_same_settings_give_the_same_order(plans: list[EpochPlan]) -> None:
    for plan in plans:
        again = EpochPlan(plan.groups, plan.seed, plan.epoch, plan.rank, plan.world, plan.batch_size)
        assert planned(again) == planned(plan)


@given(layouts, st.integers(1, 7), st.integers(1, 5), st.data())
def test_sequential_plans_read_every_row_once_in_order(
    layout: list[list[int]], batch: int, world: int, data: st.DataObject
) -> None:
    groups = groups_of(layout)
    plans = [SequentialPlan(groups, batch, rank, world) for rank in range(world)]
    assert [row for plan in plans for row in planned(plan)] == sorted(every_row(groups))
    assert max(p.rows_from(0) for p in plans) - min(p.rows_from(0) for p in plans) <= 1
    plan = data.draw(st.sampled_from(plans))
    step = data.draw(st.integers(0, plan.steps))
    assert planned(plan, step) == planned(plan)[step * batch :]
    assert plan.steps == -(-len(planned(plan)) // batch)


def test_epochs_seeds_and_row_groups_are_shuffled_differently() -> None:
    groups = groups_of([[50, 50], [50]])
    orders = [tuple(planned(EpochPlan(groups, seed, epoch, 0, 1, 10))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    inside = {group: tuple(r for f, g, r in orders[0] if (f, g) == group) for group in ((0, 0), (0, 1), (1, 0))}
    assert len(set(inside.values())) == 3


def test_the_left_out_rows_change_from_epoch_to_epoch() -> None:
    groups = groups_of([[10, 10, 10, 5]])
    left_out = [every_row(groups) - set(planned(EpochPlan(groups, 0, epoch, 0, 1, 10))) for epoch in range(8)]
    assert {len(rows) for rows in left_out} == {5}
    assert len(set(map(frozenset, left_out))) > 4


def test_every_row_comes_early_and_late() -> None:
    groups = groups_of([[25] * 4] * 2)
    place = np.zeros(200)
    for epoch in range(200):
        for position, (file, group, row) in enumerate(planned(EpochPlan(groups, 3, epoch, 0, 1, 200))):
            place[file * 100 + group * 25 + row] += position / 200
    assert abs(place - 99.5).max() < 25  # standard error of a mean of 200 uniform places is 4


def test_slices_are_lazy() -> None:
    groups = tuple(RowGroup(0, g, 20_000) for g in range(100_000))
    slices: Iterator[object] = EpochPlan(groups, 0, 0, 3, 8, 8192).slices(100)
    assert next(slices)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 52}, "50 rows.*batch_size = 52.*smaller batch"),
        ({"rank": 2}, "rank 2 is not in 0..1"),
        ({"rank": -1}, "rank -1"),
        ({"batch_size": 1}, "batch 0"),
        ({"seed": -1}, "seed -1"),
        ({"epoch": -3}, "epoch -3"),
    ],
)
def test_impossible_epochs_are_refused(change: dict[str, int], words: str) -> None:
    settings = {"seed": 0, "epoch": 0, "rank": 0, "world": 2, "batch_size": 10} | change
    with pytest.raises(ValueError, match=words):
        EpochPlan(groups_of([[50]]), **settings)


@pytest.mark.parametrize("step", [-1, 6])
def test_a_position_outside_the_epoch_is_refused(step: int) -> None:
    for plan in (EpochPlan(groups_of([[50]]), 0, 0, 0, 1, 10), SequentialPlan(groups_of([[50]]), 10)):
        with pytest.raises(ValueError, match=f"start step {step} is not in 0..5"):
            plan.slices(step)


def test_an_empty_split_has_no_sequential_steps() -> None:
    assert (SequentialPlan((), 4).steps, list(SequentialPlan((), 4).slices())) == (0, [])
