"""Writes the progress of a command to the file of ``--status``, for schedulers and pages that poll it."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slidetl.errors import OutputError
from slidetl.files import write_whole

RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"

_SECONDS = 2.0  # between two writes of the same stage


class _Status:
    """The content of the file, and the time of its last write."""

    def __init__(self, path: Path, command: str) -> None:
        self._path, self._written, self._is_lost = path, -math.inf, False
        self.values: dict[str, Any] = {
            "command": command,
            "state": RUNNING,
            "exit_code": None,
            "stage": "starting",
            "done": 0,
            "total": None,
            "unit": "",
            "metrics": {},
            "pid": os.getpid(),
            "started": _now(),
        }

    def write(self, at_once: bool) -> None:
        now = time.monotonic()
        if self._is_lost or (not at_once and now - self._written < _SECONDS):
            return
        self._written = now
        write_whole(self._path, json.dumps({**self.values, "updated": _now()}, allow_nan=False) + "\n")

    def try_to_write(self, at_once: bool) -> None:
        try:
            self.write(at_once)
        except OutputError as error:  # the command's own results matter more
            self._is_lost = True
            warnings.warn(f"--status: {error}; its progress is no longer written", stacklevel=3)


_current: _Status | None = None


@contextmanager
def status_file(path: Path | None, command: str) -> Iterator[None]:
    """Keeps the progress of a command in a file, from start to end; None keeps none.

    The file has one JSON object: ``command``; ``state``, one of running, done, failed and interrupted;
    ``exit_code``, null while it runs; ``stage`` with ``done`` of ``total`` (null if unknown) in ``unit``;
    ``metrics``, the latest by name; ``pid``; ``started`` and ``updated`` (UTC, ISO 8601). It is replaced
    atomically, at most every two seconds while a stage lasts.

    Raises:
        OutputError: the file cannot be written.
    """
    global _current
    if path is None:
        yield
        return
    before, status = _current, _Status(path, command)
    status.write(at_once=True)
    _current = status
    try:
        yield
    finally:
        _current = before
        if status.values["state"] == RUNNING:  # an exception without an exit code is a bug of ours
            status.values |= {"state": FAILED, "exit_code": 1}
        status.try_to_write(at_once=True)


def show_stage(stage: str, done: int, total: int | None, unit: str) -> None:
    """Reports the work done so far; does nothing without ``--status``."""
    if _current is not None:
        is_new = stage != _current.values["stage"]
        _current.values |= {"stage": stage, "done": done, "total": total, "unit": unit}
        _current.try_to_write(is_new)


def show_metrics(metrics: Mapping[str, float]) -> None:
    """Takes the latest metrics into the next report; those that are not finite are left out."""
    if _current is not None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        _current.values["metrics"] = finite


def show_end(exit_code: int) -> None:
    """Reports the exit code of the command; 130 and 143 are interruptions, by Ctrl-C and SIGTERM."""
    if _current is not None:
        state = DONE if exit_code == 0 else INTERRUPTED if exit_code in (130, 143) else FAILED
        _current.values |= {"state": state, "exit_code": exit_code}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
