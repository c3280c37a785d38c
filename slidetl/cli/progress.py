"""Shows the progress of a command."""

from __future__ import annotations

import sys
import time
from typing import Self

from slidetl.status import show_stage
from slidetl.text import one_line


class Progress:
    """Draws a bar on a terminal and prints a line for each item elsewhere, both on stderr.

    The file of ``--status`` has it too. A context manager.

    Args:
        what: the name of the items, beside the bar.
        total: number of items; None until :meth:`start`.
        stage: the work, in the file of ``--status``; by default ``what``.
        rate: show the items per second.

    Attributes:
        is_terminal: True if the bar is drawn.
    """

    def __init__(self, what: str, total: int | None = None, *, stage: str = "", rate: bool = False) -> None:
        # imported here: it takes a tenth of a second, and --help needs none of it
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self.is_terminal = console.is_terminal
        self._bar = Bar(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            *([TextColumn("{task.fields[rate]:.0f}/s")] if rate else []),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False),
            console=console,
            disable=not self.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, last="", rate=0.0)
        self._total, self._done, self._started = total, 0, time.monotonic()
        self._stage, self._unit = stage or what, what

    def __enter__(self) -> Self:
        self._bar.start()
        if self._total is not None:
            self.start(self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def start(self, total: int) -> None:
        """Sets the number of items and starts the clock of the rate."""
        self._total, self._started = total, time.monotonic()
        self._bar.update(self._task, total=total)
        show_stage(self._stage, self._done, total, self._unit)

    def advance(self, items: int = 1) -> None:
        """Counts items as done."""
        self._done += items
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate)
        show_stage(self._stage, self._done, self._total, self._unit)

    def show(self, text: str) -> None:
        """Shows a line: the latest one beside the bar, or each one without a terminal."""
        text = one_line(text)
        if self.is_terminal:
            self._bar.update(self._task, last=text)
        else:
            print(f"[{self._done}/{self._total}] {text}", file=sys.stderr)
