from __future__ import annotations

import math
import resource
from pathlib import Path

import numpy as np
import pytest

from slidetl.errors import SlideReadError
from slidetl.slides.openslide import _Level, _Regions
from slidetl.tiles.grid import TileSpec
from slidetl.tiles.ledger import EXCLUDED, FAILED, USED
from slidetl.tiles.store import SlideCache, cache_path, preview_path
from slidetl.tiles.tile import SlideSource, tile_slide
from tests.conftest import PyramidTiff
from tests.tiles.conftest import SPEC, Draw, damaged, tree


def test_a_slide_becomes_a_cache_of_its_tissue(
    source: SlideSource, tmp_path: Path, tissue_picture: Draw
) -> None:
    row = tile_slide(source, tmp_path, SPEC)
    cache = SlideCache.open(cache_path(tmp_path, "S1"), SPEC)
    assert (row.status, row.reason) == (USED, "")
    assert (row.tiles, row.tiles_without_tissue, row.tiles_unreadable) == (192, 64, 0)
    assert (row.mpp_x, row.mpp_y, row.width, row.height) == (1.0, 1.0, 1024, 1024)
    assert row.vendor == "generic-tiff" and row.fingerprint == cache.fingerprint
    assert row.host and row.finished_at and row.seconds > 0
    assert len(cache) == 192
    assert cache.extent_level0 == (64.0, 64.0)
    assert cache.origins_level0.max(axis=0).tolist() == [704, 960]
    assert (cache.tissue_fraction > 0.9).all()
    picture = tissue_picture(1024)
    for (x, y), tile in zip(cache.origins_level0, cache.read(range(192)), strict=True):
        means = picture[y : y + 64, x : x + 64].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(tile - means).max() <= 0.5


def test_tiles_lie_by_physical_spacing_whatever_the_pyramid(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    coarse = tissue_picture(512)
    fine = np.kron(coarse, np.ones((2, 2, 1))).astype(np.uint8)
    paths = {
        "coarse": pyramid_tiff(coarse, mpp=1.0, name="coarse"),
        "fine": pyramid_tiff(fine, mpp=0.5, factors=(4,), name="fine"),
    }
    caches = {}
    for name, path in paths.items():
        assert tile_slide(SlideSource(name, path), tmp_path, SPEC).status == USED
        caches[name] = SlideCache.open(cache_path(tmp_path, name))
    coarse_cache, fine_cache = caches["coarse"], caches["fine"]
    assert np.array_equal(coarse_cache.origins_level0 * 1.0, fine_cache.origins_level0 * 0.5)
    every = range(len(coarse_cache))
    assert np.array_equal(coarse_cache.read(every), fine_cache.read(every))


def test_the_spacing_really_read_is_stored(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    source = SlideSource("S1", pyramid_tiff(tissue_picture(512), mpp=(0.998, 1.004)))
    row = tile_slide(source, tmp_path, SPEC)
    cache = SlideCache.open(cache_path(tmp_path, "S1"))
    assert (row.mpp_x, row.mpp_y) == cache.mpp_read == pytest.approx((0.998, 1.004), rel=1e-6)
    assert cache.extent_level0 == (32.0, 32.0)


def test_a_slide_without_tissue_or_smaller_than_a_tile_is_excluded(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    blank = np.full((512, 512, 3), 255, np.uint8)
    row = tile_slide(SlideSource("blank", pyramid_tiff(blank)), tmp_path, SPEC)
    assert (row.status, row.reason, row.tiles_without_tissue) == (EXCLUDED, "no tile has 25% tissue", 64)
    small = SlideSource("small", pyramid_tiff(tissue_picture(64), tile_px=16))
    row = tile_slide(small, tmp_path, TileSpec(mpp=1.0, tile_size_px=64))
    assert (row.status, row.reason) == (EXCLUDED, "the slide is smaller than one tile")
    assert not list(tmp_path.glob("*.zarr"))


def test_failures_say_why_and_do_not_raise(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    (tmp_path / "text.svs").write_text("not a slide")
    coarse = pyramid_tiff(tissue_picture(300), mpp=2.0, name="coarse")
    without = pyramid_tiff(tissue_picture(300), mpp=None, name="without")
    for path, says in [
        (tmp_path / "missing.svs", "no such file"),
        (tmp_path / "text.svs", "not a slide"),
        (coarse, "finest spacing is 2 um per pixel, coarser than the 1 asked for"),
        (without, "--mpp-override"),
    ]:
        row = tile_slide(SlideSource("S", path), tmp_path / "cache", SPEC)
        assert row.status == FAILED
        assert says in row.reason
    assert tile_slide(SlideSource("S", without, 0.5), tmp_path / "cache", SPEC).status == USED


@pytest.mark.slow
def test_a_damaged_region_costs_its_tiles_and_much_damage_the_slide(
    pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    path = pyramid_tiff(tissue_picture(1024), mpp=1.0, jpeg=True, tile_px=64)
    intact = tile_slide(SlideSource("intact", path), tmp_path, SPEC)
    row = tile_slide(SlideSource("little", damaged(path, slice(5, None, 25))), tmp_path, SPEC)
    assert row.status == USED, row.reason
    assert 4 <= row.tiles_unreadable <= 0.1 * intact.tiles
    little, whole = (SlideCache.open(cache_path(tmp_path, name)) for name in ("little", "intact"))
    assert len(little) == row.tiles
    places = {(x, y): n for n, (x, y) in enumerate(whole.origins_level0.tolist())}
    shared = [
        (places[x, y], n) for n, (x, y) in enumerate(little.origins_level0.tolist()) if (x, y) in places
    ]
    # Damage in the glass is counted too, since nobody can tell what was there.
    assert len(shared) == row.tiles
    assert 0 < intact.tiles - row.tiles <= row.tiles_unreadable
    theirs, ours = (list(numbers) for numbers in zip(*shared, strict=True))
    assert np.array_equal(whole.read(theirs), little.read(ours))

    row = tile_slide(SlideSource("much", damaged(path, slice(5, None, 3))), tmp_path, SPEC)
    assert row.status == FAILED
    assert "more than 10% of the" in row.reason
    assert not cache_path(tmp_path, "much").exists()


def test_a_finished_cache_is_kept(source: SlideSource, tmp_path: Path) -> None:
    first = tile_slide(source, tmp_path, SPEC)
    before = {p: p.stat().st_mtime_ns for p in cache_path(tmp_path, "S1").rglob("*")}
    again = tile_slide(source, tmp_path, SPEC)
    assert {p: p.stat().st_mtime_ns for p in cache_path(tmp_path, "S1").rglob("*")} == before
    for name in ("status", "tiles", "tiles_without_tissue", "mpp_x", "fingerprint", "vendor"):
        assert getattr(again, name) == getattr(first, name)


def test_a_preview_is_never_of_an_earlier_tiling(source: SlideSource, tmp_path: Path) -> None:
    picture = preview_path(tmp_path, "S1")
    tile_slide(source, tmp_path, SPEC, preview=True)
    before = picture.read_bytes()
    tile_slide(source, tmp_path, SPEC)
    assert picture.read_bytes() == before  # the same tiles
    coarser = TileSpec(2 * SPEC.mpp, SPEC.tile_size_px)
    tile_slide(source, tmp_path, coarser, overwrite=True)
    assert not picture.exists()
    tile_slide(source, tmp_path, coarser, preview=True)
    assert picture.read_bytes() != before


def test_a_small_cache_that_a_power_cut_tore_is_made_again(source: SlideSource, tmp_path: Path) -> None:
    tile_slide(source, tmp_path, SPEC)
    path = cache_path(tmp_path, "S1")
    sound = tree(path)
    assert len(SlideCache.open(path)) <= 256  # one shard, written without waiting for the disk
    for name in ("tiles/c/0/0/0/0", "origin_level0/c/0/0", "pen/zarr.json"):
        (path / name).write_bytes(b"")
        row = tile_slide(source, tmp_path, SPEC)
        assert (row.status, row.tiles) == (USED, 192)
        assert tree(path) == sound


def test_the_cache_of_another_slide_is_not_served(
    source: SlideSource, pyramid_tiff: PyramidTiff, tissue_picture: Draw, tmp_path: Path
) -> None:
    tile_slide(source, tmp_path, SPEC)
    changed = SlideSource("S1", pyramid_tiff(tissue_picture(512, 1), name="changed"))
    rescaled = SlideSource("S1", source.path, mpp_replace=0.4)
    for other in (changed, rescaled):
        row = tile_slide(other, tmp_path, SPEC)
        assert row.status == FAILED and "--overwrite" in row.reason
    assert tile_slide(changed, tmp_path, SPEC, overwrite=True).tiles == 48
    assert SlideCache.open(cache_path(tmp_path, "S1")).size_level0 == (512, 512)


def test_what_was_begun_outlives_a_full_disk_but_not_a_broken_slide(
    source: SlideSource, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, before[1]))
    try:
        row = tile_slide(source, tmp_path / "cache", SPEC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert row.status == FAILED and "too large" in row.reason
    assert [path.name for path in (tmp_path / "cache" / ".building").iterdir()] == ["S1"]
    source.path.write_text("junk")
    assert tile_slide(source, tmp_path / "cache", SPEC).status == FAILED
    assert not list((tmp_path / "cache" / ".building").iterdir())


def test_a_folder_of_someone_else_is_not_replaced(source: SlideSource, tmp_path: Path) -> None:
    theirs = cache_path(tmp_path, "S1") / "precious.txt"
    theirs.parent.mkdir()
    theirs.write_text("data")
    row = tile_slide(source, tmp_path, SPEC)
    assert row.status == FAILED and "in the way" in row.reason
    assert theirs.read_text() == "data"
    assert tile_slide(source, tmp_path, SPEC, overwrite=True).status == USED


def test_tiles_that_could_not_be_read_are_tried_again(
    source: SlideSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, is_hung = _Regions.read_level, True

    def hang(
        self: _Regions, level: _Level, first: tuple[int, int], size: tuple[int, int], of_alpha: bool = False
    ) -> object:
        if is_hung and level.index == 0 and first[0] <= 64 < first[0] + size[0] and first[1] < 64:
            raise SlideReadError("the share hangs")
        return read(self, level, first, size, of_alpha)

    monkeypatch.setattr(_Regions, "read_level", hang)
    row = tile_slide(source, tmp_path, SPEC)
    assert (row.status, row.tiles, row.tiles_unreadable) == (USED, 191, 1)
    before = tree(cache_path(tmp_path, "S1"))
    assert tile_slide(source, tmp_path, SPEC).tiles_unreadable == 1
    assert tree(cache_path(tmp_path, "S1")) == before
    is_hung = False
    row = tile_slide(source, tmp_path, SPEC)
    assert (row.status, row.tiles, row.tiles_unreadable) == (USED, 192, 0)
    assert len(SlideCache.open(cache_path(tmp_path, "S1"))) == 192


def hang_on_glass(monkeypatch: pytest.MonkeyPatch, times: float) -> list[float]:
    """Lets the first reads of a corner of glass fail in the thumbnail's level; returns their number left."""
    read, left = _Regions.read_level, [times]

    def hang(
        self: _Regions, level: _Level, first: tuple[int, int], size: tuple[int, int], of_alpha: bool = False
    ) -> object:
        if level.index == 1 and first[0] + size[0] > 248 and first[1] < 8 and left[0] > 0:
            left[0] -= 1
            raise SlideReadError("the share hangs")
        return read(self, level, first, size, of_alpha)

    monkeypatch.setattr(_Regions, "read_level", hang)
    return left


def test_a_share_that_hangs_for_a_moment_changes_no_tile(
    source: SlideSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile_slide(source, tmp_path / "sound", SPEC)
    left = hang_on_glass(monkeypatch, 2)  # the whole thumbnail, and a square of it
    row = tile_slide(source, tmp_path, SPEC)
    assert left == [0] and (row.status, row.tiles, row.note) == (USED, 192, "")
    assert tree(cache_path(tmp_path, "S1")) == tree(cache_path(tmp_path / "sound", "S1"))


def test_glass_taken_for_tissue_as_it_could_not_be_read_is_looked_at_again(
    source: SlideSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile_slide(source, tmp_path / "sound", SPEC)
    left = hang_on_glass(monkeypatch, math.inf)
    for _ in range(2):
        row = tile_slide(source, tmp_path, SPEC)
        assert row.status == USED and row.tiles > 192 and row.tiles_unreadable == 0
        assert row.note == (
            "areas that could not be read when its tiles were chosen count as tissue, and are tried again by "
            "the next run"
        )
    left[0] = 0
    row = tile_slide(source, tmp_path, SPEC)
    assert (row.status, row.tiles, row.note) == (USED, 192, "")
    assert tree(cache_path(tmp_path, "S1")) == tree(cache_path(tmp_path / "sound", "S1"))
