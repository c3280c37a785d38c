"""Pictures of areas of a slide, laid together from its cached tiles; the slide itself is not needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import CacheCorruptError, SlideReadError
from slidetl.slides.decoding import map_in_order
from slidetl.tiles.store import SlideCache

_Result = TypeVar("_Result")


class Mosaic:
    """The picture of a slide in a cache: its tiles, and its thumbnail between them.

    Args:
        cache: the tiles.
    """

    def __init__(self, cache: SlideCache) -> None:
        from PIL import Image

        self._cache = cache
        self._thumbnail = Image.fromarray(cache.thumbnail)
        self._thumbnail_mpp = cache.thumbnail_mpp
        self._mpp = np.asarray(cache.mpp_level0)

    @property
    def mpp_finest(self) -> float:
        """The tiles' own spacing, micrometres per pixel."""
        return max(self._cache.mpp_read)

    def read(
        self, origin_level0: tuple[float, float], size_px: tuple[int, int], mpp: float
    ) -> NDArray[np.uint8]:
        """Draws an area of the slide.

        Where tiles overlap, the last one is seen. Outside the slide the picture is white.

        Args:
            origin_level0: upper-left corner ``(x, y)``, level-0 pixels; may lie outside the slide.
            size_px: width and height of the picture.
            mpp: its spacing, micrometres per pixel. Tiles are read where it is finer than the thumbnail's.

        Returns:
            ``[h, w, 3] uint8``.

        Raises:
            CacheError: a tile is damaged.
        """
        from PIL import Image

        origin, size = np.asarray(origin_level0, np.float64), np.asarray(size_px)
        picture = Image.new("RGB", size_px, "white")
        # The part of the area within the thumbnail, in its pixels and in those of the picture.
        per_px = mpp / self._thumbnail_mpp
        start = origin * self._mpp / self._thumbnail_mpp
        low = np.clip(np.ceil(-start / per_px), 0, size).astype(int)
        high = np.clip(np.floor((np.asarray(self._thumbnail.size) - start) / per_px), 0, size).astype(int)
        if (high > low).all():
            box = (*(start + low * per_px).clip(0), *(start + high * per_px).clip(0, self._thumbnail.size))
            way = Image.Resampling.BOX if per_px > 1 else Image.Resampling.BILINEAR
            part = self._thumbnail.resize(tuple((high - low).tolist()), way, box=box)
            picture.paste(part, tuple(low.tolist()))
        if mpp < self._thumbnail_mpp:
            scale = self._mpp / mpp
            first = np.round((self._cache.origins_level0 - origin) * scale).astype(int)
            last = np.round(
                (self._cache.origins_level0 + np.asarray(self._cache.extent_level0) - origin) * scale
            ).astype(int)
            seen = np.flatnonzero(((last > 0) & (first < size)).all(1))
            for tile, pixels in zip(seen.tolist(), self._cache.read(seen), strict=True):
                width, height = (last[tile] - first[tile]).clip(1).tolist()
                way = Image.Resampling.BOX if width < pixels.shape[1] else Image.Resampling.BICUBIC
                shown = Image.fromarray(pixels).resize((width, height), way)
                picture.paste(shown, tuple(first[tile].tolist()))
        return np.asarray(picture)

    def map_tiles(
        self,
        work: Callable[[NDArray[np.uint8]], _Result],
        origins_level0: NDArray[np.integer[Any]],
        side_px: int,
        mpp: float,
        mpp_tolerance: float = 0.0,
        *,
        threads: int = 1,
    ) -> Iterator[_Result | SlideReadError]:
        """Draws squares and yields what ``work`` makes of them, as :meth:`slidetl.slides.Slide.map_tiles`."""

        def draw(origin: tuple[int, int]) -> _Result | SlideReadError:
            try:
                return work(self.read(origin, (side_px, side_px), mpp))
            except CacheCorruptError as error:
                return SlideReadError(str(error))

        yield from map_in_order(draw, (tuple(row) for row in origins_level0.tolist()), threads)
