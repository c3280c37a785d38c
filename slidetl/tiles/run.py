"""Tiles many slides at once, in separate processes, and records each in the ledger."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from slidetl.errors import (
    AnnotationError,
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    UsageError,
    describe_failure,
)
from slidetl.files import is_full, paced, sync_file_system
from slidetl.processes import Child, start_child
from slidetl.slides.npz import NpzItem
from slidetl.text import listed
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.identifier import clash_key
from slidetl.tiles.ledger import FAILED, USED, Ledger, LedgerRow, file_state
from slidetl.tiles.regions import RegionSource
from slidetl.tiles.store import (
    SlideCache,
    cache_path,
    describe_difference,
    describe_write_error,
    read_header,
)
from slidetl.tiles.tile import SlideSource, release_series, stamped, tile_slide
from slidetl.volumes import is_series

_LESS_MEMORY = "use fewer --workers, or a machine with more"


def tile_slides(
    sources: Sequence[SlideSource],
    cache_dir: Path,
    spec: TileSpec,
    workers: int = 1,
    overwrite: bool = False,
    preview: bool = False,
    on_done: Callable[[LedgerRow], None] | None = None,
) -> list[LedgerRow]:
    """Tiles many slides in separate processes, and records each in ``ledger.csv`` when it is done.

    A dead process (killed for memory, crashed in a decoder) costs its present slide; if others ran beside it,
    the slide is retried at the end, alone. Workers die with this process, so the next run can begin at once.

    Args:
        sources: the slides; their identifiers differ.
        cache_dir: the folder of all caches; created if missing.
        spec: specification of the tiles.
        workers: processes, one slide each; with fewer slides, the total number of threads. 0 runs everything
            in this process and thread, so a crash ends the run.
        overwrite: replace caches of other parameters or other slides.
        preview: draw ``previews/<slide_id>.png`` of each, :mod:`slidetl.tiles.preview`.
        on_done: called with each row, in the order of completion.

    Returns:
        The rows, in the order of ``sources``.

    Raises:
        UsageError: two sources have the same identifier.
        CacheMismatchError: the cache holds slides with other parameters, and ``overwrite`` is not set; before
            any work.
        CacheError: the ledger cannot be read or written.
        FileHeldError: another program still has the ledger open at the end.
    """
    tile = partial(tile_slide, cache_dir=cache_dir, spec=spec, overwrite=overwrite, preview=preview)

    def start() -> Iterator[LedgerRow]:
        jobs = jobs_of(sources)
        return (
            _in_processes(jobs, tile, workers) if workers else (_tile(s, tile) for job in jobs for s in job)
        )

    rows = record_as_done(sources, cache_dir, spec, overwrite, start, on_done)
    release_series()
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
    """Checks if the slides can be tiled into a cache, starts the work, and records each row when it comes.

    ``start`` yields a row for each finished slide, in any order. A failure that says nothing against the
    finished tiles of an earlier run (another file under this identifier, a share not mounted, lack of memory)
    leaves their row in the ledger. It is returned, and if the file is just missing, the earlier row is.
    """
    named = Counter(clash_key(source.slide_id) for source in sources)
    if twice := [source.slide_id for source in sources if named[clash_key(source.slide_id)] > 1]:
        raise UsageError(f"slide identifiers must differ, case ignored; clashing: {listed(twice)}")
    _check_kind(sources, spec)
    if not overwrite:
        _refuse_others(sources, cache_dir, spec)
    cache_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(cache_dir / "ledger.csv")
    # A foreign file of this name is found before the work, not after it.
    before = ledger.by_slide()
    regions_of = {source.slide_id: source.regions for source in sources}
    gone: list[str] = []
    rows: dict[str, LedgerRow] = {}
    waiting: list[LedgerRow] = []

    def record() -> None:
        if waiting:
            ledger.record(waiting)
            waiting.clear()

    record_now_and_then = paced(record)
    with contextlib.ExitStack() as stack:
        stack.callback(record)
        done = start()
        if isinstance(done, Generator):
            stack.enter_context(contextlib.closing(done))  # whatever is raised in here ends the workers
        for row in done:
            regions = regions_of[row.slide_id]
            kept = _kept_row(row, before.get(row.slide_id), cache_dir, spec, regions)
            if kept is None:
                waiting.append(row)
            elif kept.path == row.path and _is_gone(Path(row.path)):
                gone.append(row.slide_id)
                row = kept
            else:
                row = replace(row, reason=f"{row.reason}; the tiles of {kept.path} are kept, and stay in use")
            record_now_and_then()
            rows[row.slide_id] = row
            if on_done is not None:
                on_done(row)
    if gone:
        warnings.warn(
            f"{len(gone)} slides are not where they were; their tiles are kept: {listed(gone, 5)}",
            stacklevel=3,
        )
    return [rows[source.slide_id] for source in sources]


def _check_kind(sources: Sequence[SlideSource], spec: TileSpec) -> None:
    """Refuses slides where patches of CT series are asked for, the reverse, and a mixture of both."""
    kinds = {path: is_series(path) for path in {source.path for source in sources}}
    series, slides = (
        [source.slide_id for source in sources if kinds[source.path] is wanted] for wanted in (True, False)
    )
    if series and slides:
        raise UsageError(
            f"slides ({listed(slides)}) and CT series ({listed(series)}) in one manifest; tile each kind by "
            "its own manifest into its own folder"
        )
    if spec.is_volume and slides:
        raise UsageError(f"--spacing-mm is for CT series; {listed(slides)}: slides, tiled with --mpp")
    if not spec.is_volume and series:
        raise UsageError(f"--mpp is for slides; {listed(series)}: CT series, tiled with --spacing-mm")
    if located := [source.slide_id for source in sources if source.location_mm and not spec.is_volume]:
        raise UsageError(f"x_mm, y_mm and z_mm are for CT series, with --spacing-mm: {listed(located)}")
    for source in sources:
        if spec.is_volume and (source.mpp_override or source.mpp_replace or source.regions):
            raise UsageError(
                f"{source.slide_id}: a spacing or regions given for a slide, not for a CT series"
            )


def _kept_row(
    row: LedgerRow,
    before: LedgerRow | None,
    cache_dir: Path,
    spec: TileSpec,
    regions: RegionSource | None,
) -> LedgerRow | None:
    """Returns the row of an earlier run with finished tiles, if a failure says nothing against them.

    Of the same path it does not if the file is as it was, or cannot be looked at; of another it never does.
    """
    if row.status != FAILED or before is None or before.status != USED:
        return None
    is_same = before.path == row.path
    if is_same and file_state(Path(row.path)) not in (None, (before.bytes, before.modified)):
        return None
    with contextlib.suppress(OSError, CacheError, AnnotationError):
        header = SlideCache.open(cache_path(cache_dir, row.slide_id), spec).header
        wanted = header.regions
        if is_same:
            wanted = "" if regions is None else regions.digest(header.viewer, header.vendor)
        if (header.fingerprint, header.regions) == (before.fingerprint, wanted):
            return before
    return None


def _is_gone(path: Path) -> bool:
    item = NpzItem.of(path)
    try:
        return not (item.file if item else path).exists()
    except OSError:  # in a folder that must not be looked into
        return False


def _sync_file_system(folder: Path) -> None:
    """Makes the many small caches durable at once, since they were written without waiting for the disk."""
    try:
        sync_file_system(folder)
    except OSError as error:
        if is_full(error):
            raise CacheError(describe_write_error(error, folder)) from error
        warnings.warn(
            f"{folder}: cannot be made durable ({error.strerror}); after a power cut run the same command "
            "again, which makes torn caches again",
            stacklevel=3,
        )


def _refuse_others(sources: Sequence[SlideSource], cache_dir: Path, spec: TileSpec) -> None:
    """Refuses caches of another specification, whole slides if regions are wanted, and the reverse.

    Other regions show later, with their slide.
    """
    others: list[tuple[Path, str]] = []
    for source in sources:
        path = cache_path(cache_dir, source.slide_id)
        is_confined = source.regions is not None and source.regions.path is not None
        # Damaged caches fail by themselves later, with their slide.
        with contextlib.suppress(CacheMissingError, CacheCorruptError):
            header = read_header(path)
            if header.spec != spec:
                others.append((path, describe_difference(header.spec, spec)))
            elif bool(header.regions) != is_confined:
                others.append((path, f"the cache was made {'without' if is_confined else 'with'} --regions"))
    if others:
        path, difference = others[0]
        raise CacheMismatchError(
            f"{path}: {difference}; so are {len(others)} slides in all: "
            "tile into another folder with --cache, or replace them with --overwrite"
        )


Job = Sequence[SlideSource]
"""Slides of one file: locations in a CT series, which is then read once, else a single one."""


def jobs_of(sources: Sequence[SlideSource]) -> list[Job]:
    """Groups the locations of each CT series; every other slide is alone."""
    jobs: dict[object, list[SlideSource]] = {}
    for source in sources:
        jobs.setdefault(source.path if source.location_mm else source.slide_id, []).append(source)
    return list(jobs.values())


@dataclass
class _Worker:
    """A process tiling one slide after another, and the rest of its job, the present slide first."""

    child: Child
    left: list[SlideSource]
    started: float


def _in_processes(
    jobs: Sequence[Job], tile: partial[LedgerRow], workers: int
) -> Generator[LedgerRow, None, None]:
    """Yields rows as slides are done."""
    waiting = list(reversed(jobs))
    count = min(workers, len(jobs))
    tile = partial(tile, threads=workers // max(1, count))
    busy: dict[Connection, _Worker] = {}
    apart: list[Job] = []

    def start() -> None:
        worker = _Worker(start_child(_work, tile), [], time.monotonic())
        busy[worker.child.connection] = worker
        give(worker)

    def give(worker: _Worker) -> None:
        worker.left, worker.started = list(waiting.pop()), time.monotonic()
        # If it has just died, the end of its pipe reports this below, with the slide.
        with contextlib.suppress(BrokenPipeError):
            worker.child.connection.send(worker.left)

    try:
        for _ in range(count):
            start()
        while busy:
            for ready in multiprocessing.connection.wait(list(busy)):
                assert isinstance(ready, Connection)  # from `busy`
                worker = busy[ready]
                try:
                    yield ready.recv()
                except (EOFError, ConnectionResetError):
                    del busy[ready]
                    reason = f"{worker.child.cause_of_death('tiled')}; if memory is short, {_LESS_MEMORY}"
                    lost, *rest = worker.left
                    if rest:
                        waiting.append(rest)
                    if count > 1:
                        apart.append([lost])
                    else:
                        yield _failed(lost, reason, worker.started)
                    if waiting:
                        start()
                    continue
                del worker.left[0]
                worker.started = time.monotonic()
                if worker.left:
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
    if apart:
        yield from _in_processes(apart, tile, 1)


def _work(connection: Connection, tile: Callable[[SlideSource], LedgerRow]) -> None:
    """Tiles the slides of jobs in a worker process until its pipe ends."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        for source in job:
            connection.send(_tile(source, tile))
        release_series()


def _tile(source: SlideSource, tile: Callable[[SlideSource], LedgerRow]) -> LedgerRow:
    """Tiles a slide; an error of any library costs this slide alone."""
    started = time.monotonic()
    try:
        return tile(source)
    except Exception as error:  # of a decoder, a bug, or for want of memory
        return _failed(source, describe_failure(error, _LESS_MEMORY), started)


def _failed(source: SlideSource, reason: str, started: float) -> LedgerRow:
    return stamped(LedgerRow(source.slide_id, str(source.path), FAILED, reason), started)
