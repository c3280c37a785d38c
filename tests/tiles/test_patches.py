"""Patches of a CT series, and the cache that holds them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from slidetl.errors import CacheMismatchError, UsageError, VolumeError
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.patches import box_means, patch_grid, plan_patches
from slidetl.tiles.store import SlideCache, cache_path
from slidetl.tiles.tile import write_patches
from slidetl.tiles.verify import verify_cache
from tests.tiles.conftest import tree
from tests.volumes.phantom import as_series, chest

SPEC = TileSpec(spacing_mm=4.0, tile_size_px=16, stride_px=8)


def test_a_series_becomes_a_cache_of_its_lungs(tmp_path: Path) -> None:
    series = as_series(chest()[0])
    plan = plan_patches(series, SPEC)
    cache = write_patches(plan, series, tmp_path, "S1", threads=2)
    assert cache.spec == SPEC and len(cache) == len(plan) > 10
    frame = cache.frame
    assert frame.size_voxel == (80, 60, 50) and frame.spacing_mm == (4.0, 4.0, 4.0)
    assert cache.overview_mm == 4.0 and cache.overview_hu.shape == cache.overview_mask.shape == (50, 60, 80)
    patches = cache.read(range(len(cache)))
    assert patches.shape == (len(cache), 16, 16, 16) and patches.dtype == np.int16
    assert patches.min() >= -1000 and patches.max() <= 400
    for number, (x, y, z) in enumerate(cache.origins_voxel.tolist()):
        assert np.array_equal(plan.volume.hu[z : z + 16, y : y + 16, x : x + 16], patches[number])
        inside = plan.mask[z : z + 16, y : y + 16, x : x + 16].mean()
        assert inside == pytest.approx(cache.tissue_fraction[number], abs=1e-6) and inside >= 0.25
    middle = cache.origins_voxel[0] + 7.5
    assert np.allclose(cache.centres_mm[0], frame.to_patient_mm(middle))
    assert np.array_equal(cache.read([3])[0], patches[3])


def test_its_attributes_name_window_and_spacing_and_zarr_reads_all_of_it(tmp_path: Path) -> None:
    series = as_series(chest()[0])
    cache = write_patches(plan_patches(series, SPEC), series, tmp_path, "S1")
    attributes = json.loads((cache.path / "zarr.json").read_text())["attributes"]
    assert attributes["spec"] == {
        "mpp": 4000.0,
        "tile_size_px": 16,
        "stride_px": 8,
        "min_tissue": 0.25,
        "codec": "zstd",
        "spacing_mm": 4.0,
        "window_hu": [-1000.0, 400.0],
        "mask": "lung",
    }
    assert attributes["frame"]["spacing_mm"] == [4.0, 4.0, 4.0]
    group = zarr.open_group(str(cache.path), mode="r")
    tiles = group["tiles"]
    assert isinstance(tiles, zarr.Array) and tiles.dtype == np.int16
    assert np.array_equal(np.asarray(tiles[:]), cache.read(range(len(cache))))
    assert verify_cache(cache.path, decode=True).is_sound


def test_equal_series_give_equal_bytes_and_a_killed_run_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = as_series(chest()[0])
    spec = TileSpec(spacing_mm=4.0, tile_size_px=8, stride_px=4, min_tissue=0.0)
    plan = plan_patches(series, spec)
    assert len(plan) > 2 * 256
    write_patches(plan, series, tmp_path / "one", "S1", threads=3)
    encode = type(plan).encode
    begun: list[int] = []

    def killed(self: object, first: int, threads: int = 1) -> object:
        begun.append(first)
        for number, payload in enumerate(encode(plan, first, threads), first):
            if number == 600 and len(begun) == 1:
                raise KeyboardInterrupt
            yield payload

    monkeypatch.setattr(type(plan), "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        write_patches(plan, series, tmp_path / "two", "S1")
    write_patches(plan, series, tmp_path / "two", "S1")
    assert begun == [0, 512]
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_location_gives_the_one_patch_around_it(tmp_path: Path) -> None:
    series = as_series(chest()[0])
    plan = plan_patches(series, SPEC, (60.0, 0.0, 10.0))
    cache = write_patches(plan, series, tmp_path, "N1", location_mm=(60.0, 0.0, 10.0))
    assert len(cache) == 1 and cache.header.location_mm == (60.0, 0.0, 10.0)
    assert np.abs(cache.centres_mm[0] - (60, 0, 10)).max() <= 2.0
    centre = cache.read([0])[0][7:9, 7:9, 7:9]
    assert centre.mean() > 0  # the nodule
    corner = plan_patches(series, SPEC, (-159.0, -119.0, -99.0))
    assert (corner.patch(0)[:6] == -1000).all()  # padded
    with pytest.raises(VolumeError, match="outside the series"):
        plan_patches(series, SPEC, (60.0, 0.0, 150.0))


def test_a_cache_of_a_series_is_no_cache_of_a_slide(tmp_path: Path) -> None:
    series = as_series(chest()[0])
    cache = write_patches(plan_patches(series, SPEC), series, tmp_path, "S1")
    for name in ("origins_level0", "thumbnail", "tissue_mask", "thumbnail_mpp"):
        with pytest.raises(CacheMismatchError, match="patches of a CT series"):
            getattr(cache, name)
    with pytest.raises(CacheMismatchError, match="spacing_mm"):
        SlideCache.open(cache_path(tmp_path, "S1"), TileSpec(spacing_mm=2.0, tile_size_px=16, stride_px=8))


@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(4, 30), st.integers(3, 30))
def test_the_grid_covers_each_voxel_and_stays_inside(
    size: tuple[int, int, int], side: int, stride: int
) -> None:
    stride = min(stride, side)
    grid = patch_grid(size, side, stride)
    assert len(np.unique(grid, axis=0)) == len(grid)
    for axis, n in enumerate(size):
        places = np.unique(grid[:, axis])
        assert places[0] == 0 and places[-1] == max(n - side, 0)
        assert (np.diff(places) <= stride).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 4))
def test_shares_of_a_mask_are_its_means(seed: int, side: int, factor: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((5, 4, 6)) < 0.5
    fine = np.kron(mask, np.ones((factor,) * 3))
    origins = rng.integers(-4, 12, (7, 3)).astype(np.int32)
    padded = np.pad(fine, 60)
    wanted = [padded[60 + z :, 60 + y :, 60 + x :][:side, :side, :side].mean() for x, y, z in origins]
    assert np.allclose(box_means(mask, origins, side, 1 / factor), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mpp": 0.5, "spacing_mm": 1.0}, "give one of them"),
        ({}, "spacing_mm instead"),
        ({"mpp": 0.5, "mask": "body"}, "for CT series"),
        ({"spacing_mm": 1.0, "max_pen": 0.1}, "max_pen is for slides"),
        ({"spacing_mm": 1.0, "window_hu": (400, -1000)}, "lower one first"),
        ({"spacing_mm": 1.0, "window_hu": (1.0, 2.0, 3.0)}, "two whole numbers"),
        ({"spacing_mm": float("nan")}, "positive number of millimetres"),
        ({"spacing_mm": 1.0, "mask": "liver"}, "'lung', 'body' or 'none'"),
    ],
)
def test_a_specification_is_of_slides_or_of_series(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TileSpec(**fields)  # type: ignore[arg-type]


def test_a_specification_round_trips_and_slides_keep_their_form() -> None:
    assert TileSpec.from_dict(json.loads(json.dumps(SPEC.to_dict()))) == SPEC
    assert TileSpec(spacing_mm=1.0).tile_size_px == 64 and TileSpec(mpp=0.5).tile_size_px == 224
    assert not {"spacing_mm", "window_hu", "mask"} & set(TileSpec(mpp=0.5).to_dict())
