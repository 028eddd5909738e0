"""Order statistics without a sort."""

import random

import pytest

from spark_jobs.transforms.ranks import values_at

rng = random.Random(0)
LOGS = {
    "one value": [7] * 5,
    "one row": [-3],
    "milliseconds": [rng.randrange(1_500_000_000_000, 1_700_000_000_000, 1000) for _ in range(300)],
    "ties and signs": [rng.randrange(-4, 4) * 10 ** rng.randrange(12) for _ in range(300)],
    "the ends of a bigint": [-(2**63), 2**63 - 1, 0, -1, 1, 2**62, 2**63 - 1],
}


@pytest.mark.parametrize("values", LOGS.values(), ids=LOGS.keys())
def test_values_at_are_those_of_the_sorted_log(spark, values: list[int]) -> None:
    places = [*sorted({0, len(values) // 3, len(values) // 2, len(values) - 1}), 0]
    frame = spark.createDataFrame([(value,) for value in values], "time bigint")
    assert values_at(frame, "time", lambda rows: places if rows == len(values) else []) == [
        sorted(values)[place] for place in places
    ]
