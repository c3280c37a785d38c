"""Shows which units are computed, which are left, and how long these will take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from slidetl.compare.plan import Unit
from slidetl.compare.records import UnitResult


class UnitProgress:
    """Shows a table of the arms on a terminal and a line for each unit elsewhere, both on stderr.

    A context manager.

    Args:
        jobs: units at a time.
        console: where it is shown.
    """

    def __init__(self, jobs: int, console: Console | None = None) -> None:
        self._jobs = max(1, jobs)
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._there: Counter[str] = Counter()
        self._left: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._seconds: dict[str, list[float]] = {}
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

    def start(self, there: Sequence[Unit], to_do: Sequence[Unit]) -> None:
        """Counts the units that are there, and those to compute."""
        self._there.update(unit.arm for unit in there)
        self._left.update(unit.arm for unit in to_do)
        self._total, self._started = len(to_do), time.monotonic()
        if not self._console.is_terminal:
            print_line = f"{len(there)} units are there, {len(to_do)} to be computed, {self._jobs} at a time"
            self._console.print(print_line, highlight=False)
        self._show()

    def done(self, unit: Unit, reason: str, result: UnitResult | None) -> None:
        """Counts a unit that was computed, or failed."""
        self._left[unit.arm] -= 1
        if reason:
            self._failed[unit.arm] += 1
        else:
            self._there[unit.arm] += 1
        if result is not None:
            self._seconds.setdefault(unit.arm, []).append(result.seconds)
        if not self._console.is_terminal:
            n_done = self._total - sum(self._left.values())
            what = f"failed: {reason}" if reason else f"{result.seconds if result else 0:.0f} s"
            line = f"[{n_done}/{self._total}] {unit.label}: {what}; {self._time_left()}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._show()

    def table(self) -> Table:
        """Makes a table of the units of each arm: done, failed and left, with their time."""
        title = f"{_minutes(time.monotonic() - self._started)} gone, {self._time_left()}"
        table = Table("arm", "done", "failed", "left", "mean", "left for", title=title)
        expected = self._expected()
        for arm in sorted({*self._there, *self._left}):
            left = self._left[arm]
            mean = f"{expected[arm]:.0f} s" if arm in expected else ""
            time_left = _minutes(left * expected[arm] / self._at_a_time()) if left and arm in expected else ""
            failed = str(self._failed[arm] or "")
            table.add_row(arm, str(self._there[arm]), failed, str(left), mean, time_left)
        return table

    def _time_left(self) -> str:
        if any(self._left.values()) and not self._seconds:
            return "how much is left is not known yet"
        return f"about {_minutes(self._remaining())} left"

    def _expected(self) -> Mapping[str, float]:
        """Returns the mean seconds of a unit, by arm."""
        return {arm: sum(values) / len(values) for arm, values in self._seconds.items()}

    def _remaining(self) -> float:
        """Estimates the seconds left; an unknown arm counts as the mean of the others."""
        expected = self._expected()
        mean = sum(expected.values()) / len(expected) if expected else 0.0
        return sum(left * expected.get(arm, mean) for arm, left in self._left.items()) / self._at_a_time()

    def _at_a_time(self) -> float:
        """Estimates the units computed at a time, here or on a cluster."""
        computed = sum(sum(values) for values in self._seconds.values())
        return max(self._jobs, computed / max(time.monotonic() - self._started, 1.0))

    def _show(self) -> None:
        if self._console.is_terminal:
            self._live.update(self.table(), refresh=True)


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
