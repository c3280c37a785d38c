"""Pictures of a place in a CT volume: an axial, a coronal and a sagittal plane, as radiologists see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.volume import Volume

_MARK = (255, 170, 0)  # of box and lines; no grey value


@dataclass(frozen=True, eq=False)
class Plane:
    """A plane through a volume.

    Attributes:
        name: ``axial``, ``coronal`` or ``sagittal``.
        sides: the directions to the left, right, top and bottom, one letter each: R, L, A, P, H or F.
        pixels: ``[h, w] uint8``, black to white over the window; square pixels of the volume's spacing.
        box_px: left, top, right and bottom edge of the marked cube, pixels from the upper-left corner.
        point_px: ``(column, row)`` of the place.
    """

    name: str
    sides: str
    pixels: NDArray[np.uint8]
    box_px: tuple[float, float, float, float]
    point_px: tuple[float, float]

    def marked(self) -> NDArray[np.uint8]:
        """Draws the box, and lines from it to the edges that cross at the place: ``[h, w, 3] uint8``."""
        picture = np.repeat(self.pixels[..., None], 3, axis=2)
        height, width = self.pixels.shape
        left, right = (int(np.clip(edge, 0, width - 1)) for edge in (self.box_px[0], self.box_px[2] - 1))
        top, bottom = (int(np.clip(edge, 0, height - 1)) for edge in (self.box_px[1], self.box_px[3] - 1))
        column, row = (
            int(np.clip(n, 0, size - 1)) for n, size in zip(self.point_px, (width, height), strict=True)
        )
        picture[top : bottom + 1, [left, right]] = _MARK
        picture[[top, bottom], left : right + 1] = _MARK
        for line in (slice(None, top), slice(bottom + 1, None)):
            picture[line, column] = _MARK
        for line in (slice(None, left), slice(right + 1, None)):
            picture[row, line] = _MARK
        return picture

    def within_box(self) -> NDArray[np.uint8]:
        """Cuts the marked cube's face out, ``[h, w] uint8``; black outside the volume."""
        left, top, right, bottom = (round(edge) for edge in self.box_px)
        face = np.zeros((bottom - top, right - left), np.uint8)
        height, width = self.pixels.shape
        rows, columns = slice(max(0, top), min(height, bottom)), slice(max(0, left), min(width, right))
        into = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        face[into] = self.pixels[rows, columns]
        return face


def planes_at(
    volume: Volume, point_voxel: ArrayLike, origin_voxel: ArrayLike, side: int, window_hu: tuple[float, float]
) -> tuple[Plane, Plane, Plane]:
    """Cuts the axial, coronal and sagittal plane through a place.

    The patient's right is on the left, as seen from the feet, the front is at the top or on the left, and the
    head is at the top. Axes of the volume that are tilted count as the nearest ones of the patient.

    Args:
        volume: of cubic voxels.
        point_voxel: the place ``(x, y, z)``, voxels; within the volume.
        origin_voxel: first voxel ``(x, y, z)`` of a cube to mark.
        side: of the cube, voxels.
        window_hu: Hounsfield units of black and white.
    """
    hu, axes, flips = _as_patient(volume)
    sizes = np.array(hu.shape[::-1])
    point, first = (np.asarray(of, np.float64)[axes] for of in (point_voxel, origin_voxel))
    point, first = (np.where(flips, sizes - 1 - point, point), np.where(flips, sizes - side - first, first))
    x, y, z = np.clip(np.rint(point), 0, sizes - 1).astype(int).tolist()
    low, high = window_hu

    def plane(name: str, sides: str, cut: NDArray[np.int16], across: int, down: int) -> Plane:
        grey = np.clip((cut.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
        at, start = (point[[across, down]], first[[across, down]])
        if down == 2:  # z grows upwards
            grey = grey[::-1]
            at, start = (
                np.array([at[0], sizes[2] - 1 - at[1]]),
                np.array([start[0], sizes[2] - side - start[1]]),
            )
        left, top, column, row = (float(value) for value in (*start, *at))
        return Plane(name, sides, grey, (left, top, left + side, top + side), (column, row))

    return (
        plane("axial", "RLAP", hu[z], 0, 1),
        plane("coronal", "RLHF", hu[:, y], 0, 2),
        plane("sagittal", "APHF", hu[:, :, x], 1, 2),
    )


def nearest_axes(frame: VolumeFrame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Finds the axis of a volume that is nearest to x, y and z of the patient, and if it runs against it."""
    from scipy.optimize import linear_sum_assignment

    matrix = frame.matrix
    axes = np.asarray(linear_sum_assignment(-np.abs(matrix))[1], np.int64)  # each once
    return axes, matrix[np.arange(3), axes] < 0


def _as_patient(volume: Volume) -> tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.bool_]]:
    """Views the array with its axes along those of the patient."""
    axes, flips = nearest_axes(volume.frame)
    view = volume.hu.transpose(*(2 - axes[::-1]))
    return view[tuple(slice(None, None, -1 if flip else 1) for flip in flips[::-1])], axes, flips
