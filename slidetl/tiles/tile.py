"""Tiles one slide into its cache."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from slidetl.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissingError,
    SlideError,
    SlidetlError,
    UsageError,
)
from slidetl.slides import Slide, SlideInfo, open_slide
from slidetl.tiles.cut import encode_tiles
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, LedgerRow
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.plan import TilePlan, plan_tiles
from slidetl.tiles.store import (
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
from slidetl.tiles.writer import CacheWriter


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


def write_tiles(
    slide: Slide,
    plan: TilePlan,
    cache_dir: Path,
    slide_id: str,
    threads: int = 1,
    check: Callable[[], object] | None = None,
) -> SlideCache:
    """Reads the tiles of a plan into a cache, or continues where a killed run stopped.

    The caller holds :func:`~slidetl.tiles.lock.slide_lock`; a cache that is there is replaced.

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
        preview: draw ``previews/<slide_id>.png``, :mod:`slidetl.tiles.preview`.
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
    return stamped(row, started)


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
    from slidetl.tiles.preview import draw_preview

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
    """Opens the finished cache of this very slide; returns None if it must be made (again)."""
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


def stamped(row: LedgerRow, started: float) -> LedgerRow:
    """Adds the time, the host and the duration since ``started`` (monotonic seconds) to a row."""
    return replace(
        row,
        seconds=round(time.monotonic() - started, 3),
        host=socket.gethostname(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
