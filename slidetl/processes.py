"""Child processes with a pipe to their parent; they end with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from slidetl.text import format_warning

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(eq=False)
class Child:
    """A process, and our end of its pipe; the pipe ends with it."""

    process: SpawnProcess
    connection: Connection

    def cause_of_death(self, did: str) -> str:
        """Waits for the process to end and describes the cause; ``did`` is its work, in the past tense."""
        self.connection.close()
        self.process.join()
        exitcode = self.process.exitcode
        if exitcode is not None and exitcode < 0:
            name = signal.Signals(-exitcode).name
            hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
            return f"the process that {did} it was ended by {name}{hint}"
        return f"the process that {did} it ended itself, as libraries do that cannot go on (code {exitcode})"

    def end(self) -> None:
        """Ends the process at once."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


def start_child(work: Callable[..., None], *arguments: Any, has_children: bool = False) -> Child:
    """Starts a process to call ``work(connection, *arguments)``.

    The kernel kills it when this process dies or the starting thread ends. It is spawned, since OpenSlide,
    zarr and torch hold threads and locks.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run, args=(work, theirs, os.getpid(), arguments), daemon=not has_children
    )
    process.start()
    theirs.close()  # else its death would not show as the end of the pipe
    return Child(process, ours)


def see_one_card(number: int) -> None:
    """Hides all GPUs from this process but one of those that it sees; CUDA must not have started in it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number) if visible is None else visible.split(",")[number]


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above


def _run(work: Callable[..., None], connection: Connection, parent: int, arguments: tuple[Any, ...]) -> None:
    # Without this, children of a killed run would go on, hold locks and keep a GPU's memory.
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    warnings.formatwarning = format_warning
    work(connection, *arguments)
