"""Volumes of known content: a chest of air, flesh and lungs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.series import Series
from slidetl.volumes.volume import Volume

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def frame(
    size: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> VolumeFrame:
    return VolumeFrame(size, spacing, origin, IDENTITY)


def ellipsoid(
    about: VolumeFrame, centre_mm: tuple[float, float, float], radii_mm: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """Marks the voxels ``[z, y, x]`` inside an ellipsoid along the axes of a frame of direction identity."""
    axes = [
        (o + np.arange(n) * s - c) / r
        for n, s, o, c, r in zip(
            about.size_voxel, about.spacing_mm, about.origin_mm, centre_mm, radii_mm, strict=True
        )
    ]
    x, y, z = axes
    return np.asarray(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2 <= 1)


def chest(
    spacing: tuple[float, float, float] = (4.0, 4.0, 5.0), fingerprint: str = "ab" * 32
) -> tuple[Volume, dict[str, NDArray[np.bool_]]]:
    """Draws a chest of 320 x 240 x 200 mm, with a table below, and the masks of its parts."""
    size = tuple(round(mm / s) for mm, s in zip((320, 240, 200), spacing, strict=True))
    about = frame((size[0], size[1], size[2]), spacing, (-160.0, -120.0, -100.0))
    body = ellipsoid(about, (0, -10, 0), (140, 90, 1e6))
    lungs = ellipsoid(about, (-65, -10, 0), (45, 60, 80)) | ellipsoid(about, (65, -10, 0), (50, 65, 85))
    hu = np.full(about.size_voxel[::-1], -1000, np.int16)
    hu[body] = 40
    hu[lungs] = -850
    nodule = ellipsoid(about, (60, 0, 10), (8, 8, 8))
    hu[nodule] = 60
    table = np.zeros(hu.shape, bool)
    table[:, int(hu.shape[1] * 0.93) :, :] = True
    hu[table] = 200
    rng = np.random.default_rng(0)
    hu += np.rint(rng.standard_normal(hu.shape) * 15).astype(np.int16)
    return Volume(hu.clip(-1024, None), about, fingerprint), {"body": body, "lungs": lungs, "nodule": nodule}


def as_series(volume: Volume) -> Series:
    """Wraps a volume as a series that is read from nowhere."""
    return Series(Path("drawn"), volume.frame, volume.fingerprint, volume.notes, lambda: iter(volume.hu))
