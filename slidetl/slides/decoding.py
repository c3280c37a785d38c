"""Tiles cut from the JPEGs of a level: each decoded once, reduced in the decoder if that is exact enough."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from slidetl.slides.area import average_areas, pixel_edges
from slidetl.slides.tiff import Jpeg, JpegTiles

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Decoded JPEGs kept for the next row of tiles; beyond this size, they are decoded again.
_KEPT_BYTES = 96 * 2**20

# libjpeg's reductions of a block of 8 x 8 pixels.
_REDUCTIONS = (8, 4, 2)

# A decoder's pixel is taken for the mean of its area. If tiles do not end at such pixels, this many per pixel
# of the result keep the error below two grey levels in any tile.
_LEAST_STEP = 2.5


@dataclass(frozen=True, eq=False)
class Placement:
    """The places of tiles on a level.

    Attributes:
        start: ``[N, 2] float64``, upper-left corners ``(x, y)``, level pixels.
        step: level pixels per pixel of a tile, along x and y.
        side_px: of a tile.
    """

    start: NDArray[np.float64]
    step: tuple[float, float]
    side_px: int

    @property
    def extent(self) -> tuple[float, float]:
        """Size of a tile along x and y, level pixels."""
        return self.side_px * self.step[0], self.side_px * self.step[1]

    def edges(self, tile: int, reduction: int = 1) -> list[NDArray[np.float64]]:
        """Computes the edges of a tile's pixels along x and y, pixels of the reduced level."""
        start = self.start[tile].tolist()
        return [
            pixel_edges(at / reduction, step / reduction, 0, self.side_px)
            for at, step in zip(start, self.step, strict=True)
        ]

    def runs(self, first: int, most: int) -> Iterator[range]:
        """Yields the tiles from ``first`` on, in runs of at most ``most`` from one row."""
        y = self.start[:, 1]
        while first < len(y):
            stop = first + 1
            while stop < len(y) and stop - first < most and y[stop] == y[first]:
                stop += 1
            yield range(first, stop)
            first = stop


def reduction_for(placement: Placement, tile_px: tuple[int, int]) -> int:
    """Chooses the reduction in the decoder: 1, 2, 4 or 8.

    Never beyond the spacing of the tiles, and only if their pixels are wide, or begin and end with whole
    pixels of the decoder's, so nothing shifts or blurs.
    """
    for reduction in _REDUCTIONS:
        if any(t % reduction for t in tile_px):
            continue
        steps = [s / reduction for s in placement.step]
        if min(steps) >= _LEAST_STEP or (
            min(steps) >= 1 and all(s == round(s) for s in steps) and not np.any(placement.start % reduction)
        ):
            return reduction
    return 1


class JpegCutter:
    """Cuts tiles from the JPEGs of a level. Threads may share it.

    Args:
        jpegs: of the level.
        placement: of the tiles.
        reduction: by the decoder, from :func:`reduction_for`.
        runs: expected in :meth:`cut`, each once; a JPEG is kept until its last run.
    """

    def __init__(
        self, jpegs: JpegTiles, placement: Placement, reduction: int = 1, runs: Iterable[range] = ()
    ) -> None:
        self._jpegs = jpegs
        self.placement = placement
        self.reduction = reduction
        self._tile_px = (jpegs.level.tile_px[0] // reduction, jpegs.level.tile_px[1] // reduction)
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, int], Future[NDArray[np.uint8] | None]] = {}
        self._most_kept = _KEPT_BYTES // (self._tile_px[0] * self._tile_px[1] * 3)
        self._uses = np.zeros(jpegs.level.offsets.shape, np.int32)
        for run in runs:
            rows, columns = self._touched(run)
            self._uses[rows.start : rows.stop, columns.start : columns.stop] += 1

    def cut(self, run: range) -> list[NDArray[np.uint8] | None]:
        """Cuts the tiles of a run, ``[side, side, 3] uint8`` each.

        Returns:
            None for a tile across the level's border, or with a JPEG that cannot be decoded.
        """
        decoded = self._decoded(*self._touched(run))
        tiles: list[NDArray[np.uint8] | None] = []
        limit = self._jpegs.level.size_px
        for tile in run:
            edges = self.placement.edges(tile, self.reduction)
            low = [math.floor(e[0]) for e in edges]
            high = [math.ceil(e[-1]) for e in edges]
            is_whole = min(low) >= 0 and all(
                h * self.reduction <= size for h, size in zip(high, limit, strict=True)
            )
            source = self._gather(decoded, low, high) if is_whole else None
            x, y = edges[0] - low[0], edges[1] - low[1]
            tiles.append(None if source is None else average_areas(source, x, y))
        return tiles

    def _touched(self, run: range) -> tuple[range, range]:
        """Returns rows and columns of the JPEGs under a run."""
        start = self.placement.start[[run[0], run[-1]]]
        ranges = []
        for axis in (1, 0):
            side, count = self._jpegs.level.tile_px[axis], int(self._uses.shape[1 - axis])
            end = start[:, axis].max() + self.placement.extent[axis]
            # A millionth of a pixel is snapped to the edge by `pixel_edges`; one JPEG more does no harm.
            first = max(0, min(math.floor(start[:, axis].min() / side), count))
            ranges.append(range(first, max(first, min(math.ceil((math.ceil(end)) / side), count))))
        return ranges[0], ranges[1]

    def _decoded(self, rows: range, columns: range) -> dict[tuple[int, int], NDArray[np.uint8] | None]:
        """Decodes the JPEGs of a rectangle; another thread may have begun with some."""
        slots: dict[tuple[int, int], Future[NDArray[np.uint8] | None]] = {}
        mine: list[tuple[int, int]] = []
        with self._lock:
            for key in ((row, column) for row in rows for column in columns):
                slot = self._kept.get(key)
                self._uses[key] -= 1
                if slot is None:
                    slot = Future()
                    mine.append(key)
                    if self._uses[key] > 0 and len(self._kept) < self._most_kept:
                        self._kept[key] = slot
                elif self._uses[key] <= 0:
                    del self._kept[key]
                slots[key] = slot
        if mine:
            places = np.array(mine, np.intp)
            for key, jpeg in zip(mine, self._jpegs.read(places[:, 0], places[:, 1]), strict=True):
                try:
                    slots[key].set_result(None if jpeg is None else self._decode(jpeg))
                except BaseException as error:  # other threads waiting for it must get the error
                    slots[key].set_exception(error)
        # Threads with an earlier claim are decoding now, and wait for nobody before they finish.
        return {key: slot.result() for key, slot in slots.items()}

    def _decode(self, jpeg: Jpeg) -> NDArray[np.uint8] | None:
        """Decodes to ``[h, w, 3] uint8``, reduced; None for a JPEG with any defect."""
        import simplejpeg

        width, height = self._tile_px
        # The decoder halves the colours of 4:2:2 along one axis only, and errs by several grey levels.
        reduction = self.reduction if jpeg.subsampling != "422" else 1
        try:
            rgb: NDArray[np.uint8] = (
                simplejpeg.decode_jpeg(jpeg.data, min_width=width, min_height=height, min_factor=reduction)
                if reduction > 1
                else simplejpeg.decode_jpeg(jpeg.data)
            )
        except ValueError:
            return None
        if reduction != self.reduction:
            edges = (np.arange(n + 1, dtype=np.float64) * self.reduction for n in (width, height))
            rgb = average_areas(rgb, *edges)
        return rgb if rgb.shape == (height, width, 3) else None

    def _gather(
        self,
        decoded: dict[tuple[int, int], NDArray[np.uint8] | None],
        low: Sequence[int],
        high: Sequence[int],
    ) -> NDArray[np.uint8] | None:
        """Puts a rectangle of the reduced level together."""
        width, height = self._tile_px
        image = np.empty((high[1] - low[1], high[0] - low[0], 3), np.uint8)
        for row in range(low[1] // height, -(-high[1] // height)):
            y0, y1 = max(low[1], row * height), min(high[1], (row + 1) * height)
            for column in range(low[0] // width, -(-high[0] // width)):
                x0, x1 = max(low[0], column * width), min(high[0], (column + 1) * width)
                rgb = decoded[row, column]
                if rgb is None:
                    return None
                image[y0 - low[1] : y1 - low[1], x0 - low[0] : x1 - low[0]] = rgb[
                    y0 - row * height : y1 - row * height, x0 - column * width : x1 - column * width
                ]
        return image


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Iterator[_Result]:
    """Yields results in the order of the items, a few computed ahead; in this thread if ``threads`` is 1."""
    if threads <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[_Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
