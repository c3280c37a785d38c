"""The grid of a volume in patient coordinates: pure arithmetic, no file.

Points are ``(x, y, z)``, array indices ``(z, y, x)``. Patient coordinates are those of DICOM, LPS in
millimetres: x towards the patient's left, y towards the back, z towards the head. A voxel's coordinates are
those of its centre, so the first one is at voxel (0, 0, 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slidetl.errors import VolumeError

Triple = tuple[float, float, float]

# Greatest error of the direction's dot products; DICOM and NIfTI write about six digits.
_ORTHOGONAL = 1e-3


@dataclass(frozen=True)
class VolumeFrame:
    """A regular grid of voxels in patient coordinates.

    Attributes:
        size_voxel: number of voxels along ``(x, y, z)``.
        spacing_mm: distance of neighbouring voxels along ``(x, y, z)``, millimetres.
        origin_mm: the centre of voxel (0, 0, 0), patient coordinates.
        direction: nine numbers, row by row, of the matrix with the unit vectors of the axes x, y and z in
            patient coordinates as its columns.

    Raises:
        VolumeError: a number is not finite, a size or spacing is not positive, or the axes are not at right
            angles.
    """

    size_voxel: tuple[int, int, int]
    spacing_mm: Triple
    origin_mm: Triple
    direction: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, count in (("size_voxel", 3), ("spacing_mm", 3), ("origin_mm", 3), ("direction", 9)):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != count or not np.isfinite(values).all():
                raise VolumeError(f"{name} must be {count} finite numbers, not {values}")
        if min(self.size_voxel) < 1 or min(self.spacing_mm) <= 0:
            raise VolumeError(
                f"a volume needs positive sizes and spacings, not {self.size_voxel} voxels of "
                f"{self.spacing_mm} mm"
            )
        matrix = self.matrix
        if np.abs(matrix.T @ matrix - np.eye(3)).max() > _ORTHOGONAL:
            raise VolumeError(f"its axes must be unit vectors at right angles, not {self.direction}")

    @property
    def matrix(self) -> NDArray[np.float64]:
        """``[3, 3]``, the unit vectors of the axes as columns."""
        return np.array(self.direction, np.float64).reshape(3, 3)

    @property
    def extent_mm(self) -> Triple:
        """Size along the axes, from edge to edge of the outermost voxels."""
        x, y, z = (n * mm for n, mm in zip(self.size_voxel, self.spacing_mm, strict=True))
        return x, y, z

    def to_patient_mm(self, voxel: ArrayLike) -> NDArray[np.float64]:
        """Converts voxel coordinates ``[..., 3]`` to patient coordinates."""
        points = np.asarray(voxel, np.float64) * self.spacing_mm
        return np.asarray(points @ self.matrix.T + self.origin_mm)

    def to_voxel(self, patient_mm: ArrayLike) -> NDArray[np.float64]:
        """Converts patient coordinates ``[..., 3]`` to voxel coordinates, fractional."""
        points = (np.asarray(patient_mm, np.float64) - self.origin_mm) @ np.linalg.inv(self.matrix).T
        return np.asarray(points / self.spacing_mm)

    def is_inside(self, patient_mm: Sequence[float]) -> bool:
        """Tells if a point in patient coordinates lies within the volume, outer halves of voxels included."""
        voxel = self.to_voxel(patient_mm)
        return bool(np.all(voxel >= -0.5) and np.all(voxel <= np.array(self.size_voxel) - 0.5))

    def at_spacing(self, spacing_mm: float) -> VolumeFrame:
        """Lays a grid of another spacing over the same extent, from the same corner."""
        size = [max(1, round(extent / spacing_mm)) for extent in self.extent_mm]
        first = [(spacing_mm / old - 1) / 2 for old in self.spacing_mm]
        x, y, z = self.to_patient_mm(first).tolist()
        spacing = (spacing_mm, spacing_mm, spacing_mm)
        return VolumeFrame((size[0], size[1], size[2]), spacing, (x, y, z), self.direction)
