"""Shows finished, failed and remaining jobs of a comparison, and estimates the time left."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from slidetl.compare.plan import Job
from slidetl.compare.records import JobResult
from slidetl.status import show_stage


class JobProgress:
    """Shows a table of the arms on a terminal and a line for each job elsewhere, both on stderr.

    A context manager.

    Args:
        processes: jobs at a time.
        console: for the output.
    """

    def __init__(self, processes: int, console: Console | None = None) -> None:
        self._processes = max(1, processes)
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._finished: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._total, self._started = 0, time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def start(self, finished: Sequence[Job], to_do: Sequence[Job]) -> None:
        """Counts the finished jobs, and the jobs to compute."""
        self._finished.update(job.arm for job in finished)
        self._left.update(job.arm for job in to_do)
        self._total, self._started = len(to_do), time.monotonic()
        self._show(f"{len(finished)} jobs are done, {len(to_do)} to be computed, {self._processes} at a time")

    def done(self, job: Job, reason: str, result: JobResult | None) -> None:
        """Counts a job that was computed, or failed."""
        self._left[job.arm] -= 1
        (self._failed if reason else self._finished)[job.arm] += 1
        if result is not None:
            self._seconds[job.arm].append(result.seconds)
        outcome = f"failed: {reason}" if reason else f"{result.seconds if result else 0:.0f} s"
        n_done = self._total - self._left.total()
        self._show(f"[{n_done}/{self._total}] {job.label}: {outcome}; {self._time_left()}")

    def table(self) -> Table:
        """Makes a table of the jobs of each arm: done, failed and left, with their time."""
        title = f"{_minutes(time.monotonic() - self._started)} gone, {self._time_left()}"
        table = Table("arm", "done", "failed", "left", "mean", "left for", title=title)
        expected = self._expected()
        for arm in sorted({*self._finished, *self._left}):
            left = self._left[arm]
            mean = f"{expected[arm]:.0f} s" if arm in expected else ""
            time_left = _minutes(left * expected[arm] / self._at_a_time()) if left and arm in expected else ""
            failed = str(self._failed[arm] or "")
            table.add_row(arm, str(self._finished[arm]), failed, str(left), mean, time_left)
        return table

    def _time_left(self) -> str:
        """Estimates the time left; an unknown arm counts as the mean of the others."""
        expected = self._expected()
        if self._left.total() and not expected:
            return "how much is left is not known yet"
        mean = sum(expected.values()) / max(1, len(expected))
        seconds = sum(left * expected.get(arm, mean) for arm, left in self._left.items())
        return f"about {_minutes(seconds / self._at_a_time())} left"

    def _expected(self) -> dict[str, float]:
        """Returns the mean seconds of a job, by arm."""
        return {arm: sum(values) / len(values) for arm, values in self._seconds.items()}

    def _at_a_time(self) -> float:
        """Estimates the jobs computed at a time, here or on a cluster."""
        computed = sum(sum(values) for values in self._seconds.values())
        return max(self._processes, computed / max(time.monotonic() - self._started, 1.0))

    def _show(self, line: str) -> None:
        show_stage("computing", self._total - self._left.total(), self._total, "jobs")
        if self._console.is_terminal:
            self._live.update(self.table(), refresh=True)
        else:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
