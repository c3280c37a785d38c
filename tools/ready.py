"""Processor time of a command until it reads its first tiles: imports, options, the study and the network.

    python -m tools.ready fit --data.num_workers=0 ...

The command ends there. Only its own process counts, so tiles must be read in it: without workers, on a CPU.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from typing import NoReturn
from unittest import mock

import slidetl.slides
from slidetl.cli import main
from slidetl.tiles.store import SlideCache

_first = threading.Lock()


def stop(*_: object, **__: object) -> NoReturn:
    _first.acquire()  # the process ends before another thread has it
    spent = resource.getrusage(resource.RUSAGE_SELF)
    print(spent.ru_utime + spent.ru_stime, flush=True)
    os._exit(0)


if __name__ == "__main__":
    with mock.patch.object(SlideCache, "read", stop), mock.patch.object(slidetl.slides, "open_slide", stop):
        code = main(sys.argv[1:])
    sys.exit(f"the command ended with code {code} before it read a tile")
