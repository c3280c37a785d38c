"""Plans and cuts the patches of a CT series: cubes of voxels at a physical spacing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import VolumeError
from slidetl.slides.decoding import map_in_order
from slidetl.tiles.codec import tile_codec
from slidetl.tiles.grid import TileSpec
from slidetl.volumes.frame import Triple, VolumeFrame
from slidetl.volumes.masks import find_body, find_lungs
from slidetl.volumes.resample import resample
from slidetl.volumes.series import Series
from slidetl.volumes.volume import Volume

# Spacing of the volume for the search for the lungs, millimetres, or finer for this many voxels per patch.
_OVERVIEW_MM = 4.0
_VOXELS_PER_PATCH = 8

# A series is enlarged, as is usual between thick slices; from so many times on, a note says it.
_COARSE = 2.5
_LEFT_OUT = 0.02  # of the lungs or the body, worth a note

_ROUNDING = 1e-6  # least share of the mask is compared with float32 shares


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """The wanted patches of a series.

    Attributes:
        spec: the specification.
        volume: the series at ``spec.spacing_mm``, within the window.
        origins_voxel: ``[N, 3] int32``, first voxels ``(x, y, z)`` of the patches, voxels of ``volume``.
        tissue_fraction: ``[N] float32``, share of the mask in each patch.
        patches_without_mask: places on the grid with a smaller share than ``spec.min_tissue``.
        overview: the whole series at a coarse spacing.
        mask: the lungs or the body in ``overview``, ``[z, y, x] bool``; all True for ``spec.mask`` none.
        notes: doubts about the series and the request, :func:`notes_on_series`.
    """

    spec: TileSpec
    volume: Volume
    origins_voxel: NDArray[np.int32]
    tissue_fraction: NDArray[np.float32]
    patches_without_mask: int
    overview: Volume
    mask: NDArray[np.bool_]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.origins_voxel)

    def describe_empty(self) -> str:
        """Describes why there is no patch."""
        if not self.mask.any():
            return f"no {self.spec.mask} is found in it"
        return f"no patch has {self.spec.min_tissue:.0%} {self.spec.mask}"

    @property
    def identity(self) -> bytes:
        """Bytes that differ for other patches."""
        return self.origins_voxel.tobytes() + self.tissue_fraction.tobytes()

    def arrays(self, is_kept: NDArray[np.bool_]) -> dict[str, tuple[NDArray[Any], dict[str, Any]]]:
        """Returns the arrays of a cache beside the patches, with their attributes."""
        spacing = {"spacing_mm": self.overview.spacing_mm[0]}
        return {
            "origin_voxel": (self.origins_voxel[is_kept], {}),
            "tissue_fraction": (self.tissue_fraction[is_kept], {}),
            "overview": (self.overview.hu, spacing),
            "mask": (self.mask, spacing),
        }

    def patch(self, number: int) -> NDArray[np.int16]:
        """Cuts a patch, ``[S, S, S] int16``; voxels outside the volume have the window's lower limit."""
        side, low = self.spec.tile_size_px, int(self.spec.window_hu[0])
        first = self.origins_voxel[number][::-1].tolist()
        hu = self.volume.hu
        patch = np.full(self.spec.tile_shape, low, np.int16)
        inside = [slice(max(0, f), min(n, f + side)) for f, n in zip(first, hu.shape, strict=True)]
        into = tuple(slice(s.start - f, s.stop - f) for s, f in zip(inside, first, strict=True))
        patch[into] = hu[tuple(inside)]
        return patch

    def encode(self, first: int, threads: int = 1) -> Iterator[bytes]:
        """Yields the bytes of each patch in a cache, from ``first`` on; ``threads`` does not change them."""
        encode = tile_codec(self.spec).encode
        yield from map_in_order(lambda n: encode(self.patch(n)), range(first, len(self)), threads)


@dataclass(frozen=True, eq=False)
class PreparedSeries:
    """A series ready to be cut, for any number of locations.

    Attributes:
        volume: at the spacing of a specification, within its window.
        overview: the whole series at a coarse spacing.
        mask: the lungs or the body in ``overview``.
    """

    volume: Volume
    overview: Volume
    mask: NDArray[np.bool_]


def prepare_series(series: Series, spec: TileSpec) -> PreparedSeries:
    """Reads a series, resamples it, and finds its lungs or body.

    Raises:
        VolumeError: it cannot be read, or is no CT volume.
    """
    volume = resample(series.read(), spec.spacing_mm)
    coarse = max(spec.spacing_mm, min(_OVERVIEW_MM, spec.tile_size_px * spec.spacing_mm / _VOXELS_PER_PATCH))
    overview = resample(volume, coarse)
    np.clip(volume.hu, *map(int, spec.window_hu), out=volume.hu)  # after the mask, which needs all values
    if spec.mask == "none":
        mask = np.ones(overview.hu.shape, bool)
    else:
        mask = (find_lungs if spec.mask == "lung" else find_body)(overview.hu, coarse)
    return PreparedSeries(volume, overview, mask)


def plan_patches(
    series: Series,
    spec: TileSpec,
    location_mm: Triple | None = None,
    prepare: Callable[[Series, TileSpec], PreparedSeries] = prepare_series,
) -> PatchPlan:
    """Selects the patches of a series with enough of the mask, or the one patch around a location.

    The grid begins at the first voxel; its last patch along an axis ends with the last voxel, so that
    nothing is left out. A series smaller than a patch is padded.

    Args:
        series: the series.
        spec: the specification, with ``spacing_mm``.
        location_mm: patient coordinates of the centre of the only patch, to half a voxel; the mask then
            selects nothing.
        prepare: reads and resamples the series.

    Raises:
        VolumeError: it cannot be read, is no CT volume, or does not reach to the location.
    """
    if location_mm is not None and not series.frame.is_inside(location_mm):
        raise VolumeError(
            f"{series.path}: the location {location_mm} mm is outside the series, which reaches from "
            f"{_corner(series.frame, 0)} to {_corner(series.frame, 1)}; give patient coordinates as in DICOM "
            "(LPS)"
        )
    prepared = prepare(series, spec)
    frame, side = prepared.volume.frame, spec.tile_size_px
    if location_mm is None:
        origins = patch_grid(frame.size_voxel, side, spec.stride_px)
    else:  # the centre of a patch of an even side lies between two voxels
        origin = np.rint(frame.to_voxel(location_mm) - (side - 1) / 2)
        origins = origin.astype(np.int32)[None]
    fraction = box_means(prepared.mask, origins, side, spec.spacing_mm / prepared.overview.spacing_mm[0])
    is_wanted = fraction >= (spec.min_tissue - _ROUNDING if location_mm is None else 0)
    without = int((~is_wanted).sum())
    coarse = prepared.overview.spacing_mm[0]
    return PatchPlan(
        spec=spec,
        volume=prepared.volume,
        origins_voxel=origins[is_wanted],
        tissue_fraction=fraction[is_wanted],
        patches_without_mask=without,
        overview=prepared.overview,
        mask=prepared.mask,
        notes=notes_on_series(series, spec, location_mm, origins[is_wanted], prepared.mask, coarse),
    )


def notes_on_series(
    series: Series,
    spec: TileSpec,
    location_mm: Triple | None,
    origins_voxel: NDArray[np.int32],
    mask: NDArray[np.bool_],
    mask_mm: float,
) -> tuple[str, ...]:
    """Notes doubts about a series, and what its patches do not show.

    Args:
        series: the series.
        spec: the specification of its patches.
        location_mm: the location of its only patch; None for all of it.
        origins_voxel: ``[N, 3]``, first voxels ``(x, y, z)`` of the patches.
        mask: the lungs or the body, ``[z, y, x]``.
        mask_mm: its spacing, millimetres.
    """
    notes, apart = list(series.notes), max(series.frame.spacing_mm)
    if apart > _COARSE * spec.spacing_mm:
        notes.append(f"slices or pixels are {apart:.3g} mm apart, interpolated to {spec.spacing_mm:g} mm")
    if location_mm is None and spec.mask != "none" and len(origins_voxel):
        lost = share_left_out(mask, origins_voxel, spec.tile_size_px, spec.spacing_mm / mask_mm)
        if lost > _LEFT_OUT:
            notes.append(
                f"{lost:.0%} of the {spec.mask} is in no patch (min_tissue {spec.min_tissue:g}, stride "
                f"{spec.stride_px})"
            )
    return tuple(notes)


def patch_grid(size_voxel: tuple[int, int, int], side: int, stride: int) -> NDArray[np.int32]:
    """Lays a grid of cubes over a volume that leaves nothing out.

    Returns:
        ``[N, 3] int32``, first voxels ``(x, y, z)``, z slowest.
    """
    x, y, z = (
        np.unique(np.minimum(np.arange(0, max(size - side, 0) + stride, stride), max(size - side, 0)))
        for size in size_voxel
    )
    grid = np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1], axis=-1)
    return grid.reshape(-1, 3).astype(np.int32)


def box_means(
    mask: NDArray[np.bool_], origins: NDArray[np.int32], side: int, scale: float
) -> NDArray[np.float32]:
    """Computes the exact share of a mask in cubes; outside the mask there is none.

    Args:
        mask: ``[z, y, x]``.
        origins: ``[N, 3]``, first voxels ``(x, y, z)`` of the cubes.
        side: of the cubes, their voxels.
        scale: voxels of the mask per voxel of the cubes; both grids begin at the same corner.

    Returns:
        ``[N] float32``, 0..1.
    """
    from scipy import ndimage

    integral = np.pad(mask.astype(np.float64).cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
    low = origins[:, ::-1].T * scale
    total = np.zeros(len(origins))
    for corner in np.ndindex(2, 2, 2):
        at = low + np.array(corner)[:, None] * side * scale
        sign = (-1) ** (3 - sum(corner))
        total += sign * ndimage.map_coordinates(integral, at, order=1, mode="nearest")
    return np.asarray(np.clip(total / (side * scale) ** 3, 0, 1), np.float32)


def share_left_out(mask: NDArray[np.bool_], origins: NDArray[np.int32], side: int, scale: float) -> float:
    """Computes the share of a mask outside all cubes, 0..1; the arguments are those of :func:`box_means`."""
    is_left_out = mask.copy()
    low = np.floor(origins[:, ::-1] * scale + _ROUNDING).astype(int).clip(0)
    high = np.ceil((origins[:, ::-1] + side) * scale - _ROUNDING).astype(int)
    for (z0, y0, x0), (z1, y1, x1) in zip(low.tolist(), high.tolist(), strict=True):
        is_left_out[z0:z1, y0:y1, x0:x1] = False
    return float(is_left_out.sum() / max(1, mask.sum()))


def _corner(frame: VolumeFrame, end: int) -> list[float]:
    """Returns the centre of the first or last voxel, rounded to a tenth of a millimetre."""
    point = frame.to_patient_mm((np.array(frame.size_voxel) - 1) * end)
    return [round(value, 1) for value in point.tolist()]
