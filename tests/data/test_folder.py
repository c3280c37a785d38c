from __future__ import annotations

import os
from pathlib import Path

import pytest

from slidetl.data.folder import find_files
from slidetl.data.manifest import read_manifest
from slidetl.errors import ManifestError, SlideOpenError
from slidetl.slides import open_slide


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def identifiers(folder: Path) -> dict[str, str]:
    return {row.slide_id: str(row.path.relative_to(folder)) for row in read_manifest(folder).rows}


def test_linked_folders_are_entered_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    study, store = touch(tmp_path / "study", "siteA/a.svs"), touch(tmp_path / "store", "b.svs", "deep/c.svs")
    (study / "siteB").symlink_to(store)
    (study / "linked.svs").symlink_to(store / "b.svs")  # listed as siteB/b.svs already
    (study / "dangling.svs").symlink_to(tmp_path / "gone.svs")
    (study / "siteC").symlink_to(tmp_path / "not mounted")
    touch(study, *["c.vsi", "d.isyntax", "e.kfb", "e2.kfb", "notes.txt", ".hidden.svs", ".Trash/x.svs"])
    os.mkfifo(study / "pipe.svs")
    with pytest.warns(UserWarning, match="left out") as caught:
        found = identifiers(study)
    # A link to nothing is a slide that fails, since its name says that it is one.
    assert found == {
        "a": "siteA/a.svs",
        "b": "siteB/b.svs",
        "c": "siteB/deep/c.svs",
        "dangling": "dangling.svs",
    }
    (warning,) = caught
    assert str(warning.message) == (
        f"{study}: left out files in formats that are not read here (4: .kfb 2, .vsi 1, .isyntax 1); "
        "links to nothing (1: siteC); pipes or devices (1: pipe.svs); "
        "links to what is listed already (1: linked.svs)"
    )


@pytest.mark.filterwarnings("ignore:.*listed already")
def test_links_in_a_circle_end(tmp_path: Path) -> None:
    study = touch(tmp_path / "study", "a/one.svs")
    (study / "a" / "up").symlink_to(study)
    (study / "above").symlink_to(tmp_path)
    (study / "self").symlink_to(study / "self")
    touch(tmp_path, "beside.svs")
    assert identifiers(study) == {"one": "a/one.svs"}


def test_a_folder_of_one_link(tmp_path: Path) -> None:
    store, only = touch(tmp_path / "store", "b.svs"), tmp_path / "only"
    only.mkdir()
    (only / "site").symlink_to(store)
    assert identifiers(only) == {"b": "site/b.svs"}


def test_a_folder_without_slides_says_what_it_has(tmp_path: Path) -> None:
    touch(tmp_path, "a.vsi", "b.isyntax")
    with pytest.raises(ManifestError, match=r"no slides in this folder.*found files in formats.*\.vsi 1"):
        read_manifest(tmp_path)


def test_companions_and_caches_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "Case.mrxs", "Case/Slidedat.ini", "Case/Data0000.dat", "Case/preview.tif")
    touch(tmp_path, "cache/ledger.csv", "cache/.locks/x", "cache/x.zarr/zarr.json", "cache/previews/x.png")
    assert identifiers(tmp_path) == {"Case": "Case.mrxs"}
    touch(tmp_path, "other.zarr/zarr.json")
    with pytest.warns(UserWarning, match=r"not read here \(1: \.zarr 1\)"):
        read_manifest(tmp_path)


def test_pictures_of_grade_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "b.json", "out/a.png", "out/a.thumbnail.jpg", "out/own.png")
    (tmp_path / "out" / "a.json").write_text('{"slide": "a.png", "model_sha256": "00"}')
    (tmp_path / "b.json").write_text('{"annotations": []}')  # of another program
    found = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path).paths]
    assert found == ["a.png", "b.json", "b.png", "out/a.json", "out/own.png"]


def test_dicom_needs_no_suffix(tmp_path: Path, test_data: Path) -> None:
    data = (test_data / "slides" / "gcp-camelyon-jpeg.dcm").read_bytes()
    (tmp_path / "IMG0001").write_bytes(data)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.dicom").write_bytes(data)
    (tmp_path / "1.2.840.113").write_bytes(b"no DICOM")
    with pytest.warns(UserWarning, match=r"\(1: \.113 1\)"):
        assert identifiers(tmp_path) == {"IMG0001": "IMG0001", "x": "other/x.dicom"}


def test_names_of_every_script_and_clashes(tmp_path: Path) -> None:
    touch(
        tmp_path, "患者1.svs", "Пациент.svs", "a.svs", "A.svs", "!.svs", "?.svs", "café.svs", "cafe\u0301.svs"
    )
    found = identifiers(tmp_path)
    assert found["患者1"] == "患者1.svs" and found["Пациент"] == "Пациент.svs"
    assert len(found) == 8 and len({name.casefold() for name in found}) == 8
    assert sorted(name.rpartition("_")[0] for name in found)[2:] == [
        "A",
        "a",
        "café",
        "café",
        "slide",
        "slide",
    ]
    assert found == identifiers(tmp_path)


def test_series_of_several_files_are_named_by_their_uid(tmp_path: Path, test_data: Path) -> None:
    uid = b"1.3.6.1.4.1.5962.99.1.1747645553.419656796.1689669825649.4.0"
    other = uid[:-3] + b"9.0"
    for name in ("openslide-python-boxes_0.dcm", "openslide-python-boxes_1.dcm"):
        data = (test_data / "slides" / name).read_bytes()
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"z{name}").write_bytes(data.replace(uid, other))
    data = (test_data / "slides" / "gcp-camelyon-jpeg.dcm").read_bytes()
    (tmp_path / "alone.dcm").write_bytes(data)
    found = {row.slide_id: row.path for row in read_manifest(tmp_path).rows}
    assert found.keys() == {uid.decode(), other.decode(), "alone"}
    for path in found.values():
        open_slide(path).close()
    with pytest.raises(SlideOpenError, match=r"3 DICOM series, each a slide of its own; name a file of one"):
        open_slide(tmp_path)


def test_the_folder_of_one_series_opens_as_its_slide(tmp_path: Path, test_data: Path) -> None:
    for name in ("openslide-python-boxes_0.dcm", "openslide-python-boxes_1.dcm"):
        (tmp_path / name).write_bytes((test_data / "slides" / name).read_bytes())
    with open_slide(tmp_path) as slide, open_slide(tmp_path / "openslide-python-boxes_1.dcm") as other:
        assert slide.info.fingerprint == other.info.fingerprint
