"""A CT series before its voxels are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import VolumeError
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.volume import AIR_HU, Volume

_HIGHEST_HU = 32767  # of int16; metal ends far below
_LEAST_RANGE_HU = 100  # noise alone has it
_MOST_VOXELS = 2**30  # 2 GB; a header may claim any size


@dataclass(frozen=True, eq=False)
class Series:
    """An opened CT series.

    Attributes:
        path: as given.
        stored: the grid as stored; :attr:`frame` has its axes in another order or direction.
        fingerprint: SHA-256 over the content of its files, hexadecimal.
        notes: doubts, and what was left out.
        planes: returns an iterator over the planes of ``stored`` along z, ``[y, x]`` Hounsfield units of any
            type.
    """

    path: Path
    stored: VolumeFrame
    fingerprint: str
    notes: tuple[str, ...]
    planes: Callable[[], Iterator[NDArray[np.generic]]]

    def __post_init__(self) -> None:
        if np.prod(self.stored.size_voxel, dtype=np.float64) > _MOST_VOXELS:
            raise VolumeError(
                f"{self.path}: it has {self.stored.size_voxel} voxels, more than a CT series may have here "
                f"({_MOST_VOXELS})"
            )

    @property
    def frame(self) -> VolumeFrame:
        """The grid of the volume read."""
        return _turn(self.stored)[2]

    def read(self) -> Volume:
        """Reads the voxels.

        Raises:
            VolumeError: they are damaged, not finite, or no Hounsfield units.
        """
        hu = np.empty(self.stored.size_voxel[::-1], np.int16)
        least, most = _HIGHEST_HU, AIR_HU
        for number, plane in enumerate(self.planes()):
            lowest, highest = float(plane.min()), float(plane.max())
            if not (np.isfinite(lowest) and np.isfinite(highest)):
                raise VolumeError(f"{self.path}: plane {number} has values that are not finite numbers")
            if highest > _HIGHEST_HU:
                raise VolumeError(
                    f"{self.path}: plane {number} reaches {highest:g}, far beyond any Hounsfield unit; check "
                    "the rescale slope and intercept"
                )
            hu[number] = np.maximum(np.rint(plane.astype(np.float32)), AIR_HU)
            # Padding has AIR_HU, whatever the other values are.
            least = min(least, hu[number].min(where=hu[number] > AIR_HU, initial=_HIGHEST_HU))
            most = max(most, hu[number].max())
        if least >= 0 or most - least < _LEAST_RANGE_HU:
            raise VolumeError(
                f"{self.path}: its values, {hu.min()} to {hu.max()}, are no Hounsfield units: expected some "
                f"between {AIR_HU} and 0 (air has -1000), over a range of at least {_LEAST_RANGE_HU}; export "
                "it with the rescale slope and intercept applied"
            )
        return turned(Volume(hu, self.stored, self.fingerprint, self.notes))


def turned(volume: Volume) -> Volume:
    """Permutes and mirrors the axes of a volume to run as nearly as they can to left, back and head."""
    order, is_mirrored, frame = _turn(volume.frame)
    hu = volume.hu.transpose([2 - axis for axis in order][::-1])
    hu = hu[tuple(slice(None, None, -1 if mirror else 1) for mirror in is_mirrored[::-1])]
    return Volume(np.ascontiguousarray(hu), frame, volume.fingerprint, volume.notes)


def _turn(old: VolumeFrame) -> tuple[tuple[int, ...], list[bool], VolumeFrame]:
    """Chooses the old axis for each new one, tells if it is mirrored, and returns the new frame."""
    matrix = old.matrix

    def nearness(axes: tuple[int, ...]) -> float:
        return float(sum(abs(matrix[n, axis]) for n, axis in enumerate(axes)))

    order = max(itertools.permutations(range(3)), key=nearness)
    is_mirrored = [bool(matrix[n, axis] < 0) for n, axis in enumerate(order)]
    first = [0, 0, 0]
    for axis, mirror in zip(order, is_mirrored, strict=True):
        first[axis] = (old.size_voxel[axis] - 1) * mirror
    x, y, z = old.to_patient_mm(first).tolist()
    signs = [-1.0 if mirror else 1.0 for mirror in is_mirrored]
    size = [old.size_voxel[axis] for axis in order]
    spacing = [old.spacing_mm[axis] for axis in order]
    frame = VolumeFrame(
        (size[0], size[1], size[2]),
        (spacing[0], spacing[1], spacing[2]),
        (x, y, z),
        tuple((matrix[:, list(order)] * signs).ravel().tolist()),
    )
    return order, is_mirrored, frame
