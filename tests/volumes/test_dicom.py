"""DICOM series: read as they lie in the patient, and refused with the fault named."""

from __future__ import annotations

import locale
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataelem import DataElement
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from slidetl.errors import UsageError, VolumeError
from slidetl.slides.dicom import series_instance_uid
from slidetl.volumes import is_series, open_series, read_volume
from slidetl.volumes.frame import VolumeFrame
from slidetl.volumes.volume import Volume
from tests.volumes.series import ROOT, edit, small, write_series


def test_a_series_is_read_in_the_order_of_its_positions(tmp_path: Path) -> None:
    wanted = small()
    found = read_volume(write_series(tmp_path / "s", wanted))
    assert np.array_equal(found.hu, wanted.hu) and found.hu.dtype == np.int16
    assert found.frame.size_voxel == wanted.frame.size_voxel
    assert np.allclose(found.spacing_mm, wanted.spacing_mm) and np.allclose(found.origin_mm, wanted.origin_mm)
    assert np.allclose(found.direction, np.eye(3)) and found.notes == () and len(found.fingerprint) == 64


def test_simpleitk_reads_the_same_voxels_at_the_same_places(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", slope=2.0, intercept=-1000.0)
    found = read_volume(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    for index in ((0, 0, 0), (5, 4, 3), (2, 1, 3)):
        x, y, z = index
        at = image.TransformIndexToPhysicalPoint(index)
        assert np.allclose(found.frame.to_patient_mm(index), at)
        assert found.hu[z, y, x] == image[index]


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    wanted = small()

    def change(dataset: Any, number: int) -> None:
        stored = wanted.hu[number] * 2 + 3 * number
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -1.5 * number
        dataset.PixelData = stored.astype(np.int16).tobytes()

    assert np.array_equal(read_volume(write_series(tmp_path / "s", wanted, change)).hu, wanted.hu)


def test_implicit_little_endian_is_read_and_known_as_a_series(tmp_path: Path) -> None:
    def implicit(dataset: Any, number: int) -> None:
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian

    folder = write_series(tmp_path / "s", change=implicit)
    assert np.array_equal(read_volume(folder).hu, small().hu)
    one = next(folder.iterdir())
    assert is_series(folder) and is_series(one) and series_instance_uid(one) == f"{ROOT}.1"


def test_padding_below_air_becomes_air(tmp_path: Path) -> None:
    volume = small()
    volume.hu[0, 0, 0] = -3024
    assert read_volume(write_series(tmp_path / "s", volume, intercept=0)).hu[0, 0, 0] == -1024


def _padded(
    value: int, limit: int | None = None, vr: str = "SS", syntax: UID = ExplicitVRLittleEndian, **about: int
) -> Callable[[Any, int], None]:
    """Declares padding, and stores it in the first and last row, the first column and amid each slice."""

    def change(dataset: Any, number: int) -> None:
        pixels = np.frombuffer(dataset.PixelData, np.int16).reshape(dataset.Rows, dataset.Columns).copy()
        stored = np.int64(value).astype(np.int16)
        pixels[[0, -1]] = pixels[:, 0] = pixels[3, 3] = stored
        if limit is not None:
            pixels[0, 1:3] = np.int64(limit).astype(np.int16)
        dataset.PixelData = pixels.tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
        for keyword, content in about.items():
            setattr(dataset, keyword, content)
        dataset.add(DataElement(0x00280120, vr, value))
        if limit is not None:
            dataset.add(DataElement(0x00280121, vr, limit))

    return change


@pytest.mark.parametrize(
    ("change", "intercept", "inner"),
    [
        (_padded(4095, vr="US", PixelRepresentation=0), -1024.0, 3071),
        (_padded(4095, vr="US", PixelRepresentation=0, syntax=ImplicitVRLittleEndian), -1024.0, 3071),
        (_padded(0), 0.0, 0),
        (_padded(2000, 1990), 0.0, 2000),
        (_padded(1990, 2000), 0.0, 1990),
        (_padded(-200, syntax=ImplicitVRLittleEndian), 1000.0, 800),
        (_padded(65336, vr="US"), 1000.0, 800),  # -200, by another type
        (_padded(3896, vr="US", BitsStored=12, HighBit=11), 1000.0, 800),  # -200, in 12 bits
    ],
)
def test_padding_above_air_becomes_air_at_the_edge_of_a_slice_alone(
    tmp_path: Path, change: Callable[[Any, int], None], intercept: float, inner: int
) -> None:
    wanted = small((7, 7, 3))
    found = read_volume(write_series(tmp_path / "s", wanted, change, intercept=intercept))
    wanted.hu[:, [0, -1]] = wanted.hu[:, :, 0] = -1024
    wanted.hu[:, 3, 3] = inner
    assert np.array_equal(found.hu, wanted.hu)
    assert found.notes == ("voxels of the PixelPaddingValue that reach the edge of a slice are read as air",)


def test_padding_below_air_needs_no_note(tmp_path: Path) -> None:
    found = read_volume(write_series(tmp_path / "s", small((7, 7, 3)), _padded(-2000), intercept=0.0))
    assert found.hu[0, 0, 0] == found.hu[0, 3, 3] == -1024 and found.notes == ()


def test_padding_does_not_hide_a_lost_intercept(tmp_path: Path) -> None:
    """The corners of its slices have -2000, the rest what a scanner stores for Hounsfield units plus 1024."""
    volume = small()
    volume.hu[:] += 1024
    volume.hu[:, 0, 0] = -2000
    folder = write_series(tmp_path / "s", volume, intercept=0)
    with pytest.raises(
        VolumeError, match=r"its values, -1024 to 469, are no Hounsfield units: expected some"
    ):
        read_volume(folder)


def test_the_air_beside_a_tilted_slice_does_not_hide_a_lost_intercept(tmp_path: Path) -> None:
    def change(dataset: Any, number: int) -> None:
        _position(1, lambda n: 0.3 * n)(dataset, number)
        dataset.RescaleIntercept = 0

    with pytest.raises(VolumeError, match=r"its values, -1024 to 468, are no Hounsfield units"):
        read_volume(write_series(tmp_path / "s", change=change))


def test_soft_tissue_alone_is_read(tmp_path: Path) -> None:
    volume = small()
    volume.hu[:] = np.linspace(-60, 90, volume.hu.size).reshape(volume.hu.shape)
    assert read_volume(write_series(tmp_path / "s", volume)).hu.min() == -60


def test_a_coronal_series_lies_like_any_other(tmp_path: Path) -> None:
    """Rows run to the patient's right, columns to the feet, slices from back to front."""
    stored = small()
    axes = (-1, 0, 0, 0, 0, -1, 0, -1, 0)
    about = VolumeFrame(stored.frame.size_voxel, stored.spacing_mm, (50.0, 30.0, 10.0), axes)
    assert np.allclose(np.cross(about.matrix[:, 0], about.matrix[:, 1]), about.matrix[:, 2])  # as in DICOM
    folder = write_series(tmp_path / "s", Volume(stored.hu, about))
    found = read_volume(folder)
    assert np.allclose(found.direction, np.eye(3))
    for index in ((0, 0, 0), (5, 4, 3), (1, 2, 3)):
        x, y, z = np.rint(found.frame.to_voxel(about.to_patient_mm(index))).astype(int)
        assert found.hu[z, y, x] == stored.hu[index[::-1]]


def _position(axis: int, by: Callable[[int], float]) -> Callable[[Any, int], None]:
    def change(dataset: Any, number: int) -> None:
        position = [float(v) for v in dataset.ImagePositionPatient]
        position[axis] += by(number)
        dataset.ImagePositionPatient = position

    return change


def _set(keyword: str, value: object, only: int | None = None) -> Callable[[Any, int], None]:
    def change(dataset: Any, number: int) -> None:
        if only in (None, number):
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_position(2, lambda n: 2.5 * (n > 1)), "slices are missing.*1 after 22.5 mm"),
        (_position(2, lambda n: -2.5 * (n > 1)), "1 doubled slices: .* at 22.5 mm"),
        (_position(2, lambda n: 0.8 * (n > 1)), "mixed spacing of slices, 2.5 to 3.3 mm"),
        (_position(0, lambda n: 3.0 * (n == 1)), "shifted sideways, unevenly, by 3.0 mm"),
        (_set("GantryDetectorTilt", 12.0), "GantryDetectorTilt is 12 degrees"),
        (_set("RescaleType", "US"), "in 'US' \\(RescaleType\\), expected HU"),
        (_set("RescaleSlope", None), "RescaleSlope must be a finite number, found None"),
        (_set("RescaleIntercept", None, 2), "RescaleIntercept must be a finite number"),
        (_set("Modality", "MR"), "its modality is MR, expected CT"),
        (_set("Modality", "SM"), "a whole slide is tiled with --mpp"),
        (_set("ImagePositionPatient", None, 1), "ImagePositionPatient must be 3 finite numbers"),
        (_set("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]), "two unit vectors at a right angle"),
        (_set("ImageOrientationPatient", [0, 1, 0, -1, 0, 0], 1), "slices differ: .* another orientation"),
        (_set("PixelSpacing", [0.9, 0.9], 1), "slices differ: .* pixels of \\[0.9, 0.9\\] mm"),
        (_set("PixelSpacing", [0.0, 0.9]), "PixelSpacing must be positive"),
        (_set("NumberOfFrames", 4), "enhanced \\(multi-frame\\) CT is not read"),
        (_set("PhotometricInterpretation", "MONOCHROME1"), "expected one MONOCHROME2 value"),
        (_set("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), "localizer images only"),
        (_set("Rows", 3, 1), "slices differ: .* 6 x 3 pixels"),
        (_set("PixelData", b"\0" * 20, 1), "damaged, or not DICOM: .*bytes"),
        (_set("RescaleSlope", 100.0), "far beyond any Hounsfield unit"),
        (_set("RescaleSlope", 0.0, 1), "RescaleSlope is 0"),
        (_set("RescaleIntercept", 0.0), "its values, 124 to 469, are no Hounsfield units"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, change: Callable[[Any, int], None], says: str) -> None:
    folder = write_series(tmp_path / "s", change=change)
    with pytest.raises(VolumeError, match=says):
        read_volume(folder)


@pytest.mark.parametrize("drift", [(0.0, 0.6), (-0.45, 0.0), (0.3, -0.2)])
def test_a_tilted_gantry_is_straightened(tmp_path: Path, drift: tuple[float, float]) -> None:
    """Values are a ramp of patient coordinates, so each voxel tells its place."""
    about = small((20, 18, 9)).frame

    def ramp(point: np.ndarray) -> np.ndarray:
        return np.asarray(5 * (point[..., 0] + 100) - 7 * (point[..., 1] + 50) + 11 * (point[..., 2] - 20))

    def change(dataset: Any, number: int) -> None:
        aside = np.array([*drift, 0.0]) * number
        dataset.ImagePositionPatient = (about.to_patient_mm((0, 0, number)) + aside).tolist()
        y, x = np.indices((18, 20))
        point = about.to_patient_mm(np.stack([x, y, np.full(x.shape, number)], -1)) + aside
        dataset.RescaleIntercept = 0
        dataset.PixelData = np.rint(ramp(point)).astype(np.int16).tobytes()

    found = read_volume(write_series(tmp_path / "s", small((20, 18, 9)), change))
    tilt = np.degrees(np.arctan(np.hypot(*drift) / 2.5))
    assert found.notes == (f"a gantry tilt of {tilt:.1f} degrees is straightened by moving its slices",)
    z, y, x = np.indices(found.hu.shape)
    wanted = ramp(found.frame.to_patient_mm(np.stack([x, y, z], -1)))
    is_drawn = found.hu > -500  # the rest is filled with air
    is_near = np.abs(found.hu - wanted) <= 1.5
    assert is_near[is_drawn].mean() > 0.85  # at the edges, ramp and air mix
    assert is_near.sum() >= 17 * 15 * 9


def test_positions_rounded_to_a_tenth_are_even(tmp_path: Path) -> None:
    volume = Volume(
        small((6, 5, 9)).hu, VolumeFrame((6, 5, 9), (0.7, 0.8, 0.625), (0, 0, 0), tuple(np.eye(3).ravel()))
    )

    def rounded(dataset: Any, number: int) -> None:
        dataset.ImagePositionPatient = [0, 0, round(0.625 * number, 1)]

    assert read_volume(write_series(tmp_path / "s", volume, rounded)).spacing_mm[2] == pytest.approx(0.625)


def test_of_several_series_a_file_chooses_one(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    other = small()
    other.hu[:] += 5
    write_series(folder, other, series="2")
    with pytest.raises(VolumeError, match=r"2 DICOM series in one folder.*CT of 4 files"):
        read_volume(folder)
    assert np.array_equal(read_volume(next(folder.glob("*-2-*"))).hu, other.hu)


def test_localizers_and_other_files_are_left_out(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    plain = read_volume(folder)
    write_series(folder, change=_set("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), series="2")
    (folder / "readings.xml").write_text("<readings/>")
    (folder / "LICENSE").write_text("free")
    found = read_volume(folder)
    assert np.array_equal(found.hu, plain.hu) and found.fingerprint == plain.fingerprint
    assert found.notes == ("localizer images are left out (4)",)
    named = read_volume(next(folder.glob("*-1-*")))
    assert np.array_equal(named.hu, plain.hu) and named.notes == ()
    with pytest.raises(VolumeError, match="localizer images only"):
        read_volume(next(folder.glob("*-2-*")))


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    one = sorted(folder.iterdir())[1]
    data = one.read_bytes()
    for content, says in (
        (b"", "not DICOM, though it is named so"),
        (data[:100] + bytes(100), "not DICOM, though it is named so"),
        (data[:200], "it has no SeriesInstanceUID"),
        (data[:-10], "damaged, or not DICOM"),
    ):
        one.write_bytes(content)
        with pytest.raises(VolumeError, match=f"{one.name}.*({says})"):
            read_volume(folder)
    shutil.rmtree(folder)
    with pytest.raises(VolumeError, match="no such file or folder"):
        read_volume(folder)
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    for path, says in ((folder, "no DICOM files"), (folder / "a.txt", "no DICOM files")):
        with pytest.raises(VolumeError, match=says):
            read_volume(path)
    single = write_series(tmp_path / "single", small((6, 5, 1)))
    with pytest.raises(VolumeError, match="one slice makes no volume"):
        read_volume(single)


@pytest.mark.parametrize("form", ["IM{:05}", "CT.1.2.840.{}", "1.2.840.{}.7", "slice{}.raw"])
@pytest.mark.parametrize("content", [b"", bytes(4096), b"garbage"])
def test_a_lost_slice_at_the_end_is_named_whatever_its_suffix(
    tmp_path: Path, form: str, content: bytes
) -> None:
    folder = write_series(tmp_path / "s", small((6, 5, 12)))
    for path in list(folder.iterdir()):
        path.rename(folder / form.format(int(path.stem.rsplit("-", 1)[1])))
    for name in ("LICENSE", "DICOMDIR", "069.xml", "README.1st"):
        (folder / name).write_text("free")
    assert read_volume(folder).frame.size_voxel == (6, 5, 12)
    last = folder / form.format(11)
    last.write_bytes(content)
    with pytest.raises(VolumeError, match=f"{last.name}: not DICOM, though it is named so, or damaged; copy"):
        read_volume(folder)


def test_an_empty_file_of_any_name_may_be_a_lost_slice(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    (folder / "0fa3c8e1").write_bytes(bytes(200))
    with pytest.raises(VolumeError, match="0fa3c8e1: not DICOM, though it is empty, or damaged; copy"):
        read_volume(folder)


def test_a_compressed_series_is_read_without_loss(tmp_path: Path) -> None:
    wanted = small((32, 32, 3))
    folder = write_series(tmp_path / "s", wanted)
    locale_before = locale.setlocale(locale.LC_CTYPE)
    for path in folder.iterdir():
        image = sitk.ReadImage(str(path), sitk.sitkInt16)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetFileName(str(path))
        writer.Execute(image)
        edit(path, lambda dataset: setattr(dataset, "RescaleType", "HU"))
    locale.setlocale(locale.LC_CTYPE, locale_before)  # which this writer of ITK sets to "C"
    assert open_series(folder).frame.size_voxel == (32, 32, 3)
    assert np.array_equal(read_volume(folder).hu, wanted.hu)
    assert locale.setlocale(locale.LC_CTYPE) == locale_before
    corner, one = int(wanted.hu[0, 0, 0]), min(folder.iterdir())
    edit(one, lambda dataset: dataset.add(DataElement(0x00280120, "SS", corner + 1024)))
    assert read_volume(folder).hu[0, 0, 0] == -1024


def test_a_file_packed_as_a_whole_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    def deflated(dataset: Any, number: int) -> None:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    folder = write_series(tmp_path / "s", change=deflated)
    with pytest.raises(VolumeError, match=r"deflated\), .* not read; unpack it with 'dcmconv \+te'"):
        open_series(folder)


def test_values_that_pydicom_cannot_parse_are_one_line(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s")
    one = sorted(folder.iterdir())[0]
    data = one.read_bytes().replace(b"-1024.0", b"-10x4.0")
    one.write_bytes(data)
    with pytest.raises(VolumeError, match=f"{one.name}.*") as caught:
        read_volume(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("package", "name"), [("pydicom", "s"), ("SimpleITK", "a.nii")])
def test_without_the_extra_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    write_series(tmp_path / "s")
    (tmp_path / "a.nii").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"CT series need {package}: pip install 'slidetl\[ct\]'"):
        read_volume(tmp_path / name)
