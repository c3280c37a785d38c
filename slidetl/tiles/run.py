"""Tiles many slides at once, in processes of their own, and records each in the ledger."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.connection
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from slidetl.errors import CacheCorruptError, CacheError, CacheMismatchError, CacheMissingError, UsageError
from slidetl.processes import Child, start_child
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import FAILED, Ledger, LedgerRow
from slidetl.tiles.store import cache_path, describe_difference, read_header
from slidetl.tiles.tile import SlideSource, stamped, tile_slide

# Between two writings of the ledger, seconds.
_LEDGER_SECONDS = 1.0


def tile_slides(
    sources: Sequence[SlideSource],
    cache_dir: Path,
    spec: TileSpec,
    workers: int = 1,
    overwrite: bool = False,
    preview: bool = False,
    on_done: Callable[[LedgerRow], None] | None = None,
) -> list[LedgerRow]:
    """Tiles many slides in processes of their own, and records each in ``ledger.csv`` as it is done.

    A process that dies (killed for memory, crashed in a decoder) costs the slide it was at. If this process
    dies, however suddenly, its workers die with it, so that the next run can begin at once.

    Args:
        sources: the slides; their identifiers differ.
        cache_dir: where the caches go; made if it is not there.
        spec: which tiles.
        workers: processes, each at a slide of its own; where there are fewer slides, so many threads in all.
            0 does it all in this process and thread, where a crash ends the run.
        overwrite: replace caches of other parameters or other slides.
        preview: draw ``previews/<slide_id>.png`` of each, :mod:`slidetl.tiles.preview`.
        on_done: called with each row, in the order in which slides are done.

    Returns:
        The rows, in the order of ``sources``.

    Raises:
        UsageError: two sources have the same identifier.
        CacheMismatchError: the cache holds some of these slides tiled with other parameters, and
            ``overwrite`` is not set. Nothing was done then.
        CacheError: the ledger cannot be read or written.
    """
    tile = partial(tile_slide, cache_dir=cache_dir, spec=spec, overwrite=overwrite, preview=preview)

    def start() -> Iterator[LedgerRow]:
        return _in_processes(sources, tile, workers) if workers else map(tile, sources)

    rows = record_as_done(sources, cache_dir, spec, overwrite, start, on_done)
    _sync_file_system(cache_dir)
    return rows


def record_as_done(
    sources: Sequence[SlideSource],
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool,
    start: Callable[[], Iterator[LedgerRow]],
    on_done: Callable[[LedgerRow], None] | None = None,
) -> list[LedgerRow]:
    """Checks that the slides can be tiled into a cache, starts the work, and records each row as it comes.

    It is :func:`tile_slides` for work that is done elsewhere: ``start`` begins it and yields a row as its
    slide is done, in any order.
    """
    twice = [name for name, count in Counter(source.slide_id for source in sources).items() if count > 1]
    if twice:
        raise UsageError(f"slide identifiers must differ; more than once: {', '.join(twice)}")
    if not overwrite:
        _refuse_other_spec(sources, cache_dir, spec)
    cache_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(cache_dir / "ledger.csv")
    ledger.rows()  # a file of that name that is no ledger is found before the work, not after it
    rows: dict[str, LedgerRow] = {}
    # It is written whole each time, which for thousands of small images is not to be done for each.
    waiting: list[LedgerRow] = []
    written = -_LEDGER_SECONDS
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: ledger.record(waiting) if waiting else None)
        done = start()
        if isinstance(done, Generator):
            stack.enter_context(contextlib.closing(done))  # whatever is raised in here ends the workers
        for row in done:
            waiting.append(row)
            if time.monotonic() - written >= _LEDGER_SECONDS:
                ledger.record(waiting)
                waiting.clear()
                written = time.monotonic()
            rows[row.slide_id] = row
            if on_done is not None:
                on_done(row)
    return [rows[source.slide_id] for source in sources]


def _sync_file_system(folder: Path) -> None:
    """Makes durable at once the many small caches that were written without waiting for the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise CacheError(f"{folder}: cannot be made durable: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def _refuse_other_spec(sources: Sequence[SlideSource], cache_dir: Path, spec: TileSpec) -> None:
    others: list[tuple[Path, TileSpec]] = []
    for path in (cache_path(cache_dir, source.slide_id) for source in sources):
        # What is damaged fails by itself, when its turn comes.
        with contextlib.suppress(CacheMissingError, CacheCorruptError):
            if (cached := read_header(path).spec) != spec:
                others.append((path, cached))
    if others:
        path, cached = others[0]
        raise CacheMismatchError(
            f"{path}: {describe_difference(cached, spec)}; so are {len(others)} slides in all: "
            "tile into another folder with --cache, or replace them with --overwrite"
        )


@dataclass
class _Worker:
    """A process that tiles one slide after another, and its present slide."""

    child: Child
    source: SlideSource
    started: float


def _in_processes(
    sources: Sequence[SlideSource], tile: partial[LedgerRow], workers: int
) -> Generator[LedgerRow, None, None]:
    """Yields rows as slides are done."""
    waiting = list(reversed(sources))
    count = min(workers, len(sources))
    tile = partial(tile, threads=workers // max(1, count))
    busy: dict[Connection, _Worker] = {}

    def start() -> None:
        worker = _Worker(start_child(_work, tile), waiting[-1], time.monotonic())
        busy[worker.child.connection] = worker
        give(worker)

    def give(worker: _Worker) -> None:
        worker.source, worker.started = waiting.pop(), time.monotonic()
        # If it has just died, the end of its pipe tells so below, and the slide is known.
        with contextlib.suppress(BrokenPipeError):
            worker.child.connection.send(worker.source)

    try:
        for _ in range(count):
            start()
        while busy:
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)  # what `wait` was given
                worker = busy[ready]
                try:
                    yield ready.recv()
                except (EOFError, ConnectionResetError):
                    del busy[ready]
                    reason = worker.child.cause_of_death("tiled")
                    row = LedgerRow(worker.source.slide_id, str(worker.source.path), FAILED, reason)
                    yield stamped(row, worker.started)
                    if waiting:
                        start()
                    continue
                if waiting:
                    give(worker)
                else:
                    del busy[ready]
                    ready.close()  # the worker sees the end and returns
                    worker.child.process.join()
    finally:
        for worker in busy.values():
            worker.child.end()


def _work(connection: Connection, tile: Callable[[SlideSource], LedgerRow]) -> None:
    """Tiles slides in a worker process until its pipe ends."""
    while True:
        try:
            source = connection.recv()
        except EOFError:
            return
        connection.send(tile(source))
