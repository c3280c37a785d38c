"""Finds the body and the lungs in a CT volume: Hounsfield units in, masks out. No file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Between air or lung (-1000 to -600) and fat (-100), after Hu et al. 2001 (IEEE TMI 20:490), who settle near
# here by iteration. Lungs with consolidations are brighter, hence the closing below.
_BODY_HU = -400
# Thinner things than this are a table, clothes, or a bridge between body and table.
_BRIDGE_MM = 5.0
# Vessels within the lungs, and nodules at their border, of up to about twice this width belong to them.
_CLOSING_MM = 8.0
# The second lung has at least this share of the first, and lungs at least this volume.
_SECOND_SHARE = 0.1
_LEAST_LUNG_ML = 50.0


def find_body(hu: NDArray[np.int16], spacing_mm: float) -> NDArray[np.bool_]:
    """Finds the body, lungs and bowel gas included: the largest piece brighter than air, filled by slice.

    Args:
        hu: ``[z, y, x]``, axial slices.
        spacing_mm: of the cubic voxels, millimetres.

    Returns:
        ``[z, y, x] bool``; all False without a body.
    """
    from scipy import ndimage

    is_dense = hu > _BODY_HU
    core = _largest(_distance(is_dense) > _BRIDGE_MM / 2 / spacing_mm, 1)
    body = is_dense & _within(core, _BRIDGE_MM / 2 / spacing_mm)
    return np.stack([ndimage.binary_fill_holes(plane) for plane in body]).astype(bool)


def find_lungs(hu: NDArray[np.int16], spacing_mm: float) -> NDArray[np.bool_]:
    """Finds the lungs with their vessels, nodules and large airways: the largest pieces of air in the body.

    Args:
        hu: ``[z, y, x]``, axial slices.
        spacing_mm: of the cubic voxels, millimetres.

    Returns:
        ``[z, y, x] bool``; all False if no air of 50 ml is inside the body.
    """
    from scipy import ndimage

    body = find_body(hu, spacing_mm)
    lungs = _largest((hu <= _BODY_HU) & body, 2, _SECOND_SHARE)
    if lungs.sum() * spacing_mm**3 / 1000 < _LEAST_LUNG_ML:
        return np.zeros_like(body)
    radius = _CLOSING_MM / spacing_mm
    margin = int(np.ceil(radius)) + 1
    grown = _within(np.pad(lungs, margin), radius)
    closed = _distance(grown)[(slice(margin, -margin),) * 3] > radius
    # A large nodule is a hole once the vessels that lead to it belong to the lung.
    return np.asarray(ndimage.binary_fill_holes(closed | lungs) & body, bool)


def _largest(mask: NDArray[np.bool_], count: int, least_share: float = 0.0) -> NDArray[np.bool_]:
    """Keeps the largest connected pieces, at most ``count``, each with a share of the first at least."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept = [n for n in np.argsort(-sizes, kind="stable")[:count] if sizes[n] > least_share * sizes.max()]
    return np.isin(labels, kept) if kept else np.zeros_like(mask)


def _distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Computes the distance of each voxel of the mask to the next one outside, within the array."""
    from scipy import ndimage

    if mask.all():
        return np.full(mask.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(mask))


def _within(mask: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Grows a mask by a radius, voxels; in its time, other than a dilation's, the radius does not matter."""
    return _distance(~mask) <= radius
