"""Slides embedded in a page: JPEG tiles of a pyramid, as fine as a budget of bytes allows."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SlideReadError
from slidetl.slides import Slide
from slidetl.tiles.grid import TileGrid, TileSpec
from slidetl.tiles.mosaic import Mosaic
from slidetl.tiles.plan import TilePlan
from slidetl.tiles.store import SlideCache
from slidetl.tiles.tissue import TissueMask, mask_size

TILE_PX = 512
_QUALITY = 75
# Levels of the slide's own pyramid are rarely smaller by exactly 2 or 4. Every tile is placed by its own
# corner, so this can shift the far side of one by half a pixel, and no more.
_MPP_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Canvas:
    """The frame of a picture of a slide.

    Attributes:
        size_level0: width and height of the slide, level-0 pixels.
        mpp_level0: spacing of level 0 along x and y, micrometres per pixel.
        mpp_finest: finest spacing to draw.
        extent_level0: size of a tile ``(x, y)``, level-0 pixels.
        tissue_mask: its tissue.
    """

    size_level0: tuple[int, int]
    mpp_level0: tuple[float, float]
    mpp_finest: float
    extent_level0: tuple[float, float]
    tissue_mask: TissueMask

    @classmethod
    def of_plan(cls, plan: TilePlan) -> Self:
        """Frames a slide at its own spacing."""
        info = plan.info
        mpp = max(info.mpp_level0)
        return cls(info.size_level0, info.mpp_level0, mpp, plan.extent_level0, plan.tissue_mask)

    @classmethod
    def of_cache(cls, cache: SlideCache) -> Self:
        """Frames a slide at the spacing of its cached tiles."""
        mpp = max(cache.mpp_read)
        return cls(cache.size_level0, cache.mpp_level0, mpp, cache.extent_level0, cache.tissue_mask)


@dataclass(frozen=True)
class Pyramid:
    """Tiles of a slide, in square pixels, each level half as fine as the next.

    Attributes:
        size_px: width and height at the finest level, pixels.
        mpp: spacing of the finest level, micrometres per pixel.
        mpp_everywhere: spacing of the finest level covering all tissue.
        mpp_slide: spacing of the slide's own finest level.
        levels: coarsest first, a single tile; JPEGs by column and row. Absent tiles show glass, are
            unreadable, or exceed the budget.
        unreadable: number of unreadable tiles.
    """

    size_px: tuple[int, int]
    mpp: float
    mpp_everywhere: float
    mpp_slide: float
    levels: tuple[dict[tuple[int, int], bytes], ...]
    unreadable: int

    @property
    def bytes(self) -> int:
        """Size of all tiles, bytes."""
        return sum(map(_bytes, self.levels))

    def to_viewer(self, canvas: Canvas, stride_level0: NDArray[np.float64]) -> dict[str, Any]:
        """Returns the data of the page's script; lengths in pixels of the finest level.

        Args:
            canvas: the frame of the picture.
            stride_level0: distance of neighbouring tiles along x and y, level-0 pixels.
        """
        scale = np.asarray(canvas.mpp_level0) / self.mpp
        extent = np.asarray(canvas.extent_level0)
        return {
            "width": self.size_px[0],
            "height": self.size_px[1],
            "tileSize": TILE_PX,
            "mpp": self.mpp,
            "levels": [
                {f"{x}_{y}": base64.b64encode(jpeg).decode("ascii") for (x, y), jpeg in level.items()}
                for level in self.levels
            ],
            # If tiles overlap or leave gaps, a cell covers the points nearest to the centre of its tile.
            "cellOrigin": ((extent - stride_level0) / 2 * scale).tolist(),
            "cellSize": (stride_level0 * scale).tolist(),
            "tileExtent": (extent * scale).tolist(),
        }


def build_pyramid(
    slide: Slide | Mosaic,
    canvas: Canvas,
    origins_level0: NDArray[np.int32],
    attention: NDArray[np.float32],
    budget_bytes: int,
    threads: int = 1,
) -> Pyramid:
    """Reads level after level, each twice as fine, until the budget is used up.

    The last level holds as many tiles as fit, those of most attention. Levels finer than the tissue mask have
    tiles on tissue only. Tiles are kept as JPEGs alone, so memory stays within the budget.

    Args:
        slide: the slide, open, or its cached tiles.
        canvas: its size, spacing and tissue.
        origins_level0: ``[N, 2] int32``, upper-left corners ``(x, y)`` of the graded tiles.
        attention: ``[N] float32``, their weights.
        budget_bytes: of all tiles together; the coarsest level, a single tile, may exceed it.
        threads: number of threads to read and compress.
    """
    mpp_slide = canvas.mpp_finest
    longest = max(mask_size(canvas.size_level0, canvas.mpp_level0, mpp_slide))
    coarsest = max(0, math.ceil(math.log2(longest / TILE_PX)))
    levels: list[dict[tuple[int, int], bytes]] = []
    left = math.inf
    unreadable = 0
    mpp = mpp_everywhere = mpp_slide * 2**coarsest
    for halvings in range(coarsest, -1, -1):
        level = _Level.over(canvas, mpp_slide * 2**halvings)
        if levels and level.mpp < canvas.tissue_mask.mpp:
            level = level.with_tissue(canvas)
        jpegs, damaged = _read(slide, level, left, threads)
        is_whole = _bytes(jpegs) <= left
        if not is_whole:
            fitting = int(0.9 * left / (_bytes(jpegs) / len(jpegs)))  # tiles are not all of one size
            level = level.most_attended(canvas, origins_level0, attention, fitting)
            jpegs, damaged = _read(slide, level, left, threads)
            while _bytes(jpegs) > left:
                jpegs.popitem()
        if jpegs:
            levels.append(jpegs)
            mpp = level.mpp
        unreadable += damaged
        if not is_whole:
            break
        mpp_everywhere = level.mpp
        left = max(0, budget_bytes - sum(map(_bytes, levels)))
    size_px = mask_size(canvas.size_level0, canvas.mpp_level0, mpp)
    return Pyramid(size_px, mpp, mpp_everywhere, mpp_slide, tuple(levels), unreadable)


def encode_view(rgb: NDArray[np.uint8], quality: int = _QUALITY) -> bytes:
    """Compresses ``[h, w, 3] uint8`` for viewing, with colour at half the resolution."""
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, "RGB", "420"))


def encode_thumbnail(rgb: NDArray[np.uint8], longest_px: int, quality: int) -> bytes:
    """Compresses a picture for viewing, at most so large."""
    from PIL import Image

    picture = Image.fromarray(rgb)
    picture.thumbnail((longest_px, longest_px))
    return encode_view(np.asarray(picture), quality)


def _bytes(jpegs: dict[tuple[int, int], bytes]) -> int:
    return sum(map(len, jpegs.values()))


@dataclass(frozen=True, eq=False)
class _Level:
    """Tiles of a level: their corners in level-0 pixels, and their columns and rows."""

    mpp: float
    extent_level0: tuple[float, float]
    origins_level0: NDArray[np.int32]
    places: NDArray[np.int64]

    @classmethod
    def over(cls, canvas: Canvas, mpp: float) -> Self:
        spec = TileSpec(mpp, TILE_PX, edge="pad")
        grid = TileGrid.over(canvas.size_level0, canvas.mpp_level0, (mpp, mpp), spec)
        places = np.stack(np.divmod(np.arange(len(grid)), grid.columns)[::-1], axis=1)
        return cls(mpp, grid.extent_level0, grid.origins_level0(), places)

    def __getitem__(self, chosen: NDArray[Any]) -> Self:
        return replace(self, origins_level0=self.origins_level0[chosen], places=self.places[chosen])

    def with_tissue(self, canvas: Canvas) -> Self:
        mpp = canvas.mpp_level0
        return self[canvas.tissue_mask.fraction(self.origins_level0, self.extent_level0, mpp) > 0]

    def most_attended(
        self, canvas: Canvas, origins_level0: NDArray[np.int32], attention: NDArray[np.float32], count: int
    ) -> Self:
        """Keeps ``count`` tiles, those with the most attention of graded tiles by their centres."""
        middles = origins_level0 + np.asarray(canvas.extent_level0) / 2
        sums: dict[tuple[int, int], float] = {}
        for (column, row), weight in zip(
            (middles // self.extent_level0).astype(int).tolist(), attention.tolist(), strict=True
        ):
            sums[column, row] = sums.get((column, row), 0.0) + weight
        weights = [sums.get((column, row), 0.0) for column, row in self.places.tolist()]
        chosen = np.argsort(-np.array(weights), kind="stable")[:count]
        return self[np.sort(chosen)]  # row by row, as tiles are read


def _read(
    slide: Slide | Mosaic, level: _Level, budget_bytes: float, threads: int
) -> tuple[dict[tuple[int, int], bytes], int]:
    """Reads the tiles of a level, up to the first beyond the budget, and counts unreadable ones."""
    jpegs: dict[tuple[int, int], bytes] = {}
    taken = unreadable = 0
    where = (level.origins_level0, TILE_PX, level.mpp, _MPP_TOLERANCE)
    results = slide.map_tiles(encode_view, *where, threads=threads)
    for (column, row), result in zip(level.places.tolist(), results, strict=False):
        if isinstance(result, SlideReadError):
            unreadable += 1
            continue
        jpegs[column, row] = result
        taken += len(result)
        if taken > budget_bytes:
            break
    return jpegs, unreadable
