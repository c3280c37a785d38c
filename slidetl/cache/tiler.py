"""From slides to caches: which tiles, their bytes, and many slides at once in processes of their own.

Selection (:func:`plan_tiles`) is apart from reading (:func:`encode_tiles`), and both from storing
(:func:`tile_slide`), so that whoever grades a slide without a cache sees the very pixels a cache would hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.cache.codec import tile_codec
from slidetl.cache.ledger import EXCLUDED, FAILED, USED, Ledger, LedgerRow
from slidetl.cache.lock import slide_lock
from slidetl.cache.store import (
    CacheHeader,
    SlideCache,
    cache_path,
    describe_difference,
    describe_write_error,
    discard,
    is_intact,
    is_small,
    read_header,
)
from slidetl.cache.writer import CacheWriter
from slidetl.errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissingError,
    SlideError,
    SlideReadError,
    SlidetlError,
    UsageError,
)
from slidetl.grid import TileGrid, TileSpec
from slidetl.quality import focus_of, measure_quality
from slidetl.slides import Slide, SlideInfo, open_slide
from slidetl.tissue import TissueMask, find_tissue, thumbnail_mpp

# A slide of which more than this share cannot be read is not to be trusted for the rest. It also bounds how
# often a damaged slide is opened anew.
MAX_UNREADABLE = 0.1

# Between two writings of the ledger, seconds.
_LEDGER_SECONDS = 1.0

# Least tissue is compared with float32 shares of an area.
_ROUNDING = 1e-6

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class SlideSource:
    """A slide to be tiled.

    Attributes:
        slide_id: the name of its cache.
        path: its file.
        mpp_override: micrometres per level-0 pixel, instead of what the file says.

    Raises:
        UsageError: ``slide_id`` cannot be the name of a folder.
    """

    slide_id: str
    path: Path
    mpp_override: float | None = None

    def __post_init__(self) -> None:
        if not self.slide_id or self.slide_id.startswith(".") or self.slide_id != Path(self.slide_id).name:
            raise UsageError(f"a slide's identifier must do as the name of a folder, not {self.slide_id!r}")


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Which tiles of a slide are wanted, before any is read.

    Attributes:
        spec: what was asked for.
        info: the slide.
        mpp_read: spacing of the tiles along x and y, micrometres per pixel.
        origins_level0: ``[N, 2] int32``, upper-left corners ``(x, y)``, level-0 pixels, row by row.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        tissue_fraction: ``[N] float32``, at least ``spec.min_tissue``.
        tiles_without_tissue: places on the grid that are not wanted.
        thumbnail: ``[h, w, 3] uint8``, the whole slide.
        tissue_mask: its tissue; what of the slide cannot be read counts as tissue, so that damage shows as
            unreadable tiles instead of passing for glass.
        quality: ``[N] float32`` each: shares of the tile by ``pen``, ``fold`` and ``air``
            (:mod:`slidetl.quality`); its ``focus`` too if ``spec.min_focus`` asks for it, NaN if unreadable.
        left_out_level0: ``[n, 2] int32``, corners of tiles with tissue left out for their quality, by the
            first reason that applies: ``pen``, ``fold``, ``air``, ``out of focus``.
    """

    spec: TileSpec
    info: SlideInfo
    mpp_read: tuple[float, float]
    origins_level0: NDArray[np.int32]
    extent_level0: tuple[float, float]
    tissue_fraction: NDArray[np.float32]
    tiles_without_tissue: int
    thumbnail: NDArray[np.uint8]
    tissue_mask: TissueMask
    quality: dict[str, NDArray[np.float32]]
    left_out_level0: dict[str, NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.origins_level0)

    @property
    def left_out(self) -> dict[str, int]:
        """How many tiles were left out for their quality, by the names of the ledger's columns."""
        return {f"tiles_{reason.replace(' ', '_')}": len(o) for reason, o in self.left_out_level0.items()}


@dataclass(frozen=True, eq=False)
class TileBatch:
    """Tiles as a cache holds them.

    Attributes:
        origins_level0: ``[n, 2] int32``, upper-left corners ``(x, y)``, level-0 pixels.
        tissue_fraction: ``[n] float32``.
        pixels: ``[n, S, S, 3] uint8`` RGB.
    """

    origins_level0: NDArray[np.int32]
    tissue_fraction: NDArray[np.float32]
    pixels: NDArray[np.uint8]


def plan_tiles(slide: Slide, spec: TileSpec, threads: int = 1) -> TilePlan:
    """Looks at a slide from afar and decides which tiles are worth reading.

    Focus, where it is asked for, cannot be seen from afar: all tiles are then read once for it.

    Raises:
        SpacingError: the slide is coarser than ``spec.mpp``.
        SlideReadError: more than a tenth of the slide cannot be read.
    """
    info = slide.info
    mpp_read = slide.mpp_read(spec.mpp, spec.mpp_tolerance)
    mpp = thumbnail_mpp(info.size_level0, info.mpp_level0, spec)
    thumbnail, is_unreadable = _read_thumbnail(slide, mpp, spec.tile_size_px * spec.mpp)
    found = find_tissue(thumbnail, mpp, info.background_rgb)
    tissue_mask = TissueMask(found.mask | is_unreadable, mpp)
    grid = TileGrid.over(info.size_level0, info.mpp_level0, mpp_read, spec)
    origins = grid.origins_level0()
    fraction = tissue_mask.fraction(origins, grid.extent_level0, info.mpp_level0)
    is_wanted = fraction >= spec.min_tissue - _ROUNDING
    without_tissue = int((~is_wanted).sum())
    origins, fraction = origins[is_wanted], fraction[is_wanted]
    maps = measure_quality(thumbnail, mpp, found.mask, info.background_rgb)
    quality = maps.fractions(origins, grid.extent_level0, info.mpp_level0)
    left_out: dict[str, NDArray[np.int32]] = {}

    def leave_out(reason: str, is_spoilt: NDArray[np.bool_]) -> None:
        nonlocal origins, fraction, quality
        left_out[reason] = origins[is_spoilt]
        origins, fraction = origins[~is_spoilt], fraction[~is_spoilt]
        quality = {name: values[~is_spoilt] for name, values in quality.items()}

    for reason, most in (("pen", spec.max_pen), ("fold", spec.max_fold), ("air", spec.max_air)):
        leave_out(reason, quality[reason] > most + _ROUNDING)
    if spec.min_focus > 0:
        quality["focus"] = _focus(slide, origins, spec, threads)
        leave_out("out of focus", quality["focus"] < spec.min_focus)  # NaN, unreadable, is not
    return TilePlan(
        spec=spec,
        info=info,
        mpp_read=mpp_read,
        origins_level0=origins,
        extent_level0=grid.extent_level0,
        tissue_fraction=fraction,
        tiles_without_tissue=without_tissue,
        thumbnail=thumbnail,
        tissue_mask=tissue_mask,
        quality=quality,
        left_out_level0=left_out,
    )


def _focus(slide: Slide, origins: NDArray[np.int32], spec: TileSpec, threads: int) -> NDArray[np.float32]:
    """Sharpness of each tile, ``[N]``; NaN where it cannot be read."""

    def measure(rgb: NDArray[np.uint8]) -> float:
        return focus_of(rgb, spec.mpp)

    results = slide.map_tiles(
        measure, origins, spec.tile_size_px, spec.mpp, spec.mpp_tolerance, threads=threads
    )
    values = [math.nan if isinstance(result, SlideReadError) else result for result in results]
    return np.array(values, np.float32)


def encode_tiles(
    slide: Slide, plan: TilePlan, first: int = 0, unreadable: int = 0, threads: int = 1
) -> Iterator[tuple[int, bytes | None]]:
    """Reads the tiles of a plan, as the bytes that a cache holds.

    Where they coincide with the slide's own JPEGs, those are copied as they are, whatever
    ``spec.jpeg_quality`` says: to compress them again would lose once more.

    Args:
        slide: the slide of the plan.
        plan: which tiles.
        first: the number of the tile to begin with.
        unreadable: how many of those before it could not be read.
        threads: that read and compress at a time; the bytes do not depend on it.

    Yields:
        The number of the tile in the plan, and its bytes; None instead of them if it cannot be read.

    Raises:
        SlideReadError: more than a tenth of all tiles cannot be read.
    """
    for tile, result in enumerate(_encoded(slide, plan, first, threads), first):
        if not isinstance(result, SlideReadError):
            yield tile, result
            continue
        unreadable += 1
        check_unreadable(plan, unreadable, result)
        yield tile, None


def check_unreadable(plan: TilePlan, unreadable: int, last: SlideReadError) -> None:
    """Ends the reading of a slide of which too much is damaged.

    Raises:
        SlideReadError: more than a tenth of the tiles wanted cannot be read.
    """
    if unreadable > MAX_UNREADABLE * len(plan):
        raise SlideReadError(
            f"more than {MAX_UNREADABLE:.0%} of the {len(plan)} tiles wanted cannot be read; the last: {last}"
        ) from last


def encode_tile(slide: Slide, plan: TilePlan, tile: int) -> bytes:
    """Reads one tile of a plan, never copying the slide's own JPEG, as the bytes that a cache holds.

    Raises:
        SlideReadError: the slide is damaged there.
    """
    spec = plan.spec
    x, y = plan.origins_level0[tile].tolist()
    size_px = (spec.tile_size_px, spec.tile_size_px)
    return tile_codec(spec).encode(slide.read((x, y), size_px, spec.mpp, spec.mpp_tolerance))


def _encoded(slide: Slide, plan: TilePlan, first: int, threads: int) -> Iterator[bytes | SlideReadError]:
    """The bytes of each tile, or why it cannot be read."""
    spec = plan.spec
    encode = tile_codec(spec).encode
    copies = None
    if spec.codec == "jpeg":
        copies = slide.copy_tiles(plan.origins_level0, spec.tile_size_px, spec.mpp, spec.mpp_tolerance, first)
    if copies is None:
        yield from slide.map_tiles(
            encode, plan.origins_level0, spec.tile_size_px, spec.mpp, spec.mpp_tolerance, first, threads
        )
        return
    for tile, copied in enumerate(copies, first):
        if copied is not None:
            yield copied
            continue
        try:
            yield encode_tile(slide, plan, tile)
        except SlideReadError as error:
            yield error


def stream_tiles(slide: Slide, plan: TilePlan, batch_size: int = 64, threads: int = 1) -> Iterator[TileBatch]:
    """Yields the tiles of a plan exactly as a cache would, compression included, in bounded memory.

    Args:
        slide: the slide of the plan.
        plan: which tiles.
        batch_size: tiles in a batch.
        threads: that read and compress at a time.

    Raises:
        SlideReadError: more than a tenth of all tiles cannot be read.
    """
    decode = tile_codec(plan.spec).decode
    tiles: list[int] = []
    pixels: list[NDArray[np.uint8]] = []
    unreadable = 0
    for tile, payload in encode_tiles(slide, plan, threads=threads):
        try:
            if payload is not None:
                pixels.append(decode(payload))
                tiles.append(tile)
            else:
                unreadable += 1
        except CacheCorruptError:  # copied from a slide that is damaged within the JPEG
            try:
                pixels.append(decode(encode_tile(slide, plan, tile)))
                tiles.append(tile)
            except SlideReadError as error:
                unreadable += 1
                check_unreadable(plan, unreadable, error)
        if pixels and (len(pixels) == batch_size or tile == len(plan) - 1):
            yield TileBatch(plan.origins_level0[tiles], plan.tissue_fraction[tiles], np.stack(pixels))
            tiles, pixels = [], []


def write_tiles(
    slide: Slide,
    plan: TilePlan,
    cache_dir: Path,
    slide_id: str,
    threads: int = 1,
    check: Callable[[], object] | None = None,
) -> SlideCache:
    """Reads the tiles of a plan into a cache, or continues where a killed run stopped.

    The caller holds :func:`~slidetl.cache.lock.slide_lock`; a cache that is there is replaced.

    Args:
        slide: the slide of the plan.
        plan: which tiles; at least one.
        cache_dir: the folder of all caches.
        slide_id: the name of the cache.
        threads: that read and compress at a time; the cache does not depend on it.
        check: called before every commit, in another thread; what it raises ends the writing.

    Raises:
        SlideReadError: more than a tenth of all tiles cannot be read.
        OSError: the cache cannot be written.
    """
    header = CacheHeader(
        slide_id=slide_id,
        fingerprint=plan.info.fingerprint,
        vendor=plan.info.vendor,
        size_level0=plan.info.size_level0,
        mpp_level0=plan.info.mpp_level0,
        mpp_read=plan.mpp_read,
        extent_level0=plan.extent_level0,
        spec=plan.spec,
        tiles_without_tissue=plan.tiles_without_tissue,
        **plan.left_out,
    )
    with CacheWriter(
        cache_dir,
        header,
        plan.origins_level0,
        plan.tissue_fraction,
        plan.quality,
        plan.thumbnail,
        plan.tissue_mask,
        check,
    ) as writer:
        for tile, payload in encode_tiles(slide, plan, writer.next_tile, writer.unreadable, threads):
            writer.add(tile, payload)
        return writer.finish()


def tile_slide(
    source: SlideSource,
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool = False,
    threads: int = 1,
    preview: bool = False,
) -> LedgerRow:
    """Makes the cache of one slide, or keeps the one that is there for the same slide and ``spec``.

    A slide that cannot be tiled does not raise: its row says ``failed``, and why. What was begun for it is
    kept for the next run if the machine failed (a full disk), and thrown away if the slide did. A finished
    cache stays in either case, and only the row tells that it is not of this slide.

    Args:
        source: the slide.
        cache_dir: the folder of all caches.
        spec: which tiles.
        overwrite: replace a cache of other parameters or of another slide, instead of failing.
        threads: that read and compress at a time; the cache does not depend on it.
        preview: draw ``previews/<slide_id>.png``, :mod:`slidetl.cache.preview`.
    """
    started = time.monotonic()
    picture = cache_dir / "previews" / f"{source.slide_id}.png" if preview else None
    row = LedgerRow(source.slide_id, str(source.path), FAILED)
    try:
        with slide_lock(cache_dir, source.slide_id) as lock:
            try:
                with open_slide(source.path, source.mpp_override, spec.icc) as slide:
                    row = _described(row, slide.info)
                    row = _tile_open_slide(
                        row, slide, cache_dir, spec, overwrite, threads, lock.check, picture
                    )
            except SlideError:
                discard(cache_dir, source.slide_id)
                raise
    except (SlidetlError, OSError) as error:
        row = replace(row, status=FAILED, reason=describe_write_error(error, cache_dir))
    return _stamped(row, started)


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
        preview: draw ``previews/<slide_id>.png`` of each, :mod:`slidetl.cache.preview`.
        on_done: called with each row, in the order in which slides are done.

    Returns:
        The rows, in the order of ``sources``.

    Raises:
        UsageError: two sources have the same identifier.
        CacheMismatchError: the cache holds some of these slides tiled with other parameters, and
            ``overwrite`` is not set. Nothing was done then.
        CacheError: the ledger cannot be read or written.
    """

    def start() -> Iterator[LedgerRow]:
        if workers:
            return _in_processes(sources, cache_dir, spec, overwrite, preview, workers)
        return (tile_slide(source, cache_dir, spec, overwrite, preview=preview) for source in sources)

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
    """Checks that the slides can be tiled into a cache, has it done, and writes the ledger meanwhile.

    It is :func:`tile_slides` for whoever does the work elsewhere: ``start`` begins it, and a row comes as its
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
    """Makes durable, at once, the many small caches that were written without waiting for the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor):
            raise CacheError(f"{folder}: cannot be made durable: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


def _tile_open_slide(
    row: LedgerRow,
    slide: Slide,
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool,
    threads: int,
    check: Callable[[], object],
    preview: Path | None,
) -> LedgerRow:
    kept = _kept_cache(slide.info, cache_path(cache_dir, row.slide_id), spec, overwrite)
    if kept is not None:
        if preview is not None and not preview.exists():
            _draw(plan_tiles(slide, spec, threads), row.slide_id, preview)
        discard(cache_dir, row.slide_id)
        return _used(row, kept)

    plan = plan_tiles(slide, spec, threads)
    left_out = plan.left_out
    row = replace(
        row,
        mpp_x=plan.mpp_read[0],
        mpp_y=plan.mpp_read[1],
        tiles_without_tissue=plan.tiles_without_tissue,
        tiles_pen=left_out["tiles_pen"],
        tiles_fold=left_out["tiles_fold"],
        tiles_air=left_out["tiles_air"],
        tiles_out_of_focus=left_out.get("tiles_out_of_focus", 0),
    )
    if preview is not None:
        _draw(plan, row.slide_id, preview)
    if not len(plan):
        discard(cache_dir, row.slide_id, finished=True)
        if any(left_out.values()):
            reason = "no tile with tissue is good enough"
        elif plan.tiles_without_tissue:
            reason = f"no tile has {spec.min_tissue:.0%} tissue"
        else:
            reason = "the slide is smaller than one tile"
        return replace(row, status=EXCLUDED, reason=reason)
    return _used(row, write_tiles(slide, plan, cache_dir, row.slide_id, threads, check))


def _draw(plan: TilePlan, slide_id: str, path: Path) -> None:
    from slidetl.cache.preview import draw_preview

    draw_preview(
        path,
        plan.thumbnail,
        plan.tissue_mask,
        plan.origins_level0,
        plan.left_out_level0,
        plan.extent_level0,
        plan.info.mpp_level0,
        slide_id,
    )


def _kept_cache(info: SlideInfo, path: Path, spec: TileSpec, overwrite: bool) -> SlideCache | None:
    """The finished cache of this very slide; None if it is to be made (again)."""
    try:
        header = read_header(path)
        if header.spec != spec:
            raise CacheMismatchError(f"{path}: {describe_difference(header.spec, spec)}")
        if (header.fingerprint, header.mpp_level0) != (info.fingerprint, info.mpp_level0):
            raise CacheMismatchError(
                f"{path}: made from another slide, or from this one at another spacing of level 0; "
                "replace it with --overwrite, or tile into another folder"
            )
        # Nobody waited for the disk when it was written, so after a power cut it may not be whole.
        return None if is_small(path) and not is_intact(path) else SlideCache.open(path, spec)
    except CacheMissingError:
        if not path.exists() or overwrite:
            return None
        # A cache gets its name when it is whole, so this is not ours, or was tampered with.
        raise CacheMismatchError(
            f"{path}: in the way, and not a finished tile cache; move it, or replace it with --overwrite"
        ) from None
    except (CacheMismatchError, CacheCorruptError):
        if overwrite:
            return None
        raise


def _refuse_other_spec(sources: Sequence[SlideSource], cache_dir: Path, spec: TileSpec) -> None:
    others: list[tuple[Path, TileSpec]] = []
    for source in sources:
        path = cache_path(cache_dir, source.slide_id)
        try:
            header = read_header(path)
        except (CacheMissingError, CacheCorruptError):
            continue  # what is damaged fails by itself, when its turn comes
        if header.spec != spec:
            others.append((path, header.spec))
    if others:
        path, cached = others[0]
        raise CacheMismatchError(
            f"{path}: {describe_difference(cached, spec)}; so are {len(others)} slides in all: "
            "tile into another folder with --cache, or replace them with --overwrite"
        )


def _read_thumbnail(slide: Slide, mpp: float, tile_um: float) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The whole slide at a coarse spacing, and which of its pixels ``[h, w]`` could not be read.

    Where it cannot be read at once, it is read in squares as wide as a tile.
    """
    info = slide.info
    width, height = (
        # The allowance keeps a size that fits exactly from being one more when the product rounds.
        math.ceil(size * m / mpp - 1e-6)
        for size, m in zip(info.size_level0, info.mpp_level0, strict=True)
    )
    is_unreadable = np.zeros((height, width), bool)
    try:
        return slide.read((0, 0), (width, height), mpp, mpp_tolerance=0.0), is_unreadable
    except SlideReadError as error:
        whole_error = error
    image = np.empty((height, width, 3), np.uint8)
    image[:] = info.background_rgb
    side = max(1, round(tile_um / mpp))
    squares = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    lost = 0
    for x, y in squares:
        size = (min(side, width - x), min(side, height - y))
        origin = (round(x * mpp / info.mpp_level0[0]), round(y * mpp / info.mpp_level0[1]))
        try:
            image[y : y + size[1], x : x + size[0]] = slide.read(origin, size, mpp, mpp_tolerance=0.0)
        except SlideReadError:
            is_unreadable[y : y + size[1], x : x + size[0]] = True
            lost += 1
            if lost > MAX_UNREADABLE * len(squares):
                raise SlideReadError(
                    f"more than {MAX_UNREADABLE:.0%} of the slide cannot be read; first: {whole_error}"
                ) from whole_error
    return image, is_unreadable


def _described(row: LedgerRow, info: SlideInfo) -> LedgerRow:
    width, height = info.size_level0
    return replace(row, vendor=info.vendor, width=width, height=height, fingerprint=info.fingerprint)


def _used(row: LedgerRow, cache: SlideCache) -> LedgerRow:
    return replace(
        row,
        status=USED,
        tiles=len(cache),
        tiles_without_tissue=cache.header.tiles_without_tissue,
        tiles_pen=cache.header.tiles_pen,
        tiles_fold=cache.header.tiles_fold,
        tiles_air=cache.header.tiles_air,
        tiles_out_of_focus=cache.header.tiles_out_of_focus,
        tiles_unreadable=cache.header.tiles_unreadable,
        mpp_x=cache.mpp_read[0],
        mpp_y=cache.mpp_read[1],
    )


def _stamped(row: LedgerRow, started: float) -> LedgerRow:
    return replace(
        row,
        seconds=round(time.monotonic() - started, 3),
        host=socket.gethostname(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@dataclass
class _Worker:
    """A process that tiles one slide after another, and what it is at."""

    process: SpawnProcess
    connection: Connection
    source: SlideSource
    started: float


def _in_processes(
    sources: Sequence[SlideSource],
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool,
    preview: bool,
    workers: int,
) -> Generator[LedgerRow, None, None]:
    """Rows as slides are done. Spawned, not forked: OpenSlide and zarr hold threads and locks."""
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(sources))
    count = min(workers, len(sources))
    threads = workers // max(1, count)
    busy: dict[Connection, _Worker] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, os.getpid(), cache_dir, spec, overwrite, threads, preview),
            daemon=True,
        )
        process.start()
        theirs.close()  # else its death would not show as the end of the pipe
        worker = _Worker(process, ours, waiting[-1], time.monotonic())
        busy[ours] = worker
        give(worker)

    def give(worker: _Worker) -> None:
        worker.source, worker.started = waiting.pop(), time.monotonic()
        # If it has just died, the end of its pipe tells so below, and the slide is known.
        with contextlib.suppress(BrokenPipeError):
            worker.connection.send(worker.source)

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
                    ready.close()
                    worker.process.join()
                    row = LedgerRow(worker.source.slide_id, str(worker.source.path), FAILED)
                    row = replace(row, reason=_cause_of_death(worker.process.exitcode))
                    yield _stamped(row, worker.started)
                    if waiting:
                        start()
                    continue
                if waiting:
                    give(worker)
                else:
                    del busy[ready]
                    ready.close()  # the worker sees the end and returns
                    worker.process.join()
    finally:
        for worker in busy.values():
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"the process that tiled it was ended by {name}{hint}"
    return f"the process that tiled it ended with exit code {exitcode}"


def _work(
    connection: Connection,
    parent: int,
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool,
    threads: int,
    preview: bool,
) -> None:
    """The life of a worker."""
    # Without this, workers of a killed run would go on and hold the locks of their slides.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    while True:
        try:
            source = connection.recv()
        except EOFError:
            return
        connection.send(tile_slide(source, cache_dir, spec, overwrite, threads, preview))
