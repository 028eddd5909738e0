"""How a step's rows are divided, and that what is made ahead is the same, errors and ends included."""

import threading
from collections.abc import Generator, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reclora_dist.data.ahead import ahead
from reclora_dist.data.micro import Rows, by_rows, by_sum, by_tokens, spread

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(lambda x: np.array(x, np.int64))


def every(passes: list[Rows]) -> list[int]:
    return sorted(int(row) for rows in passes for row in rows)


@given(lengths, st.integers(50, 300))
def test_passes_hold_the_budget_and_every_row_once(length: np.ndarray, budget: int) -> None:
    padded, packed = by_tokens(length, budget), by_sum(length, budget)
    assert every(padded) == every(packed) == list(range(len(length)))
    assert all(len(rows) * length[rows].max() <= budget for rows in padded)
    assert all(length[rows].sum() <= budget for rows in packed)
    assert [list(rows) for rows in packed] == [sorted(rows) for rows in packed], "in stored order"
    sizes = [int(length[rows].max()) for rows in padded]
    assert sizes == sorted(sizes, reverse=True), "like lengths are together"


@given(lengths, st.integers(50, 300), st.integers(0, 45))
def test_more_passes_are_made_by_division(length: np.ndarray, budget: int, more: int) -> None:
    passes = by_tokens(length, budget)
    found = spread(passes, len(passes) + more)
    assert len(found) == len(passes) + more
    assert every(found) == list(range(len(length)))
    assert all(len(rows) * length[rows].max() <= budget for rows in found if len(rows))
    assert spread(passes, 1) == passes, "never fewer"


def test_rows_are_divided_evenly() -> None:
    assert [list(rows) for rows in by_rows(7, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("divide", [by_tokens, by_sum])
def test_a_prompt_above_the_budget_is_refused(divide: type) -> None:
    with pytest.raises(ValueError, match="60 tokens, more than micro_tokens = 50: raise it"):
        divide(np.array([3, 60]), 50)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def numbers(count: int, closed: list[bool], error: int = -1) -> Generator[int, None, None]:
    try:
        for number in range(count):
            if number == error:
                raise OSError("disk")
            yield number
    finally:
        closed.append(True)


@pytest.mark.parametrize("depth", [0, 1, 3, 50])
def test_what_is_made_ahead_is_the_same(depth: int) -> None:
    closed: list[bool] = []
    assert list(ahead(numbers(10, closed), depth)) == list(range(10))
    assert closed == [True]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_errors_come_in_their_place_and_a_closed_one_ends(depth: int) -> None:
    closed: list[bool] = []
    items = ahead(numbers(10, closed, error=2), depth)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(items)
    left = ahead(numbers(10, closed), depth)
    assert next(left) == 0
    left.close()
    assert closed == [True, True]
