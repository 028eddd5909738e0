"""Tables of embeddings: a row per value, or hashed rows; padding; what came after the training."""

import pytest
import torch

from reclora_dist.crm.inputs import HASHES, PRIME, Fields, Table


def numbered(values: int, rows: int) -> Table:
    """A table whose row r is [r, r²]."""
    table = Table(values, 2, rows)
    numbers = torch.arange(float(table.num_embeddings))
    table.weight.data = torch.stack([numbers, numbers.square()], 1)
    return table


def test_a_value_has_its_row_and_a_later_one_is_unknown() -> None:
    assert numbered(3, 0)(torch.tensor([0, 1, 3, 4, 2**31 - 1])).tolist() == [[0, 0], [1, 1], [3, 9], [0, 0], [0, 0]]


def test_padding_starts_at_zero() -> None:
    assert not Table(3, 2).weight[0].any()
    assert Table(3, 2).weight[1:].all()


@pytest.mark.parametrize("rows", [3, 4, 100])
def test_a_table_that_fits_is_not_hashed(rows: int) -> None:
    assert numbered(3, rows)(torch.tensor([1, 2, 3])).tolist() == [[1, 1], [2, 4], [3, 9]]


def test_a_hashed_value_is_the_sum_of_two_fixed_rows() -> None:
    table, positions = numbered(10**9, 1000), [1, 2, 77, 10**6, 10**9, 2**31 - 1]
    rows = [[(a * x + b) % PRIME % 1000 + 1 for a, b in HASHES] for x in positions]  # Python's integers do not overflow
    assert table.num_embeddings == 1001
    assert table(torch.tensor(positions)).tolist() == [[i + j, i * i + j * j] for i, j in rows]
    assert table(torch.tensor([0])).tolist() == [[0, 0]], "padding has its own row"


def test_hashed_values_seldom_coincide_and_fill_the_rows_evenly() -> None:
    table = numbered(20_000, 2000)
    found = table(torch.arange(1, 20_001)).double()
    distinct = len(torch.unique(found, dim=0))
    assert distinct > 19_700, "one hash function would leave 2000"
    for a, b in HASHES:
        counts = torch.bincount((a * torch.arange(1, 20_001) + b) % PRIME % 2000, minlength=2000)
        assert counts.min() > 0
        assert counts.max() < 40


def test_a_field_value_that_came_later_is_unknown_and_not_the_next_fields_row() -> None:
    fields = Fields((2, 3), 4)
    torch.testing.assert_close(fields(torch.tensor([3, 4])), fields(torch.tensor([0, 0])))
    assert not torch.equal(fields(torch.tensor([2, 3])), fields(torch.tensor([0, 0])))
