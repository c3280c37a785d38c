"""Settings of the C library and of OpenMP for processes that run a network on processors."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
_KEEP = {
    "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 256 << 20),
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 512 << 20),
    "MALLOC_ARENA_MAX": (_M_ARENA_MAX, 1),
}


def prepare_for_networks() -> None:
    """Has freed memory kept for the next tensor, and idle threads sleep soon; call it before torch is loaded.

    glibc hands a freed activation back to the kernel, and takes as much back page by page for the next
    layer: half the time of a training step of MobileNetV2, a third of its forward pass
    (docs/design/processor.md). All threads share one heap, since those that glibc makes for further ones
    keep no block of 64 MiB or more. Torch's idle threads spin for milliseconds by default, on cores that
    others could read and decode tiles on.

    The environment hands both on to processes started from here; where it says otherwise already, that
    stands. Without glibc only the environment is set.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, (option, size) in _KEEP.items():
        if name not in os.environ and mallopt is not None:
            mallopt(option, size)
        os.environ.setdefault(name, str(size))


def hand_back_memory() -> None:
    """Gives what is kept for the next tensor back to the kernel, before other work that needs room."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def postpone_collection() -> Iterator[None]:
    """Postpones collecting garbage while a command is imported and built: a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
