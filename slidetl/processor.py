"""Settings of the C library and of OpenMP for networks on a CPU."""

from __future__ import annotations

import atexit
import ctypes
import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
CONTROL_GROUP = Path("/sys/fs/cgroup")
_KEEP = {
    "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 256 << 20),
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 512 << 20),
    "MALLOC_ARENA_MAX": (_M_ARENA_MAX, 1),
}


def usable_cores() -> int:
    """Counts the cores for this process: those that it may run on, or as many as its container may use."""
    cores, quota = len(os.sched_getaffinity(0)), core_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def core_quota() -> float | None:
    """Reads how many cores' time a control group may use (Docker's ``--cpus``, a limit of Kubernetes)."""
    try:
        share, period = (CONTROL_GROUP / "cpu.max").read_text().split()[:2]
        return None if share == "max" else int(share) / int(period)
    except (OSError, ValueError):
        return None


def prepare_for_networks() -> None:
    """Keeps freed memory for the next tensor, and lets idle threads sleep soon; call it before torch loads.

    In a container with a limit, libraries have as many threads as it may use cores, not as the machine has.

    glibc returns a freed activation to the kernel, and takes it back page by page for the next layer: half
    the time of a training step of MobileNetV2, a third of its forward pass (docs/design/processor.md). All
    threads share one heap, since glibc's further heaps keep no block of 64 MiB or more. By default torch's
    idle threads spin for milliseconds, on cores needed to read and decode tiles.

    Child processes inherit both from the environment; variables already set stay. Without glibc only the
    environment is set.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if usable_cores() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (option, size) in _KEEP.items():
        if name not in os.environ and mallopt is not None:
            mallopt(option, size)
        os.environ.setdefault(name, str(size))


def hand_back_memory() -> None:
    """Returns memory kept for the next tensor to the kernel, before other work."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def postpone_collection(of_a_command: bool = False) -> Iterator[None]:
    """Postpones garbage collection while a command is imported and built: saves a fifth of the time.

    Args:
        of_a_command: this process runs a command and ends with it, so later collections leave out all that is
            there by now. Never in a library function: its caller's objects would stay to the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if of_a_command and not gc.get_freeze_count():
            gc.freeze()
            atexit.register(gc.unfreeze)  # else nanobind reports all that it holds as leaked
        if enabled:
            gc.enable()
