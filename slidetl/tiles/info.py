"""Summarises a cache folder, without reading a tile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidetl.errors import CacheError
from slidetl.tiles.lock import dead_leases
from slidetl.tiles.store import FEATURES, SlideCache, groups


@dataclass(frozen=True)
class SlideSummary:
    """One slide's cache.

    Attributes:
        slide_id: its identifier.
        tiles: their number.
        bytes: on disk.
        mpp_read: spacing of the tiles along x and y, micrometres per pixel; None if it cannot be opened.
        spec: index of its specification in :attr:`CacheInfo.specs`; -1 if it cannot be opened.
        features: names of the stored embeddings.
        problem: reason if it cannot be opened; empty if it can.
    """

    slide_id: str
    tiles: int
    bytes: int
    mpp_read: tuple[float, float] | None
    spec: int
    features: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class CacheInfo:
    """A cache folder.

    Attributes:
        slides: by name.
        specs: all distinct specifications, as :meth:`slidetl.tiles.grid.TileSpec.to_dict`.
        unfinished: slides begun but not finished.
        stale_leases: slides with a lease left by a dead process of this machine.
        tiles: of all slides.
        bytes: of all slides.
    """

    slides: tuple[SlideSummary, ...]
    specs: tuple[dict[str, Any], ...]
    unfinished: tuple[str, ...]
    stale_leases: tuple[str, ...]
    tiles: int
    bytes: int


def cache_info(cache_dir: Path) -> CacheInfo:
    """Summarises a cache folder. If a slide cannot be opened, its summary has the reason.

    Raises:
        CacheMissingError: there is no such folder.
    """
    slides: list[SlideSummary] = []
    specs: list[dict[str, Any]] = []
    for path in groups(cache_dir):
        slide_id = path.name.removesuffix(".zarr")
        size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
        features = tuple(sorted(node.parent.name for node in (path / FEATURES).glob("*/zarr.json")))
        try:
            cache = SlideCache.open(path)
        except CacheError as error:
            slides.append(SlideSummary(slide_id, 0, size, None, -1, features, str(error)))
            continue
        spec = cache.spec.to_dict()
        if spec not in specs:
            specs.append(spec)
        slides.append(SlideSummary(slide_id, len(cache), size, cache.mpp_read, specs.index(spec), features))
    building = cache_dir / ".building"
    return CacheInfo(
        slides=tuple(slides),
        specs=tuple(specs),
        unfinished=tuple(sorted(path.name for path in building.iterdir())) if building.is_dir() else (),
        stale_leases=dead_leases(cache_dir),
        tiles=sum(slide.tiles for slide in slides),
        bytes=sum(slide.bytes for slide in slides),
    )
