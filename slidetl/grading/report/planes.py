"""Pictures of a place in a CT volume: an axial, a coronal and a sagittal plane, as radiologists see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

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

    def marked(self, longest_px: int) -> NDArray[np.uint8]:
        """Draws the box, and lines from it to the edges that cross at the place: ``[h, w, 3] uint8``.

        The picture is scaled for its longer side to be ``longest_px``; the lines are two pixels wide.
        """
        scale = longest_px / max(self.pixels.shape)
        height, width = (max(1, round(side * scale)) for side in self.pixels.shape)
        scaled = Image.fromarray(self.pixels).resize((width, height), Image.Resampling.BICUBIC)
        picture = np.repeat(np.asarray(scaled)[..., None], 3, axis=2)

        def at(value: float, size: int) -> int:
            return int(np.clip(np.floor(value * scale), 0, size - 1))

        left, right = at(self.box_px[0], width), at(self.box_px[2], width)
        top, bottom = at(self.box_px[1], height), at(self.box_px[3], height)
        column, row = at(self.point_px[0] + 0.5, width), at(self.point_px[1] + 0.5, height)
        for x in (left, right):
            picture[top : bottom + 1, _line(x)] = _MARK
        for y in (top, bottom):
            picture[_line(y), left : right + 1] = _MARK
        for part in (slice(None, top), slice(bottom + 1, None)):
            picture[part, _line(column)] = _MARK
        for part in (slice(None, left), slice(right + 1, None)):
            picture[_line(row), part] = _MARK
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


def _line(place: int) -> slice:
    """Widens a line to two pixels; one would lose its colour in a JPEG."""
    return slice(max(0, place - 1), place + 1)


def planes_at(
    volume: Volume, point_voxel: ArrayLike, origin_voxel: ArrayLike, side: int, window_hu: tuple[float, float]
) -> tuple[Plane, Plane, Plane]:
    """Cuts the axial, coronal and sagittal plane through a place.

    The patient's right is on the left, as seen from the feet, the front is at the top or on the left, and the
    head is at the top.

    Args:
        volume: of cubic voxels, with its axes nearly to left, back and head, as all that are read.
        point_voxel: the place ``(x, y, z)``, voxels.
        origin_voxel: first voxel ``(x, y, z)`` of a cube to mark.
        side: of the cube, voxels.
        window_hu: Hounsfield units of black and white.
    """
    point, first = (np.asarray(of, np.float64) for of in (point_voxel, origin_voxel))
    sizes = np.array(volume.frame.size_voxel)
    x, y, z = np.clip(np.rint(point), 0, sizes - 1).astype(int).tolist()
    low, high = window_hu

    def plane(name: str, sides: str, cut: NDArray[np.int16], across: int, down: int) -> Plane:
        grey = np.clip((cut.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
        row, top = float(point[down]), float(first[down])
        if down == 2:  # z grows upwards
            grey = grey[::-1]
            row, top = float(sizes[2] - 1 - row), float(sizes[2] - side - top)
        left = float(first[across])
        return Plane(name, sides, grey, (left, top, left + side, top + side), (float(point[across]), row))

    return (
        plane("axial", "RLAP", volume.hu[z], 0, 1),
        plane("coronal", "RLHF", volume.hu[:, y], 0, 2),
        plane("sagittal", "APHF", volume.hu[:, :, x], 1, 2),
    )
