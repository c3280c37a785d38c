"""The tiles of some slides with their stored features, patients, sites and grades."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.atlas.options import Selection
from slidetl.data.manifest import ManifestRow
from slidetl.data.study import CachedSlide, common_spec, find_slides, open_listed, read_study
from slidetl.errors import CacheCorruptError, UsageError
from slidetl.text import listed
from slidetl.tiles.features import FeatureSource, common_source, feature_checksum, read_features
from slidetl.tiles.store import SlideCache


@dataclass(frozen=True, eq=False)
class Collection:
    """Tiles of slides, numbered from 0 over all slides.

    Attributes:
        slides: with their lines of the manifest; without one, each is a patient of its own.
        features: name of the features.
        source: their network.
        has_manifest: False if patients, sites and grades are unknown.
    """

    slides: tuple[CachedSlide, ...]
    features: str
    source: FeatureSource
    has_manifest: bool

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first tile of each slide, and of all tiles: ``[S + 1]``."""
        return np.cumsum([0, *(len(slide.cache) for slide in self.slides)])

    @cached_property
    def slide_of(self) -> NDArray[np.int32]:
        """Number of the slide of each tile, ``[N]``."""
        return np.repeat(np.arange(len(self.slides), dtype=np.int32), np.diff(self.starts))

    @property
    def patients(self) -> NDArray[Any]:
        """Patient of each slide, ``[S]``."""
        return np.array([slide.row.patient_id for slide in self.slides])

    @cached_property
    def identity(self) -> str:
        """The hash of the slides in their order, with the network and the checksums of their features."""
        digest = hashlib.sha256(f"{self.source.identity} {self.source.block} {self.features}".encode())
        for slide in self.slides:
            checksum = feature_checksum(slide.cache, self.features)
            about = (slide.row.slide_id, slide.cache.fingerprint, len(slide.cache), checksum)
            digest.update(repr(about).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[NDArray[np.float16]]:
        """Yields the features of each slide, ``[n, D]``.

        Raises:
            CacheCorruptError: some are not finite, or of another length.
        """
        columns = None
        for slide in self.slides:
            rows = self.read(slide)
            columns = columns or rows.shape[1]
            finite = np.isfinite(rows).all(1)
            if not finite.all() or rows.shape[1] != columns:
                fault = (
                    f"of tile {int(np.flatnonzero(~finite)[0])} are not finite"
                    if not finite.all()
                    else f"have {rows.shape[1]} columns, those of other slides {columns}"
                )
                raise CacheCorruptError(
                    f"features {self.features!r} of slide {slide.row.slide_id!r}: those {fault}; make them "
                    "again with 'slidetl embed --overwrite'"
                )
            yield rows

    def read(self, slide: CachedSlide) -> NDArray[np.float16]:
        """Reads the features of a slide, ``[n, D]``.

        Raises:
            CacheMismatchError: they are of another network than the source; they were replaced.
        """
        return read_features(slide.cache, self.features, identity=self.source.identity)

    def place(self, tile: int) -> tuple[CachedSlide, int]:
        """Returns the slide of a tile, and the number of the tile in its cache."""
        slide = int(self.slide_of[tile])
        return self.slides[slide], tile - int(self.starts[slide])

    def find(self, name: str, option: str = "--tile") -> int:
        """Returns the number of the tile at ``SLIDE@x,y``.

        The point is in level-0 pixels; if several tiles hold it, the one with its corner there, else the
        one with the nearest centre.

        Raises:
            UsageError: no such form, slide or tile; the message names near ones.
        """
        slide_id, _, point = name.rpartition("@")
        match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*", point)
        if not slide_id or match is None:
            raise UsageError(
                f"{option} must be SLIDE@x,y in level-0 pixels, such as {self._example()}, not {name!r}"
            )
        ids = [slide.row.slide_id for slide in self.slides]
        if slide_id not in ids:
            near = difflib.get_close_matches(slide_id, ids, 5, 0.5) or ids
            raise UsageError(f"{option}: no slide {slide_id!r} here; there are {listed(near, 5)}")
        number = ids.index(slide_id)
        cache = self.slides[number].cache
        xy = np.array([float(match[1]), float(match[2])])
        inside = xy - cache.origins_level0
        extent = np.asarray(cache.extent_level0)
        off = np.abs(inside - extent / 2).max(1)
        off[np.abs(inside).max(1) < 0.5] = -1
        holds = ((inside >= 0) & (inside < extent)).all(1)
        if not holds.any():
            x, y = cache.origins_level0[int(off.argmin())].tolist()
            raise UsageError(
                f"{option}: no tile of {slide_id} holds the point {match[1]},{match[2]}; the nearest is "
                f"{slide_id}@{x},{y}"
            )
        return int(self.starts[number]) + int(np.where(holds, off, np.inf).argmin())

    def _example(self) -> str:
        slide = self.slides[0]
        x, y = slide.cache.origins_level0[0].tolist()
        return f"{slide.row.slide_id}@{x},{y}"


def open_collection(selection: Selection) -> Collection:
    """Opens the tiles of a cache with their features and, from the manifest, their patients.

    Raises:
        UsageError: a named slide is missing, or no slide has a tile.
        CacheMissingError: there are no such features; the message names the others.
        CacheMismatchError: features of different networks, slides tiled differently, or no tiles of slides:
            imported features, or patches of CT series.
        SlidetlError: the manifest or the cache cannot be read.
    """
    folder = Path(selection.cache).absolute()
    if selection.manifest is not None:
        slides = read_study(selection.manifest, folder).slides
        ids = {slide.row.slide_id for slide in slides}
        if unknown := sorted(set(selection.slides) - ids):
            raise UsageError(f"--slides: not in the manifest and the cache: {listed(unknown)}")
        slides = tuple(s for s in slides if not selection.slides or s.row.slide_id in selection.slides)
    else:
        found = []
        for slide_id, entry in find_slides(folder, selection.slides).items():
            path = Path(entry.path) if entry is not None else Path(slide_id)
            row = ManifestRow(0, slide_id, path, slide_id)
            found.append(CachedSlide(row, open_listed(folder, slide_id, entry)))
        slides = tuple(found)
    slides = tuple(slide for slide in slides if len(slide.cache))
    if not slides:
        raise UsageError(f"{folder}: its slides have no tiles")
    caches: list[SlideCache] = [slide.cache for slide in slides]
    common_spec(caches)
    for cache in caches:  # the pages need tiles of slides; a lack of them is told before any work
        cache.check_tiles()
        cache.origins_level0  # noqa: B018 # raises
    return Collection(
        slides, selection.features, common_source(selection.features, caches), selection.manifest is not None
    )
