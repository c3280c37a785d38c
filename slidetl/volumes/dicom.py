"""Reads a CT series of DICOM: one file per slice, checked, sorted along the normal of the slices."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import VolumeError
from slidetl.slides.base import fingerprint_of
from slidetl.text import one_line
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.series import Series
from slidetl.volumes.volume import AIR_HU

if TYPE_CHECKING:
    from pydicom import Dataset

_Header = dict[str, Any]
_Taken = TypeVar("_Taken")

_NAMED = 5  # files or gaps named by a message
# Positions are often written with one decimal, which moves a distance by up to 0.1 mm.
_GAP_SHARE, _GAP_MM = 0.05, 0.08
_SAME = 1e-3  # greatest difference of equal spacings (mm) and of equal directions
_TILT_DEGREES = 0.5

_TAGS = (
    *("SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "NumberOfFrames", "Rows", "Columns"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PixelSpacing", "ImagePositionPatient"),
    *("ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "RescaleType", "GantryDetectorTilt"),
    *("PixelRepresentation", "BitsStored", "PixelPaddingValue", "PixelPaddingRangeLimit"),
)


@dataclass(frozen=True, eq=False)
class _Slice:
    """The metadata of a slice."""

    path: Path
    shape: tuple[int, int]
    spacing_mm: NDArray[np.float64]  # (row, column)
    position_mm: NDArray[np.float64]
    axes: NDArray[np.float64]  # [2, 3]: of growing columns (x), of growing rows (y)
    slope: float
    intercept: float
    padding_hu: tuple[float, float] | None  # lowest and highest; None if all padding is below air
    tilt_degrees: float


def open_dicom(path: Path) -> Series:
    """Opens the series in a folder, or that of a file; see :func:`slidetl.volumes.open_series`."""
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise VolumeError(f"{path}: no such file or folder")
    found = _headers(folder)
    if not found:
        raise VolumeError(f"{path}: no DICOM files here; expected the folder of a CT series")
    if path != folder and path not in found:
        raise VolumeError(f"{path}: not a DICOM file, a NIfTI or a MetaImage")
    if path in found:
        chosen = found[path]["SeriesInstanceUID"]
        found = {p: header for p, header in found.items() if header["SeriesInstanceUID"] == chosen}
    notes = []
    localizers = [p for p, header in found.items() if "LOCALIZER" in _image_type(header)]
    if localizers:
        found = {p: header for p, header in found.items() if p not in localizers}
        notes.append(f"localizer images are left out ({len(localizers)})")
        if not found:
            raise VolumeError(f"{path}: it has localizer images only, and no CT series")
    series: dict[str, dict[Path, _Header]] = defaultdict(dict)
    for file, header in found.items():
        series[str(header["SeriesInstanceUID"])][file] = header
    if len(series) > 1:
        listed = "; ".join(map(_describe, list(series.values())[:_NAMED])) + " ..." * (len(series) > _NAMED)
        raise VolumeError(
            f"{path}: {len(series)} DICOM series in one folder; give each its own, or name a file of one "
            f"({listed})"
        )
    slices = [_parse(file, header) for file, header in found.items()]
    stack = _stack(path, slices)
    if stack.shifts_px.any():
        notes.append(
            f"a gantry tilt of {stack.tilt_degrees:.1f} degrees is straightened by moving its slices"
        )
    if any(one.padding_hu for one in stack.slices):
        notes.append("voxels of the PixelPaddingValue that reach the edge of a slice are read as air")
    fingerprint = fingerprint_of(one.path for one in stack.slices)
    return Series(path, stack.frame, fingerprint, tuple(notes), lambda: _planes(stack))


def _headers(folder: Path) -> dict[Path, _Header]:
    """Reads the metadata of all DICOM files in a folder.

    Raises:
        VolumeError: one is damaged; so is a file of zeros beside DICOM, and another that is named like it.
    """
    headers: dict[Path, _Header] = {}
    others: dict[Path, bytes] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(132)
        if head[128:] == b"DICM":
            headers[path] = _read(path, _header, stop_before_pixels=True, specific_tags=list(_TAGS))
        else:
            others[path] = head
    names = set(map(_form, headers))
    for path, head in others.items():
        is_named_so = path.suffix.lower() in (".dcm", ".dicom", ".ima") or _form(path) in names
        if is_named_so or (headers and not head.strip(b"\0")):
            raise VolumeError(
                f"{path}: not DICOM, though it is {'named so' if is_named_so else 'empty'}, or damaged; "
                "copy it again, or remove it"
            )
    return headers


def _form(path: Path) -> str:
    """Returns the name of a file with all its numbers as one."""
    return re.sub(r"\d[\d.]*", "#", path.name)


def _header(dataset: Dataset) -> _Header:
    if not dataset.get("SeriesInstanceUID"):
        raise ValueError("it has no SeriesInstanceUID")
    return {tag: dataset.get(tag) for tag in _TAGS}


def _read(path: Path, take: Callable[[Dataset], _Taken], **options: Any) -> _Taken:
    """Reads a file and takes values of it; anything wrong with it is one error."""
    import pydicom
    from pydicom.filereader import read_file_meta_info

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are checked here, or not used
            syntax = read_file_meta_info(path).get("TransferSyntaxUID")
            if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
                raise VolumeError(
                    f"{path}: packed as a whole (deflated), which may unpack to any size, and is not read; "
                    "unpack it with 'dcmconv +te'"
                )
            return take(pydicom.dcmread(path, **options))
    except VolumeError:
        raise
    except Exception as error:  # pydicom raises anything at a damaged file
        raise VolumeError(f"{path}: damaged, or not DICOM: {one_line(str(error))[:200]}") from error


def _image_type(header: _Header) -> list[str]:
    value = header.get("ImageType")
    return [] if value is None else [str(v) for v in ([value] if isinstance(value, str) else value)]


def _describe(series: dict[Path, _Header]) -> str:
    first, header = next(iter(series.items()))
    about = one_line(str(header["SeriesDescription"] or ""))[:40]
    return f"{header.get('Modality', 'no modality')} of {len(series)} files, {about!r}, {first.name}"


def _parse(path: Path, header: _Header) -> _Slice:
    """Checks the metadata of one file."""

    def numbers(keyword: str, count: int) -> NDArray[np.float64]:
        try:
            value: Any = header[keyword]
            values = np.array([float(v) for v in (value if count > 1 else [value])])
        except (TypeError, ValueError):
            values = np.empty(0)
        if len(values) != count or not np.isfinite(values).all():
            what = "a finite number" if count == 1 else f"{count} finite numbers"
            raise VolumeError(f"{path}: {keyword} must be {what}, found {header.get(keyword)!r}")
        return values

    modality = str(header["Modality"] or "")
    if modality != "CT":
        hint = "; a whole slide is tiled with --mpp" if modality == "SM" else ""
        raise VolumeError(f"{path}: its modality is {modality or 'not given'}, expected CT{hint}")
    if int(header.get("NumberOfFrames") or 1) > 1:
        raise VolumeError(
            f"{path}: an enhanced (multi-frame) CT is not read; convert it to one file per slice or to NIfTI"
        )
    units = str(header.get("RescaleType") or "HU").strip()
    if units != "HU":
        raise VolumeError(f"{path}: its values are in {units!r} (RescaleType), expected HU")
    if header.get("SamplesPerPixel") != 1 or header.get("PhotometricInterpretation") != "MONOCHROME2":
        raise VolumeError(
            f"{path}: expected one MONOCHROME2 value per pixel, found {header.get('SamplesPerPixel')} of "
            f"{header.get('PhotometricInterpretation')}"
        )
    axes = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > _SAME:
        raise VolumeError(f"{path}: ImageOrientationPatient must be two unit vectors at a right angle")
    spacing = numbers("PixelSpacing", 2)
    if spacing.min() <= 0:
        raise VolumeError(f"{path}: PixelSpacing must be positive, found {spacing.tolist()}")
    slope = float(numbers("RescaleSlope", 1)[0])
    if slope == 0:
        raise VolumeError(f"{path}: RescaleSlope is 0, so all its values are one; use another series")
    intercept = float(numbers("RescaleIntercept", 1)[0])
    padding = None
    if header.get("PixelPaddingValue") is not None:
        # Its bits are those of a pixel, whatever type the file gives it.
        size = 2 ** min(16, int(numbers("BitsStored", 1)[0]))
        least = -size // 2 if header.get("PixelRepresentation") == 1 else 0
        last = (
            "PixelPaddingValue" if header.get("PixelPaddingRangeLimit") is None else "PixelPaddingRangeLimit"
        )
        ends = [int(numbers(keyword, 1)[0]) for keyword in ("PixelPaddingValue", last)]
        low, high = sorted(((end - least) % size + least) * slope + intercept for end in ends)
        padding = (low, high) if high > AIR_HU else None
    tilt = header.get("GantryDetectorTilt")
    return _Slice(
        path=path,
        shape=(int(numbers("Rows", 1)[0]), int(numbers("Columns", 1)[0])),
        spacing_mm=spacing,
        position_mm=numbers("ImagePositionPatient", 3),
        axes=axes,
        slope=slope,
        intercept=intercept,
        padding_hu=padding,
        tilt_degrees=0.0 if tilt is None else float(numbers("GantryDetectorTilt", 1)[0]),
    )


@dataclass(frozen=True, eq=False)
class _Stack:
    """Slices in order, their common grid, and the place of each in it, pixels ``(x, y)``, fractional."""

    slices: Sequence[_Slice]
    frame: VolumeFrame
    shifts_px: NDArray[np.float64]
    tilt_degrees: float


def _stack(path: Path, slices: Sequence[_Slice]) -> _Stack:
    """Sorts slices along their normal, and checks that they make one regular grid."""
    first = slices[0]
    if len(slices) < 2:
        raise VolumeError(f"{path}: one slice makes no volume ({first.path.name})")
    for other in slices[1:]:
        if other.shape != first.shape:
            differ = f"{other.shape[1]} x {other.shape[0]} pixels, others {first.shape[1]} x {first.shape[0]}"
        elif np.abs(other.spacing_mm - first.spacing_mm).max() > _SAME:
            differ = f"pixels of {other.spacing_mm.tolist()} mm, others {first.spacing_mm.tolist()}"
        elif np.abs(other.axes - first.axes).max() > _SAME:
            differ = f"another orientation, {np.round(other.axes, 4).tolist()}"
        else:
            continue
        raise VolumeError(f"{path}: its slices differ: {other.path.name} has {differ} ({first.path.name})")
    normal = np.cross(*first.axes)
    slices = sorted(slices, key=lambda s: float(s.position_mm @ normal))
    positions = np.array([s.position_mm for s in slices])
    along = positions @ normal
    gaps = np.diff(along)
    if (doubled := np.flatnonzero(gaps < 0.01)).size:
        pairs = ", ".join(
            f"{slices[n].path.name} and {slices[n + 1].path.name} at {along[n]:g} mm"
            for n in doubled[:_NAMED]
        )
        raise VolumeError(
            f"{path}: {doubled.size} doubled slices: {pairs}; keep one reconstruction and one time point"
        )
    step = float(np.median(gaps))
    allowed = _GAP_SHARE * step + _GAP_MM
    whole = np.rint(gaps / step)
    if (lost := np.flatnonzero((whole > 1) & (np.abs(gaps - whole * step) <= allowed))).size:
        places = ", ".join(f"{int(whole[n]) - 1} after {along[n]:g} mm" for n in lost[:_NAMED])
        raise VolumeError(
            f"{path}: slices are missing, {step:g} mm apart else: {places}; copy the series again"
        )
    step = float((along[-1] - along[0]) / (len(along) - 1))
    regular = along[0] + step * np.arange(len(along))
    if np.abs(gaps - step).max() > allowed or np.abs(along - regular).max() > max(allowed, step / 2):
        raise VolumeError(
            f"{path}: mixed spacing of slices, {gaps.min():.4g} to {gaps.max():.4g} mm; reconstruct it evenly"
        )
    drift = _drift(path, first, positions, normal)
    spacing = first.spacing_mm[::-1]  # (x, y)
    shifts = np.round((regular - along[0])[:, None] * (first.axes @ drift) / spacing, 6)
    low = np.floor(shifts.min(axis=0))
    extra = (np.ceil(shifts.max(axis=0)) - low).astype(int)
    x, y, z = (slices[0].position_mm + (low * spacing) @ first.axes).tolist()
    rows, columns = first.shape
    frame = VolumeFrame(
        (columns + int(extra[0]), rows + int(extra[1]), len(slices)),
        (float(spacing[0]), float(spacing[1]), step),
        (x, y, z),
        tuple(np.stack([*first.axes, normal], axis=1).ravel().tolist()),
    )
    return _Stack(slices, frame, shifts - low, math.degrees(math.atan(float(np.linalg.norm(drift)))))


def _drift(
    path: Path, first: _Slice, positions: NDArray[np.float64], normal: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Computes how far each slice lies beside the last, per millimetre along the normal, 0 without a tilt."""
    way = positions - positions[0]
    height = way @ normal
    aside = way - height[:, None] * normal
    drift: NDArray[np.float64] = aside[-1] / height[-1]
    uneven = float(np.linalg.norm(aside - height[:, None] * drift, axis=1).max())
    if uneven > 2 * _GAP_MM:
        raise VolumeError(f"{path}: its slices are shifted sideways, unevenly, by {uneven:.1f} mm")
    is_tilted = float(np.linalg.norm(aside, axis=1).max()) > _GAP_MM
    is_upright = abs(normal[2]) > math.cos(math.radians(_TILT_DEGREES / 2))
    if abs(first.tilt_degrees) > _TILT_DEGREES and is_upright and not is_tilted:
        raise VolumeError(
            f"{path}: GantryDetectorTilt is {first.tilt_degrees:g} degrees, while its slices lie upright, a "
            "contradiction; use a series without tilt"
        )
    return drift if is_tilted else np.zeros(3)


def _planes(stack: _Stack) -> Iterator[NDArray[np.generic]]:
    """Yields the Hounsfield units of the slices, those of a tilted gantry moved to their places linearly."""
    from scipy import ndimage

    columns, rows, _ = stack.frame.size_voxel
    for one, shift in zip(stack.slices, stack.shifts_px, strict=True):
        plane = _hounsfield(one)
        if stack.shifts_px.any():
            plane = ndimage.affine_transform(
                *(plane.astype(np.float32), (1, 1), -shift[::-1], (rows, columns)), order=1, cval=AIR_HU
            )
        yield plane


def _hounsfield(one: _Slice) -> NDArray[np.generic]:
    """Reads the Hounsfield units of a slice."""
    from pydicom.pixels.decoders.base import get_decoder

    def values_of(dataset: Dataset) -> NDArray[np.generic]:
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and not get_decoder(syntax).is_available:
            return _by_itk(one.path)
        return np.asarray(dataset.pixel_array * one.slope + one.intercept)

    values = _read(one.path, values_of)
    if values.shape != one.shape:
        raise VolumeError(f"{one.path}: expected {one.shape} pixels, found {values.shape}")
    return values if one.padding_hu is None else _without_padding(values, one.padding_hu, abs(one.slope) / 2)


def _without_padding(
    hu: NDArray[np.generic], padding_hu: tuple[float, float], rounding: float
) -> NDArray[np.generic]:
    """Replaces padding that reaches the edge of a slice by air; within, the same values are tissue."""
    from scipy import ndimage

    low, high = padding_hu
    values = hu.astype(np.float32)
    is_padding = (values > low - rounding) & (values < high + rounding)
    pieces, _ = ndimage.label(is_padding)
    edge = np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])
    values[np.isin(pieces, edge[edge > 0])] = AIR_HU
    return values


def _by_itk(path: Path) -> NDArray[np.generic]:
    """Reads a compressed slice through ITK, which applies slope and intercept."""
    import SimpleITK as sitk

    try:
        values: NDArray[np.generic] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0]
    except RuntimeError as error:
        reason = re.sub(r"\s+", " ", str(error))[-200:]
        raise VolumeError(
            f"{path}: compressed in a way not read here; decompress it (gdcmconv --raw): {one_line(reason)}"
        ) from error
    return values
