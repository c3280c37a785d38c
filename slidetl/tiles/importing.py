"""Stores features of other tools in a cache; a slide's group then has features and no tiles."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, CacheMismatchError, CacheMissingError
from slidetl.files import fsync_path
from slidetl.slides import SlideInfo, open_slide
from slidetl.tiles.features import (
    NOT_STATED,
    FeatureSource,
    read_features,
    read_source,
    record_path,
    write_features,
)
from slidetl.tiles.foreign import ForeignFeatures, read_foreign
from slidetl.tiles.ledger import USED, LedgerRow, file_state
from slidetl.tiles.lock import slide_lock
from slidetl.tiles.store import CacheHeader, SlideCache, building_path, cache_path, describe_difference
from slidetl.tiles.tile import stamped
from slidetl.tiles.writer import write_arrays, write_seal


@dataclass(frozen=True)
class ImportedSlide:
    """The outcome of one file.

    Attributes:
        row: for the ledger, if the slide has no tiles.
        source: the network behind the features.
        tiles: their number.
        is_new: False if the same features were there.
        notes: what is doubtful; one line each.
    """

    row: LedgerRow | None
    tiles: int
    source: FeatureSource
    is_new: bool
    notes: tuple[str, ...] = ()


def import_features(
    path: Path,
    cache_dir: Path,
    slide_id: str,
    name: str,
    *,
    slide: Path | None = None,
    mpp: float | None = None,
    backbone: str = "",
    overwrite: bool = False,
) -> ImportedSlide:
    """Stores the features of one file as ``features/<name>`` of a slide's cache.

    Without a cache of the slide, one without tiles is made. An existing one, tiled or imported, must have its
    tiles at the same places, in any order; features of its other networks stay.

    Args:
        path: the file, :func:`~slidetl.tiles.foreign.read_foreign`.
        cache_dir: the folder of all caches.
        slide_id: the slide.
        name: for the features.
        slide: path of the slide; if it is there, its content and spacing are recorded, and the coordinates
            are compared with its size. Without one, the file itself stands for the slide.
        mpp: spacing of level 0 from the manifest, micrometres per pixel, instead of the slide's.
        backbone: the network, where the file does not state it.
        overwrite: replace other features of this name.

    Raises:
        CacheCorruptError: the file is damaged or holds no features of tiles.
        CacheMismatchError: the cache has other tiles, is of another slide, or has features of another network
            under this name.
        SlideError: the slide is there, and cannot be read.
        UsageError: h5py is not installed, or the file is a pickle.
    """
    started = time.monotonic()
    found = read_foreign(path)
    notes = []
    info = None
    if slide is not None and slide.exists():
        # No pixel is read: the channel does not matter.
        with open_slide(slide, mpp_replace=mpp, channels="0") as opened:
            info = opened.info
    source = _source(found, backbone)
    if source.record and not record_path(cache_dir, source.record).exists():
        # An exported file goes to others, so it names no patients.
        notes.append(
            "of a network that a checkpoint trained, whose slides are not known here: nothing would show "
            f"that yours were kept from it; copy records/{source.record[:12]}... of the features' cache to "
            f"{cache_dir / 'records'}, and import them again"
        )
        source = replace(source, record="")
    if found.duplicates:
        notes.append(f"{found.duplicates} of {len(found.coords)} tiles lie at the place of another one")
    header, origins = _describe(found, slide_id, path, info)
    if header.imported == "stamp" and info is None:
        notes.append("coordinates count pixels of the tiles, as its file does not state the slide's spacing")
    try:
        cache = SlideCache.open(cache_path(cache_dir, slide_id))
    except CacheMissingError:
        cache = _write_group(cache_dir, header, origins)
    if (info is not None or found.header is not None) and cache.fingerprint != header.fingerprint:
        raise CacheMismatchError(
            f"{cache.path}: not of {info.path if info is not None else f'the slide of {path}'}, or imported "
            "without it; import into another folder"
        )
    _check_tiles(header, cache)
    order = _order(origins, cache)
    values = found.values[order]
    is_new = not _is_there(cache, name, source, values, overwrite)
    if is_new:
        write_features(cache, {name: (source, values)})
    size, modified = file_state(slide or path) or (0, 0.0)
    about = cache.header
    row = LedgerRow(
        slide_id,
        str(slide or path),
        USED,
        tiles=len(cache),
        mpp_x=about.mpp_read[0],
        mpp_y=about.mpp_read[1],
        mpp_level0=max(about.mpp_level0),
        vendor=about.vendor,
        width=about.size_level0[0],
        height=about.size_level0[1],
        fingerprint=about.fingerprint,
        note="; ".join((f"features imported from {found.tool}", *notes)),
        bytes=size,
        modified=modified,
    )
    ours = stamped(row, started) if about.imported else None
    return ImportedSlide(ours, len(cache), source, is_new, tuple(notes))


def _source(found: ForeignFeatures, backbone: str) -> FeatureSource:
    if found.source is not None:
        return found.source
    name = found.backbone if found.backbone != NOT_STATED else backbone or NOT_STATED
    if backbone and name != backbone:
        raise CacheMismatchError(f"the file is of {name}, --backbone says {backbone}; leave it out")
    return FeatureSource(name, "", "", (), (), precision=NOT_STATED)


def _describe(
    found: ForeignFeatures, slide_id: str, path: Path, info: SlideInfo | None
) -> tuple[CacheHeader, NDArray[np.int32]]:
    """Returns the header of a group for the features, and the corners ``[N, 2] int32`` of its tiles."""
    if found.header is not None:
        if info is not None and info.fingerprint != found.header.fingerprint:
            raise CacheMismatchError(f"{path}: its features are of another slide than {info.path}")
        return replace(found.header, slide_id=slide_id, imported=found.tool), _whole(found.coords)
    mpp_level0 = info.mpp_level0 if info is not None else (0.0, 0.0)
    size_level0 = info.size_level0 if info is not None else found.size_level0
    coords, extent = found.coords, (found.extent_level0,) * 2
    if found.tool == "stamp":  # micrometres, to pixels of level 0, or else of the tiles
        mpp_level0 = mpp_level0 if info is not None else (found.mpp, found.mpp)
        if not all(mpp_level0):
            raise CacheCorruptError(
                f"{path}: its coords are micrometres, and neither the size of its tiles nor the slide's "
                "spacing is known; name the slides with --slides"
            )
        coords = coords / mpp_level0
        side_um = found.mpp * found.tile_size_px
        extent = (side_um / mpp_level0[0], side_um / mpp_level0[1])
    if info is not None and found.size_level0 not in ((0, 0), info.size_level0):
        raise CacheMismatchError(
            f"{path}: its slide has {found.size_level0} pixels, {info.path} has {info.size_level0}: "
            "another one"
        )
    limit = size_level0 if all(size_level0) else (2**31, 2**31)
    outside = ((coords < -np.asarray(extent)) | (coords >= limit)).any(axis=1)
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        raise CacheMismatchError(
            f"{path}: coords of row {row}, {coords[row].tolist()}, lie outside the slide of {limit} pixels"
        )
    mpp_read, side_px = (found.mpp, found.mpp), found.tile_size_px
    if side_px and all(extent) and info is not None:
        mpp_read = (mpp_level0[0] * extent[0] / side_px, mpp_level0[1] * extent[1] / side_px)
    header = CacheHeader(
        slide_id=slide_id,
        fingerprint=info.fingerprint if info is not None else found.fingerprint,
        vendor=info.vendor if info is not None else NOT_STATED,
        size_level0=size_level0,
        mpp_level0=mpp_level0,
        mpp_read=mpp_read,
        extent_level0=extent,
        spec=found.spec,
        imported=found.tool,
    )
    return header, _whole(coords)


def _whole(coords: NDArray[np.float64]) -> NDArray[np.int32]:
    return np.round(coords).astype(np.int32)


def _check_tiles(header: CacheHeader, cache: SlideCache) -> None:
    """Refuses features of a slide or of tiles of another size than a cache's; 0 is not stated."""
    for what in ("size_level0", "extent_level0"):
        theirs, ours = getattr(header, what), getattr(cache.header, what)
        if all((*theirs, *ours)) and not np.allclose(theirs, ours, rtol=0, atol=1):  # tools round it
            raise CacheMismatchError(
                f"{cache.path}: its {'slide has' if what == 'size_level0' else 'tiles have'} {ours} level-0 "
                f"pixels, those of the file {theirs}; import into another folder"
            )
    if not (header.spec.foreign or cache.spec.foreign) and header.spec != cache.spec:
        raise CacheMismatchError(
            f"{cache.path}: {describe_difference(cache.spec, header.spec)}; import into another folder"
        )


def _order(origins: NDArray[np.int32], cache: SlideCache) -> NDArray[np.intp]:
    """Finds the row of each tile of a cache in a file; refuses other tiles."""
    mine, theirs = (np.lexsort(places.T[::-1]) for places in (cache.origins_level0, origins))
    if len(mine) != len(theirs) or not np.array_equal(cache.origins_level0[mine], origins[theirs]):
        raise CacheMismatchError(
            f"{cache.path}: {len(cache)} tiles are here, the file has {len(origins)} at other places; import "
            "them into another folder"
        )
    order = np.empty_like(mine)
    order[mine] = theirs
    return order


def _is_there(
    cache: SlideCache, name: str, source: FeatureSource, values: NDArray[np.float16], overwrite: bool
) -> bool:
    """Tells if the same features are stored; refuses others of the name."""
    try:
        stored = read_source(cache, name)
        is_same = replace(stored, record="") == replace(source, record="")
        if is_same and np.array_equal(read_features(cache, name), values):
            return source.record in ("", stored.record)  # else the record has been copied since
    except (CacheMissingError, CacheCorruptError):
        return False
    if not overwrite:
        raise CacheMismatchError(
            f"{cache.path}: other features {name!r} are there, of {stored.backbone}; give these another "
            "--name, or replace them with --overwrite"
        )
    return False


def _write_group(cache_dir: Path, header: CacheHeader, origins: NDArray[np.int32]) -> SlideCache:
    """Writes a slide's group without tiles; it appears whole or not at all."""
    target, building = cache_path(cache_dir, header.slide_id), building_path(cache_dir, header.slide_id)
    with slide_lock(cache_dir, header.slide_id) as lock:
        if target.exists():
            raise CacheMismatchError(f"{target}: in the way, and not a finished cache; move it away")
        shutil.rmtree(building, ignore_errors=True)
        group = building / "group"
        group.mkdir(parents=True)
        tissue = np.full(len(origins), np.nan, np.float32)
        arrays: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
            "origin_level0": (origins, {}),
            "tissue_fraction": (tissue, {}),
        }
        write_seal(group, header.to_attributes(), write_arrays(group, arrays))
        for path in (*group.rglob("*"), group):
            fsync_path(path)
        lock.check()
        group.rename(target)
        fsync_path(target.parent)
        shutil.rmtree(building)
    return SlideCache.open(target)
