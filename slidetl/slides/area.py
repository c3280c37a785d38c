"""Averaging of areas: from pixels of a pyramid level to pixels at another spacing. Pure arithmetic."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Edges closer than this to a source pixel's edge are on it: spacings such as 0.2527 are not exact in
# binary, and an edge at 3.9999999 would otherwise drag a further source pixel in with weight zero.
_SNAP_PX = 1e-6


def pixel_edges(start: float, step: float, first: int, stop: int) -> NDArray[np.float64]:
    """Computes the edges of the output pixels ``first .. stop - 1`` along one axis, in source pixels.

    Args:
        start: left edge of output pixel 0, source pixels.
        step: width of an output pixel, source pixels, at least 1.
        first: first output pixel.
        stop: one past the last.

    Returns:
        ``[stop - first + 1] float64``. An edge does not depend on ``first``: images joined from bands equal
        images read at once.
    """
    edges = start + step * np.arange(first, stop + 1, dtype=np.float64)
    nearest = np.round(edges)
    return np.where(np.abs(edges - nearest) < _SNAP_PX, nearest, edges)


def average_areas(
    source: NDArray[np.uint8], edges_x: NDArray[np.float64], edges_y: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """Averages the source over the rectangles between the edges: a box filter with fractional ends.

    Every output pixel is the mean of exactly its area, partly covered source pixels counting by their share,
    so there is no shift at any phase.

    Args:
        source: ``[h, w, 3] uint8``.
        edges_x: ``[width + 1]`` increasing, within ``0 .. w``, source pixels.
        edges_y: ``[height + 1]`` increasing, within ``0 .. h``, source pixels.

    Returns:
        ``[height, width, 3] uint8``, rounded half up.
    """
    size_px = (len(edges_y) - 1, len(edges_x) - 1)
    if _is_identity(edges_x) and _is_identity(edges_y):
        y, x = int(edges_y[0]), int(edges_x[0])
        return np.ascontiguousarray(source[y : y + size_px[0], x : x + size_px[1]])
    whole = _whole_step(edges_x), _whole_step(edges_y)
    if whole[0] and whole[1]:
        y, x = int(edges_y[0]), int(edges_x[0])
        inside = source[y : y + size_px[0] * whole[1], x : x + size_px[1] * whole[0]]
        return _block_means(inside, (whole[1], whole[0]))
    rows = _sum_axis(source, edges_y, axis=0)
    sums = _sum_axis(rows, edges_x, axis=1)
    # One division at the end: over whole pixels the sums are integers, and so the means exact.
    areas = np.diff(edges_y)[:, None] * np.diff(edges_x)[None, :]
    return (sums / areas[..., None].astype(np.float32) + np.float32(0.5)).astype(np.uint8)


def _is_identity(edges: NDArray[np.float64]) -> bool:
    return bool(edges[0] == np.floor(edges[0]) and np.all(np.diff(edges) == 1))


def _whole_step(edges: NDArray[np.float64]) -> int:
    """Returns the distance between the edges if all are whole pixels and equally far apart, else 0."""
    step = int(edges[1] - edges[0]) if len(edges) > 1 else 0
    is_whole = step > 0 and edges[0] == np.floor(edges[0]) and np.all(np.diff(edges) == step)
    return step if is_whole else 0


def _block_means(source: NDArray[np.uint8], step: tuple[int, int]) -> NDArray[np.uint8]:
    """Computes means of whole blocks, ``step`` rows by columns, in fast integer arithmetic."""
    area = step[0] * step[1]
    kind = np.uint16 if 255 * area + area // 2 < 2**16 else np.uint64
    # Rows first, since they are contiguous in memory.
    rows: NDArray[np.unsignedinteger] = source[:: step[0]].astype(kind)
    for row in range(1, step[0]):
        np.add(rows, source[row :: step[0]], out=rows)
    sums = rows[:, :: step[1]] + kind(area // 2)
    for column in range(1, step[1]):
        np.add(sums, rows[:, column :: step[1]], out=sums)
    return np.asarray(sums // kind(area)).astype(np.uint8)


def _sum_axis(
    source: NDArray[np.uint8] | NDArray[np.float32], edges: NDArray[np.float64], axis: int
) -> NDArray[np.float32]:
    """Integrates between neighbouring edges along one axis, a tap at a time, to bound memory."""
    first = np.floor(edges[:-1])
    taps = int(np.max(np.ceil(edges[1:]) - first))
    shape = list(source.shape)
    shape[axis] = len(first)
    total = np.zeros(shape, np.float32)
    along = [1, 1, 1]
    along[axis] = -1
    for tap in range(taps):
        position = first + tap
        overlap = np.minimum(edges[1:], position + 1) - np.maximum(edges[:-1], position)
        weight = np.maximum(overlap, 0).astype(np.float32)
        index = np.minimum(position, source.shape[axis] - 1).astype(np.intp)
        total += source.take(index, axis=axis) * weight.reshape(along)
    return total
