"""CT series from files to a cache: the same command, ledger, resume and verification as slides."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slidetl.cli import main
from slidetl.data.manifest import read_manifest
from slidetl.data.study import read_study
from slidetl.errors import CacheMismatchError, ManifestError, UsageError
from slidetl.grading.batch import find_slides
from slidetl.slides import open_slide
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED, Ledger
from slidetl.tiles.patches import prepare_series
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource
from slidetl.volumes import is_series, open_series, read_volume
from slidetl.volumes.volume import Volume
from tests.tiles.conftest import tree
from tests.volumes.phantom import chest, frame
from tests.volumes.series import ROOT, small, write_series

SPEC = TileSpec(spacing_mm=8.0, tile_size_px=8)
NODULE = (60.0, 0.0, 10.0)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("ct") / "chest", chest((8.0, 8.0, 10.0))[0])


def manifest(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "manifest.csv"
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(slide_id: str, path: Path, location: tuple[float, float, float] | None = None) -> dict[str, object]:
    about: dict[str, object] = {"slide_id": slide_id, "path": path, "patient_id": "P1", "grade": 1}
    return about | dict(zip(("x_mm", "y_mm", "z_mm"), location or ("", "", ""), strict=True))


def test_one_command_tiles_a_manifest_of_series(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    listed = str(manifest(tmp_path, [row("C1", series)]))
    words = ["--cache", str(cache), "--spacing-mm", "8", "--tile-size", "8", "--window", "-1000", "400"]
    assert main(["tile", listed, *words, "--workers", "1", "--preview"]) == 0
    (entry,) = Ledger(cache / "ledger.csv").rows()
    assert (entry.status, entry.vendor, entry.mpp_x, entry.width) == (USED, "CT", 8000.0, 40)
    assert entry.tiles > 3 and entry.tiles_without_tissue > 0 and entry.bytes > 20 * 30 * 40 * 2
    with Image.open(cache / "previews" / "C1.png") as picture:
        assert picture.width > 3 * 300
        assert {(20, 130, 40), (0, 170, 190)} <= set(
            map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist())
        )
    assert (
        main(["atlas", "cluster", str(cache), "--features", "any", "--output", str(tmp_path / "atlas")]) == 2
    )
    assert "patches of a CT series" in capsys.readouterr().err
    before = tree(cache_path(cache, "C1"))
    (kept,) = tile_slides([SlideSource("C1", series)], cache, SPEC, 0)
    assert kept.tiles == entry.tiles and tree(cache_path(cache, "C1")) == before
    assert main(["cache", "verify", str(cache), "--decode"]) == 0
    assert main(["cache", "info", str(cache)]) == 0
    assert "spacing_mm 8.0" in capsys.readouterr().out
    study = read_study(listed, cache)
    assert study.caches[0].read([0]).shape == (1, 8, 8, 8)
    narrow = dataclasses.replace(SPEC, window_hu=(-160, 240))
    with pytest.raises(CacheMismatchError, match="window_hu"):
        tile_slides([SlideSource("C1", series)], cache, narrow, 0)
    assert tile_slides([SlideSource("C1", series)], cache, narrow, 0, overwrite=True)[0].status == USED
    assert SlideCache.open(cache_path(cache, "C1")).read([0]).max() <= 240


def test_locations_are_units_of_one_patch_and_the_series_is_read_once(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [
        row("N1", series, NODULE),
        row("N2", series, (-60.0, 0.0, 0.0)),
        row("N3", series, (0.0, 0.0, 999.0)),
    ]
    rows = read_manifest(manifest(tmp_path, listed)).rows
    assert [r.location_mm for r in rows[:2]] == [NODULE, (-60.0, 0.0, 0.0)]
    reads: list[object] = []

    def counted(*arguments: object) -> object:
        reads.append(arguments)
        return prepare_series(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("slidetl.tiles.tile.prepare_series", counted)
    sources = [SlideSource(r.slide_id, r.path, location_mm=r.location_mm) for r in rows]
    found = tile_slides(sources, tmp_path / "cache", SPEC, 0)
    assert [r.status for r in found] == [USED, USED, FAILED] and len(reads) == 1
    assert "outside the series" in found[2].reason
    one, two = (SlideCache.open(cache_path(tmp_path / "cache", name)) for name in ("N1", "N2"))
    assert len(one) == len(two) == 1 and one.fingerprint == two.fingerprint
    assert np.abs(one.centres_mm[0] - NODULE).max() <= 4.0
    inner = [cache.read([0])[0][2:6, 2:6, 2:6].max() for cache in (one, two)]
    assert inner[0] > -500 and inner[1] < -700
    alone = tile_slides([sources[1]], tmp_path / "alone", SPEC, 0)
    assert alone[0].status == USED
    assert tree(cache_path(tmp_path / "alone", "N2")) == tree(two.path)
    moved = dataclasses.replace(sources[0], location_mm=(50.0, 0.0, 10.0))
    (again,) = tile_slides([moved], tmp_path / "cache", SPEC, 0)
    assert again.status == FAILED and "made at the location (60.0, 0.0, 10.0) mm" in again.reason


@pytest.mark.slow  # two processes
def test_workers_get_all_locations_of_a_series(series: Path, tmp_path: Path) -> None:
    other = write_series(tmp_path / "other", chest((8.0, 8.0, 10.0))[0], series="2")
    sources = [
        SlideSource(f"N{n}", (series, other)[n % 2], location_mm=(60.0, 0.0, float(n))) for n in range(5)
    ]
    rows = tile_slides(sources, tmp_path / "cache", SPEC, 2)
    assert [(r.slide_id, r.status) for r in rows] == [(s.slide_id, USED) for s in sources]


def test_the_label_of_one_location_never_meets_the_patch_of_another(series: Path, tmp_path: Path) -> None:
    tile_slides([SlideSource("N1", series, location_mm=NODULE)], tmp_path / "cache", SPEC, 0)
    with pytest.raises(CacheMismatchError, match="the manifest's location is"):
        read_study(manifest(tmp_path, [row("N1", series, (50.0, 0.0, 10.0))]), tmp_path / "cache")


def test_a_damaged_patch_is_found_and_mended_byte_for_byte(series: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tile_slides([SlideSource("C1", series)], cache, SPEC, 0)
    path = cache_path(cache, "C1")
    sound = tree(path)
    shard = path / "tiles/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[30] ^= 1
    shard.write_bytes(data)
    assert main(["cache", "verify", str(cache)]) == 1
    assert main(["cache", "verify", str(cache), "--repair"]) == 0
    assert tree(path) == sound


def test_series_without_lungs_are_excluded_with_the_reason(tmp_path: Path) -> None:
    hu = np.full((20, 20, 20), -1000, np.int16)
    hu[4:16, 4:16, 4:16] = 30
    folder = write_series(tmp_path / "s", Volume(hu, frame((20, 20, 20), (8.0, 8.0, 8.0))))
    (found,) = tile_slides([SlideSource("C1", folder)], tmp_path / "cache", SPEC, 0)
    assert (found.status, found.reason) == (
        EXCLUDED,
        "no lung is found in it; --mask chooses another part, or none",
    )
    body = dataclasses.replace(SPEC, mask="body")
    (found,) = tile_slides([SlideSource("C1", folder)], tmp_path / "body", body, 0)
    assert found.status == USED


def test_a_part_of_the_lungs_without_patches_is_noted(series: Path, tmp_path: Path) -> None:
    narrow = dataclasses.replace(SPEC, min_tissue=0.7)
    (found,) = tile_slides([SlideSource("C1", series)], tmp_path / "cache", narrow, 0)
    cache = SlideCache.open(cache_path(tmp_path / "cache", "C1"))
    mask = np.kron(cache.overview_mask, np.ones((2,) * 3, bool))  # overview at 8 mm, in halves of voxels
    assert cache.overview_mm == 8.0
    for x, y, z in 2 * cache.origins_voxel:
        mask[z : z + 16, y : y + 16, x : x + 16] = False
    lost = mask.sum() / 8 / cache.overview_mask.sum()
    assert lost > 0.1
    assert found.note == f"{lost:.0%} of the lung is in no patch (min_tissue 0.7, stride 8)"
    (kept,) = tile_slides([SlideSource("C1", series)], tmp_path / "cache", narrow, 0)
    assert kept.note == found.note
    (all_of_it,) = tile_slides(
        [SlideSource("C1", series)], tmp_path / "all", dataclasses.replace(SPEC, min_tissue=0.0), 0
    )
    assert all_of_it.note == ""


def test_thick_slices_are_noted(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", chest((8.0, 8.0, 25.0))[0])
    whole = dataclasses.replace(SPEC, min_tissue=0.0)
    (found,) = tile_slides([SlideSource("C1", folder)], tmp_path / "cache", whole, 0)
    assert (found.status, found.note) == (USED, "slices or pixels are 25 mm apart, interpolated to 8 mm")
    (kept,) = tile_slides([SlideSource("C1", folder)], tmp_path / "cache", whole, 0)
    assert kept.note == found.note


def test_wrong_kinds_and_mixtures_are_one_line(series: Path, tmp_path: Path) -> None:
    picture = tmp_path / "slide.png"
    Image.new("RGB", (64, 64)).save(picture)
    slide, ct = SlideSource("S1", picture, 1.0), SlideSource("C1", series)
    for sources, spec, says in (
        ([slide, ct], SPEC, r"slides \(S1\) and CT series \(C1\) in one manifest"),
        ([slide], SPEC, "--spacing-mm is for CT series; S1"),
        ([ct], TileSpec(mpp=1.0), "--mpp is for slides; C1"),
        ([SlideSource("C1", series, 1.0)], SPEC, "a spacing or regions given for a slide"),
        ([SlideSource("S1", picture, 1.0, location_mm=NODULE)], TileSpec(mpp=1.0), "x_mm, y_mm and z_mm are"),
    ):
        with pytest.raises(UsageError, match=says):
            tile_slides(sources, tmp_path / "cache", spec, 0)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(OSError, match="modality CT, not a slide"):
        open_slide(series)
    assert is_series(series) is True and is_series(picture) is False and is_series(tmp_path / "no") is None
    assert is_series(next(series.iterdir())) is True and is_series(tmp_path / "no.nii.gz") is True


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("a", "s", (1.0, 2.0, "x"))], "must be three numbers of millimetres"),
        ([("a", "s", (1.0, "", 3.0))], "must be three numbers of millimetres"),
        (
            [("a", "s", (1.0, 2.0, 3.0)), ("b", "s", (1.0, 2.0, 3.0))],
            "the same file as on line 2, at the same",
        ),
        ([("a", "s", None), ("b", "s", (1.0, 2.0, 3.0))], "line 2, which is there as a whole"),
    ],
)
def test_faults_of_locations_are_told(tmp_path: Path, rows: list[tuple[str, str, object]], says: str) -> None:
    listed = [row(name, tmp_path / path, place) for name, path, place in rows]  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=says):
        read_manifest(manifest(tmp_path, listed))


def test_a_folder_of_series_lists_each_once(tmp_path: Path) -> None:
    write_series(tmp_path / "a", small(), series="7")
    for name in ("b.nii.gz", "c.mha"):
        (tmp_path / name).write_bytes(b"")
    rows = read_manifest(tmp_path).rows
    assert sorted(row.slide_id for row in rows) == [f"{ROOT}.7", "b", "c"]
    assert all(is_series(row.path) for row in rows)
    (one,) = [row for row in rows if row.path.parent.name == "a"]
    assert read_volume(one.path).frame.size_voxel == (6, 5, 4)


def test_a_localizer_beside_a_series_is_no_patient(series: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study" / "P1"
    shutil.copytree(series, folder)

    def localizer(dataset: Any, number: int) -> None:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    write_series(folder, small((6, 5, 1)), localizer, series="9")
    with pytest.warns(UserWarning, match=r"left out series of localizer images \(1: P1/00-9-0\.dcm\)"):
        (listed,) = read_manifest(tmp_path / "study").rows
    assert listed.slide_id == f"{ROOT}.1" and open_series(listed.path).frame.size_voxel == (40, 30, 20)
    with pytest.warns(UserWarning, match="localizer"):
        assert find_slides([folder])[0] == [folder]
    words = ["--cache", str(tmp_path / "cache"), "--spacing-mm", "8", "--tile-size", "8", "--workers", "1"]
    with pytest.warns(UserWarning, match="localizer"):
        assert main(["tile", str(folder), *words]) == 0
    alone = write_series(tmp_path / "alone", small((6, 5, 1)), localizer)
    (listed,) = read_manifest(alone).rows
    (found,) = tile_slides([SlideSource("A", listed.path)], tmp_path / "cache", SPEC, 0)
    assert found.status == FAILED and "localizer images only" in found.reason


def test_a_series_of_many_locations_is_compared_once_and_only_if_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = write_series(tmp_path / "ct", chest((16.0, 16.0, 16.0))[0])
    places = [row(f"N{n}", series, (60.0, 0.0, 10.0 * n)) for n in range(3)]
    rows = read_manifest(manifest(tmp_path, places)).rows
    sources = [SlideSource(r.slide_id, r.path, location_mm=r.location_mm) for r in rows]
    cache = tmp_path / "cache"
    tile_slides(sources, cache, TileSpec(spacing_mm=16.0, tile_size_px=4), 0)
    opened: list[Path] = []

    def counted(path: Path) -> object:
        opened.append(path)
        return open_series(path)

    monkeypatch.setattr("slidetl.data.study.open_series", counted)
    assert len(read_study(tmp_path / "manifest.csv", cache).slides) == 3 and not opened
    one = next(series.iterdir())
    os.utime(one, (1e9, 2e9))
    assert len(read_study(tmp_path / "manifest.csv", cache).slides) == 3 and opened == [series]
    assert len(read_study(tmp_path / "manifest.csv", cache).slides) == 3 and opened == [series]
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    os.utime(one, (1e9, 3e9))
    with pytest.raises(CacheMismatchError, match="tiles of another file"):
        read_study(tmp_path / "manifest.csv", cache)
    series.rename(tmp_path / "moved")
    assert len(read_study(tmp_path / "manifest.csv", cache).slides) == 3  # its path is known to the ledger
