from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from slidetl.cli import main
from slidetl.errors import OutputError
from slidetl.tiles.exchange import Form, export_features
from slidetl.tiles.features import NOT_STATED, write_features
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.run import tile_slides
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import SlideSource
from tests.cli.test_tile import Draw
from tests.conftest import PyramidTiff
from tests.tiles.test_features import SOURCE, values


@pytest.fixture
def cache(pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path) -> SlideCache:
    slide = pyramid_tiff(tissue_picture(512), 0.5)
    tile_slides([SlideSource("s", slide)], tmp_path / "cache", TileSpec(1.0, 32), workers=0)
    cache = SlideCache.open(cache_path(tmp_path / "cache", "s"))
    write_features(cache, {"resnet18": (SOURCE, values(len(cache)))})
    return cache


def test_hdf5_has_the_layout_of_trident(cache: SlideCache, tmp_path: Path) -> None:
    assert export_features(cache, "resnet18", tmp_path / "out" / "s.h5")
    with h5py.File(tmp_path / "out" / "s.h5") as file:
        features, coords = file["features"], file["coords"]
        np.testing.assert_array_equal(features[:], values(len(cache)).astype(np.float32))
        np.testing.assert_array_equal(coords[:], cache.origins_level0)
        assert (features.dtype, coords.dtype) == (np.float32, np.int64)
        assert dict(features.attrs) == {"name": "s", "encoder": "resnet18"}
        # the names of TRIDENT's `coords_to_h5`, without the folder on this machine
        assert dict(coords.attrs) == {
            "name": "s",
            "patch_size": 32,
            "patch_size_level0": 64,
            "overlap": 0,
            "level0_magnification": 20,
            "target_magnification": 10,
            "level0_width": 512,
            "level0_height": 512,
        }


def test_anndata_has_the_centres_of_the_tiles(cache: SlideCache, tmp_path: Path) -> None:
    import anndata

    export_features(cache, "resnet18", tmp_path / "s.h5ad", "anndata")
    data = anndata.read_h5ad(tmp_path / "s.h5ad")
    np.testing.assert_array_equal(data.X, values(len(cache)).astype(np.float32))
    np.testing.assert_array_equal(data.obsm["spatial"], cache.origins_level0 + 32)
    np.testing.assert_array_equal(data.obs[["x_level0", "y_level0"]], cache.origins_level0)
    assert data.uns["spatial"]["s"]["scalefactors"]["spot_diameter_fullres"] == 64
    assert data.obs_names[0] == "s_0" and data.uns["backbone"] == "resnet18"


@pytest.mark.parametrize("form", ["hdf5", "anndata"])
def test_a_second_run_keeps_files_and_refuses_others(cache: SlideCache, tmp_path: Path, form: str) -> None:
    words = ["features", "export", str(cache.path.parent), str(tmp_path / "out"), "--features", "resnet18"]
    words += ["--to", form]
    assert main(words) == 0
    (file,) = (tmp_path / "out").iterdir()
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert main(words) == 0
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before
    file.write_bytes(b"from elsewhere")
    assert main(words) == 1 and file.read_bytes() == b"from elsewhere"
    assert main([*words, "--overwrite"]) == 0 and file.read_bytes()[:8] == before[0][:8]


@pytest.mark.parametrize("form", ["hdf5", "anndata"])
def test_features_that_were_replaced_are_not_there_already(
    cache: SlideCache, tmp_path: Path, form: Form
) -> None:
    imported = replace(SOURCE, weights_sha256="", precision=NOT_STATED)
    write_features(cache, {"uni": (imported, values(len(cache)))})
    file = tmp_path / "out" / "s"
    assert export_features(cache, "uni", file, form)
    assert not export_features(cache, "uni", file, form)
    write_features(cache, {"uni": (imported, values(len(cache)) + 1)})
    with pytest.raises(OutputError, match="it is there with other content"):
        export_features(cache, "uni", file, form)


@pytest.mark.parametrize(("weights", "is_kept"), [("a" * 64, True), ("", False)])
def test_a_file_of_an_earlier_version_is_compared_by_what_it_says(
    cache: SlideCache, tmp_path: Path, weights: str, is_kept: bool
) -> None:
    source = replace(SOURCE, weights_sha256=weights, record="b" * 64)
    write_features(cache, {"uni": (source, values(len(cache)))})
    file = tmp_path / "s.h5"
    export_features(cache, "uni", file)
    with h5py.File(file, "r+") as opened:
        about = json.loads(opened.attrs["slidetl"])
        del about["checksum"], about["features"]["record"]
        opened.attrs["slidetl"] = json.dumps(about, sort_keys=True)
    # Without a hash of its network, nothing says that its values are these.
    with contextlib.nullcontext() if is_kept else pytest.raises(OutputError, match="with other content"):
        assert not export_features(cache, "uni", file)
    write_features(cache, {"uni": (replace(source, weights_sha256="c" * 64), values(len(cache)))})
    with pytest.raises(OutputError, match="it is there with other content"):
        export_features(cache, "uni", file)


def test_a_failure_leaves_nothing(cache: SlideCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(OutputError, match="the disk is full"):
        export_features(cache, "resnet18", tmp_path / "out" / "s.h5")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_unknown_name_is_one_line(
    cache: SlideCache, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["features", "export", str(cache.path.parent), str(tmp_path / "out"), "--features", "uni"]
    assert main(words) == 1
    assert "no such features, there are: resnet18" in capfd.readouterr().err
