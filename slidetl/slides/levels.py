"""A pyramid of levels seen at a physical spacing: choice of the level, and resampling of its pixels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import SpacingError
from slidetl.slides.area import average_areas, pixel_edges
from slidetl.slides.base import Slide, SlideInfo
from slidetl.slides.spacing import REMEDY

# Most level pixels in one averaged band, for any request.
MAX_SOURCE_PX = 8 * 2**20

# Relative difference of equal spacings, written with other digits.
_SAME = 1e-9
# Most pixels by which rounding, of both sides, makes a level too long along its shorter side.
_ROUNDED_PX = 2
# Greatest relative difference for which the error message suggests a tolerance.
_NEAR = 0.1

# Upper-left corner and size, level pixels; to [height, width, 3] uint8, and its actual corner.
ReadWindow = Callable[[tuple[int, int], tuple[int, int]], tuple[NDArray[np.uint8], list[float]]]


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Attributes:
        size_px: width and height.
        scale: level-0 pixels per pixel of this level, along x and y.
    """

    size_px: tuple[int, int]
    scale: tuple[float, float]

    @property
    def is_exact(self) -> bool:
        """True if windows of it begin exactly as requested, not a fraction of a pixel beside."""
        return True


_Level = TypeVar("_Level", bound=Level)


@dataclass(frozen=True)
class View(Generic[_Level]):
    """A level, and its resampling for a spacing.

    Attributes:
        level: the level to read.
        step: level pixels per pixel of the result, along x and y.
        as_it_is: the axes without resampling.
    """

    level: _Level
    step: tuple[float, float]
    as_it_is: tuple[bool, bool]

    def starts(self, origins_level0: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Turns level-0 pixels ``[N, 2] int`` into level pixels ``float64``, rounded if not resampled."""
        start = origins_level0 / np.array(self.level.scale)
        return np.asarray(np.where(self.as_it_is, np.round(start), start))

    def read(
        self, window: ReadWindow, start: tuple[float, float], size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """Reads a rectangle of ``size_px`` from ``start``, level pixels, in bands."""
        image = np.empty((size_px[1], size_px[0], 3), np.uint8)
        # Space for a corner missed by a fraction of a pixel.
        margin = [0 if same or self.level.is_exact else 1 for same in self.as_it_is]
        for x0, x1, y0, y1 in _blocks(size_px, self.step):
            edges = [pixel_edges(start[0], self.step[0], x0, x1), pixel_edges(start[1], self.step[1], y0, y1)]
            first = [math.floor(e[0]) - m for e, m in zip(edges, margin, strict=True)]
            size = [math.ceil(e[-1]) + m - f for e, m, f in zip(edges, margin, first, strict=True)]
            source, corner = window((first[0], first[1]), (size[0], size[1]))
            # Such a fraction alone does not justify resampling.
            corner = [f if same else c for f, c, same in zip(first, corner, self.as_it_is, strict=True)]
            image[y0:y1, x0:x1] = average_areas(source, edges[0] - corner[0], edges[1] - corner[1])
        return image


class PyramidSlide(Slide, Generic[_Level]):
    """The base of the readers of files. A reader sets the two attributes, and implements :meth:`_window`.

    It reads the coarsest level fine enough, at an integer pixel of this level, and averages areas in bands,
    so memory stays below about 100 MB for any region.

    Attributes:
        _info: value of :attr:`info`.
        _levels: finest first.
    """

    _info: SlideInfo
    _levels: tuple[_Level, ...]

    @property
    def info(self) -> SlideInfo:
        """Metadata of the slide."""
        return self._info

    @property
    @abstractmethod
    def colour_profile(self) -> bytes | None:
        """Its ICC profile, if it has one."""

    def mpp_read(self, mpp: float, mpp_tolerance: float = 0.01) -> tuple[float, float]:
        """Returns the spacing of the read pixels; see :meth:`slidetl.slides.base.Slide.mpp_read`."""
        view = self._view(mpp, mpp_tolerance)
        x, y = self._spacing(view.level)
        return (x if view.as_it_is[0] else mpp), (y if view.as_it_is[1] else mpp)

    def read(
        self,
        origin_level0: tuple[int, int],
        size_px: tuple[int, int],
        mpp: float,
        mpp_tolerance: float = 0.01,
    ) -> NDArray[np.uint8]:
        """Reads a rectangle at a physical spacing; see :meth:`slidetl.slides.base.Slide.read`."""
        view = self._view(mpp, mpp_tolerance)
        (start,) = view.starts(np.array([origin_level0])).tolist()
        return view.read(
            lambda first, size: self._window(view.level, first, size), (start[0], start[1]), size_px
        )

    @abstractmethod
    def _window(
        self, level: _Level, first: tuple[int, int], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], list[float]]:
        """Reads a window of one level, background outside; see :data:`ReadWindow`."""

    def _spacing(self, level: _Level) -> tuple[float, float]:
        mpp = self._info.mpp_level0
        return mpp[0] * level.scale[0], mpp[1] * level.scale[1]

    def _view(self, mpp: float, mpp_tolerance: float) -> View[_Level]:
        """Chooses the coarsest level as fine as ``mpp`` on both axes, or within the tolerance."""
        for level in reversed(self._levels):
            x, y = self._spacing(level)
            as_it_is = (_is_close(x, mpp, mpp_tolerance), _is_close(y, mpp, mpp_tolerance))
            if (as_it_is[0] or x <= mpp) and (as_it_is[1] or y <= mpp):
                step = (1.0 if as_it_is[0] else mpp / x, 1.0 if as_it_is[1] else mpp / y)
                return View(level, step, as_it_is)
        finest = max(self._info.mpp_level0)
        missed = finest / mpp - 1
        # Scanners of nominally equal spacing differ by 5 %.
        tolerance = math.ceil(missed * 1e3 + 1) / 1e3
        near = f"accept {missed:.1%} with --mpp-tolerance {tolerance:g}, " if missed < _NEAR else ""
        raise SpacingError(
            f"{self._info.path}: its finest spacing is {finest:.6g} um per pixel, coarser than the {mpp:.6g} "
            f"asked for; a slide is never enlarged: {near}ask for a coarser spacing "
            f"or leave the slide out; if {finest:.6g} is wrong, {REMEDY}"
        )


def scale_of(
    size_level0: tuple[int, int], size_px: tuple[int, int], downsample: float
) -> tuple[float, float]:
    """Computes level-0 pixels per pixel of a level, along x and y.

    Scanners halve and drop, or fill up, the remainder: 3567 pixels become 1783, and each still covers two. So
    the scale is a whole number if the sizes allow it.

    Args:
        size_level0: width and height of level 0.
        size_px: those of the level.
        downsample: approximate scale, one number for both axes.
    """
    whole = round(downsample)
    if all(s in (s0 // whole, -(-s0 // whole)) for s, s0 in zip(size_px, size_level0, strict=True)):
        return float(whole), float(whole)
    return size_level0[0] / size_px[0], size_level0[1] / size_px[1]


def is_same_picture(size_level0: tuple[int, int], size_px: tuple[int, int]) -> bool:
    """Tells by its sides if a reduced picture may be a level, up to rounding, or is a label or overview."""
    (width, height), (across, down) = size_level0, size_px
    return abs(across * height - down * width) <= _ROUNDED_PX * max(width, height)


def nominal_mpp(mpp_level0: tuple[float, float], levels: tuple[Level, ...]) -> tuple[float, ...]:
    """Computes the spacing of every level as one number, the geometric mean of both axes."""
    return tuple(math.sqrt(math.prod(mpp_level0) * math.prod(level.scale)) for level in levels)


def _is_close(spacing: float, mpp: float, mpp_tolerance: float) -> bool:
    # By a thousandth more: 0.2525 misses 0.25 by 1 %, and a little when written in binary.
    return abs(spacing / mpp - 1) <= max(mpp_tolerance * 1.001, _SAME)


def _blocks(size_px: tuple[int, int], step: tuple[float, float]) -> Iterator[tuple[int, int, int, int]]:
    """Splits an output image into blocks of full rows, each with a source below ``MAX_SOURCE_PX``."""
    per_pixel = step[0] * step[1]
    columns = min(size_px[0], max(1, int(MAX_SOURCE_PX / per_pixel)))
    rows = min(size_px[1], max(1, int(MAX_SOURCE_PX / (per_pixel * columns))))
    for y in range(0, size_px[1], rows):
        for x in range(0, size_px[0], columns):
            yield x, min(x + columns, size_px[0]), y, min(y + rows, size_px[1])
