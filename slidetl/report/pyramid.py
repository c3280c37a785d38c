"""A slide small enough to lie inside a page: JPEG tiles of a pyramid, as fine as a budget of bytes allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.cache.tiler import TilePlan
from slidetl.errors import SlideReadError
from slidetl.grid import TileGrid, TileSpec
from slidetl.slides import Slide, SlideInfo

TILE_PX = 512
_QUALITY = 75
# Levels of the slide's own pyramid are rarely smaller by exactly 2 or 4. Every tile is placed by its own
# corner, so this can shift the far side of one by half a pixel, and no more.
_MPP_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pyramid:
    """Tiles of a slide, in square pixels, each level half as fine as the next.

    Attributes:
        size_px: width and height at the finest level, pixels.
        mpp: spacing of the finest level, micrometres per pixel.
        levels: coarsest first, a single tile; JPEGs by column and row. A tile that is absent shows glass or
            cannot be read.
        mpp_finest: spacing of the finest level that the slide would have had, micrometres per pixel.
        unreadable: how many tiles could not be read.
    """

    size_px: tuple[int, int]
    mpp: float
    levels: tuple[dict[tuple[int, int], bytes], ...]
    mpp_finest: float
    unreadable: int

    @property
    def bytes(self) -> int:
        """Size of all tiles, bytes."""
        return sum(len(jpeg) for level in self.levels for jpeg in level.values())


def build_pyramid(slide: Slide, plan: TilePlan, budget_bytes: int, threads: int = 1) -> Pyramid:
    """Reads level after level, each twice as fine, until the next would exceed the budget.

    The tiles of a level are held as JPEGs alone, so memory stays within the budget. Levels finer than the
    picture in which tissue is looked for have tiles where there is tissue only.

    Args:
        slide: the slide, open.
        plan: its tiles and tissue.
        budget_bytes: of all tiles together; the coarsest level, a single tile, is there whatever it takes.
        threads: that read and compress at a time.
    """
    info = plan.info
    mpp_finest = max(info.mpp_level0)
    coarsest = max(0, math.ceil(math.log2(max(_size_px(info, mpp_finest)) / TILE_PX)))
    levels: list[dict[tuple[int, int], bytes]] = []
    left = budget_bytes
    unreadable = 0
    for halvings in range(coarsest, -1, -1):
        found = _read_level(slide, plan, mpp_finest * 2**halvings, left if levels else None, threads)
        if found is None:
            break
        jpegs, damaged = found
        levels.append(jpegs)
        unreadable += damaged
        left -= sum(map(len, jpegs.values()))
    mpp = mpp_finest * 2 ** (coarsest - len(levels) + 1)
    return Pyramid(_size_px(info, mpp), mpp, tuple(levels), mpp_finest, unreadable)


def encode_jpeg(rgb: NDArray[np.uint8], quality: int = _QUALITY) -> bytes:
    """Compresses ``[h, w, 3] uint8`` for people to look at: colour at half the resolution."""
    import simplejpeg

    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, "RGB", "420")
    return jpeg


def _size_px(info: SlideInfo, mpp: float) -> tuple[int, int]:
    width, height = (
        math.ceil(size * own / mpp - 1e-6)
        for size, own in zip(info.size_level0, info.mpp_level0, strict=True)
    )
    return width, height


def _read_level(
    slide: Slide, plan: TilePlan, mpp: float, budget_bytes: int | None, threads: int
) -> tuple[dict[tuple[int, int], bytes], int] | None:
    """The tiles of a level and how many cannot be read; None if they take more than the budget."""
    info = plan.info
    spec = TileSpec(mpp, TILE_PX, edge="pad")
    grid = TileGrid.over(info.size_level0, info.mpp_level0, (mpp, mpp), spec)
    origins = grid.origins_level0()
    places = np.stack(np.divmod(np.arange(len(grid)), grid.columns)[::-1], axis=1)
    if mpp < plan.tissue_mask.mpp:
        is_tissue = plan.tissue_mask.fraction(origins, grid.extent_level0, info.mpp_level0) > 0
        origins, places = origins[is_tissue], places[is_tissue]
    jpegs: dict[tuple[int, int], bytes] = {}
    taken = unreadable = 0
    results = slide.map_tiles(encode_jpeg, origins, TILE_PX, mpp, _MPP_TOLERANCE, threads=threads)
    for (column, row), result in zip(places.tolist(), results, strict=True):
        if isinstance(result, SlideReadError):
            unreadable += 1
            continue
        taken += len(result)
        if budget_bytes is not None and taken > budget_bytes:
            return None
        jpegs[column, row] = result
    return jpegs, unreadable
