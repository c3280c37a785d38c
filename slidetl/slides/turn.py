"""Orientation of a picture: the eight arrangements of its rows and columns in a file; and viewers' frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

# A rectangle of one level, wholly inside it: left, top, width, height, to [height, width, 3] uint8.
ReadPixels = Callable[[int, int, int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Turn:
    """Turns a stored picture into its view: mirrored first, then transposed.

    Attributes:
        mirror_x: exchange left and right.
        mirror_y: exchange top and bottom.
        is_transposed: exchange rows and columns after the mirroring.
    """

    mirror_x: bool = False
    mirror_y: bool = False
    is_transposed: bool = False

    @classmethod
    def of(cls, orientation: int) -> tuple[Self, list[str]]:
        """Returns the turn of an orientation of TIFF and EXIF, 1..8, none for others; and a note of it."""
        turn = cls(orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7), orientation in (5, 6, 7, 8))
        return turn, [f"turned as its orientation {orientation} says"] if turn != cls() else []

    @property
    def orientation(self) -> int:
        """The orientation of TIFF and EXIF, 1..8."""
        return next(number for number in range(1, 9) if Turn.of(number)[0] == self)

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Returns width and height of the view from the stored ones."""
        return (stored[1], stored[0]) if self.is_transposed else stored

    def reader(self, read: ReadPixels, stored: tuple[int, int]) -> ReadPixels:
        """Turns the reader of a stored picture of a size into a reader of its view."""
        if self == Turn():
            return read

        def turned(x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
            if self.is_transposed:
                x, y, width, height = y, x, height, width
            x = stored[0] - x - width if self.mirror_x else x
            y = stored[1] - y - height if self.mirror_y else y
            return self.apply(read(x, y, width, height))

        return turned

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Turns pixels ``[h, w, 3]``."""
        pixels = pixels[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]
        return np.ascontiguousarray(pixels.swapaxes(0, 1) if self.is_transposed else pixels)


@dataclass(frozen=True)
class ViewerFrame:
    """Converts places between level 0 of a slide and the picture shown by QuPath, ASAP or ImageScope.

    They show the pixels as stored, without the orientation of TIFF and EXIF. QuPath also crops to the scanned
    area.

    Attributes:
        size_level0: width and height of level 0, turned.
        corner_level0: ``(x, y)`` of the scanned area.
        orientation: of TIFF and EXIF, as applied to level 0.
    """

    size_level0: tuple[int, int]
    corner_level0: tuple[int, int] = (0, 0)
    orientation: int = 1

    def to_level0(self, places: NDArray[np.float64], is_cropped: bool = True) -> NDArray[np.float64]:
        """Converts places ``[P, 2]`` in the viewer; ``is_cropped`` if it crops to the scanned area."""
        turn, stored = self._stored()
        x, y = (places + self.corner_level0 if is_cropped else places).T
        x = stored[0] - x if turn.mirror_x else x
        y = stored[1] - y if turn.mirror_y else y
        return np.stack((y, x) if turn.is_transposed else (x, y), axis=1)

    def from_level0(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inverts :meth:`to_level0` of a viewer that crops to the scanned area."""
        turn, stored = self._stored()
        x, y = places.T[::-1] if turn.is_transposed else places.T
        x = stored[0] - x if turn.mirror_x else x
        y = stored[1] - y if turn.mirror_y else y
        return np.stack((x, y), axis=1) - self.corner_level0

    def _stored(self) -> tuple[Turn, tuple[int, int]]:
        turn, _ = Turn.of(self.orientation)
        return turn, turn.size(self.size_level0)
