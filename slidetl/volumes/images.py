"""Reads NIfTI and MetaImage through SimpleITK, whose coordinates are DICOM's (LPS) for both."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidetl.errors import VolumeError
from slidetl.slides.base import fingerprint_of
from slidetl.text import one_line
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.series import Series

_BLOCK_BYTES = 2**22
_NIFTI = ("qform_code", "sform_code", "vox_offset", "bitpix", "datatype", "dim[1]", "dim[2]", "dim[3]")
_LITTLE = [size.to_bytes(4, "little") for size in (348, 540)]  # size of the header of NIfTI 1 and 2
_HEADER_BYTES = 2**16  # of a MetaImage; a real one has 500
# Fields of a MetaImage with defaults in ITK that would be guesses here, each with its synonyms.
_GEOMETRY = (
    ("ElementSpacing",),
    ("TransformMatrix", "Rotation", "Orientation"),
    ("Offset", "Position", "Origin"),
)


def open_image(path: Path) -> Series:
    """Opens a NIfTI or MetaImage; see :func:`slidetl.volumes.open_series`."""
    import SimpleITK as sitk

    if not path.is_file():
        raise VolumeError(f"{path}: no such file")
    is_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    header = None if is_nifti else _read_meta(path)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what they warn of is checked here
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path}: not readable; ITK says: {_reason(error)}") from error
    size = reader.GetSize()
    if len(size) != 3 or reader.GetNumberOfComponents() != 1:
        raise VolumeError(
            f"{path}: expected a volume of three axes and one value per voxel, found {size} with "
            f"{reader.GetNumberOfComponents()} values; split it first"
        )
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt8):
        raise VolumeError(f"{path}: its {kind}s cannot hold Hounsfield units; is it a mask or a picture?")
    about = {key: reader.GetMetaData(key) for key in _NIFTI if is_nifti and reader.HasMetaDataKey(key)}
    if is_nifti and about.get("qform_code") == "0" and about.get("sform_code") == "0":
        raise VolumeError(
            f"{path}: it does not say how its axes lie in the patient (qform_code and sform_code are 0); "
            "convert it again from DICOM"
        )
    try:
        frame = VolumeFrame(size, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error
    files = [path] if header is None else sorted({path, header.voxels})

    def planes() -> Iterator[NDArray[np.generic]]:
        # ITK reads truncated and damaged files without an error.
        if header is None:
            _check_nifti(path, about)
        elif header.is_compressed:
            _check_zlib(header.voxels, header.start)
        yield from _planes(path)

    return Series(path, frame, fingerprint_of(files), (), planes)


def _planes(path: Path) -> Iterator[NDArray[np.generic]]:
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))  # it owns the memory of the view, so it must live as long
    except RuntimeError as error:
        raise VolumeError(f"{path}: it cannot be read; ITK says: {_reason(error)}") from error
    voxels = sitk.GetArrayViewFromImage(image)
    lowest = float(voxels.min())
    if lowest >= 0:
        raise VolumeError(
            f"{path}: no value is below 0, so these are no Hounsfield units (air has -1000); export it with "
            "the rescale intercept applied"
        )
    yield from voxels


def _check_nifti(path: Path, about: dict[str, str]) -> None:
    """Checks that a NIfTI is complete and undamaged, and its numbers finite: ITK reads NaN as 0."""
    try:
        start, bits = int(float(about["vox_offset"])), int(about["bitpix"])
        left = math.prod(int(about[f"dim[{n}]"]) for n in (1, 2, 3)) * bits // 8
    except (KeyError, ValueError, OverflowError) as error:
        raise VolumeError(f"{path}: its header is damaged ({error!r})") from error
    is_float = about.get("datatype") in ("16", "64")
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
            order = "<" if file.read(4) in _LITTLE else ">"
            file.seek(start)
            # To the end, since the checksum of gzip stands there.
            while block := file.read(_BLOCK_BYTES):
                numbers = block[: max(0, min(left, len(block) // 8 * 8))]
                if is_float and not np.isfinite(np.frombuffer(numbers, f"{order}f{bits // 8}")).all():
                    raise VolumeError(f"{path}: it has values that are not finite numbers")
                left -= len(block)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, VolumeError):
            raise
        raise VolumeError(f"{path}: it is damaged: {error}") from error
    if left > 0:
        raise VolumeError(f"{path}: it ends early, {left} bytes are missing; copy it again")


@dataclass(frozen=True)
class _MetaHeader:
    """The place of a MetaImage's voxels: file, first byte, and if zlib compresses them."""

    voxels: Path
    start: int
    is_compressed: bool


def _read_meta(path: Path) -> _MetaHeader:
    """Reads the header of a MetaImage, and checks what ITK does not."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    found = re.search(rb"^ElementDataFile[ \t]*=[ \t]*([^\r\n]*?)[ \t]*\r?\n", head, re.MULTILINE)
    if found is None:
        raise VolumeError(f"{path}: not a MetaImage, or its header is damaged: no ElementDataFile")
    names = dict(
        re.findall(r"^(\w+)[ \t]*=[ \t]*(.*?)[ \t\r]*$", head[: found.end()].decode("latin-1"), re.MULTILINE)
    )
    for synonyms in _GEOMETRY:
        if not names.keys() & set(synonyms):
            raise VolumeError(f"{path}: its header has no {synonyms[0]}, so its place is not known")
    data = found[1].decode("latin-1")
    is_local = data == "LOCAL"
    if not is_local and (
        not re.fullmatch(r"[^/\\%]+", data) or data.startswith(("LIST", "..")) or " " in data
    ):
        raise VolumeError(f"{path}: its voxels must be in one file beside it, not in {data[:80]!r}")
    voxels = path if is_local else path.with_name(data)
    if not voxels.is_file():
        raise VolumeError(f"{path}: its voxels are missing, the file {data} beside it; copy both")
    compressed = names.get("CompressedData", "False")
    if compressed.lower() not in ("true", "false"):
        raise VolumeError(f"{path}: CompressedData must be True or False, found {compressed[:20]!r}")
    return _MetaHeader(voxels, found.end() if is_local else 0, compressed.lower() == "true")


def _check_zlib(path: Path, start: int) -> None:
    """Checks that the voxels can be decompressed."""
    unpack = zlib.decompressobj()
    try:
        with path.open("rb") as file:
            file.seek(start)
            while not unpack.eof and (block := file.read(_BLOCK_BYTES)):
                while block and not unpack.eof:
                    unpack.decompress(block, _BLOCK_BYTES)
                    block = unpack.unconsumed_tail
    except zlib.error as error:
        raise VolumeError(f"{path}: it is damaged: {error}") from error
    if not unpack.eof:
        raise VolumeError(f"{path}: it ends early; copy it again")


def _reason(error: Any) -> str:
    """Extracts the reason from an error of ITK, without the place in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(re.sub(r"^(sitk::ERROR|ITK ERROR): *", "", " ".join(lines[1:] or lines)))[:300]
