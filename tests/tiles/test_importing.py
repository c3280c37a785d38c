"""Files of other tools, written here in their layouts, and their way to a graded slide."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from slidetl.cli import main
from slidetl.compare.config import read_comparison
from slidetl.compare.run import plan_comparison
from slidetl.compare.train_arm import train_job
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.manifest import ManifestRow
from slidetl.data.record import RecordedSlide, StudyRecord, store_record, stored_record
from slidetl.data.study import CachedSlide, check_duplicates, read_study
from slidetl.errors import CacheCorruptError, CacheMismatchError, UsageError
from slidetl.tiles.exchange import export_features
from slidetl.tiles.features import (
    NOT_STATED,
    FeatureSource,
    common_source,
    read_features,
    read_source,
    write_features,
)
from slidetl.tiles.foreign import read_foreign
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.importing import import_features
from slidetl.tiles.ledger import Ledger
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache
from slidetl.tiles.tile import SlideSource
from slidetl.tiles.verify import verify_cache
from tests.cli.test_tile import Draw
from tests.conftest import PyramidTiff
from tests.tiles.test_features import SOURCE

Values = NDArray[np.float32]
COORDS = np.array([[0, 0], [448, 0], [0, 448], [448, 448]])


def features(seed: int = 0, rows: int = 4, columns: int = 6) -> Values:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def save(path: Path, arrays: dict[str, Any], attributes: dict[str, dict[str, Any]] | None = None) -> Path:
    """Writes arrays as TRIDENT's ``save_h5`` and CLAM's ``save_hdf5``: chunks of a row, growing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            shape = values.shape
            chunks, most = (1, *shape[1:]), (None, *shape[1:])
            file.create_dataset(name, data=values, maxshape=most, chunks=chunks)
        for name, about in (attributes or {}).items():
            (file[name] if name else file).attrs.update(about)
    return path


def trident(path: Path, values: Values, coords: NDArray[Any] = COORDS, **more: Any) -> Path:
    about = {
        "patch_size": 224,
        "patch_size_level0": 448,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": path.stem,
        "savetodir": "/somewhere",
        "level0_width": 1000,
        "level0_height": 900,
        **more,
    }
    of = {"name": path.stem, "savetodir": "/somewhere", "encoder": "uni_v1"}
    arrays = {"features": values, "coords": coords.astype(np.int64)}
    return save(path, arrays, {"coords": about, "features": of})


def clam(path: Path, values: Values, coords: NDArray[Any] = COORDS) -> Path:
    return save(path, {"features": values, "coords": coords.astype(np.int32)})


def stamp(path: Path, values: Values, coords_um: NDArray[Any] | None = None, **more: Any) -> Path:
    about = {
        "stamp_version": "2.3.0",
        "extractor": "uni2",
        "unit": "um",
        "tile_size_um": 256.0,
        "tile_size_px": 224,
        "code_hash": "0a1b2c3d",
        "feat_type": "tile",
        **more,
    }
    at = np.array([[0, 0], [256, 0], [0, 256], [256, 256]]) if coords_um is None else coords_um
    return save(path, {"coords": at.astype(np.float32), "feats": values.astype(np.float16)}, {"": about})


def test_a_file_of_trident_says_where_its_tiles_lie_and_not_their_spacing(tmp_path: Path) -> None:
    import_features(trident(tmp_path / "s.h5", features()), tmp_path / "cache", "s", "uni")
    cache = SlideCache.open(tmp_path / "cache" / "s.zarr")
    assert read_source(cache, "uni").backbone == "uni_v1"
    assert (cache.spec.foreign, cache.spec.tile_size_px, cache.spec.mpp) == ("trident 20x", 224, 0)
    assert (cache.extent_level0, cache.size_level0, cache.mpp_level0) == ((448, 448), (1000, 900), (0, 0))
    np.testing.assert_array_equal(cache.origins_level0, COORDS)
    for wanted in ({}, {"weights_sha256": ""}, {"identity": "imported: uni_v1"}):
        np.testing.assert_array_equal(read_features(cache, "uni", **wanted), features().astype(np.float16))
    for wanted in ({"weights_sha256": "a" * 64}, {"identity": "imported: uni_v2"}):
        with pytest.raises(
            CacheMismatchError, match=r"made by weights imported: uni_v1, wanted (aaa|imported: uni_v2)"
        ):
            read_features(cache, "uni", **wanted)
    assert np.isnan(cache.tissue_fraction).all()
    assert verify_cache(cache.path).is_sound and verify_cache(cache.path, decode=True).is_sound


@pytest.mark.parametrize("has_batch", [False, True])
def test_a_file_of_clam_states_nothing_but_values_and_places(tmp_path: Path, has_batch: bool) -> None:
    values, coords = (features()[None], COORDS[None]) if has_batch else (features(), COORDS)
    done = import_features(clam(tmp_path / "s.h5", values, coords), tmp_path / "cache", "s", "r50")
    cache = SlideCache.open(tmp_path / "cache" / "s.zarr")
    assert done.source.backbone == NOT_STATED and cache.spec.foreign == "clam"
    np.testing.assert_array_equal(read_features(cache, "r50"), features().astype(np.float16))
    with pytest.raises(CacheMismatchError, match="without the size of a tile"):
        assert cache.extent_level0
    with pytest.raises(CacheMismatchError, match="without the size of a tile"):
        export_features(cache, "r50", tmp_path / "s.h5ad", "anndata")
    for read in (lambda: cache.read([0]), lambda: cache.thumbnail, lambda: cache.tissue_mask):
        with pytest.raises(CacheMismatchError, match="features imported from clam, and no tiles"):
            read()


def test_micrometres_of_stamp_become_pixels_of_the_slide_or_of_the_tiles(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    file = stamp(tmp_path / "s.h5", features())
    alone = import_features(file, tmp_path / "alone", "s", "uni2")
    cache = SlideCache.open(tmp_path / "alone" / "s.zarr")
    assert cache.spec.mpp == pytest.approx(256 / 224) and "pixels of the tiles" in alone.notes[0]
    np.testing.assert_array_equal(cache.origins_level0, COORDS // 2)
    slide = pyramid_tiff(tissue_picture(1024), 0.5)
    import_features(file, tmp_path / "cache", "s", "uni2", slide=slide)
    cache = SlideCache.open(tmp_path / "cache" / "s.zarr")
    np.testing.assert_array_equal(cache.origins_level0, [[0, 0], [512, 0], [0, 512], [512, 512]])
    assert (cache.mpp_level0, cache.extent_level0) == ((0.5, 0.5), (512, 512))


def test_a_slide_that_is_here_gives_spacing_and_content_and_must_fit(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    slide = pyramid_tiff(tissue_picture(1024), 0.25)
    file = trident(tmp_path / "s.h5", features(), level0_width=1024, level0_height=1024)
    import_features(file, tmp_path / "cache", "s", "uni", slide=slide)
    header = SlideCache.open(tmp_path / "cache" / "s.zarr").header
    assert (header.mpp_level0, header.mpp_read) == ((0.25, 0.25), (0.5, 0.5))
    with pytest.raises(CacheMismatchError, match=r"has \(1000, 900\) pixels.*\(1024, 1024\): another one"):
        import_features(trident(tmp_path / "t.h5", features()), tmp_path / "cache", "t", "uni", slide=slide)
    with pytest.raises(CacheMismatchError, match=r"row 1, \[4480.0, 0.0\], lie outside the slide"):
        file = clam(tmp_path / "t.h5", features(), COORDS * 10)
        import_features(file, tmp_path / "c", "t", "u", slide=slide)


def test_a_second_network_joins_the_first_and_another_one_of_its_name_does_not(tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    file = trident(tmp_path / "s.h5", features())
    assert import_features(file, cache_dir, "s", "uni").is_new
    assert not import_features(file, cache_dir, "s", "uni").is_new
    # the same tiles in another order
    turned = trident(tmp_path / "o" / "s.h5", features(1)[::-1], COORDS[::-1])
    import_features(turned, cache_dir, "s", "other")
    cache = SlideCache.open(cache_dir / "s.zarr")
    np.testing.assert_array_equal(read_features(cache, "other"), features(1).astype(np.float16))
    other = trident(tmp_path / "p" / "s.h5", features(2))
    with pytest.raises(CacheMismatchError, match="other features 'uni' are there"):
        import_features(other, cache_dir, "s", "uni")
    assert import_features(other, cache_dir, "s", "uni", overwrite=True).is_new
    with pytest.raises(CacheMismatchError, match="at other places"):
        import_features(trident(tmp_path / "q" / "s.h5", features(), COORDS + 1), cache_dir, "s", "uni")


def test_tiles_at_one_place_are_told(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [0, 0], [448, 0], [0, 448]])
    done = import_features(clam(tmp_path / "s.h5", features(), coords), tmp_path / "cache", "s", "u")
    assert done.notes == ("1 of 4 tiles lie at the place of another one",)


def _nan(file: h5py.File) -> None:
    file["features"][2, 1] = np.nan


def _large(file: h5py.File) -> None:
    file["features"][3, 0] = 1e6


def _soft(file: h5py.File) -> None:
    del file["coords"]
    file["coords"] = h5py.SoftLink("/elsewhere")


def _external(file: h5py.File) -> None:
    del file["coords"]
    file["coords"] = h5py.ExternalLink("other.h5", "coords")


def _virtual(file: h5py.File) -> None:
    del file["coords"]
    layout = h5py.VirtualLayout((4, 2), np.int64)
    layout[:] = h5py.VirtualSource("other.h5", "coords", (4, 2))
    file.create_virtual_dataset("coords", layout)


def _stored_outside(file: h5py.File) -> None:
    del file["coords"]
    file.create_dataset("coords", (4, 2), "i8", external=[("/etc/hostname", 0, 64)])


def _huge(file: h5py.File) -> None:
    del file["features"], file["coords"]
    file.create_dataset("features", (10**7, 10**5), "f4", chunks=(1, 10**5))
    file.create_dataset("coords", (10**7, 2), "i8", chunks=(1, 2))


def _large_piece(file: h5py.File) -> None:
    del file["features"]
    file.create_dataset("features", (4, 6), "f4", maxshape=(None, None), chunks=(2**14, 2**14), compression=1)


def _bomb(file: h5py.File) -> None:
    """64 bytes by its shape, and 64 MiB of zeros."""
    del file["coords"]
    coords = file.create_dataset("coords", (4, 2), "i8", chunks=(4, 2), shuffle=True, compression=1)
    coords.id.write_direct_chunk((0, 0), zlib.compress(bytes(2**26)), filter_mask=1)


def _stored_large(file: h5py.File) -> None:
    del file["coords"]
    coords = file.create_dataset("coords", (4, 2), "i8", chunks=(4, 2), compression=1)
    coords.id.write_direct_chunk((0, 0), bytes(2**20), filter_mask=1)


def _by_lzf(file: h5py.File) -> None:
    del file["coords"]
    file.create_dataset("coords", data=COORDS, chunks=(4, 2), compression="lzf")


def _text(file: h5py.File) -> None:
    del file["features"]
    file["features"] = np.array([[b"x"] * 6] * 4, "S1")


def _slide_level(file: h5py.File) -> None:
    del file["features"]
    file["features"] = np.zeros(768, np.float32)


def _rows(file: h5py.File) -> None:
    del file["coords"]
    file["coords"] = COORDS[:3]


def _group(file: h5py.File) -> None:
    del file["features"]
    file.create_group("features")


def _nowhere(file: h5py.File) -> None:
    del file["coords"]
    file["coords"] = np.array([[0, 0], [0, np.inf], [1, 1], [2, 2]])


def _empty(file: h5py.File) -> None:  # TRIDENT writes this for a slide without tissue
    del file["features"], file["coords"]
    file["features"], file["coords"] = np.empty((0, 6), np.float32), np.empty((0, 2), np.int64)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_nan, "features of row 2 are not finite"),
        (_large, "row 3 are not finite, or beyond 65,504"),
        (_soft, "coords is a link"),
        (_external, "coords is a link"),
        (_virtual, "values of coords are in other files"),
        (_stored_outside, "values of coords are in other files"),
        (_huge, "more than the 2 GiB"),
        (_large_piece, "too large to unpack"),
        (_bomb, r"a piece of coords unpacks to more than its \[4, 2\] values"),
        (_stored_large, r"a piece of coords unpacks to more than its \[4, 2\] values"),
        (_by_lzf, "coords is packed in a way that is not read; unpack it with 'h5repack"),
        (_text, "expected numbers"),
        (_slide_level, r"of shape \[768\]; those of a slide encoder"),
        (_rows, r"expected coords \[4, 2\], found \[3, 2\]"),
        (_group, "found a group"),
        (_nowhere, "coords of row 1 are no place"),
        (_empty, "no tiles"),
    ],
)
def test_a_hostile_or_damaged_file_is_refused(
    tmp_path: Path, spoil: Callable[[h5py.File], None], said: str
) -> None:
    path = clam(tmp_path / "s.h5", features())
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(CacheCorruptError, match=said):
        import_features(path, tmp_path / "cache", "s", "u")
    assert not (tmp_path / "cache" / "s.zarr").exists()


@pytest.mark.parametrize(
    "packing",
    [{}, {"compression": 4}, {"compression": 4, "shuffle": True, "fletcher32": True}, {"fletcher32": True}],
)
def test_packed_values_are_read(tmp_path: Path, packing: dict[str, Any]) -> None:
    noise, zeros = features(), np.zeros((4, 2))
    for name, stored in (("noise", noise), ("zeros", np.zeros_like(noise))):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("features", data=stored, chunks=(3, 6), **packing)
            file.create_dataset("coords", data=zeros, chunks=(1, 2), **packing)
        np.testing.assert_array_equal(read_foreign(tmp_path / f"{name}.h5").values, stored.astype(np.float16))


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n" + bytes(64), b"PK\x03\x04"])
def test_what_is_no_hdf5_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.h5").write_bytes(content)
    with pytest.raises(CacheCorruptError, match="not an HDF5 file"):
        read_foreign(tmp_path / "s.h5")


def test_pickles_are_not_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"pickles can run code.*h5_files beside"):
        read_foreign(tmp_path / "s.pt")
    assert main(["features", "import", str(tmp_path), str(tmp_path / "cache"), "--name", "u"]) == 2
    assert "no .h5 files here, and 1 .pt" in capfd.readouterr().err


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four slides of two grades in files of TRIDENT, with manifests of the files and of slides."""
    folder = tmp_path_factory.mktemp("cohort")
    rows = []
    for number in range(24):
        grade = number % 2
        values = features(number) * 0.1 + grade
        path = trident(folder / "h5" / f"s{number}.h5", values)
        rows.append([f"s{number}", str(path), f"p{number}", grade])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "path", "patient_id", "grade"], *rows])
    with (folder / "slides.csv").open("w", newline="") as file:
        slides = [[name, f"/not/here/{name}.svs", *rest] for name, _, *rest in rows]
        csv.writer(file).writerows([["slide_id", "path", "patient_id", "grade"], *slides])
    assert main(["features", "import", str(folder / "h5"), str(folder / "cache"), "--name", "uni"]) == 0
    return folder


def test_imported_features_are_a_study(cohort: Path) -> None:
    study = read_study(cohort / "manifest.csv", cohort / "cache")
    assert len(study.slides) == 24
    assert common_source("uni", study.caches).backbone == "uni_v1"
    (row, *_) = Ledger(cohort / "cache" / "ledger.csv").rows()
    assert row.note == "features imported from trident"


def test_a_manifest_of_slides_that_are_elsewhere_serves_too(
    cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [str(cohort / "h5" / f"{name}.h5") for name in ("s0", "s1")]
    words = ["features", "import", *files, str(tmp_path / "c"), "--name", "uni"]
    assert main([*words, "--slides", str(cohort / "slides.csv")]) == 0
    assert "22 slides without a file, left out: s2, s3" in capfd.readouterr().err
    with pytest.warns(UserWarning, match="22 of 24 slides are not in the cache"):
        assert len(read_study(cohort / "slides.csv", tmp_path / "c").slides) == 2
    with pytest.raises(CacheMismatchError, match="nothing shows that the tiles are of /not/here"):
        read_study(cohort / "slides.csv", cohort / "cache")


def test_linked_folders_are_imported_and_a_link_to_nothing_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trident(tmp_path / "h5" / "site" / "a.h5", features())
    trident(tmp_path / "away" / "b.h5", features(1))
    (tmp_path / "h5" / "linked").symlink_to(tmp_path / "away")
    command = ["features", "import", str(tmp_path / "h5"), str(tmp_path / "cache"), "--name", "u"]
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.zarr")) == ["a.zarr", "b.zarr"]
    (tmp_path / "h5" / "c.h5").symlink_to(tmp_path / "nowhere.h5")
    assert main(command) == 1
    assert "failed: c: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("rows", "files", "said"),
    [
        # two slides of one file name: the tool wrote one over the other
        (["A,a/s1.svs,PA,0", "B,b/s1.svs,PB,4"], ["s1"], r"s1.h5 of A \(.*a/s1.svs\) or B \(.*b/s1.svs\)"),
        (["A,a/s1.ome.tiff,PA,0", "B,b/s1.svs,PB,4"], ["s1"], "s1.h5 of A .* or B"),
        (["s1,a/s1.svs,PA,0", "B,b/s1.svs,PB,4"], ["s1"], "s1.h5 of s1 .* or B"),
        # by one slide's identifier and another one's file name
        (["X,a/s1.svs,PA,0", "s1,b/other.svs,PB,4"], ["s1"], "s1.h5 of s1 .* or X"),
        (["1,a/2.svs,PA,0", "2,a/1.svs,PB,4"], ["1", "2"], "1.h5 of 1 .* or 2 .*, .*2.h5 of 2 .* or 1"),
        (["A,a/s1.ome.tiff,PA,0"], ["s1", "s1.ome"], "s1.ome.h5 of A"),
        (["s1,a/s1.svs,PA,0", "b_s1,b/s1.svs,PB,4"], ["s1", "b_s1"], ""),  # as slidetl names them
        (["A,a/s1.ome.tiff,PA,0", "B,b/s2.svs,PB,4"], ["s1", "B"], ""),
    ],
)
def test_a_file_that_could_be_of_two_slides_is_refused(
    tmp_path: Path, rows: list[str], files: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(files):
        clam(tmp_path / "h5" / f"{name}.h5", features(number))
    (tmp_path / "m.csv").write_text("\n".join(["slide_id,path,patient_id,grade", *rows]) + "\n")
    words = ["features", "import", str(tmp_path / "h5"), str(tmp_path / "cache"), "--name", "u"]
    code = main([*words, "--slides", str(tmp_path / "m.csv")])
    err = capfd.readouterr().err
    if said:
        assert code == 2 and re.search(said, err) and "name each by its slide_id" in err
        assert not (tmp_path / "cache").exists()
    else:
        assert code == 0 and "left out" not in err
        for row in rows:
            slide_id = row.split(",")[0]
            number = files.index(slide_id if slide_id in files else "s1")
            stored = read_features(SlideCache.open(tmp_path / "cache" / f"{slide_id}.zarr"), "u")
            np.testing.assert_array_equal(stored, features(number).astype(np.float16))


def test_one_slide_under_two_patients_is_noticed(tmp_path: Path) -> None:
    files = [trident(tmp_path / name, features()) for name in ("a.h5", "b.h5")]
    assert main(["features", "import", *map(str, files), str(tmp_path / "cache"), "--name", "u"]) == 0
    (tmp_path / "m.csv").write_text(
        "slide_id,path,patient_id,grade\n" + "".join(f"{f.stem},{f},{f.stem},0\n" for f in files)
    )
    with pytest.raises(UsageError, match=r"1 pair of slides with the same content.*a \(a\) and b \(b\)"):
        check_duplicates(read_study(tmp_path / "m.csv", tmp_path / "cache").slides)


def test_features_for_a_tiled_slide_leave_its_ledger_alone(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    slide = pyramid_tiff(tissue_picture(512), 0.5)
    tile_slides([SlideSource("slide", slide)], tmp_path / "cache", TileSpec(1.0, 32), workers=0)
    before = (tmp_path / "cache" / "ledger.csv").read_bytes()
    cache = SlideCache.open(tmp_path / "cache" / "slide.zarr")
    file = clam(tmp_path / "slide.h5", features(rows=len(cache)), cache.origins_level0)
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"slide_id,path,patient_id,grade\nslide,{slide},p,0\n")
    words = ["features", "import", str(file), str(tmp_path / "cache"), "--name", "uni", "--slides"]
    assert main([*words, str(manifest)]) == 0
    assert (tmp_path / "cache" / "ledger.csv").read_bytes() == before
    assert read_source(SlideCache.open(cache.path), "uni").identity == "imported: not stated"
    other = pyramid_tiff(tissue_picture(512)[::-1], 0.5, name="other")
    with pytest.raises(CacheMismatchError, match=r"not of .*other.tiff"):
        import_features(file, tmp_path / "cache", "slide", "x", slide=other)


def test_a_feature_file_that_changed_is_noticed(tmp_path: Path) -> None:
    path = clam(tmp_path / "s.h5", features())
    assert main(["features", "import", str(path), str(tmp_path / "cache"), "--name", "u"]) == 0
    (tmp_path / "m.csv").write_text(f"slide_id,path,patient_id,grade\ns,{path},p,0\n")
    clam(path, features(1))
    os.utime(path, (0, 0))
    with pytest.raises(CacheMismatchError, match="another file"):
        read_study(tmp_path / "m.csv", tmp_path / "cache")


def test_an_atlas_of_them_is_refused_before_any_work(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(cohort / "cache"), "--features", "uni", "--output", str(tmp_path / "atlas")]
    assert (
        main(["atlas", "cluster", *words, "--method", "k-means", "--clusters", "2", "--store", "found"]) == 2
    )
    assert "features imported from trident, and no tiles" in capsys.readouterr().err
    assert not (tmp_path / "atlas").exists() and not list((cohort / "cache").glob("*.zarr/features/found"))


def test_a_linear_model_grades_by_them(cohort: Path, tmp_path: Path) -> None:
    words = [str(cohort / "manifest.csv"), "--cache", str(cohort / "cache"), "--features", "uni"]
    assert main(["fit-features", *words, "--output", str(tmp_path), "--grades", "0", "1"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["accuracy"] == 1


def test_a_test_on_features_of_an_unstated_network_says_that_nothing_is_compared(tmp_path: Path) -> None:
    """Files of CLAM state no network, and those of two encoders may have one length."""
    for name, backbone in (("unstated", ""), ("stated", "uni")):
        file = clam(tmp_path / f"{name}.h5", features())
        import_features(file, tmp_path / name, "s", "f", backbone=backbone)
        row = ManifestRow(2, "s", file, "p", 0)
        slide = CachedSlide(row, SlideCache.open(tmp_path / name / "s.zarr"))
        data = SlideDataModule.from_slides(test=[slide], features="f", bag_size=0, num_workers=0)
        data.setup("test")
        assert data.feature_source is not None
        identity = data.feature_source.identity
        assert data.check_features("", False, 6, None) == identity  # a new training
        said = pytest.warns(UserWarning, match="do not state their network, nor did .* --backbone NAME")
        with nullcontext() if backbone else said:
            data.check_features(identity, False, 6, None)


@pytest.mark.slow
def test_a_network_trains_and_tests_on_them_and_grades_no_slide(
    cohort: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"""
seed_everything: 0
data:
  manifest: {cohort / "manifest.csv"}
  cache: {cohort / "cache"}
  features: uni
  bag_size: 0
  num_workers: 0
  grades: ["0", "1"]
model:
  backbone: {{name: stored_6}}
  transfer: {{class_path: slidetl.models.transfer.FrozenFeatures}}
  lr: 1.0e-2
trainer: {{default_root_dir: {tmp_path / "run"}, max_epochs: 2, accelerator: cpu}}
"""
    )
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = next((tmp_path / "run").rglob("best*.ckpt"))
    assert main(["test", "--config", str(config), "--ckpt_path", str(checkpoint)]) == 0
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "m.pt")]) == 2
    assert "stands for stored features and embeds no tile" in capfd.readouterr().err
    wrong = ("stored_7", "length of 6, the backbone's have 7"), ("tf_efficientnet_lite0", "stored_6")
    for name, said in wrong:
        assert main(["fit", "--config", str(config), "--model.backbone.name", name]) == 2
        assert said in capfd.readouterr().err


@pytest.mark.slow
def test_arms_of_a_comparison_take_them_and_lack_thumbnails(cohort: Path, tmp_path: Path) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text(
        f"""
manifest: {cohort / "manifest.csv"}
cache: {cohort / "cache"}
grades: ["0", "1"]
protocol: {{outer_folds: 2, inner_folds: 0}}
primary: {{arm: mil, against: ridge}}
near_duplicates: 0
base:
  data: {{features: uni, bag_size: 0, num_workers: 0}}
  model:
    backbone: {{name: stored_6}}
    transfer: {{class_path: slidetl.models.transfer.FrozenFeatures}}
  trainer: {{max_epochs: 1, accelerator: cpu}}
arms:
  ridge: {{classical: {{features: [uni]}}}}
  mil: {{fit: {{}}}}
"""
    )
    comparison = read_comparison(config)
    job = next(job for job in plan_comparison(comparison).jobs if job.arm == "mil")
    found = train_job(job, tmp_path / "work")
    assert len(found.predictions) == 12 and not found.similarity
    values = {job.arm: job.key for job in plan_comparison(comparison).jobs}
    again = trident(tmp_path / "s0.h5", features(99))
    import_features(again, cohort / "cache", "s0", "uni", overwrite=True)
    assert not values.items() & {job.arm: job.key for job in plan_comparison(comparison).jobs}.items()
    import_features(cohort / "h5" / "s0.h5", cohort / "cache", "s0", "uni", overwrite=True)
    with pytest.raises(UsageError, match=r"24 slides have imported features, or are CT series.* set near"):
        plan_comparison(replace(comparison, near_duplicates=0.95))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("header", "mpp_level0", [-1, 0.5]),
        ("header", "size_level0", ["a", 2]),
        ("header", "fingerprint", "x"),
        ("header", "spec", {"mpp": 0.5, "foreign": {}}),
        ("header", "spec", {"mpp": 0.5, "tile_size_px": 2.5}),
        ("features", "backbone", 7),
        ("features", "mean", 7),
    ],
)
def test_an_export_with_a_forged_description_is_refused(
    cohort: Path, tmp_path: Path, part: str, name: str, value: object
) -> None:
    cache = SlideCache.open(cohort / "cache" / "s0.zarr")
    export_features(cache, "uni", tmp_path / "s0.h5")
    with h5py.File(tmp_path / "s0.h5", "r+") as file:
        about = json.loads(file.attrs["slidetl"])
        about[part][name] = value
        file.attrs["slidetl"] = json.dumps(about)
    with pytest.raises(CacheCorruptError, match="its description by slidetl cannot be understood"):
        read_foreign(tmp_path / "s0.h5")


def test_our_own_export_comes_back_as_it_was(cohort: Path, tmp_path: Path) -> None:
    cache = SlideCache.open(cohort / "cache" / "s0.zarr")
    words = ["features", "export", str(cohort / "cache"), str(tmp_path / "out"), "--features", "uni"]
    assert main([*words, "--slides", "s0"]) == 0
    found = read_foreign(tmp_path / "out" / "s0.h5")
    assert found.source == read_source(cache, "uni") and found.header == cache.header
    assert found.source != SOURCE
    import_features(tmp_path / "out" / "s0.h5", tmp_path / "cache", "s0", "uni")
    again = SlideCache.open(tmp_path / "cache" / "s0.zarr")
    np.testing.assert_array_equal(read_features(again, "uni"), read_features(cache, "uni"))
    assert (again.spec, again.fingerprint) == (cache.spec, cache.fingerprint)
    # Its tiles lie at the same places as those of all other slides.
    with pytest.raises(CacheMismatchError, match=r"s1.zarr: not of the slide of .*s0.h5, or"):
        import_features(tmp_path / "out" / "s0.h5", cohort / "cache", "s1", "other")


def test_a_record_of_patients_stays_in_its_cache_until_it_is_copied(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    import_features(trident(tmp_path / "s.h5", features()), here, "s", "uni")
    record = StudyRecord((RecordedSlide("z", "Ms Z", "f" * 64, "train"),))
    source = FeatureSource("net", "", "a" * 64, (0,), (1,), record=store_record(here, record))
    cache = SlideCache.open(here / "s.zarr")
    write_features(cache, {"own": (source, features().astype(np.float16))})
    file = tmp_path / "out" / "s.h5"
    export_features(cache, "own", file)
    assert b"Ms Z" not in file.read_bytes()
    done = import_features(file, there, "s", "own")
    assert done.source == replace(source, record="") and f"copy records/{source.record[:12]}" in done.notes[0]
    assert stored_record(there, read_source(SlideCache.open(there / "s.zarr"), "own")) is None
    assert not import_features(file, there, "s", "own").is_new
    shutil.copytree(here / "records", there / "records")
    done = import_features(file, there, "s", "own")
    assert done.is_new and done.notes == ()
    assert stored_record(there, read_source(SlideCache.open(there / "s.zarr"), "own")) == record
    assert not import_features(file, there, "s", "own").is_new


def test_features_of_other_pixels_do_not_join(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    slide = pyramid_tiff(tissue_picture(512), 0.5)
    for folder, quality in (("one", 90), ("other", 50)):
        spec = TileSpec(1.0, 32, jpeg_quality=quality)
        tile_slides([SlideSource("s", slide)], tmp_path / folder, spec, workers=0)
    one = SlideCache.open(tmp_path / "one" / "s.zarr")
    write_features(one, {"u": (SOURCE, features(rows=len(one)).astype(np.float16))})
    export_features(one, "u", tmp_path / "s.h5")
    with pytest.raises(CacheMismatchError, match=r"made with jpeg_quality 50 \(wanted: 90\)"):
        import_features(tmp_path / "s.h5", tmp_path / "other", "s", "u")
    assert not import_features(tmp_path / "s.h5", tmp_path / "one", "s", "u").is_new
    # Of TRIDENT, at the same places: another slide, larger tiles, and rounded as it does.
    places, most = one.origins_level0, one.size_level0
    about = {"patch_size_level0": 64, "level0_width": most[0], "level0_height": most[1]}
    for more, said in (({"level0_width": 900}, "slide has"), ({"patch_size_level0": 80}, "tiles have")):
        file = trident(tmp_path / "t.h5", features(rows=len(one)), places, **about | more)
        with pytest.raises(CacheMismatchError, match=said):
            import_features(file, tmp_path / "one", "s", "t")
    file = trident(tmp_path / "t.h5", features(rows=len(one)), places, **about | {"patch_size_level0": 65})
    assert import_features(file, tmp_path / "one", "s", "t").is_new
