"""How far a running job is: Spark's own bar on a terminal, a line now and then where there is none."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyspark import SparkStageInfo, StatusTracker
from pyspark.sql import SparkSession

SECONDS = 10.0
"""Between two lines."""


@contextmanager
def shown(spark: SparkSession, tell: Callable[[str], None], seconds: float = SECONDS) -> Iterator[None]:
    """Tell every ``seconds`` how much of what Spark works on is done, unless Spark draws its bar."""
    if spark.sparkContext.getConf().get("spark.ui.showConsoleProgress") == "true":
        yield
        return
    ended = threading.Event()
    follower = threading.Thread(
        target=_follow, args=(spark.sparkContext.statusTracker(), tell, seconds, ended), name="progress", daemon=True
    )
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _follow(tracker: StatusTracker, tell: Callable[[str], None], seconds: float, ended: threading.Event) -> None:
    while not ended.wait(seconds):
        line = done(tracker)
        if line:
            tell(line)


def done(tracker: StatusTracker) -> str:
    """Tasks and stages done of the Spark jobs that run now; empty while none does."""
    stages = _stages(tracker)
    if not stages:
        return ""
    tasks = f"{sum(s.numCompletedTasks for s in stages):,} of {sum(s.numTasks for s in stages):,} tasks"
    complete = sum(s.numCompletedTasks == s.numTasks for s in stages)
    return tasks if len(stages) == 1 else f"{tasks}, {complete} of {len(stages)} stages"


def _stages(tracker: StatusTracker) -> list[SparkStageInfo]:
    """The stages of the running jobs, without those that are skipped because a shuffle's files are still there.

    Spark says only at a job's end that it skipped a stage. Until then it is one that has not begun although stages
    after it have: a stage's number is higher than those of the stages it waits for.
    """
    active = tracker.getActiveStageIds()
    jobs = [job for job in map(tracker.getJobInfo, tracker.getActiveJobsIds()) if job]
    numbers = {number for job in jobs for number in job.stageIds}
    found = [stage for stage in map(tracker.getStageInfo, sorted(numbers)) if stage]
    first = min(active, default=0)
    return [stage for stage in found if stage.stageId >= first or stage.numCompletedTasks]
