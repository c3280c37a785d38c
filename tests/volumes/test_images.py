"""NIfTI and MetaImage: places in LPS, values in Hounsfield units, damage found."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from slidetl.errors import VolumeError
from slidetl.volumes import open_series, read_volume
from tests.volumes.series import small, write_series

SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd")


def write_image(path: Path, kind: int = sitk.sitkInt16, compress: bool = False) -> Path:
    volume = small()
    image = sitk.Cast(sitk.GetImageFromArray(volume.hu), kind)
    image.SetSpacing(volume.spacing_mm)
    image.SetOrigin(volume.origin_mm)
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compress", [False, True])
def test_all_formats_give_the_voxels_and_places_of_the_dicom_series(
    tmp_path: Path, suffix: str, compress: bool
) -> None:
    wanted = read_volume(write_series(tmp_path / "s"))
    found = read_volume(write_image(tmp_path / f"a{suffix}", compress=compress))
    assert np.array_equal(found.hu, wanted.hu)
    assert found.frame.size_voxel == wanted.frame.size_voxel
    assert np.allclose(found.spacing_mm, wanted.spacing_mm)
    assert np.allclose(found.origin_mm, wanted.origin_mm, atol=1e-4)
    assert np.allclose(found.direction, wanted.direction)


def test_ras_of_a_nifti_becomes_lps(tmp_path: Path) -> None:
    """The first voxel of this NIfTI lies at R 30, A 20, S 10, and its axes run right, front and head."""
    path = write_image(tmp_path / "a.nii")
    data = bytearray(path.read_bytes())
    _set_sform(data, 0.7, 0, 0, 30, 0, 0.8, 0, 20, 0, 0, 2.5, 10, codes=(0, 1))
    path.write_bytes(data)
    found = read_volume(path)
    x, y, z = np.rint(found.frame.to_voxel((-30.0, -20.0, 10.0))).astype(int)
    assert found.hu[z, y, x] == small().hu[0, 0, 0]
    x, y, z = np.rint(found.frame.to_voxel((-30.0 - 0.7 * 5, -20.0 - 0.8 * 4, 10.0))).astype(int)
    assert found.hu[z, y, x] == small().hu[0, 4, 5]
    assert np.allclose(found.direction, np.eye(3))  # turned


def _set_sform(data: bytearray, *rows: float, codes: tuple[int, int] = (1, 1)) -> None:
    struct.pack_into("<hh", data, 252, *codes)
    struct.pack_into("<12f", data, 280, *rows)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("unit", [1, 1000])
def test_an_oblique_nifti_says_its_place_twice_alike(
    tmp_path: Path, suffix: str, order: str, unit: int
) -> None:
    """Its qform has the axes mirrored along z and a turn of all three; its sform says the same."""
    turn = Rotation.from_euler("xyz", (175, -8, 3), degrees=True)
    axes, origin = turn.as_matrix() * (0.7, 0.8, -2.5), (-60.0, 70.0, 1230.0)
    *bcd, a = turn.as_quat() * np.sign(turn.as_quat()[3])
    assert a > 0
    sizes = np.multiply([-1, 0.7, 0.8, 2.5, 0, 0, 0, 0], [1, *[unit] * 7])
    forms = (*bcd, *np.multiply(origin, unit), *np.ravel(np.column_stack([axes, origin]) * unit))
    head = bytearray(352)
    struct.pack_into(order + "i", head, 0, 348)
    struct.pack_into(order + "8h", head, 40, 3, 6, 5, 4, 1, 1, 1, 1)
    struct.pack_into(order + "2h", head, 70, 4, 16)
    struct.pack_into(order + "8f3f", head, 76, *sizes, 352, 1, 0)
    head[123] = 3 if unit == 1000 else 2
    struct.pack_into(order + "2h18f", head, 252, 1, 1, *forms)
    head[344:348] = b"n+1\0"
    content = bytes(head) + small().hu.astype(order + "i2").tobytes()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    found = read_volume(path)
    for index in ((0, 0, 0), (5, 4, 3), (5, 0, 2)):
        place = (axes @ index + origin) * (-1, -1, 1)
        x, y, z = np.rint(found.frame.to_voxel(place)).astype(int)
        assert np.allclose(found.frame.to_patient_mm((x, y, z)), place, atol=1e-3)
        assert found.hu[z, y, x] == small().hu[index[::-1]]


@pytest.mark.parametrize(
    "kind",
    [sitk.sitkInt16, sitk.sitkInt32, sitk.sitkFloat32, sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt16],
)
def test_simpleitk_reads_the_same_values_from_any_type_with_its_slope(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "a.nii"
    sitk.WriteImage(sitk.Cast(sitk.GetImageFromArray(small().hu + 1000), kind), str(path))
    data = bytearray(path.read_bytes())
    struct.pack_into("<2f", data, 112, 0.5, -333.0)
    path.write_bytes(data)
    theirs = np.rint(sitk.GetArrayFromImage(sitk.ReadImage(str(path), sitk.sitkFloat64)))
    assert np.array_equal(read_volume(path).hu, theirs)


def test_floats_are_rounded_to_hounsfield_units(tmp_path: Path) -> None:
    assert np.array_equal(read_volume(write_image(tmp_path / "a.nii.gz", sitk.sitkFloat64)).hu, small().hu)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "a.mhd", "compressed.mha", "compressed.mhd"])
def test_truncated_and_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    path = write_image(tmp_path / name, compress=name.startswith("c"))
    voxels = next((p for p in tmp_path.iterdir() if p.suffix in (".raw", ".zraw")), path)
    data = voxels.read_bytes()
    for length in (len(data) - 1, len(data) * 3 // 4):
        voxels.write_bytes(data[:length])
        with pytest.raises(VolumeError, match=r"ends early|damaged|cannot be read"):
            read_volume(path)
    if name in ("a.nii.gz", "compressed.mha", "compressed.mhd"):
        for place in (len(data) * 3 // 4, len(data) - 6):
            voxels.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            with pytest.raises(VolumeError, match=r"damaged|ends early|ITK says"):
                read_volume(path)


def _nifti(change: Callable[[bytearray], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_image(folder / "a.nii.gz")
        data = bytearray(gzip.decompress(path.read_bytes()))
        change(data)
        path.write_bytes(gzip.compress(data))
        return path

    return write


def _meta(old: str, new: str, name: str = "a.mhd", compress: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_image(folder / name, compress=compress)
        data = path.read_bytes()
        assert old.encode() in data
        path.write_bytes(data.replace(old.encode(), new.encode(), 1))
        return path

    return write


def _of(image: sitk.Image, name: str = "a.nii.gz") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        sitk.WriteImage(image, str(folder / name))
        return folder / name

    return write


def _fewer(name: str, compress: bool = False) -> Callable[[Path], Path]:
    """Writes four planes, and a header that says three."""

    def write(folder: Path) -> Path:
        path = write_image(folder / name, compress=compress)
        data = path.read_bytes()
        if path.suffix in (".mha", ".mhd"):
            data = data.replace(b"DimSize = 6 5 4", b"DimSize = 6 5 3")
        else:
            plain = bytearray(gzip.decompress(data) if path.suffix == ".gz" else data)
            struct.pack_into("<h", plain, 46, 3)
            data = gzip.compress(plain) if path.suffix == ".gz" else bytes(plain)
        path.write_bytes(data)
        return path

    return write


def _garbage(folder: Path) -> Path:
    (folder / "a.nii").write_bytes(b"no nifti")
    return folder / "a.nii"


APART = r"its qform, its sform and its voxel sizes \(pixdim\) differ: .* apart"
ONES = np.ones((4, 4, 4), np.int16)
NAN = np.full((4, 4, 4), -1.0, np.float32)
NAN[1, 1, 1] = np.nan


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda folder: folder / "none.nii.gz", "no such file"),
        (_garbage, "not readable; ITK says: Unable to determine"),
        (
            _nifti(lambda data: struct.pack_into("<hh", data, 252, 0, 0)),
            r"how its axes lie in the patient \(qform_code 0, sform_code 0\)",
        ),
        (_nifti(lambda data: struct.pack_into("<hh", data, 252, 1, 4)), "coordinates of an atlas"),
        (_nifti(lambda data: struct.pack_into("<hh", data, 252, 5, 0)), "coordinates of an atlas"),
        (
            _nifti(lambda data: struct.pack_into("<f", data, 268, 99.0)),
            "1 mm apart, and which is right is not",
        ),
        (_nifti(lambda data: _set_sform(data, -0.7, 0, 0, 100, 0, -0.8, 0.7, 50, 0, 0, 2.5, 20)), APART),
        (_nifti(lambda data: _set_sform(data, 0.7, 0, 0, 100, 0, -0.8, 0, 50, 0, 0, 2.5, 20)), APART),
        (_nifti(lambda data: _set_sform(data, -1.4, 0, 0, 100, 0, -1.6, 0, 50, 0, 0, 5, 20)), APART),
        (
            _nifti(lambda data: _set_sform(data, -1.4, 0, 0, 100, 0, -1.6, 0, 50, 0, 0, 5, 20, codes=(0, 1))),
            APART,
        ),
        (_of(sitk.GetImageFromArray(ONES * 1024)), "its values, 1024 to 1024, are no Hounsfield units"),
        (_of(sitk.GetImageFromArray(np.linspace(-2, 2, 64).reshape(4, 4, 4))), "its values, -2 to 2, are no"),
        (_of(sitk.GetImageFromArray(ONES * -3024)), "its values, -1024 to -1024, are no Hounsfield units"),
        (_of(sitk.GetImageFromArray(ONES.astype(np.uint8))), "unsigned integers cannot hold Hounsfield"),
        (_fewer("a.nii"), "its header says 3 planes, and 1 more follow; export it again"),
        (_fewer("a.nii.gz"), "its header says 3 planes, and 1 more follow"),
        (_fewer("a.mhd"), r"its header says 180 bytes of voxels, a\.raw has 240; export it again"),
        (_fewer("a.mha"), r"its header says 180 bytes of voxels, a\.mha has 240"),
        (_fewer("a.mhd", compress=True), r"its header says 180 bytes of voxels, a\.zraw has 240"),
        (_fewer("a.mha", compress=True), r"its header says 180 bytes of voxels, a\.mha has 240"),
        (
            _nifti(lambda data: struct.pack_into("<f", data, 108, 0.0)),
            "voxels that begin within the header",
        ),
        (_of(sitk.GetImageFromArray(NAN)), "plane 1 has values that are not finite"),
        (_of(sitk.GetImageFromArray(NAN), "a.mha"), "plane 1 has values that are not finite"),
        (_of(sitk.GetImageFromArray(NAN[0])), "expected a volume of three axes"),
        (_of(sitk.GetImageFromArray(ONES - 2, isVector=False)[:, :, 0], "a.mha"), "three axes"),
        (_meta("ElementSpacing", "NoSpacing"), "has no ElementSpacing"),
        (_meta("Offset", "NoOffset"), "has no Offset"),
        (_meta("ElementDataFile = a.raw", "ElementDataFile = ../a.raw"), "one file beside it, not in"),
        (_meta("ElementDataFile = a.raw", "ElementDataFile = LIST"), "one file beside it"),
        (_meta("ElementDataFile = a.raw", "ElementDataFile = b.raw"), "the file b.raw beside it; copy both"),
        (_meta("ElementDataFile", "DataFile"), "no ElementDataFile"),
        (_meta("NDims = 3", "NDims = 103"), "volume of three axes"),
        (_meta("NDims = 3", "NDims = 3\nNDims = 3"), "a line is no field, or there twice"),
        (_meta("DimSize = 6 5 4", "DimSize = 6 5"), "DimSize must be 3 numbers"),
        (_meta("Offset = ", "Offset = x "), "Offset must be 3 numbers"),
        (_meta("DimSize = 6 5 4", "DimSize = 654"), "DimSize must be 3 numbers"),
        (_meta("NDims", "DistanceUnits = cm\nNDims"), "and millimetres, found DistanceUnits = cm; export"),
        (_meta("NDims", "ElementToIntensityFunctionSlope = 1.5\nNDims"), "FunctionSlope = 1.5"),
        (_meta("NDims", "ElementToIntensityFunctionOffset = -1000\nNDims"), "FunctionOffset = -1000"),
        (_meta("NDims", "Modality = MET_MOD_MR\nNDims"), "found Modality = MET_MOD_MR"),
        (_meta("CompressedData = False", "CompressedData = Tralse"), "must be True or False"),
        (_meta("NDims", "HeaderSize = 37\nNDims"), "it cannot be read; ITK says"),
        (_meta("NDims", "HeaderSize = -2\nNDims"), "HeaderSize must be the number of bytes .* found '-2'"),
        (_meta("NDims", "HeaderSize = 37\nNDims", "a.mha"), "found '37'"),  # within its own header
        (_meta("NDims", "HeaderSize = 37\nNDims", compress=True), "not compressed, .* found '37'"),
        (_meta("DimSize = 6 5 4", "DimSize = 6000 5000 4000"), "6000, 5000, 4000\\) voxels are not in it"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, write: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(VolumeError, match=says) as caught:
        open_series(write(tmp_path)).read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("units", ["mm", "?"])
@pytest.mark.parametrize("kind", ["CT", "UNKNOWN", "OTHER"])
def test_fields_of_a_metaimage_that_change_nothing_are_taken(tmp_path: Path, units: str, kind: str) -> None:
    scale = "ElementToIntensityFunctionSlope = 1.0\nElementToIntensityFunctionOffset = -0\n"
    fields = f"DistanceUnits = {units}\nModality = MET_MOD_{kind}\n{scale}"
    assert np.array_equal(read_volume(_meta("NDims", f"{fields}NDims")(tmp_path)).hu, small().hu)


@pytest.mark.parametrize("given", ["37", "-1"])
def test_the_header_of_a_metaimages_voxels_is_skipped(tmp_path: Path, given: str) -> None:
    path = _meta("NDims", f"HeaderSize = {given}\nNDims")(tmp_path)
    voxels = path.with_suffix(".raw")
    content = voxels.read_bytes()
    voxels.write_bytes(b"h" * 37 + content)
    assert np.array_equal(read_volume(path).hu, small().hu)
    voxels.write_bytes(b"h" * 38 + content)
    if given == "-1":
        assert np.array_equal(read_volume(path).hu, small().hu)
    else:
        with pytest.raises(VolumeError, match=r"says 240 bytes of voxels, a\.raw has 241"):
            read_volume(path)


def test_a_few_bytes_after_the_voxels_of_a_nifti_are_taken(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes() + bytes(59))
    assert np.array_equal(read_volume(path).hu, small().hu)


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, two = write_image(tmp_path / "a.mhd"), write_image(tmp_path / "b.nii")
    (tmp_path / "c.nii").write_bytes(two.read_bytes())
    before = open_series(one).fingerprint
    assert open_series(tmp_path / "c.nii").fingerprint == open_series(two).fingerprint != before
    data = (tmp_path / "a.raw").read_bytes()
    (tmp_path / "a.raw").write_bytes(data[:-1] + b"\1")
    assert open_series(one).fingerprint != before
