"""What a running job says without a terminal."""

import re
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import SparkSession

from spark_jobs.progress import done, shown


def slow(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        time.sleep(0.4)
        yield batch


def told(spark: SparkSession, work) -> list[tuple[int, ...]]:
    """The numbers of the lines told during ``work``: tasks done, tasks, and the same of stages if there are several."""
    lines: list[str] = []
    with shown(spark, lines.append, seconds=0.05):
        work()
    assert all(re.fullmatch(r"[\d,]+ of [\d,]+ tasks(, \d+ of \d+ stages)?", line) for line in lines), lines
    return [tuple(int(number) for number in re.findall(r"\d+", line)) for line in lines]


def test_tasks_done_are_told_while_a_job_runs(spark: SparkSession) -> None:
    slowed = spark.range(0, 6, 1, 6).mapInArrow(slow, "id bigint")
    numbers = told(spark, slowed.collect)
    assert {tasks for _, tasks in numbers} == {6}
    assert [tasks for tasks, _ in numbers] == sorted(tasks for tasks, _ in numbers)
    assert {1, 2, 3, 4, 5} & {tasks for tasks, _ in numbers}, "not only the beginning and the end"


def test_stages_are_told_where_there_are_several(spark: SparkSession) -> None:
    slowed = spark.range(0, 4, 1, 4).mapInArrow(slow, "id bigint").repartition(2, "id").mapInArrow(slow, "id bigint")
    numbers = told(spark, slowed.collect)
    assert {(tasks, stages) for _, tasks, _, stages in numbers} == {(6, 2)}
    assert {0, 1} <= {stages for _, _, stages, _ in numbers}


def test_a_stage_whose_files_are_still_there_does_not_count(spark: SparkSession) -> None:
    grouped = spark.sparkContext.parallelize(range(8), 4).map(lambda number: (number, 1)).groupByKey(2)
    grouped.count()
    numbers = told(spark, grouped.map(lambda _: time.sleep(0.2)).count)
    assert {tasks for _, tasks in numbers} == {2}


def test_nothing_is_told_between_jobs_and_after_the_end(spark: SparkSession) -> None:
    assert told(spark, lambda: time.sleep(0.3)) == []
    assert done(spark.sparkContext.statusTracker()) == ""
    assert "progress" not in {thread.name for thread in threading.enumerate()}
