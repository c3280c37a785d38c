"""Reads NIfTI and MetaImage by SimpleITK's account of them, in DICOM's coordinates (LPS) for both."""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
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
_DENSEST = 1032  # deflate packs no more bytes into one, so a header may claim no more
_NIFTI = (
    *("vox_offset", "datatype", "scl_slope", "scl_inter", "dim[1]", "dim[2]", "dim[3]", "xyzt_units"),
    *("qform_code", "sform_code"),
)
_NIFTI_TYPES = {"4": "i2", "8": "i4", "16": "f4", "64": "f8", "512": "u2"}
_NIFTI_TYPES |= {"768": "u4", "1024": "i8", "1280": "u8"}
_NIFTI_BYTES = 348  # its header, whose first number says so; ITK does not read NIfTI 2
_LITTLE = _NIFTI_BYTES.to_bytes(4, "little")
_UNIT_MM = {1: 1000.0, 3: 0.001}  # metres, micrometres; else millimetres
# A quaternion of float32 loses up to 6e-4 radians of a turn by nearly 180 degrees, the usual one from DICOM.
_APART_MM = 0.5
_HEADER_BYTES = 2**16  # of a MetaImage; a real one has 500
# Fields of a MetaImage with defaults in ITK that would be guesses here, each with its synonyms and count of
# numbers. ITK crashes at other counts.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_GEOMETRY = {
    ("DimSize",): 3,
    ("ElementSpacing",): 3,
    ("TransformMatrix", "Rotation", "Orientation"): 9,
    ("Offset", "Position", "Origin"): 3,
}
# Fields that change units or values, and ITK ignores, with the contents that change nothing.
_PLAIN = {
    "DistanceUnits": r"mm|\?",
    "ElementToIntensityFunctionSlope": r"\+?1(\.0*)?",
    "ElementToIntensityFunctionOffset": r"[-+]?0(\.0*)?",
    "Modality": "MET_MOD_(CT|UNKNOWN|OTHER)",
}


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
    stored = path if header is None else header.voxels
    is_packed = stored.suffix.lower() == ".gz" if header is None else header.is_compressed
    if math.prod(size) * 2 > stored.stat().st_size * (_DENSEST if is_packed else 1):
        raise VolumeError(f"{path}: it ends early, or its header is damaged: {size} voxels are not in it")
    about = {key: reader.GetMetaData(key) for key in _NIFTI if is_nifti and reader.HasMetaDataKey(key)}
    try:
        frame = VolumeFrame(size, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from error
    if is_nifti:
        _check_place(path, frame, about)
    files = [path] if header is None else sorted({path, header.voxels})

    def planes() -> Iterator[NDArray[np.generic]]:
        return _nifti_planes(path, about) if header is None else _meta_planes(path, header)

    return Series(path, frame, fingerprint_of(files), (), planes)


def _check_place(path: Path, frame: VolumeFrame, about: dict[str, str]) -> None:
    """Checks that a NIfTI says once how it lies in the patient, not in an atlas, and that ITK reads it so."""
    codes = {about.get("qform_code", "0"), about.get("sform_code", "0")} - {"0"}
    if not codes or not codes <= {"1", "2"}:
        wrong = (
            "it has the coordinates of an atlas"
            if codes
            else "it does not say how its axes lie in the patient"
        )
        raise VolumeError(
            f"{path}: {wrong} (qform_code {about.get('qform_code')}, sform_code {about.get('sform_code')}); "
            "convert it again from DICOM"
        )
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(frame.size_voxel) - 1)
    taken = frame.to_patient_mm(corners) * (-1, -1, 1)  # LPS to RAS
    try:
        unit = _UNIT_MM.get(int(about["xyzt_units"]) & 7, 1.0)
        places = [unit * (corners @ form[:, :3].T + form[:, 3]) for form in _nifti_forms(path)]
    except (KeyError, ValueError, struct.error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(f"{path}: its header is damaged ({error!r})") from error
    apart = float(np.linalg.norm(np.array(places) - taken, axis=-1).max())
    if not apart <= _APART_MM:
        raise VolumeError(
            f"{path}: its qform, its sform and its voxel sizes (pixdim) differ: they lay a corner up to "
            f"{apart:.3g} mm apart, and which is right is not known; convert it again from DICOM"
        )


def _nifti_forms(path: Path) -> Iterator[NDArray[np.float64]]:
    """Yields qform and sform, those with a code, ``[3, 4]``: from voxels to RAS in the unit of the file."""
    from scipy.spatial.transform import Rotation

    # ITK tells six digits of these, too few for a quaternion near half a turn.
    with _opened(path) as file:
        head = file.read(_NIFTI_BYTES)
    order = "<" if head[:4] == _LITTLE else ">"
    turn, *scale = struct.unpack_from(order + "4f", head, 76)
    q_code, s_code, b, c, d, *numbers = struct.unpack_from(order + "2h18f", head, 252)
    if q_code > 0:
        rest = 1 - b * b - c * c - d * d
        a = math.sqrt(rest) if rest > 1e-7 else 0.0  # as NIfTI's own library has it
        axes = Rotation.from_quat([b, c, d, a]).as_matrix() * scale * (1, 1, -1 if turn < 0 else 1)
        yield np.column_stack([axes, numbers[:3]])
    if s_code > 0:
        yield np.reshape(numbers[3:], (3, 4))


def _opened(path: Path) -> io.BufferedIOBase:
    """Opens a NIfTI, compressed or not."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _nifti_planes(path: Path, about: dict[str, str]) -> Iterator[NDArray[np.generic]]:
    """Yields the planes of a NIfTI; by hand, since ITK holds it several times and reads NaN as 0.

    Truncated files, which ITK takes for complete, and other checksums than gzip's are errors.
    """
    try:
        dtype = np.dtype(_NIFTI_TYPES[about["datatype"]])
        x, y, z = (int(about[f"dim[{n}]"]) for n in (1, 2, 3))
        start, slope, offset = (float(about[name]) for name in ("vox_offset", "scl_slope", "scl_inter"))
        if not np.isfinite([start, slope, offset]).all():
            raise ValueError("numbers that are not finite")
        if start < _NIFTI_BYTES + 4:  # the flags of extensions end the header; ITK makes 348 of less
            raise ValueError("voxels that begin within the header")
    except (KeyError, ValueError) as error:
        raise VolumeError(
            f"{path}: its header is damaged, or of a kind that is not read ({error!r})"
        ) from error
    slope, offset = (slope, offset) if slope else (1.0, 0.0)
    size = x * y * dtype.itemsize
    try:
        with _opened(path) as file:
            dtype = dtype.newbyteorder("<" if file.read(4) == _LITTLE else ">")
            file.seek(int(start))
            for number in range(z):
                content = file.read(size)
                if len(content) < size:
                    raise VolumeError(f"{path}: it ends early, at plane {number} of {z}; copy it again")
                plane = np.frombuffer(content, dtype).reshape(y, x)
                yield plane if (slope, offset) == (1, 0) else plane * slope + offset
            more = 0
            while block := file.read(_BLOCK_BYTES):  # the checksum of gzip stands at the end
                more += len(block)
            if more >= size:
                raise VolumeError(
                    f"{path}: its header says {z} planes, and {more // size} more follow; export it again"
                )
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise VolumeError(f"{path}: it is damaged: {error}") from error


def _meta_planes(path: Path, header: _MetaHeader) -> Iterator[NDArray[np.generic]]:
    import SimpleITK as sitk

    if header.is_compressed:
        size = _unpacked_bytes(header.voxels, header.start)
    else:
        size = header.voxels.stat().st_size - header.start
    try:
        image = sitk.ReadImage(str(path))  # it owns the memory of the view, so it must live as long
    except RuntimeError as error:
        raise VolumeError(f"{path}: it cannot be read; ITK says: {_reason(error)}") from error
    view = sitk.GetArrayViewFromImage(image)
    if size < view.nbytes or (size > view.nbytes and not header.is_end):
        raise VolumeError(
            f"{path}: its header says {view.nbytes} bytes of voxels, {header.voxels.name} has {size}; export "
            "it again"
        )
    yield from view


@dataclass(frozen=True)
class _MetaHeader:
    """The place of a MetaImage's voxels: file, first byte or a byte before, and if zlib compresses them.

    With ``is_end``, they are the last bytes of the file.
    """

    voxels: Path
    start: int
    is_compressed: bool
    is_end: bool


def _read_meta(path: Path) -> _MetaHeader:
    """Reads the header of a MetaImage, and checks what ITK does not."""
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    found = re.search(rb"^ElementDataFile[ \t]*=[ \t]*([^\r\n]*?)[ \t]*\r?\n", head, re.MULTILINE)
    if found is None:
        raise VolumeError(f"{path}: not a MetaImage, or its header is damaged: no ElementDataFile")
    text = head[: found.end()].decode("latin-1")
    pairs = re.findall(r"^([A-Za-z]+)[ \t]*=[ \t]*([ -~]*?)[ \t\r]*$", text, re.MULTILINE)
    names = dict(pairs)
    if len(pairs) != len(text.splitlines()) or len(names) != len(pairs):
        raise VolumeError(
            f"{path}: not a MetaImage, or its header is damaged: a line is no field, or there twice"
        )
    if names.get("NDims") != "3" or names.get("ElementNumberOfChannels", "1") != "1":
        raise VolumeError(f"{path}: expected a volume of three axes and one value per voxel")
    for synonyms, count in _GEOMETRY.items():
        values = [names[name] for name in synonyms if name in names]
        if not values:
            raise VolumeError(f"{path}: its header has no {synonyms[0]}, so its place is not known")
        numbers = values[0].split()
        if len(values) > 1 or len(numbers) != count or not all(map(_NUMBER.fullmatch, numbers)):
            raise VolumeError(f"{path}: {synonyms[0]} must be {count} numbers, once, found {values}")
    for name, plain in _PLAIN.items():
        if name in names and not re.fullmatch(plain, names[name]):
            raise VolumeError(
                f"{path}: expected Hounsfield units of CT as stored, and millimetres, found {name} = "
                f"{names[name][:40]}; export it again from DICOM"
            )
    data = found[1].decode("latin-1")
    is_local = data == "LOCAL"
    if not is_local and (not re.fullmatch(r"[^/\\%]+", data) or data.startswith(("LIST", ".."))):
        raise VolumeError(f"{path}: its voxels must be in one file beside it, not in {data[:80]!r}")
    voxels = path if is_local else path.with_name(data)
    if not voxels.is_file():
        raise VolumeError(f"{path}: its voxels are missing, the file {data} beside it; copy both")
    compressed = names.get("CompressedData", "False")
    if compressed.lower() not in ("true", "false"):
        raise VolumeError(f"{path}: CompressedData must be True or False, found {compressed[:20]!r}")
    is_compressed = compressed.lower() == "true"
    start = found.end() if is_local else 0
    skipped = names.get("HeaderSize", "0")
    is_number = re.fullmatch(r"-1|\d{1,9}", skipped)
    if not is_number or (int(skipped) > 0 and (is_compressed or int(skipped) < start)):
        raise VolumeError(
            f"{path}: HeaderSize must be the number of bytes before voxels that are not compressed, or -1 if "
            f"they are the last ones of their file, found {skipped[:20]!r}; export it again"
        )
    is_end = skipped == "-1" and not is_compressed
    return _MetaHeader(voxels, max(start, int(skipped)), is_compressed, is_end)


def _unpacked_bytes(path: Path, start: int) -> int:
    """Counts the bytes of voxels that zlib compressed, and checks that all can be decompressed."""
    unpack, size = zlib.decompressobj(), 0
    try:
        with path.open("rb") as file:
            file.seek(start)
            while not unpack.eof and (block := file.read(_BLOCK_BYTES)):
                while block and not unpack.eof:
                    size += len(unpack.decompress(block, _BLOCK_BYTES))
                    block = unpack.unconsumed_tail
    except zlib.error as error:
        raise VolumeError(f"{path}: it is damaged: {error}") from error
    if not unpack.eof:
        raise VolumeError(f"{path}: it ends early; copy it again")
    return size


def _reason(error: Any) -> str:
    """Extracts the reason from an error of ITK, without the place in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(re.sub(r"^(sitk::ERROR|ITK ERROR): *", "", " ".join(lines[1:] or lines)))[:300]
