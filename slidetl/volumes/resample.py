"""Resamples a volume to another spacing: separable, linear, without aliasing, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slidetl.volumes.volume import Volume

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def resample(volume: Volume, spacing_mm: float) -> Volume:
    """Resamples a volume to cubic voxels of a spacing over the same extent.

    Linear along each axis; where the spacing grows by a factor s, the linear interpolant is averaged over
    sqrt(2 (s^2 - 1)) voxels, which gives the variance of the usual triangle filter of width s and, other than
    the latter, keeps ramps exactly. Beyond the outermost centres the outermost value counts. Memory beside
    the two volumes is a few slices.

    Args:
        volume: the volume.
        spacing_mm: wanted along all axes, millimetres per voxel.
    """
    old, new = volume.frame, volume.frame.at_spacing(spacing_mm)
    axes = zip(old.size_voxel, old.spacing_mm, new.size_voxel, new.spacing_mm, strict=True)
    x, y, z = (axis_weights(*axis) for axis in axes)
    hu = np.empty(new.size_voxel[::-1], np.int16)

    def in_plane(index: int) -> NDArray[np.float32]:
        rows = y @ volume.hu[index].astype(np.float32)
        return np.asarray((x @ rows.T).T)

    for number, plane in enumerate(_along_z(z, in_plane)):
        hu[number] = np.rint(plane)
    return Volume(hu, new, volume.fingerprint, volume.notes)


def axis_weights(size: int, spacing: float, size_new: int, spacing_new: float) -> csr_array:
    """Computes the weights of the old samples along an axis in each new one, ``[size_new, size]`` float32.

    Both axes begin at the same edge, half a sample before the first centre.
    """
    from scipy.sparse import csr_array

    scale = spacing_new / spacing
    centre = (np.arange(size_new) + 0.5) * scale - 0.5
    width = math.sqrt(2 * max(scale**2 - 1, 0.0))
    reach = math.ceil(1 + width / 2)
    index = np.floor(centre).astype(np.int64)[:, None] + np.arange(-reach, reach + 2)
    offset = index - centre[:, None]
    if width > 1e-3:
        weight = (_hat_integral(offset + width / 2) - _hat_integral(offset - width / 2)) / width
    else:
        weight = np.maximum(0, 1 - np.abs(offset))
    row = np.broadcast_to(np.arange(size_new)[:, None], index.shape)
    is_used = weight > 1e-7
    entries = (weight[is_used], (row[is_used], index.clip(0, size - 1)[is_used]))
    matrix = csr_array(entries, shape=(size_new, size))  # adds up the weights of one sample
    return csr_array(matrix.multiply(1 / matrix.sum(axis=1)[:, None]), dtype=np.float32)


def _hat_integral(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integrates the hat function max(0, 1 - |t|) from minus infinity to x."""
    inside = np.clip(x, -1, 1)
    return np.where(inside < 0, (1 + inside) ** 2 / 2, 1 - (1 - inside) ** 2 / 2)


def _along_z(
    weights: csr_array, plane_of: Callable[[int], NDArray[np.float32]]
) -> Iterator[NDArray[np.float32]]:
    """Yields each new plane; an old one is computed once, and kept while it is needed."""
    kept: dict[int, NDArray[np.float32]] = {}
    for number in range(weights.shape[0]):
        entries = slice(weights.indptr[number], weights.indptr[number + 1])
        wanted = weights.indices[entries].tolist()
        kept = {index: plane for index, plane in kept.items() if index >= min(wanted)}
        planes = []
        for index, weight in zip(wanted, weights.data[entries], strict=True):
            if index not in kept:
                kept[index] = plane_of(index)
            planes.append(weight * kept[index])
        yield np.add.reduce(planes)
