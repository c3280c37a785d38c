from __future__ import annotations

from io import StringIO

from rich.console import Console

from slidetl.compare.plan import Job
from slidetl.compare.progress import JobProgress
from slidetl.compare.records import JobResult
from slidetl.evaluation.protocol import Fold


def job(number: int) -> Job:
    return Job("warm", Fold(0, str(number), 0, ("a",), ("b",)), None, None, {}, f"key-{number}")


def test_nothing_is_said_of_the_time_left_before_a_job_has_shown_it() -> None:
    written = StringIO()
    progress = JobProgress(2, Console(file=written, width=100))
    jobs = [job(number) for number in range(9)]
    progress.start([], jobs)
    assert "not known yet" in str(progress.table().title)
    progress.done(jobs[0], "", JobResult((), seconds=600))
    progress.done(jobs[1], "no memory", None)
    first, failed = written.getvalue().splitlines()[1:]
    assert "[1/9]" in first and "600 s; about " in first
    assert "[2/9]" in failed and "failed: no memory" in failed


def test_a_cluster_is_as_fast_as_it_turns_out_to_be() -> None:
    """Ten jobs of ten minutes each within a second: a thousand workers and more, whatever was asked for."""
    progress = JobProgress(1, Console(file=StringIO()))
    jobs = [job(number) for number in range(20)]
    progress.start([], jobs)
    for number in range(10):
        progress.done(jobs[number], "", JobResult((), seconds=600))
    assert "about 0 min left" in str(progress.table().title)
