"""Polygons to shares of pixels, and masks to polygons. Pure arithmetic, no file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import AnnotationError
from slidetl.slides.opencv import opencv

Polygon = tuple[NDArray[np.float64], ...]
"""Rings ``[P, 2]`` of ``(x, y)``; inside is what an odd number of them encloses, so holes are rings, too."""


class Layer(NamedTuple):
    """Areas, and areas cut out of them, but not out of other layers."""

    areas: Sequence[Polygon]
    holes: Sequence[Polygon] = ()


# Scan lines in a pixel, and the most places at which edges cross them; fewer lines where more are needed.
_LINES = 8
_MOST_CROSSINGS = 5 * 10**6
_BAND = 256  # rows of pixels at a time


def coverage(
    layers: Sequence[Layer],
    without: Sequence[Layer],
    size_px: tuple[int, int],
    pixels_per_unit: tuple[float, float],
) -> NDArray[np.float32]:
    """Computes the share of each pixel inside any of some layers and outside of all others.

    Exact along x; along y the mean of eight scan lines. Each polygon is filled by the even-odd rule, so
    rings may touch or cross themselves, and polygons may overlap. The time grows with the length of their
    edges, not with their number times the pixels.

    Args:
        layers: the areas, in any unit.
        without: layers to cut out of all of them.
        size_px: width and height of the result.
        pixels_per_unit: pixels along x and y per unit of the polygons.

    Returns:
        ``[h, w] float32``, 0..1. Beyond the border, nothing is counted.

    Raises:
        AnnotationError: the edges are too many for a bounded time.
    """
    width, height = size_px
    shares = np.zeros((height, width), np.float32)
    every = (*layers, *without)
    start, end, polygon = _edges([one for layer in every for part in layer for one in part])
    part_of = np.repeat(np.arange(2 * len(every)), [len(part) for layer in every for part in layer])
    start, end = start * pixels_per_unit, end * pixels_per_unit
    for lines in (_LINES, 2, 1):
        first, last = (
            np.ceil(np.clip(f(start[:, 1], end[:, 1]), 0, height) * lines - 0.5).astype(np.int64)
            for f in (np.minimum, np.maximum)
        )
        total = int((last - first).sum())
        if total <= _MOST_CROSSINGS:
            break
    else:
        raise AnnotationError(f"their edges cross {total} lines of pixels, more than {_MOST_CROSSINGS}")
    edge = np.repeat(np.arange(len(first)), last - first)
    line = np.arange(total) + np.repeat(first - (np.cumsum(last - first) - (last - first)), last - first)
    x0, y0 = start[edge].T
    x1, y1 = end[edge].T
    x = np.clip(x0 + ((line + 0.5) / lines - y0) * ((x1 - x0) / (y1 - y0)), 0, width)
    of = polygon[edge]
    # Along a line, the crossings of a polygon enter and leave it in turns; their number is even.
    order = np.lexsort((x, line, of))
    x, line, of = x[order], line[order], of[order]
    step = np.where(np.arange(total) % 2 == 0, 1, -1)
    order = np.lexsort((x, line))
    x, line, step, part = x[order], line[order], step[order], part_of[of[order]]
    is_inside = np.zeros(total, bool)
    for number in range(len(every)):
        areas, holes = (np.cumsum(np.where(part == 2 * number + kind, step, 0)) for kind in (0, 1))
        is_covered = (areas > 0) & (holes == 0)
        is_inside = is_inside | is_covered if number < len(layers) else is_inside & ~is_covered
    is_inside[-1:] = False
    (before,) = np.nonzero(is_inside)  # from this crossing to the next, on the same line
    left, right, row = x[before], x[before + 1], line[before] // lines
    for top in range(0, height, _BAND):
        rows = min(_BAND, height - top)
        chosen = slice(*np.searchsorted(row, (top, top + rows)))
        places = np.concatenate([left[chosen], right[chosen]])
        sign = np.repeat([1.0, -1.0], len(places) // 2)
        column = np.floor(places)
        fraction = places - column
        cell = np.tile(row[chosen] - top, 2) * (width + 2) + column.astype(np.int64)
        steps = np.bincount(cell, sign * (1 - fraction), rows * (width + 2))
        steps += np.bincount(cell + 1, sign * fraction, rows * (width + 2))
        sums = steps.reshape(rows, width + 2).cumsum(1)[:, :width]
        shares[top : top + rows] = np.clip(sums / lines, 0, 1)
    # Sums of fractions leave rounding errors where nothing, or all, is inside.
    return np.where(shares < 1e-6, 0, np.where(shares > 1 - 1e-6, 1, shares)).astype(np.float32)


def _edges(
    polygons: Sequence[Polygon],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Returns start and end ``[E, 2]`` of all edges, and the number of their polygon."""
    rings = [ring for polygon in polygons for ring in polygon]
    if not rings:
        return np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, np.int64)
    lengths = np.array([len(ring) for ring in rings])
    owner = np.repeat(np.arange(len(polygons)), [len(polygon) for polygon in polygons])
    start = np.concatenate(rings)
    following = np.arange(1, len(start) + 1)
    following[np.cumsum(lengths) - 1] = np.cumsum(lengths) - lengths  # rings are closed
    return start, start[following], np.repeat(owner, lengths)


def outlines(mask: NDArray[np.bool_]) -> list[Polygon]:
    """Traces the exact outlines of a mask along the edges of its pixels.

    Args:
        mask: ``[h, w] bool``.

    Returns:
        One polygon for each piece of pixels that share sides: the outer ring, then the holes; corners in
        pixels from the mask's corner, rings not closed.
    """
    _, labels = opencv().connectedComponents(mask.view(np.uint8), connectivity=4)
    height, width = mask.shape
    padded = np.pad(mask, 1)
    leaving: defaultdict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for down, right, start, heading in _SIDES:
        beside = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        rows, columns = np.nonzero(mask & ~beside)
        corners = (labels[rows, columns], columns + start[0], rows + start[1])
        for corner in zip(*(values.tolist() for values in corners), strict=True):
            leaving[corner].append(heading)
    rings: defaultdict[int, list[NDArray[np.float64]]] = defaultdict(list)
    done: set[tuple[int, int, int, tuple[int, int]]] = set()
    for (label, *begin), ways in list(leaving.items()):
        for way in ways:
            ring, before, (x, y) = [], (0, 0), begin
            while (label, x, y, way) not in done:
                done.add((label, x, y, way))
                if way != before:
                    ring.append((x, y))
                x, y, before = x + way[0], y + way[1], way
                onward = leaving[label, x, y]
                # Pixels of one piece that touch by their corners are joined here: else a ring touches itself.
                way = onward[0] if len(onward) == 1 else (before[1], -before[0])
            if ring:
                rings[label].append(np.array(ring, np.float64))
    return [tuple(sorted(found, key=_signed_area, reverse=True)) for found in rings.values()]


# Sides of a pixel: the row and column of its neighbour there, where the side begins, and its heading in
# (x, y), the pixel at its right hand.
_SIDES = (
    (-1, 0, (0, 0), (1, 0)),
    (0, 1, (1, 0), (0, 1)),
    (1, 0, (1, 1), (-1, 0)),
    (0, -1, (0, 1), (0, -1)),
)


def _signed_area(ring: NDArray[np.float64]) -> float:
    """Computes twice the area of a ring; negative for a hole of :func:`outlines`."""
    (x, y), (x1, y1) = ring.T, np.roll(ring, -1, axis=0).T
    return float((x * y1 - x1 * y).sum())
