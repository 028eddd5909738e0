"""What `python -m spark_jobs` does with commands that cannot be run."""

import pytest

from spark_jobs.__main__ import JOBS, serve


def test_an_unknown_job_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(['["build_event", "--out", "events"]\n']) == 2
    assert f"no job 'build_event'; choose one of {', '.join(JOBS)}" in capsys.readouterr().err


def test_arguments_that_are_missing_end_it_like_the_job_itself() -> None:
    with pytest.raises(SystemExit, match="2"):
        serve(['["build_events"]\n'])
