"""A CT volume: Hounsfield units on a grid in patient coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import VolumeError
from slidetl.volumes.frame import Triple, VolumeFrame

AIR_HU = -1024
"""Lowest value of a volume. Scanners pad the area outside their circle with lower ones."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT series as one volume.

    Attributes:
        hu: ``[z, y, x] int16``, Hounsfield units, at least :data:`AIR_HU`.
        frame: its grid in patient coordinates.
        fingerprint: SHA-256 over the content of its files, hexadecimal; empty if it was not read from files.
        notes: doubts about the series and what was left out; one line each, no semicolon.

    Raises:
        VolumeError: array and grid differ in size, or the array is not ``int16``.
    """

    hu: NDArray[np.int16]
    frame: VolumeFrame
    fingerprint: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hu.dtype != np.int16 or self.hu.shape != self.frame.size_voxel[::-1]:
            raise VolumeError(
                f"a volume of {self.frame.size_voxel} voxels (x, y, z) needs int16 numbers [z, y, x], "
                f"not {self.hu.dtype} {self.hu.shape}"
            )

    @property
    def spacing_mm(self) -> Triple:
        """Distance of neighbouring voxels along ``(x, y, z)``, millimetres."""
        return self.frame.spacing_mm

    @property
    def origin_mm(self) -> Triple:
        """Centre of the first voxel, patient coordinates."""
        return self.frame.origin_mm

    @property
    def direction(self) -> NDArray[np.float64]:
        """``[3, 3]``, unit vectors of the axes x, y, z in patient coordinates, as columns."""
        return self.frame.matrix
