"""Tiles one slide into its cache."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from slidetl.errors import (
    CacheCorruptError,
    CacheMismatchError,
    CacheMissingError,
    SlideError,
    SlideReadError,
    SlidetlError,
    UsageError,
)
from slidetl.slides import Slide, open_slide
from slidetl.tiles.cut import encode_tile, encode_tiles
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, LedgerRow, file_state
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.patches import PatchPlan, PreparedSeries, notes_on_series, plan_patches, prepare_series
from slidetl.tiles.plan import MANY_PLACES, TilePlan, notes_on, plan_tiles
from slidetl.tiles.preview import draw_patches, draw_preview
from slidetl.tiles.regions import Regions, RegionSource, read_regions
from slidetl.tiles.store import (
    CacheHeader,
    SlideCache,
    cache_path,
    describe_difference,
    describe_write_error,
    discard,
    is_intact,
    is_small,
    preview_path,
    read_header,
)
from slidetl.tiles.writer import CacheWriter
from slidetl.volumes import Series, open_series
from slidetl.volumes.frame import Triple, VolumeFrame


@dataclass(frozen=True)
class SlideSource:
    """A slide to be tiled.

    Attributes:
        slide_id: the name of its cache.
        path: its file.
        mpp_override: micrometres per level-0 pixel, if the file has none.
        mpp_replace: micrometres per level-0 pixel, instead of the file's.
        regions: the annotations to which its tiles are confined; None for the whole slide.
        location_mm: patient coordinates ``(x, y, z)`` of the centre of the only patch of a CT series; None
            for all of it.

    Raises:
        UsageError: ``slide_id`` cannot be the name of a folder.
    """

    slide_id: str
    path: Path
    mpp_override: float | None = None
    mpp_replace: float | None = None
    regions: RegionSource | None = None
    location_mm: Triple | None = None

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
    regions: str = "",
) -> SlideCache:
    """Reads the tiles of a plan into a cache, or resumes a killed run.

    The caller holds :func:`~slidetl.tiles.lock.slide_lock`; an existing cache is replaced.

    Args:
        slide: the slide of the plan.
        plan: the tiles; at least one.
        cache_dir: the folder of all caches.
        slide_id: the name of the cache.
        threads: parallel reads and compressions; the cache does not depend on it.
        check: called before every commit, in another thread; its exception ends the writing.
        regions: the digest of the plan's regions, if it has any.

    Raises:
        SlideReadError: more than a tenth of all tiles cannot be read.
        OSError: the cache cannot be written.
    """
    info = plan.info
    header = CacheHeader(
        slide_id=slide_id,
        fingerprint=info.fingerprint,
        vendor=info.vendor,
        size_level0=info.size_level0,
        mpp_level0=info.mpp_level0,
        mpp_read=plan.mpp_read,
        extent_level0=plan.extent_level0,
        spec=plan.spec,
        regions=regions,
        corner_level0=info.corner_level0,
        orientation=info.orientation,
        **plan.left_out,
    )
    with CacheWriter(cache_dir, header, plan, check) as writer:
        for tile, payload in encode_tiles(slide, plan, writer.next_tile, writer.unreadable, threads):
            writer.add(tile, payload)
        return writer.finish()


def write_patches(
    plan: PatchPlan,
    series: Series,
    cache_dir: Path,
    slide_id: str,
    threads: int = 1,
    check: Callable[[], object] | None = None,
    location_mm: Triple | None = None,
) -> SlideCache:
    """Cuts the patches of a plan into a cache, or resumes a killed run; see :func:`write_tiles`.

    Args:
        plan: the patches; at least one.
        series: the series of the plan.
        cache_dir: the folder of all caches.
        slide_id: the name of the cache.
        threads: parallel compressions; the cache does not depend on it.
        check: called before every commit, in another thread; its exception ends the writing.
        location_mm: the location of the plan, if it has one.

    Raises:
        OSError: the cache cannot be written.
    """
    mpp = _in_plane_um(series.frame)
    extent = [plan.spec.tile_size_px * plan.spec.mpp / of for of in mpp]
    header = CacheHeader(
        slide_id=slide_id,
        fingerprint=series.fingerprint,
        vendor="CT",
        size_level0=series.frame.size_voxel[:2],
        mpp_level0=mpp,
        mpp_read=(plan.spec.mpp, plan.spec.mpp),
        extent_level0=(extent[0], extent[1]),
        spec=plan.spec,
        tiles_without_tissue=plan.patches_without_mask,
        frame=plan.volume.frame,
        location_mm=location_mm,
    )
    with CacheWriter(cache_dir, header, plan, check) as writer:
        for number, payload in enumerate(plan.encode(writer.next_tile, threads), writer.next_tile):
            writer.add(number, payload)
        return writer.finish()


def _in_plane_um(frame: VolumeFrame) -> tuple[float, float]:
    return 1000 * frame.spacing_mm[0], 1000 * frame.spacing_mm[1]


def tile_slide(
    source: SlideSource,
    cache_dir: str | Path,
    spec: TileSpec,
    overwrite: bool = False,
    threads: int = 1,
    preview: bool = False,
) -> LedgerRow:
    """Makes the cache of one slide, or keeps an existing one of the same slide and ``spec``.

    If a slide cannot be tiled, its row has status ``failed`` and the reason. The next run resumes the partial
    work if the machine failed (a full disk); if the slide did, the work is deleted. A finished cache stays in
    either case, and only the row tells if it is not of this slide.

    Args:
        source: the slide.
        cache_dir: the folder of all caches.
        spec: specification of the tiles.
        overwrite: replace a cache of other parameters or of another slide, instead of failing.
        threads: parallel reads and compressions; the cache does not depend on it.
        preview: draw ``previews/<slide_id>.png``, :mod:`slidetl.tiles.preview`.

    Returns:
        The outcome. It is not written to ``ledger.csv``; that is left to ``slidetl tile``. Nothing that is
        wrong with the slide, the options or the disk is raised: it is the ``reason`` of a row ``failed``.
    """
    started, cache_dir = time.monotonic(), Path(cache_dir)
    picture = preview_path(cache_dir, source.slide_id) if preview else None
    row = LedgerRow(source.slide_id, str(source.path), FAILED)
    try:
        with slide_lock(cache_dir, source.slide_id) as lock:
            size, modified = file_state(source.path) or (0, 0.0)
            row = replace(row, bytes=size, modified=modified)
            try:
                if spec.is_volume:
                    series = _open_series(source.path, modified)
                    row = _described(row, series)
                    row = _tile_open_series(
                        row, series, source, cache_dir, spec, overwrite, threads, lock.check, picture
                    )
                    return stamped(row, started)
                with open_slide(
                    *(source.path, source.mpp_override, spec.icc),
                    mpp_replace=source.mpp_replace,
                    channels=spec.channels,
                ) as slide:
                    info, (width, height) = slide.info, slide.info.size_level0
                    row = replace(row, vendor=info.vendor, fingerprint=info.fingerprint)
                    row = replace(row, width=width, height=height, mpp_level0=max(info.mpp_level0))
                    row = _tile_open_slide(
                        row, slide, source.regions, cache_dir, spec, overwrite, threads, lock.check, picture
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
    annotated: RegionSource | None,
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool,
    threads: int,
    check: Callable[[], object],
    preview: Path | None,
) -> LedgerRow:
    path = cache_path(cache_dir, row.slide_id)
    regions, doubts, digest = None, [], ""
    if annotated is not None and annotated.path is not None:
        regions = read_regions(annotated.path, annotated.options, slide.info.viewer, slide.info.vendor)
        doubts, digest = list(regions.notes), regions.digest
        row = replace(row, regions=f"{annotated.path.name} {digest[:12]}")
    elif annotated is not None and annotated.options.missing == "whole":
        doubts = ["no file of annotations, tiled whole"]
    elif annotated is not None:
        if path.exists() and not overwrite:
            raise CacheMismatchError(
                f"{path}: its slide has no file of annotations; remove it with --overwrite"
            )
        discard(cache_dir, row.slide_id, finished=True)
        preview_path(cache_dir, row.slide_id).unlink(missing_ok=True)
        return replace(row, status=EXCLUDED, reason="no file of annotations")
    info = slide.info
    kept = _kept_cache(path, info.fingerprint, info.mpp_level0, spec, digest, None, overwrite)
    if kept is not None and not (
        (kept.header.tiles_unreadable or kept.areas_unreadable)
        and _is_readable_now(slide, kept, threads, regions)
    ):
        if preview is not None and not preview.exists():
            draw_preview(preview, plan_tiles(slide, spec, threads, regions), row.slide_id)
        discard(cache_dir, row.slide_id)
        is_large = len(kept) + kept.header.tiles_without_tissue >= MANY_PLACES
        mask = kept.tissue_mask.mask if is_large else None
        notes = notes_on(slide.info, spec, mask, kept.areas_unreadable)
        return replace(_used(row, kept), note="; ".join([*notes, *doubts]))

    plan = plan_tiles(slide, spec, threads, regions)
    row = replace(row, mpp_x=plan.mpp_read[0], mpp_y=plan.mpp_read[1], **plan.left_out)
    row = replace(row, note="; ".join([*plan.notes, *doubts]))
    preview_path(cache_dir, row.slide_id).unlink(missing_ok=True)  # of an earlier tiling
    if preview is not None:
        draw_preview(preview, plan, row.slide_id)
    if not len(plan):
        discard(cache_dir, row.slide_id, finished=True)
        return replace(row, status=EXCLUDED, reason=plan.describe_empty(regions))
    return _used(row, write_tiles(slide, plan, cache_dir, row.slide_id, threads, check, digest))


def _described(row: LedgerRow, series: Series) -> LedgerRow:
    """Adds the metadata of a series to its row, and doubts about it."""
    width, height, _ = series.frame.size_voxel
    return replace(
        row,
        vendor="CT",
        fingerprint=series.fingerprint,
        mpp_level0=max(_in_plane_um(series.frame)),
        width=width,
        height=height,
        note="; ".join(series.notes),
    )


def _tile_open_series(
    row: LedgerRow,
    series: Series,
    source: SlideSource,
    cache_dir: Path,
    spec: TileSpec,
    overwrite: bool,
    threads: int,
    check: Callable[[], object],
    preview: Path | None,
) -> LedgerRow:
    path = cache_path(cache_dir, row.slide_id)
    mpp = _in_plane_um(series.frame)
    kept = _kept_cache(path, series.fingerprint, mpp, spec, "", source.location_mm, overwrite)
    if kept is not None and (preview is None or preview.exists()):
        discard(cache_dir, row.slide_id)
        return _used_series(row, series, kept)
    plan = plan_patches(series, spec, source.location_mm, _held if source.location_mm else prepare_series)
    preview_path(cache_dir, row.slide_id).unlink(missing_ok=True)  # of an earlier tiling
    if preview is not None:
        draw_patches(preview, plan, row.slide_id)
    if kept is not None:
        discard(cache_dir, row.slide_id)
        return _used_series(row, series, kept)
    row = replace(row, mpp_x=spec.mpp, mpp_y=spec.mpp, tiles_without_tissue=plan.patches_without_mask)
    row = replace(row, note="; ".join(plan.notes))
    if not len(plan):
        discard(cache_dir, row.slide_id, finished=True)
        reason = f"{plan.describe_empty()}; --mask chooses another part, or none"
        return replace(row, status=EXCLUDED, reason=reason)
    made = write_patches(plan, series, cache_dir, row.slide_id, threads, check, source.location_mm)
    return _used(row, made)


def _used_series(row: LedgerRow, series: Series, cache: SlideCache) -> LedgerRow:
    """Notes on a kept cache what the plan of its patches would."""
    about = (cache.header.location_mm, cache.origins_voxel, cache.overview_mask, cache.overview_mm)
    return _used(replace(row, note="; ".join(notes_on_series(series, cache.spec, *about))), cache)


@lru_cache(maxsize=1)
def _open_series(path: Path, modified: float) -> Series:
    """Opens a series; many locations in it are cut one after the other."""
    return open_series(path)


@lru_cache(maxsize=1)
def _held(series: Series, spec: TileSpec) -> PreparedSeries:
    return prepare_series(series, spec)


def release_series() -> None:
    """Releases the memory of the last series."""
    _open_series.cache_clear()
    _held.cache_clear()


def _place(location_mm: Triple | None) -> str:
    return "all" if location_mm is None else f"the location {location_mm} mm"


def _is_readable_now(slide: Slide, cache: SlideCache, threads: int, regions: Regions | None) -> bool:
    """Tells if any tile missing in a cache as unreadable, or any area unreadable then, can be read now."""
    plan = plan_tiles(slide, cache.spec, threads, regions)
    if plan.areas_unreadable < cache.areas_unreadable:
        return True
    kept = set(map(tuple, cache.origins_level0.tolist()))
    lost = [n for n, origin in enumerate(map(tuple, plan.origins_level0.tolist())) if origin not in kept]
    if len(lost) < cache.header.tiles_unreadable:
        return True  # the thumbnail is whole again, and shows that some are not tissue
    for tile in lost:
        with contextlib.suppress(SlideReadError):
            encode_tile(slide, plan, tile)
            return True
    return False


def _kept_cache(
    path: Path,
    fingerprint: str,
    mpp_level0: tuple[float, float],
    spec: TileSpec,
    regions: str,
    location_mm: Triple | None,
    overwrite: bool,
) -> SlideCache | None:
    """Opens the finished cache of this very slide; returns None if it must be made (again)."""
    try:
        header = read_header(path)
        if header.spec != spec:
            raise CacheMismatchError(f"{path}: {describe_difference(header.spec, spec)}")
        if header.imported:
            raise CacheMismatchError(
                f"{path}: features imported from {header.imported} are here; tile into another folder, or "
                "replace them with --overwrite"
            )
        if (header.fingerprint, header.mpp_level0) != (fingerprint, mpp_level0):
            raise CacheMismatchError(
                f"{path}: made from another slide, or from this one at another spacing of level 0; "
                "replace it with --overwrite, or tile into another folder"
            )
        if header.regions != regions:
            before = "other regions" if header.regions and regions else "regions" if header.regions else "all"
            raise CacheMismatchError(
                f"{path}: made from {before} of this slide; replace it with --overwrite, or tile into "
                "another folder"
            )
        if header.location_mm != location_mm:
            raise CacheMismatchError(
                f"{path}: made at {_place(header.location_mm)} of this series, wanted {_place(location_mm)}; "
                "replace it with --overwrite, or tile into another folder"
            )
        # Its writing did not wait for the disk, so after a power cut it may be incomplete.
        return None if is_small(path) and not is_intact(path) else SlideCache.open(path, spec)
    except CacheMissingError:
        if not path.exists() or overwrite:
            return None
        # A cache gets its name once complete, so this is foreign, or was tampered with.
        raise CacheMismatchError(
            f"{path}: in the way, and not a finished tile cache; move it, or replace it with --overwrite"
        ) from None
    except (CacheMismatchError, CacheCorruptError):
        if overwrite:
            return None
        raise


def _used(row: LedgerRow, cache: SlideCache) -> LedgerRow:
    about = vars(cache.header)
    counts: dict[str, Any] = {name: about[name] for name in about if name.startswith("tiles_")}
    mpp_x, mpp_y = cache.mpp_read
    return replace(row, status=USED, tiles=len(cache), mpp_x=mpp_x, mpp_y=mpp_y, **counts)


def stamped(row: LedgerRow, started: float) -> LedgerRow:
    """Adds the time, the host and the duration since ``started`` (monotonic seconds) to a row."""
    return replace(
        row,
        seconds=round(time.monotonic() - started, 3),
        host=socket.gethostname(),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
